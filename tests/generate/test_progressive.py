import warnings

import pytest
import torch
from diffusers import FluxImg2ImgPipeline
from safetensors.torch import load_file, save_file
from torch._dynamo.testing import CompileCounter

import urae
from urae.adapters.attach import active_adapters
from urae.generate.config import GenerateConfig
from urae.generate.memory import stream_blocks
from urae.generate.progressive import enlarge, shrink, small_noise_level
from urae.geometry import pack, unpack
from urae.resolution import find_policy

CPU = torch.device("cpu")
STEPS = 6


@pytest.fixture
def adapted(load_pipe, expected):
    """A pipe to which half of 128 x 128 is native: 64 tokens of text, 16 of the picture."""
    policy = urae.ResolutionPolicy(native_sequence_length=80)
    return lambda: urae.adapt(load_pipe(), expected / "dev_2k_lora.safetensors", policy=policy)


@pytest.fixture
def draw(sample):
    """Make one picture; return it and the image tokens of each step's attention."""

    def run(pipe, side=128, seed=7, **options):
        tokens = []
        block = pipe.transformer.transformer_blocks[0]
        hook = block.register_forward_pre_hook(
            lambda _module, _args, kwargs: tokens.append(kwargs["hidden_states"].shape[1]),
            with_kwargs=True,
        )
        generator = torch.Generator().manual_seed(seed)
        try:
            latents = sample(
                pipe,
                side,
                side,
                **{"num_inference_steps": STEPS, "generator": generator, **options},
            )
        finally:
            hook.remove()
        return latents, tokens

    return run


def progressive(pipe, share, *parts):
    return urae.optimize(pipe, speed=None, parts=[f"progressive={share}", *parts])


def test_shrinking_what_was_enlarged_gives_it_back():
    generator = torch.Generator().manual_seed(0)
    small = torch.randn(2, 3, 4, 6, generator=generator)
    assert torch.allclose(shrink(enlarge(small)), small, atol=1e-6)
    plain = torch.full((1, 1, 4, 4), 0.3)
    assert torch.allclose(enlarge(plain), torch.full((1, 1, 8, 8), 0.3))


def test_the_transformer_sees_a_point_of_the_small_pictures_path():
    """Pooled and scaled, noise of level s around a picture is noise of level t around it, white."""
    generator = torch.Generator().manual_seed(0)
    noise = torch.randn(1, 16, 256, 256, generator=generator)
    sigma, small = 0.8, torch.randn(1, 16, 128, 128, generator=generator)
    level = small_noise_level(sigma)
    seen = shrink((1 - sigma) * enlarge(small) + sigma * noise) * 2 / (2 - sigma)
    left = (seen - (1 - level) * small) / level
    assert float(left.std()) == pytest.approx(1, abs=0.01)
    assert float((left[..., 1:] * left[..., :-1]).mean()) == pytest.approx(0, abs=0.01)
    assert (small_noise_level(1.0), small_noise_level(0.0)) == (1, 0)


def test_early_steps_have_a_quarter_of_the_tokens(adapted, draw):
    pipe = adapted()
    wanted, _ = draw(pipe)
    progressive(pipe, 0.5)
    first, tokens = draw(pipe)
    assert tokens == [16, 16, 16, 64, 64, 64]
    assert first.shape == wanted.shape
    assert not torch.equal(first, wanted)
    draw(pipe, seed=3)
    assert torch.equal(draw(pipe)[0], first)
    wide, tokens = draw(pipe, side=192)
    assert tokens[0] == 36
    assert wide.isfinite().all()
    assert torch.equal(draw(pipe)[0], first)


def test_the_last_step_is_whole(adapted, draw):
    assert draw(progressive(adapted(), 0.99))[1] == [16] * (STEPS - 1) + [64]
    assert draw(progressive(adapted(), 0.99), num_inference_steps=1)[1] == [64]


def test_a_preset_hands_over_at_a_high_noise_level(adapted, draw):
    pipe = urae.optimize(adapted(), speed="fast", parts=["taylorseer-cache=1"])
    _, tokens = draw(pipe, num_inference_steps=40)
    sigmas = pipe.scheduler.sigmas.tolist()
    early = tokens.count(16)
    assert 0 < early < round(0.35 * 40)
    assert sigmas[early] >= 0.95 > sigmas[early + 1]
    named = urae.optimize(pipe, speed="fast", parts=["taylorseer-cache=1", "progressive=0.35"])
    assert draw(named, num_inference_steps=40)[1].count(16) == round(0.35 * 40)


def test_a_native_picture_is_made_whole(adapted, draw):
    pipe = adapted()
    wanted, _ = draw(pipe, side=64)
    found, tokens = draw(progressive(pipe, 0.5), side=64)
    assert tokens == [16] * STEPS
    assert torch.equal(found, wanted)


def test_native_is_what_a_base_says_without_adapters(load_pipe, draw, monkeypatch):
    pipe = load_pipe()
    assert draw(progressive(pipe, 0.5))[1] == [64] * STEPS
    policy = urae.ResolutionPolicy(native_sequence_length=80)
    monkeypatch.setattr("urae.generate.progressive.read_base_policy", lambda _: policy)
    assert draw(progressive(pipe, 0.5))[1] == [16] * 3 + [64] * 3


def test_a_share_of_none_changes_nothing(adapted, draw):
    pipe = adapted()
    wanted, _ = draw(pipe)
    assert torch.equal(draw(progressive(pipe, 0.0))[0], wanted)
    progressive(pipe, 0.5)
    draw(pipe)
    assert torch.equal(draw(urae.optimize(pipe, speed=None))[0], wanted)


def test_latents_are_the_small_picture_enlarged_in_the_pipelines_own_noise(adapted, draw):
    """Where the transformer knows the small picture, each early step is exact."""
    pipe = adapted()
    generator = torch.Generator().manual_seed(0)
    picture = torch.randn(1, 16, 8, 8, generator=generator)
    noise = torch.randn(1, 16, 16, 16, generator=generator)

    def know(hidden_states, timestep, **_):
        seen = unpack(hidden_states, 8, 8)
        level = float(timestep[0])
        return (pack((seen - picture) / level),)

    found = {}

    def keep(_pipe, step, _timestep, values):
        found[step] = unpack(values["latents"], 16, 16)
        return values

    pipe.transformer.forward = know
    progressive(pipe, 0.5)
    steps = 8
    with pytest.raises(RuntimeError):  # of the full size, which this one does not know
        draw(pipe, latents=pack(noise), num_inference_steps=steps, callback_on_step_end=keep)
    sigmas = pipe.scheduler.sigmas
    assert sorted(found) == [0, 1, 2, 3]
    for step, latents in found.items():
        sigma = float(sigmas[step + 1])
        wanted = (1 - sigma) * enlarge(picture) + sigma * noise
        assert torch.allclose(latents, wanted, atol=1e-5)


def test_both_forwards_of_true_guidance(adapted, draw):
    pipe = progressive(adapted(), 0.5)
    _, tokens = draw(pipe, negative_prompt="a blue square", true_cfg_scale=2.0)
    assert tokens == [16] * 6 + [64] * 6


@pytest.mark.parametrize(
    "other", ["constants", "joined-adapters", "taylorseer-cache=1", "mag-cache=0"]
)
def test_other_parts_beside_it(adapted, draw, other):
    wanted, _ = draw(progressive(adapted(), 0.5))
    pipe = progressive(adapted(), 0.5, other)
    for _ in range(2):
        assert torch.equal(draw(pipe)[0], wanted)


@pytest.mark.slow
def test_early_steps_are_not_compiled(adapted, draw, rel, monkeypatch):
    wanted, _ = draw(progressive(adapted(), 0.5))
    torch._dynamo.reset()
    counter, compile_function = CompileCounter(), torch.compile
    monkeypatch.setattr(torch, "compile", lambda f: compile_function(f, backend=counter))
    pipe = progressive(adapted(), 0.5, "compile")
    for _ in range(2):
        assert rel(draw(pipe)[0], wanted) < 1e-5
    assert counter.frame_count == 2  # both kinds of blocks, in one size
    draw(progressive(pipe, 0, "compile"), side=64)
    assert counter.frame_count == 4


def test_local_attention_and_the_policy_follow_the_size(load_pipe, draw):
    policy = urae.ResolutionPolicy(native_sequence_length=128, attention="local")
    pipe = progressive(urae.adapt(load_pipe(), policy=policy), 0.5)
    lengths = []
    positions = pipe.transformer.pos_embed
    positions.register_forward_hook(
        lambda *_: lengths.append((positions.sequence_length, positions.num_local_keys))
    )
    draw(pipe, side=512, num_inference_steps=2)
    (early, no_keys), (late, keys) = lengths
    assert (early, late) == (16 * 16 + 64, 32 * 32 + 64)
    assert keys > (no_keys or 0)


@pytest.mark.parametrize("beneath", ["full", "local"])
def test_what_4k_adapters_lie_over_attends_as_it_has_learnt_to(
    load_pipe, expected, draw, tmp_path, beneath
):
    files = []
    for name, attention in (("dev_2k_lora", beneath), ("dev_4k_lora_conversion", "local")):
        policy = urae.ResolutionPolicy(native_sequence_length=128, attention=attention)
        metadata = {"urae.policy": policy.to_json()}
        files.append(tmp_path / f"{name}.safetensors")
        save_file(load_file(expected / files[-1].name), files[-1], metadata)
    pipe = progressive(urae.adapt(load_pipe(), files), 0.5)
    positions, keys = find_policy(pipe.transformer), []
    positions.register_forward_hook(lambda *_: keys.append(positions.num_local_keys))
    draw(pipe, side=768, num_inference_steps=2)
    assert [each is None for each in keys] == [beneath == "full", False]

    def interrupt(*_):
        raise KeyboardInterrupt  # after which torch calls no hook of the forward

    block = pipe.transformer.transformer_blocks[0]
    hook = block.register_forward_pre_hook(interrupt)
    with pytest.raises(KeyboardInterrupt):
        draw(pipe, side=768, num_inference_steps=2)
    hook.remove()
    keys.clear()
    draw(pipe, side=1024, num_inference_steps=2)
    assert [each is None for each in keys] == [beneath == "full", False]
    hook = block.register_forward_pre_hook(interrupt)
    with pytest.raises(KeyboardInterrupt):
        draw(pipe, side=1024, num_inference_steps=2)
    hook.remove()
    urae.optimize(pipe, speed=None)
    assert active_adapters(pipe.transformer) == ["urae_2k", "urae_4k"]
    assert positions.local.is_on
    assert not positions.is_resting


def test_fused_adapters_keep_their_attention(load_pipe, expected, draw, tmp_path):
    policy = urae.ResolutionPolicy(native_sequence_length=128, attention="local")
    lora, conversion = (
        expected / f"{name}.safetensors" for name in ("dev_2k_lora", "dev_4k_lora_conversion")
    )
    local = tmp_path / "local.safetensors"
    save_file(load_file(conversion), local, {"urae.policy": policy.to_json()})
    pipe = progressive(urae.adapt(load_pipe(), [lora, local]), 0.5)
    positions, keys = find_policy(pipe.transformer), []
    positions.register_forward_hook(lambda *_: keys.append(positions.num_local_keys))
    pipe.fuse_lora()
    draw(pipe, side=1024, num_inference_steps=2)
    assert None not in keys


@pytest.mark.parametrize(("native", "early"), [(32, ["own", "urae_2k"]), (80, ["own"])])
@pytest.mark.parametrize("parts", [(), ("joined-adapters", "constants")])
def test_adapters_for_the_whole_size_rest_in_early_steps(
    load_pipe, expected, draw, native, early, parts
):
    files = [expected / "dev_2k_lora.safetensors", expected / "dev_4k_minor.safetensors"]
    policy = urae.ResolutionPolicy(native_sequence_length=native)
    pipe = load_pipe()
    own = {"transformer_blocks.0.attn.to_q.lora_A.weight": torch.ones(2, 64),
           "transformer_blocks.0.attn.to_q.lora_B.weight": torch.ones(64, 2)}  # fmt: skip
    pipe.transformer.load_lora_adapter(own, prefix=None, adapter_name="own")
    urae.adapt(pipe, files, policy=policy)
    active = active_adapters(pipe.transformer)
    seen = []
    pipe.transformer.transformer_blocks[0].register_forward_pre_hook(
        lambda *_: seen.append(active_adapters(pipe.transformer))
    )
    progressive(pipe, 0.5, *parts)
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # such as that the policy's adapters are not active
        latents, _ = draw(pipe)
    assert seen == [early] * 3 + [active] * 3
    assert torch.equal(draw(pipe)[0], latents)
    break_off(draw, pipe)
    urae.optimize(pipe, speed=None)
    assert active_adapters(pipe.transformer) == active


def break_off(draw, pipe, **options):
    def stop(_pipe, _step, _timestep, _inputs):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        draw(pipe, callback_on_step_end=stop, **options)


@pytest.fixture
def both(load_pipe, expected):
    """A pipe with both adapters, to which half of 128 x 128 is native."""
    files = [expected / "dev_2k_lora.safetensors", expected / "dev_4k_minor.safetensors"]
    policy = urae.ResolutionPolicy(native_sequence_length=80)
    return lambda: urae.adapt(load_pipe(), files, policy=policy)


def test_a_picture_that_was_broken_off_leaves_nothing_behind(both, draw):
    pipe = progressive(both(), 0.5, "joined-adapters")
    wanted, _ = draw(pipe, side=256)
    break_off(draw, pipe)  # in a step in which all adapters rested
    assert active_adapters(pipe.transformer) == ["urae_2k", "urae_4k"]
    assert torch.equal(draw(pipe, side=256)[0], wanted)


def test_adapters_rest_no_longer_than_a_forward_that_fails(both, draw):
    pipe = progressive(both(), 0.5)

    def fail(*_):
        raise RuntimeError("out of luck")

    hook = pipe.transformer.transformer_blocks[0].register_forward_pre_hook(fail)
    with pytest.raises(RuntimeError, match="out of luck"):
        draw(pipe)
    hook.remove()
    assert active_adapters(pipe.transformer) == ["urae_2k", "urae_4k"]
    assert not find_policy(pipe.transformer).is_resting


def test_fused_adapters_cannot_rest_and_that_is_told_once(both, draw, caplog):
    pipe = progressive(both(), 0.5)
    pipe.fuse_lora()
    draw(pipe)
    draw(pipe)
    (record,) = [each for each in caplog.records if "cannot be switched off" in each.message]
    assert (
        "adapters are fused into the base, so urae_2k, urae_4k cannot be switched off"
        in record.message
    )


def test_adapters_that_are_chosen_meanwhile_stay(both, draw):
    pipe = progressive(both(), 0.5)
    break_off(draw, pipe, side=256)
    pipe.transformer.set_adapter(["urae_4k"])
    with pytest.warns(UserWarning, match="its adapter urae_2k is not active"):
        draw(pipe, side=256)
    assert active_adapters(pipe.transformer) == ["urae_4k"]


def test_only_4k_adapters_rest_beside_others(load_pipe, expected, draw):
    """Another one after the 2K LoRA acts in all steps, as a 4K adapter that goes alone does."""
    policy = urae.ResolutionPolicy(native_sequence_length=32)
    lora = expected / "dev_2k_lora.safetensors"
    alone = expected / "dev_4k_lora_conversion.safetensors"
    for files, names in (([lora, lora], ["urae_2k", "style"]), ([alone], ["only"])):
        pipe = urae.adapt(load_pipe(), files, policy=policy, adapter_names=names)
        seen = []
        pipe.transformer.transformer_blocks[0].register_forward_pre_hook(
            lambda *_, pipe=pipe, seen=seen: seen.append(active_adapters(pipe.transformer))
        )
        draw(progressive(pipe, 0.5))
        assert seen == [names] * 6


@pytest.mark.parametrize("parts", [(), ("joined-adapters",)])
def test_streamed_weights(adapted, draw, parts, caplog):
    wanted, _ = draw(progressive(adapted(), 0.5))
    pipe = progressive(adapted(), 0.5, *parts)
    stream_blocks(pipe.transformer, CPU)
    found = [draw(pipe)[0] for _ in range(2)]
    assert all(torch.allclose(each, wanted, atol=1e-5) for each in found)
    assert not caplog.records


def test_another_pipeline_with_the_same_parts_begins_whole(adapted, caplog):
    """Image to image keeps the whole schedule, and begins in the middle of it."""
    pipe = progressive(adapted(), 0.6)
    other = FluxImg2ImgPipeline.from_pipe(pipe, dtype=torch.float32)
    other.set_progress_bar_config(disable=True)
    seen = []
    pipe.transformer.transformer_blocks[0].register_forward_pre_hook(
        lambda _module, _args, kwargs: seen.append(kwargs["hidden_states"].shape[1]),
        with_kwargs=True,
    )
    image = torch.rand(1, 3, 128, 128, generator=torch.Generator().manual_seed(0))
    settings = {"height": 128, "width": 128, "max_sequence_length": 64, "output_type": "latent"}
    other("a lake", image=image, strength=0.8, num_inference_steps=10, **settings)
    assert seen == [64] * 8
    assert "progressive is left out for a picture: it starts at noise level 0." in caplog.text


def test_other_pipelines_are_refused(adapted):
    other = FluxImg2ImgPipeline.from_pipe(adapted(), dtype=torch.float32)
    with pytest.raises(
        ValueError, match=r"only works with FluxPipeline; a FluxImg2ImgPipeline starts"
    ):
        progressive(other, 0.5)


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        (
            {"sigmas": [0.6, 0.3], "num_inference_steps": None},
            "starts at noise level 0.818, from la",
        ),
        ({"side": 144}, "144 x 144 pixels are not multiples of 32"),
    ],
)
def test_where_it_cannot_be_right_a_picture_is_made_whole(adapted, draw, caplog, options, reason):
    pipe = adapted()
    wanted, _ = draw(pipe, **options)
    assert torch.equal(draw(progressive(pipe, 0.5), **options)[0], wanted)
    assert caplog.text.count("progressive is left out for a picture: ") == 1
    assert reason in caplog.text
    assert draw(pipe)[1] == [16] * 3 + [64] * 3


def test_a_size_that_has_no_half_is_refused_before_anything_loads():
    with pytest.raises(ValueError, match="width 48 must be a multiple of 32 pixels for progressi"):
        GenerateConfig(("a circle",), height=64, width=48, parts=("progressive",))
