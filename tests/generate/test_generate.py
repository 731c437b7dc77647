import json
import os
import shutil
import weakref
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext
from dataclasses import asdict, replace
from functools import partial

import numpy as np
import pytest
import torch
from diffusers.models.attention_dispatch import AttentionBackendName, _AttentionBackendRegistry
from PIL import Image
from safetensors.torch import load_file, save_file

import urae
from urae.backbones import vae
from urae.backbones.flux import build_meta_models
from urae.backbones.ranks import Ranks
from urae.generate import GenerateConfig, generate
from urae.generate import inputs as inputs_module
from urae.generate import job as job_module
from urae.generate import sample as sample_module
from urae.generate.chunks import token_chunks
from urae.generate.estimate import estimate
from urae.generate.inputs import Sampling
from urae.generate.memory import Room
from urae.generate.parts import PRESETS, resolve_parts
from urae.generate.picture import list_pictures, save_picture
from urae.generate.speed import pays_to_compile
from urae.resolution import ResolutionPolicy


@pytest.fixture
def settings(bases, tmp_path):
    def build(**changes) -> GenerateConfig:
        defaults = {
            "prompts": ("a large red circle",),
            "model": str(bases["dev"]),
            "height": 96,
            "width": 64,
            "steps": 2,
            "seed": 5,
            "output_dir": tmp_path / "out",
        }
        return GenerateConfig(**{**defaults, **changes})

    return build


@pytest.fixture
def no_weights(monkeypatch):
    """Fail if anything loads weights."""

    def load(*_, **__):
        raise AssertionError("weights were loaded")

    monkeypatch.setattr(job_module, "load_pipeline", load)


def test_a_picture_and_its_recipe(settings, expected):
    steps = []
    adapters = tuple(str(expected / f"dev_{name}.safetensors") for name in ("2k_lora", "4k_minor"))
    config = settings(adapters=adapters, policy=ResolutionPolicy(time_shift=10.0))
    (path,) = generate(config, on_progress=lambda p: steps.append((p.picture, p.step, p.num_steps)))
    assert steps == [(1, 1, 2), (1, 2, 2)]
    assert path.name == "0000-a-large-red-circle-5.png"
    with Image.open(path) as image:
        assert image.size == (64, 96)
        record = image.text
    assert record["prompt"] == "a large red circle"
    assert (record["seed"], record["width"], record["height"]) == ("5", "64", "96")
    assert json.loads(record["adapters"]) == list(adapters)
    assert json.loads(record["policy"])["time_shift"] == 10.0
    assert (record["steps"], record["guidance_scale"]) == ("2", "3.5")
    assert record["max_sequence_length"] == "512"
    assert json.loads(record["versions"])["urae"] == urae.__version__
    assert (record["memory"], record["compiled"]) == ("resident", "false")


def test_the_picture_is_that_of_the_adapted_pipeline(settings, expected, load_pipe):
    lora = str(expected / "dev_2k_lora.safetensors")
    (path,) = generate(settings(adapters=(lora,)))
    pipe = urae.adapt(load_pipe(), lora)
    wanted = pipe(
        "a large red circle",
        height=96,
        width=64,
        num_inference_steps=2,
        guidance_scale=3.5,
        generator=torch.Generator().manual_seed(5),
    ).images[0]
    with Image.open(path) as image:
        assert image.tobytes() == wanted.tobytes()


def test_schnell_has_its_own_defaults(settings, bases):
    (path,) = generate(settings(model=str(bases["schnell"]), steps=None))
    with Image.open(path) as image:
        record = image.text
    assert (record["steps"], record["guidance_scale"]) == ("4", "0.0")
    assert record["max_sequence_length"] == "256"


def test_guidance_is_refused_where_there_is_none(settings, bases, no_weights):
    schnell = str(bases["schnell"])
    with pytest.raises(
        ValueError, match=r"guidance_scale 3.5 would have no effect, since .*schnell"
    ):
        generate(settings(model=schnell, guidance_scale=3.5))
    with pytest.raises(AssertionError, match="weights were loaded"):  # nothing is wrong with 0
        generate(settings(model=schnell, guidance_scale=0.0))


def test_no_more_text_than_the_model_reads(settings, bases, no_weights):
    for model, most in ((str(bases["schnell"]), 256), ("miniature-dev", 64)):
        config = settings(model=model, max_sequence_length=most + 1)
        with pytest.raises(ValueError, match=f"{most + 1} is more than the {most} T5 tokens that "):
            generate(config)
        with pytest.raises(AssertionError, match="weights were loaded"):
            generate(replace(config, max_sequence_length=most))


def test_several_prompts_and_images(settings):
    paths = generate(settings(prompts=("one", "two"), num_images=2, steps=1))
    names = ["0000-one-5.png", "0000-one-6.png", "0001-two-5.png", "0001-two-6.png"]
    assert [path.name for path in paths] == names
    again = generate(settings(prompts=("one",), seed=6, steps=1, output_dir=paths[0].parent / "b"))
    assert Image.open(again[0]).tobytes() == Image.open(paths[1]).tobytes()


def test_a_seed_is_drawn(settings, tmp_path):
    paths = [generate(settings(seed=None, steps=1))[0] for _ in range(2)]
    assert paths[0] != paths[1]


def test_loras_on_top(settings, expected, load_pipe, tmp_path):
    ours, style = (str(expected / f"{b}_2k_lora.safetensors") for b in ("dev", "schnell"))
    (plain,) = generate(settings(adapters=(ours,)))
    (styled,) = generate(
        settings(adapters=(ours,), loras=((style, 2.0),), output_dir=tmp_path / "styled")
    )
    (none,) = generate(
        settings(adapters=(ours,), loras=((style, 0.0),), output_dir=tmp_path / "none")
    )
    assert Image.open(styled).tobytes() != Image.open(plain).tobytes()
    assert Image.open(none).tobytes() == Image.open(plain).tobytes()


def test_a_folder_of_peft_is_a_lora_too(settings, expected, tmp_path):
    style = expected / "schnell_2k_lora.safetensors"
    (tmp_path / "peft").mkdir()
    keys = {key.replace("transformer.", "base_model.model.", 1): tensor
            for key, tensor in load_file(style).items()}  # fmt: skip
    save_file(keys, tmp_path / "peft" / "adapter_model.safetensors")
    (plain,) = generate(settings(loras=((str(style), 2.0),)))
    folder = str(tmp_path / "peft")
    (found,) = generate(settings(loras=((folder, 2.0),), output_dir=tmp_path / "found"))
    assert Image.open(found).tobytes() == Image.open(plain).tobytes()


def test_loras_are_checked_before_weights_load(settings, no_weights, expected, tmp_path):
    minor = str(expected / "dev_4k_minor.safetensors")
    with pytest.raises(ValueError, match="is a minor-component adapter; give it as --adapter"):
        generate(settings(loras=((minor, 1.0),)))
    tensors = load_file(expected / "dev_2k_lora.safetensors")
    narrow = {k: t[:, :8].clone() if "lora_A" in k else t for k, t in tensors.items()}
    narrow["text_encoder.x.lora_A.weight"] = torch.ones(2, 3)  # is not looked at
    save_file(narrow, tmp_path / "narrow.safetensors")
    with pytest.raises(ValueError, match="to_k is 64 x 8 in the adapter and 64 x 64 in the model"):
        generate(settings(loras=((str(tmp_path / "narrow.safetensors"), 1.0),)))


def test_a_base_alone_is_left_alone_at_its_native_size(settings, bases, load_pipe, tmp_path):
    (path,) = generate(settings())
    wanted = load_pipe()(
        "a large red circle",
        height=96,
        width=64,
        num_inference_steps=2,
        generator=torch.Generator().manual_seed(5),
    ).images[0]
    with Image.open(path) as image:
        assert image.tobytes() == wanted.tobytes()
        assert image.text["policy"] == "null"
    small = shutil.copytree(bases["dev"], tmp_path / "small")
    policy = ResolutionPolicy(native_sequence_length=520)
    (small / "resolution_policy.json").write_text(policy.to_json())
    (path,) = generate(settings(model=str(small), overwrite=True))
    with Image.open(path) as image:
        assert json.loads(image.text["policy"])["native_sequence_length"] == 520


def test_an_output_that_cannot_be_a_folder(settings, no_weights, tmp_path):
    (tmp_path / "out").write_text("mine")
    for folder in ("out", "out/deeper/still"):
        with pytest.raises(FileExistsError, match="/out is a file; choose another with --output"):
            generate(settings(output_dir=tmp_path / folder))
    (tmp_path / "broken").symlink_to(tmp_path / "nothing")
    for folder in ("broken", "broken/deeper"):
        with pytest.raises(FileExistsError, match="/broken is a link to nothing; choose another"):
            generate(settings(output_dir=tmp_path / folder))
    with pytest.raises(OSError, match="File name too long"):
        generate(settings(output_dir=tmp_path / ("a" * 300)))


def test_an_output_that_cannot_be_written(settings, no_weights, monkeypatch, tmp_path):
    """As root, who runs tests in containers, everything can be."""
    ask = os.access
    monkeypatch.setattr(
        os, "access", lambda path, mode: ask(path, mode) and (mode == os.F_OK or path != tmp_path)
    )
    with pytest.raises(PermissionError, match=f"no permission in {tmp_path}; .* --output"):
        generate(settings(output_dir=tmp_path / "not" / "there"))


def test_an_existing_picture_is_kept(settings, no_weights, tmp_path):
    path = tmp_path / "out" / "0000-a-large-red-circle-5.png"
    path.parent.mkdir()
    path.write_bytes(b"mine")
    with pytest.raises(
        FileExistsError, match=r"circle-5.png already exists and is kept .*--overwrite"
    ):
        generate(settings())
    assert path.read_bytes() == b"mine"


def test_a_job_that_was_stopped_goes_on(settings, monkeypatch):
    config = settings(num_images=3, steps=1)
    paths = generate(config)
    before = [path.read_bytes() for path in paths]
    paths[1].unlink()
    with pytest.raises(
        FileExistsError, match=r"2 of 3 pictures exist\); make the others with --resume"
    ):
        generate(config)
    made = []
    save = job_module.save_picture
    monkeypatch.setattr(job_module, "save_picture", lambda p, *a: made.append(p) or save(p, *a))
    assert generate(replace(config, resume=True)) == paths
    assert made == [paths[1]]
    assert [path.read_bytes() for path in paths] == before
    monkeypatch.setattr(job_module, "fetch_model", None)  # nothing is left to do
    assert generate(replace(config, resume=True)) == paths


@pytest.mark.parametrize("prompt", ['"a large red circle"', "1e5", "true"])
def test_a_prompt_that_reads_as_json_is_text(settings, no_weights, prompt, tmp_path):
    config = settings(prompts=(prompt,), resume=True)
    (picture,) = list_pictures(config.prompts, 1, config.seed, config.output_dir)
    record = {
        "prompt": prompt, "width": 64, "height": 96, "model": config.model, "adapters": [],
        "loras": [], "speed": "exact", "approximations": [], "steps": 2,
    }  # fmt: skip
    save_picture(picture.path, Image.new("RGB", (8, 8)), record)
    assert generate(config) == [picture.path]
    save_picture(picture.path, Image.new("RGB", (8, 8)), {**record, "steps": "two"})
    with pytest.raises(FileExistsError, match="with steps two, but this job has 2"):
        generate(config)


def test_pictures_of_another_job_are_not_gone_on_with(settings, no_weights, tmp_path):
    path = tmp_path / "out" / "0000-a-large-red-circle-5.png"
    path.parent.mkdir()
    record = {"prompt": "a large red circle", "width": 64, "height": 128}
    save_picture(path, Image.new("RGB", (8, 8)), record)
    with pytest.raises(
        FileExistsError, match="already exists with height 128, but this job has 96"
    ):
        generate(settings(resume=True))
    policy, other = ResolutionPolicy(), ResolutionPolicy(time_shift=3.0)
    whole = {**record, "height": 96, "model": settings().model, "adapters": [], "loras": []}
    whole |= {"speed": settings().speed, "steps": 2, "policy": asdict(policy)}
    whole |= {"approximations": ["progressive=0.5"], "memory": "resident"}
    save_picture(path, Image.new("RGB", (8, 8)), whole)
    same = settings(resume=True, height=96, parts=("progressive=0.5", "constants"))
    assert generate(same) == generate(replace(same, policy=policy)) == [path]
    for change, told in (
        ({"policy": other}, "policy"),
        ({"parts": ("constants",)}, "approximations"),
        ({"memory": "8bit"}, "memory resident"),
    ):
        with pytest.raises(FileExistsError, match=f"already exists with {told}"):
            generate(replace(same, **change))
    save_picture(path, Image.new("RGB", (8, 8)), {**whole, "memory": "8bit"})
    with pytest.raises(FileExistsError, match="already exists with memory 8bit"):
        generate(replace(same, memory="resident"))
    assert generate(replace(same, memory="auto")) == [path]
    path.write_bytes(b"mine")
    with pytest.raises(ValueError, match="is not a complete PNG"):
        generate(settings(resume=True))
    assert path.read_bytes() == b"mine"
    with pytest.raises(ValueError, match="resume needs a seed"):
        settings(resume=True, seed=None)
    with pytest.raises(
        ValueError, match="resume and overwrite cannot be combined; choose one of them"
    ):
        settings(resume=True, overwrite=True)


def test_what_does_not_fit_is_said_before_a_download(settings, monkeypatch, expected):
    monkeypatch.setattr(job_module, "fetch_model", lambda *_: pytest.fail("the hub was asked"))
    far = {"model": "flux-dev", "height": 1024, "width": 1024}
    for changes, message in (
        ({"adapters": ("typo.safetensors",)}, "typo.safetensors"),
        ({"adapters": (str(expected / "dev_2k_lora.safetensors"),)}, "dev_2k_lora"),
        ({"loras": (("nofile.safetensors", 1.0),)}, "nofile"),
        ({"memory": "4bit"}, "4bit"),
        (
            {"model": "flux-schnell", "guidance_scale": 3.0},
            "guidance_scale 3.0 would have no effect",
        ),
        ({"model": "flux-schnell", "max_sequence_length": 512}, "more than the 256 T5 tokens"),
    ):
        with pytest.raises((ValueError, FileNotFoundError, ModuleNotFoundError), match=message):
            generate(settings(**{**far, **changes}))


def test_overwrite(settings):
    (path,) = generate(settings(steps=1))
    before = path.read_bytes()
    generate(settings(overwrite=True))
    assert path.read_bytes() != before


def test_bad_adapters_fail_before_weights_load(settings, no_weights, expected, tmp_path):
    lora = expected / "dev_2k_lora.safetensors"
    truncated = tmp_path / "t.safetensors"
    truncated.write_bytes(lora.read_bytes()[:500])
    with pytest.raises(ValueError, match="not a complete safetensors file"):
        generate(settings(adapters=(str(truncated),)))
    with pytest.raises(ValueError, match="not a complete safetensors file"):
        generate(settings(loras=((str(truncated), 1.0),)))
    with pytest.raises(FileNotFoundError, match="neither an existing file"):
        generate(settings(adapters=("nothing.safetensors",)))


def test_an_adapter_for_another_base(settings, no_weights, expected, bases, tmp_path):
    other = tmp_path / "other"
    shutil.copytree(bases["dev"], other)
    config = json.loads((other / "transformer" / "config.json").read_text())
    config["num_attention_heads"] = 4
    (other / "transformer" / "config.json").write_text(json.dumps(config))
    adapters = (str(expected / "dev_2k_lora.safetensors"),)
    with pytest.raises(ValueError, match=r"to_k is 64 x 64 in the adapter and 128 x 128 in the mo"):
        generate(settings(model=str(other), adapters=adapters))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"height": 100}, "height 100 is not .* try 96 or 112"),
        ({"prompts": ()}, "prompt is empty"),
        ({"prompts": (" ",)}, "prompt is empty"),
        ({"steps": 0}, "steps 0 must be at least 1"),
        ({"num_images": 0}, "num_images 0"),
        ({"guidance_scale": -1.0}, "guidance_scale -1.0 must be between 0 and 1000"),
        ({"guidance_scale": 1e39}, "guidance_scale 1e\\+39 must be between 0 and 1000"),
        ({"seed": 2**63 - 1, "num_images": 2}, "is too large for 2 pictures"),
        ({"height": 2**40}, "height 1099511627776 must be at most 1048576 pixels"),
        ({"max_sequence_length": 513}, "max_sequence_length 513 must be between 1 and 512"),
        ({"seed": -1}, "seed -1 must be"),
        ({"loras": (("a", float("nan")),)}, "weight nan of LoRA a must be"),
        (
            {"parts": ("compile",), "memory": "8bit"},
            "--part compile cannot be combined with --memory 8b",
        ),
    ],
)
def test_bad_values(settings, changes, message):
    with pytest.raises(ValueError, match=message):
        settings(**changes)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "neither a local path nor a hub id"),
        ({}, "no model_index.json"),
        ({"model_index.json": '{"_class_name": "StableDiffusionPipeline"}'}, "not FLUX.1"),
        ({"model_index.json": '{"_class_name": "Flux2Pipeline"}'}, "a Flux2Pipeline, not FLUX.1"),
    ],
)
def test_models_that_are_none(settings, no_weights, tmp_path, content, message):
    folder = tmp_path / "a" / "b" / "c" / "model"
    if content is not None:
        folder.mkdir(parents=True)
        for name, text in content.items():
            (folder / name).write_text(text)
    with pytest.raises((ValueError, FileNotFoundError), match=message):
        generate(settings(model=str(folder)))


@pytest.fixture
def small_gpu(monkeypatch):
    """Estimates as of FLUX.1-dev on a GPU of 80 GiB; the job itself runs on the CPU."""
    flux = build_meta_models("flux-dev")

    def find_room(_models, request, tiers, _ranks):
        size = 80 * 2**30
        estimates = [estimate(flux, request, tier, size) for tier in tiers]
        return Room(estimates, size, size)

    monkeypatch.setattr(job_module, "find_room", find_room)


OUT_OF_MEMORY = torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")


def fail_times(monkeypatch, count, error=OUT_OF_MEMORY):
    """Let sampling run out of memory the first `count` times; return the tries."""
    run, tries = job_module.sample, []

    def sample(pipe, *arguments):
        tries.append(hasattr(pipe.transformer.transformer_blocks[0], "_diffusers_hook"))
        if len(tries) <= count:
            raise error
        return run(pipe, *arguments)

    monkeypatch.setattr(job_module, "sample", sample)
    return tries


def test_out_of_gpu_memory_says_what_to_try(settings, monkeypatch, small_gpu, tmp_path):
    fail_times(monkeypatch, 9)
    message = r"64 x 96 .* --memory resident \(CUDA out of memory\); try --memory streamed$"
    with pytest.raises(MemoryError, match=message):
        generate(settings(memory="resident"))
    with pytest.raises(MemoryError, match=r"with --memory streamed \(CUDA out of memory\); try"):
        generate(settings(memory="streamed"))
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("text", "named"),
    [
        ("CUDA error: out of memory\nCUDA kernel errors might", "CUDA error: out of memory"),
        ("cuDNN error: CUDNN_STATUS_ALLOC_FAILED", "cuDNN error: CUDNN_STATUS_ALLOC_FAILED"),
        (
            "[enforce fail] err == 0. DefaultCPUAllocator: not enough memory: 9 bytes. Error code",
            "DefaultCPUAllocator: not enough memory: 9 bytes",
        ),
    ],
)
def test_memory_runs_out_in_other_forms(settings, monkeypatch, small_gpu, text, named):
    fail_times(monkeypatch, 1, RuntimeError(text))
    with pytest.raises(MemoryError) as found:
        generate(settings(memory="resident"))
    assert f"--memory resident ({named}); try --memory streamed" in str(found.value)
    tries = fail_times(monkeypatch, 1, RuntimeError(text))
    generate(settings())
    assert tries == [False, True]


def test_other_errors_are_not_about_memory(settings, monkeypatch, small_gpu):
    fail_times(monkeypatch, 1, RuntimeError("CUDA error: misaligned address"))
    with pytest.raises(RuntimeError, match=r"^CUDA error: misaligned address$"):
        generate(settings())


def test_what_fits_is_measured_after_the_failed_try_has_gone(settings, monkeypatch, small_gpu):
    run, find, pipes, alive = job_module.sample, job_module.find_room, [], []

    def sample(pipe, *arguments):
        if not pipes:
            pipes.append(weakref.ref(pipe.transformer))
            raise OUT_OF_MEMORY.with_traceback(None)
        return run(pipe, *arguments)

    def find_room(*arguments):
        alive.append([pipe() is not None for pipe in pipes])
        return find(*arguments)

    monkeypatch.setattr(job_module, "sample", sample)
    monkeypatch.setattr(job_module, "find_room", find_room)
    generate(settings())
    assert alive == [[], [False]]


def test_a_vae_without_room_names_the_tier_that_fits(settings, monkeypatch, small_gpu):
    monkeypatch.setattr("urae.backbones.vae.vae_bytes", lambda *_: 2**10)
    with pytest.raises(MemoryError) as found:
        generate(settings(height=256, width=256, steps=1, memory="resident"))
    assert "with --memory resident (decoding 256 x 256 pixels needs at least " in str(found.value)
    assert str(found.value).endswith(" available); try --memory streamed")


def test_auto_tries_once_more_with_less(settings, monkeypatch, small_gpu, caplog, tmp_path):
    (wanted,) = generate(settings(memory="resident", output_dir=tmp_path / "resident"))
    tries = fail_times(monkeypatch, 1)
    (path,) = generate(settings())
    assert tries == [False, True]
    assert (
        "ran out of memory with --memory resident (CUDA out of memory): trying once more with "
        "--memory streamed" in caplog.text
    )
    with Image.open(path) as found, Image.open(wanted) as image:
        assert found.tobytes() == image.tobytes()
        assert found.text["memory"] == "streamed"


def test_auto_tries_no_more_than_once(settings, monkeypatch, small_gpu, tmp_path):
    tries = fail_times(monkeypatch, 9)
    with pytest.raises(MemoryError, match=r"--memory streamed \(.*\); try a smaller --size"):
        generate(settings())
    assert tries == [False, True]
    assert not (tmp_path / "out").exists()


def test_pictures_that_were_made_before_are_kept(settings, monkeypatch, small_gpu):
    """Memory may run out in the middle of a job."""
    run, seeds = job_module.sample, []

    def sample(pipe, embeds, seed, *arguments):
        seeds.append(seed)
        if seeds == [5, 6]:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return run(pipe, embeds, seed, *arguments)

    monkeypatch.setattr(job_module, "sample", sample)
    progress = []
    paths = generate(settings(num_images=3, steps=1), on_progress=lambda p: progress.append(p))
    assert seeds == [5, 6, 6, 7]
    assert [p.picture for p in progress] == [1, 2, 3]
    tiers = [Image.open(path).text["memory"] for path in paths]
    assert tiers == ["resident", "streamed", "streamed"]


@pytest.mark.parametrize("memory", ["streamed", "offload"])
def test_exact_tiers_make_the_same_picture(settings, expected, memory, tmp_path):
    adapters = tuple(str(expected / f"dev_{n}.safetensors") for n in ("2k_lora", "4k_minor"))
    (wanted,) = generate(settings(adapters=adapters))
    (path,) = generate(settings(adapters=adapters, memory=memory, output_dir=tmp_path / memory))
    with Image.open(path) as found, Image.open(wanted) as image:
        # how it is decoded follows from the memory that is free: a level here and there
        levels = zip(found.tobytes(), image.tobytes(), strict=True)
        assert max(abs(one - other) for one, other in levels) <= 1
        assert found.text["memory"] == memory


def test_a_picture_in_chunks_of_tokens(settings, monkeypatch, tmp_path):
    (wanted,) = generate(settings())  # of so few tokens that it is one chunk
    few = partial(token_chunks, num_tokens=7)
    monkeypatch.setattr(job_module, "token_chunks", few)
    (path,) = generate(settings(output_dir=tmp_path / "chunks"))
    found, image = (np.array(Image.open(each)).astype(int) for each in (path, wanted))
    assert abs(found - image).max() <= 1  # on the edge between two 8-bit levels


@pytest.mark.filterwarnings("ignore")  # torchao's own
def test_weights_in_eight_bits(settings, expected, caplog, tmp_path):
    """Adapters stay outside; B0 and A0 come from the original weights."""
    adapters = tuple(str(expected / f"dev_{n}.safetensors") for n in ("2k_lora", "4k_minor"))
    (exact,) = generate(settings(adapters=adapters))
    (path,) = generate(settings(adapters=adapters, memory="8bit", output_dir=tmp_path / "8bit"))
    assert "weights in 8bit: the pictures are approximations" in caplog.text
    found, wanted = (np.array(Image.open(each)).astype(int) for each in (path, exact))
    assert 0 < abs(found - wanted).mean() < 3


def test_a_single_file_is_not_quantised(settings, monkeypatch, tmp_path):
    path = tmp_path / "one.safetensors"
    names = [f"double_blocks.{n}.x" for n in range(19)] + [
        f"single_blocks.{n}.x" for n in range(38)
    ]
    tensors = {name: torch.ones(1) for name in names}
    save_file({"img_in.weight": torch.ones(3072, 64), **tensors}, path)
    monkeypatch.setattr("urae.backbones.flux.load_transformer", lambda *_, **__: 1 / 0)
    with pytest.raises(ValueError, match="is a single file, which cannot be quantised"):
        generate(settings(model=str(path), memory="8bit"))


def test_quantised_tiers_fail_before_weights_load(settings, no_weights, monkeypatch):
    with pytest.raises(ValueError, match="4bit needs a CUDA device"):
        generate(settings(memory="4bit"))
    monkeypatch.setattr("urae.generate.quantize.find_spec", lambda _: None)
    with pytest.raises(ModuleNotFoundError, match="pip install torchao"):
        generate(settings(memory="8bit"))


def test_the_image_equals_the_reference(expected, bases, tmp_path):
    """To 8 bits, from the job itself."""
    golden = load_file(expected / "dev_4k_192x320_pipeline.safetensors")["image"]
    adapters = tuple(str(expected / f"dev_{name}.safetensors") for name in ("2k_lora", "4k_minor"))
    config = GenerateConfig(
        prompts=("a large red circle on a striped blue background",),
        model=str(bases["dev"]),
        height=192,
        width=320,
        adapters=adapters,
        steps=6,
        max_sequence_length=64,
        seed=7,
        output_dir=tmp_path,
    )
    (path,) = generate(config)
    wanted = ((golden[0] / 2 + 0.5).clamp(0, 1) * 255).round().permute(1, 2, 0)
    with Image.open(path) as image:
        found = torch.from_numpy(np.array(image)).float()
    # a value on the edge between two 8-bit levels may fall either way
    assert (found - wanted).abs().max() <= 1


def test_text_encoders_that_do_not_fit_are_streamed(settings, monkeypatch, tmp_path):
    (wanted,) = generate(settings())
    streamed = []
    run = job_module.stream_layers
    monkeypatch.setattr(job_module, "stream_layers", lambda *a: (streamed.append(a[0]), run(*a))[1])
    monkeypatch.setattr(job_module, "free_bytes", lambda _: 2**28)
    (path,) = generate(settings(output_dir=tmp_path / "short"))
    assert len(streamed) == 1
    assert Image.open(path).tobytes() == Image.open(wanted).tobytes()


def test_compiling_where_it_pays(monkeypatch):
    cpu, gpu = torch.device("cpu"), torch.device("cuda")
    assert not pays_to_compile(cpu, 4096, 4096, 28, 1)
    monkeypatch.setattr("urae.generate.speed.has_triton", lambda: True)
    monkeypatch.setattr("shutil.which", lambda _: "/usr/bin/cc")
    assert pays_to_compile(gpu, 4096, 4096, 28, 1)
    assert not pays_to_compile(gpu, 2048, 2048, 28, 1)
    assert pays_to_compile(gpu, 2048, 2048, 28, 4)
    monkeypatch.setattr("shutil.which", lambda _: None)
    assert not pays_to_compile(gpu, 4096, 4096, 28, 1)


def test_a_job_compiles_the_blocks(settings, monkeypatch):
    compiled = []
    monkeypatch.setattr(job_module, "pays_to_compile", lambda *_: True)
    monkeypatch.setattr(torch, "compile", lambda forward: compiled.append(forward) or forward)
    (path,) = generate(settings())
    assert len(compiled) == 3  # one a block
    with Image.open(path) as image:
        assert image.text["compiled"] == "true"
        assert json.loads(image.text["parts"]) == [*PRESETS["exact"]]


def test_parts_by_name(settings, expected, tmp_path, caplog, monkeypatch):
    monkeypatch.setenv("URAE_CACHE_DIR", str(tmp_path))
    lora = (str(expected / "dev_2k_lora.safetensors"),)
    (exact,) = generate(settings(adapters=lora, steps=8))
    changes = {"adapters": lora, "steps": 8, "output_dir": tmp_path / "parts"}
    for memory in ("resident", "streamed"):
        parts = ("taylorseer-cache=3",)
        (path,) = generate(settings(parts=parts, memory=memory, overwrite=True, **changes))
        with Image.open(path) as image:
            found = image.tobytes()
            assert found != Image.open(exact).tobytes()
            exact_parts = [name for name in PRESETS["exact"] if name != "compile"]
            assert json.loads(image.text["parts"]) == [*exact_parts, "taylorseer-cache=3"]
            assert image.text["speed"] == "exact"
    assert "taylorseer-cache=3: the pictures are approximations" in caplog.text
    (path,) = generate(settings(parts=("mag-cache=0",), overwrite=True, **changes))
    assert Image.open(path).tobytes() == Image.open(exact).tobytes()


def test_the_policy_in_a_picture_is_that_of_the_adapters(settings, expected):
    lora = (str(expected / "dev_2k_lora.safetensors"),)
    policy = ResolutionPolicy(native_sequence_length=64 + 512)
    parts = ("local-attention=0.8",)
    (path,) = generate(
        settings(adapters=lora, policy=policy, parts=parts, height=256, width=256, steps=4)
    )
    with Image.open(path) as image:
        assert json.loads(image.text["policy"])["attention"] == "full"
        assert "local-attention=0.8" in json.loads(image.text["parts"])


@pytest.mark.slow
def test_a_presets_local_attention_goes_where_blocks_are_compiled(
    settings, expected, monkeypatch, caplog
):
    monkeypatch.setattr(torch, "compile", lambda forward: forward)
    lora = (str(expected / "dev_2k_lora.safetensors"),)
    policy = ResolutionPolicy(native_sequence_length=64 + 512)
    config = settings(
        adapters=lora, policy=policy, speed="turbo", height=256, width=256, overwrite=True
    )
    monkeypatch.setattr(job_module, "can_compile", lambda _: True)
    for pays, memory, named, is_local in (
        (True, "resident", (), True),
        (True, "8bit", (), False),
        (False, "resident", (), False),
        (False, "resident", ("compile",), True),
    ):
        monkeypatch.setattr(job_module, "pays_to_compile", lambda *_, pays=pays: pays)
        caplog.clear()
        (path,) = generate(replace(config, memory=memory, parts=named))
        pays |= bool(named)
        with Image.open(path) as image:
            found = json.loads(image.text["parts"])
        assert ("local-attention=0.87" in found) == ("compile" in found) == is_local
        assert ("local-attention is left out: it only helps" in caplog.text) != pays
        left_out = "local-attention is left out: blocks are not compiled with --memory 8bit"
        assert (left_out in caplog.text) == (memory == "8bit")


def test_a_picture_that_gpus_share_is_not_local_by_a_preset(settings, tmp_path):
    policy = ResolutionPolicy(native_sequence_length=64 + 64)
    turbo = settings(speed="turbo", height=256, width=256, policy=policy)
    sampling = Sampling(2, 3.5, 64)
    shared, alone = (
        inputs_module.find_excluded(turbo, [], sampling, tmp_path, n) for n in (True, False)
    )
    assert "local-attention" not in alone
    assert shared["local-attention"].startswith("several GPUs share a picture")
    native = inputs_module.find_excluded(
        replace(turbo, height=64, width=64, policy=ResolutionPolicy()), [], sampling, tmp_path, True
    )
    assert set(native.values()) == {"the pictures are within the native size"}


def test_parts_are_checked_before_weights_load(settings, no_weights):
    with pytest.raises(ValueError, match="part 'magic' is unknown; known: "):
        settings(parts=("magic",))
    with pytest.raises(ValueError, match=r"fp8 needs a GPU of .* this machine runs on cpu"):
        generate(settings(parts=("fp8",)))
    with pytest.raises(ValueError, match="--memory 8bit and --part 8bit both quantise"):
        generate(settings(parts=("8bit",), memory="8bit"))


def test_a_presets_fp8_keeps_no_tier_out(monkeypatch, settings, tmp_path):
    monkeypatch.setattr(job_module, "check_quantization", lambda *_, **__: None)
    device, parts = torch.device("cuda"), resolve_parts("turbo", ())
    for named, quantised in (((), True), (("fp8",), False)):
        config = settings(speed="turbo", parts=named)
        chosen = resolve_parts("turbo", named) if named else parts
        tiers = job_module._list_tiers(config, tmp_path, chosen, device)
        assert ("8bit" in tiers, "4bit" in tiers) == (quantised, quantised)
    job = job_module._Job(settings(speed="turbo"), (), None, parts, None, None, None)
    assert "fp8" in map(str, job.list_parts("streamed"))
    left = {part.name for part in job.list_parts("8bit")}
    assert not left & {"fp8", "local-attention", "compile"}


def test_named_compiling_keeps_quantised_tiers_out(settings, monkeypatch, no_weights):
    lists = []

    def find_room(_models, _request, tiers, _ranks):
        lists.append(tiers)
        return Room([], 0, 0)

    monkeypatch.setattr(job_module, "find_room", find_room)
    for parts in ((), ("compile",)):
        with pytest.raises(AssertionError, match="weights were loaded"):
            generate(settings(parts=parts))
    assert [("8bit" in tiers, "streamed" in tiers) for tiers in lists] == [
        (True, True), (False, True),
    ]  # fmt: skip


def test_attention_is_checked_before_weights_load(settings, monkeypatch, no_weights):
    def set_backend(name):
        monkeypatch.setattr(_AttentionBackendRegistry, "_active_backend", name)

    set_backend(AttentionBackendName.FLASH)
    with pytest.raises(ModuleNotFoundError, match="unset DIFFUSERS_ATTN_BACKEND"):
        generate(settings())
    set_backend(AttentionBackendName._NATIVE_MATH)
    two = Ranks(torch.device("cpu"), 0, 2)
    monkeypatch.setattr(job_module, "join_ranks", lambda _: nullcontext(two))
    with pytest.raises(
        ValueError, match="_native_math cannot be combined with several GPUs on one pict"
    ):
        generate(settings())


def test_decoding_in_stripes_when_memory_is_short(settings, monkeypatch, tmp_path):
    (whole,) = generate(settings(height=256, width=256, steps=1))
    plans = []
    monkeypatch.setattr("urae.backbones.vae.vae_bytes", lambda *_: 3 * 2**20)
    run = vae.plan_decode
    monkeypatch.setattr(
        "urae.backbones.vae.plan_decode", lambda *a, **k: plans.append(run(*a, **k)) or plans[-1]
    )
    (path,) = generate(settings(height=256, width=256, steps=1, output_dir=tmp_path / "short"))
    assert [plan.whole for plan in plans] == [False]
    found, wanted = (np.array(Image.open(each)).astype(int) for each in (path, whole))
    assert abs(found - wanted).max() <= 1  # on the edge between two 8-bit levels
    monkeypatch.setattr("urae.backbones.vae.vae_bytes", lambda *_: 2**10)
    with pytest.raises(MemoryError, match="decoding 256 x 256 pixels needs at least"):
        generate(settings(height=256, width=256, steps=1, output_dir=tmp_path / "none"))
    assert not (tmp_path / "none").exists()


def test_steps_are_not_lost_where_decoding_runs_out_of_memory(
    settings, load_pipe, monkeypatch, tmp_path
):
    (whole,) = generate(settings(height=256, width=256, steps=1))
    limits, decode = [], vae.decode
    errors = [
        torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB"),
        RuntimeError("cuDNN error: CUDNN_STATUS_ALLOC_FAILED"),
    ]

    def fail_twice(*arguments, max_bytes, group):
        limits.append(max_bytes)
        if len(limits) < 3:
            raise errors[len(limits) % 2]
        return decode(*arguments, max_bytes=max_bytes, group=group)

    monkeypatch.setattr("urae.backbones.vae.vae_bytes", lambda *_: 5 * 2**20)
    monkeypatch.setattr("urae.backbones.vae.decode", fail_twice)
    (path,) = generate(settings(height=256, width=256, steps=1, output_dir=tmp_path / "less"))
    assert [limit / 2**20 for limit in limits] == pytest.approx([5, 4, 3.2])
    found, wanted = (np.array(Image.open(each)).astype(int) for each in (path, whole))
    assert abs(found - wanted).max() <= 1
    with pytest.raises(RuntimeError, match="ALLOC_FAILED"):  # the others would wait for this one
        limits.clear()
        latents = torch.zeros(1, 4, 8, 8)
        vae.decode_within_free(load_pipe().vae, latents, group=object())
    assert len(limits) == 1


@pytest.mark.parametrize(("name", "message"), [("latents", "last step's"), ("pixels", "the VAE")])
def test_a_picture_that_is_not_finite_is_not_written(settings, monkeypatch, name, message):
    if name == "latents":
        later = sample_module.sample
        monkeypatch.setattr("urae.generate.job.sample", lambda *args: torch.nan * later(*args))
    else:
        monkeypatch.setattr(
            "urae.generate.sample.decode_within_free",
            lambda _vae, latents, _group: torch.full((1, 3, 64, 64), torch.inf),
        )
    config = settings(height=64, width=64, steps=1)
    with pytest.raises(FloatingPointError, match=message):
        generate(config)
    assert not config.output_dir.exists()


@pytest.mark.parametrize("parts", [(), ("8bit",)])
def test_jobs_in_two_threads(settings, expected, tmp_path, parts):
    common = {"adapters": (str(expected / "dev_2k_lora.safetensors"),), "parts": parts}
    configs = [settings(**common, steps=1, output_dir=tmp_path / str(n)) for n in range(4)]
    with ThreadPoolExecutor(2) as pool:
        paths = [path for (path,) in pool.map(generate, configs)]
    assert len({path.read_bytes() for path in paths}) == 1
    assert torch.nn.Linear(2, 2).weight.device.type == "cpu"  # not left on meta


def test_a_prompt_that_is_cut_is_told(settings, caplog):
    long = settings(prompts=("red " * 40,), steps=1, max_sequence_length=16)
    generate(long)
    assert "tokens, but only the first 16 are used" in caplog.text
    caplog.clear()
    generate(replace(long, prompts=("red",)))
    assert "tokens, but only the first" not in caplog.text


def copy_base(base, folder, **changes):
    """Copy a base with another transformer's config."""
    shutil.copytree(base, folder)
    config = folder / "transformer" / "config.json"
    settings = {**json.loads(config.read_text()), **changes}
    config.write_text(json.dumps({key: each for key, each in settings.items() if each != "gone"}))
    return str(folder)


def test_a_base_that_paints_after_another_picture(settings, no_weights, bases, tmp_path):
    control = copy_base(bases["dev"], tmp_path / "control", in_channels=128, out_channels=64)
    with pytest.raises(ValueError, match="takes 128 channels and outputs 64"):
        generate(settings(model=control))


def test_guidance_is_off_where_a_config_says_nothing(settings, bases, tmp_path):
    plain = copy_base(bases["schnell"], tmp_path / "plain", guidance_embeds="gone")
    (path,) = generate(settings(model=plain, steps=None))
    with Image.open(path) as image:
        assert image.info["steps"] == "4"


def test_a_prompt_that_is_no_utf8(settings):
    with pytest.raises(ValueError, match=r"prompt 'caf.udce9' is not UTF-8"):
        settings(prompts=("caf\udce9",))
