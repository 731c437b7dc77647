"""Pictures of the miniature by every tier and part, against plain float32 on the same GPU."""

import json

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image

import urae
from urae.backbones import vae
from urae.backbones.flux import load_pipeline, predict_velocity
from urae.backbones.wide_attention import attend, count_score_bytes
from urae.generate import GenerateConfig, generate
from urae.generate.quantize import check_quantization
from urae.local_attention import LocalForward

SIDE = 512
CAPTION = "a large red circle left of a small blue square on a striped green background"
LOCAL = urae.ResolutionPolicy(native_sequence_length=320, attention="local", time_shift=6.0)


@pytest.fixture
def load(gpu):
    """Load the miniature with its 2K LoRA."""

    def load(dtype=torch.bfloat16, policy=None):
        pipe = load_pipeline("miniature-dev", dtype=dtype)
        pipe.set_progress_bar_config(disable=True)
        return urae.adapt(pipe, "miniature-2k", policy=policy).to(gpu)

    return load


@pytest.fixture
def forward(gpu):
    """One forward at the miniature's 2K."""

    @torch.no_grad()
    def forward(pipe, device=gpu):
        transformer, generator = pipe.transformer, torch.Generator().manual_seed(0)
        config, dtype = transformer.config, transformer.dtype
        shapes = [
            (1, config.in_channels // 4, SIDE // 8, SIDE // 8),
            (1, 64, config.joint_attention_dim),
            (1, config.pooled_projection_dim),
        ]
        drawn = (torch.randn(shape, generator=generator) for shape in shapes)
        latents, *text = (each.to(device, dtype) for each in drawn)
        return predict_velocity(
            transformer, latents, torch.tensor([0.7], device=device), *text, 3.5
        )

    return forward


@pytest.fixture
def draw():
    """Make a picture's latents."""

    def draw(pipe, seed=3, steps=24):
        generator = torch.Generator().manual_seed(seed)
        settings = {"num_inference_steps": steps, "guidance_scale": 3.5, "output_type": "latent"}
        return pipe(CAPTION, height=SIDE, width=SIDE, generator=generator, **settings).images

    return draw


# --- exact ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_exact_parts_change_the_rounding_alone(load, forward, dtype, rel):
    wanted = forward(load(torch.float32))
    stock = rel(forward(load(dtype)), wanted)
    pipe = urae.optimize(load(dtype), speed="exact")
    assert rel(forward(pipe), wanted) < max(1.2 * stock, 1e-5)


def test_wide_heads_attend_in_blocks(gpu, rel):
    """As close to float64 as torch's own attention, in the memory that is said."""
    size = {"heads": 1, "queries": 4096, "keys": 65_536, "width": 512}
    query = torch.randn(1, 1, size["queries"], 512, device=gpu, dtype=torch.bfloat16)
    key, value = torch.randn(2, 1, 1, size["keys"], 512, device=gpu, dtype=torch.bfloat16)
    stock = F.scaled_dot_product_attention(query, key, value)
    attend(query, key, value)  # cuBLAS keeps memory of its own from then on
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    found = attend(query, key, value)
    peak = torch.cuda.max_memory_allocated() - before
    scores = count_score_bytes(gpu, torch.bfloat16, **size)
    assert 0 < peak <= scores + 2 * found.nbytes
    few, doubles = slice(0, 256), (query[:, :, :256].double(), key.double(), value.double())
    exact = F.scaled_dot_product_attention(*doubles)
    assert rel(found[:, :, few], exact) < 1.3 * rel(stock[:, :, few], exact)


def test_flex_attends_to_what_the_mask_shows(load, forward, rel):
    found = forward(load(torch.float32, LOCAL))
    right = forward(load(torch.float32, LOCAL).to("cpu"), torch.device("cpu"))
    assert rel(found.cpu(), right) < 1e-3


@pytest.fixture
def make(tmp_path):
    """Make a picture as the command does; return its pixels, what it says and the peak's bytes."""

    def make(name, **changes):
        torch.cuda.reset_peak_memory_stats()
        settings = {"height": SIDE, "width": SIDE, "steps": 4, "seed": 5, **changes}
        config = GenerateConfig(
            prompts=(CAPTION,),
            model="miniature-dev",
            adapters=("miniature-2k",),
            output_dir=tmp_path / name,
            **settings,
        )
        (path,) = generate(config)
        with Image.open(path) as image:
            return np.asarray(image, np.float32), image.info, torch.cuda.max_memory_allocated()

    return make


@pytest.mark.parametrize("memory", ["streamed", "offload"])
def test_exact_tiers_make_the_same_picture_in_less_memory(make, memory):
    wanted, _, resident = make("resident", memory="resident")
    found, info, peak = make(memory, memory=memory)
    assert info["memory"] == memory
    assert np.abs(found - wanted).mean() < 1
    assert peak < resident


@pytest.mark.parametrize("memory", ["8bit", "4bit"])
def test_quantised_tiers_make_a_like_picture(make, memory):
    if memory == "4bit":
        pytest.importorskip("bitsandbytes", reason="4 bits are bitsandbytes'")
    wanted, _, _ = make("resident", memory="resident")
    found, info, _ = make(memory, memory=memory)
    assert info["memory"] == memory
    assert np.abs(found - wanted).mean() < 12


def test_stripes_decode_what_the_whole_does(load, gpu, rel):
    model = load(torch.float32).vae
    latents = torch.randn(1, 16, 96, 64, generator=torch.Generator().manual_seed(0)).to(gpu)
    with torch.no_grad():
        wanted = model.decode(latents, return_dict=False)[0]
        found = vae.decode(model, latents, max_bytes=2**26)
    assert rel(found, wanted) < 1e-5


# --- approximate ----------------------------------------------------------------------------------


@pytest.mark.parametrize("part", ["fp8", "8bit", "local-attention=0.85"])
def test_a_part_stays_near_exact(load, draw, part, rel, gpu):
    if part == "fp8" and not has_fp8(gpu):
        pytest.skip("this GPU does not multiply in fp8")
    wanted = draw(load())
    found = draw(urae.optimize(load(), speed="exact", parts=[part]))
    assert 1e-4 < rel(found, wanted) < 0.2


def test_predicted_steps_are_nearer_than_as_few_steps(load, draw, rel):
    exact, seeds = load(), (3, 4, 5)
    wanted = [draw(exact, seed) for seed in seeds]
    few = [draw(exact, seed, steps=10) for seed in seeds]
    pipe = urae.optimize(load(), speed="exact", parts=["taylorseer-cache=3"])
    found = [draw(pipe, seed) for seed in seeds]  # ten of their 24 steps are computed
    assert 1e-4 < rel(torch.cat(found), torch.cat(wanted)) < rel(torch.cat(few), torch.cat(wanted))


@pytest.mark.parametrize("speed", ["fast", "turbo"])
def test_a_preset_repeats_itself(load, draw, speed):
    for _ in range(2):  # the second replaces the first
        pipe = urae.optimize(load(), speed=speed)
    found = draw(pipe)
    assert found.isfinite().all()
    assert torch.equal(draw(pipe), found)


def test_local_steps_follow_full_ones_in_compiled_blocks(load, draw, monkeypatch):
    seen = []
    enter = LocalForward.enter

    def watch(self, *args):
        keys = enter(self, *args)
        seen.append(keys is not None)
        return keys

    monkeypatch.setattr(LocalForward, "enter", watch)
    pipe = urae.optimize(load(), speed="exact", parts=["local-attention=0.85"])
    assert draw(pipe).isfinite().all()
    sigmas = pipe.scheduler.sigmas[:-1].tolist()
    assert seen == [sigma <= 0.85 for sigma in sigmas]
    assert 0 < sum(seen) < len(seen)


def has_fp8(gpu):
    try:
        check_quantization("fp8", gpu)
    except ValueError:
        return False
    return True


def test_a_preset_names_its_parts_in_the_picture(make):
    _, info, _ = make("fast", speed="fast", steps=8)
    parts = json.loads(info["parts"])
    assert {"progressive=0.35", "taylorseer-cache=3"} <= set(parts)
    assert "fp8" not in parts  # in so short a job nothing is compiled
