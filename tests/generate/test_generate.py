import json
import shutil

import numpy as np
import pytest
import torch
from diffusers import FluxTransformer2DModel
from PIL import Image
from safetensors.torch import load_file, save_file

import urae
from urae.generate import GenerateConfig, generate
from urae.generate import job as job_module
from urae.generate.memory import choose_placement, decode_bytes
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


def test_an_output_that_is_a_file(settings, no_weights, tmp_path):
    (tmp_path / "out").write_text("mine")
    with pytest.raises(FileExistsError, match="is a file; name a folder"):
        generate(settings())


def test_an_existing_picture_is_kept(settings, no_weights, tmp_path):
    path = tmp_path / "out" / "0000-a-large-red-circle-5.png"
    path.parent.mkdir()
    path.write_bytes(b"mine")
    with pytest.raises(FileExistsError, match=r"circle-5.png exists and is kept .*--overwrite"):
        generate(settings())
    assert path.read_bytes() == b"mine"


def test_overwrite(settings):
    (path,) = generate(settings(steps=1))
    before = path.read_bytes()
    generate(settings(overwrite=True))
    assert path.read_bytes() != before


def test_bad_adapters_fail_before_weights_load(settings, no_weights, expected, tmp_path):
    lora = expected / "dev_2k_lora.safetensors"
    truncated = tmp_path / "t.safetensors"
    truncated.write_bytes(lora.read_bytes()[:500])
    with pytest.raises(ValueError, match="not a whole safetensors file"):
        generate(settings(adapters=(str(truncated),)))
    with pytest.raises(ValueError, match="not a whole safetensors file"):
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
        ({"guidance_scale": -1.0}, "guidance_scale -1.0 must be 0 or more"),
        ({"max_sequence_length": 513}, "max_sequence_length 513 must be between 1 and 512"),
        ({"seed": -1}, "seed -1 must be"),
        ({"loras": (("a", float("nan")),)}, "weight nan of LoRA a must be"),
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
        ({"model_index.json": '{"_class_name": "StableDiffusionPipeline"}'}, "not FLUX"),
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


def test_out_of_gpu_memory_says_what_to_try(settings, monkeypatch):
    def fail(*_, **__):
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(job_module, "_sample", fail)
    with pytest.raises(MemoryError, match=r"64 x 96 pixels with --memory resident; try .*offload"):
        generate(settings())


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


def test_placement(load_pipe, monkeypatch):
    pipe = load_pipe()
    gpu = torch.device("cuda")
    assert choose_placement(pipe, 64, 64, torch.device("cpu")) == "resident"
    assert choose_placement(pipe, 64, 64, gpu, memory="offload") == "offload"
    weights = sum(
        p.numel() * 4
        for part in (pipe.transformer, pipe.vae, pipe.text_encoder, pipe.text_encoder_2)
        for p in part.parameters()
    )
    for free, wanted in ((2 * weights + 2**24, "resident"), (weights, "offload")):
        monkeypatch.setattr("urae.generate.memory.free_bytes", lambda _, free=free: free)
        assert choose_placement(pipe, 64, 64, gpu) == wanted


def test_text_encoders_that_do_not_fit_run_on_the_cpu(settings, monkeypatch, caplog, tmp_path):
    (wanted,) = generate(settings())
    monkeypatch.setattr(job_module, "free_bytes", lambda _: 0)
    (path,) = generate(settings(output_dir=tmp_path / "short"))
    assert "they run on the CPU" in caplog.text
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
    monkeypatch.setattr(
        FluxTransformer2DModel, "compile_repeated_blocks", lambda self: compiled.append(self)
    )
    (path,) = generate(settings())
    assert len(compiled) == 1
    with Image.open(path) as image:
        assert image.text["compiled"] == "true"


def test_decoding_in_stripes_when_memory_is_short(settings, monkeypatch, tmp_path):
    (whole,) = generate(settings(height=256, width=256, steps=1))
    plans = []
    monkeypatch.setattr(job_module, "decode_bytes", lambda _: 3 * 2**20)
    run = job_module.vae.plan_decode
    monkeypatch.setattr(
        "urae.backbones.vae.plan_decode", lambda *a, **k: plans.append(run(*a, **k)) or plans[-1]
    )
    (path,) = generate(settings(height=256, width=256, steps=1, output_dir=tmp_path / "short"))
    assert [plan.whole for plan in plans] == [False]
    found, wanted = (np.array(Image.open(each)).astype(int) for each in (path, whole))
    assert abs(found - wanted).max() <= 1  # on the edge between two 8-bit levels
    monkeypatch.setattr(job_module, "decode_bytes", lambda _: 2**10)
    with pytest.raises(MemoryError, match="decoding 256 x 256 pixels takes at least"):
        generate(settings(height=256, width=256, steps=1, output_dir=tmp_path / "none"))
    assert not (tmp_path / "none").exists()


def test_decoding_takes_twelve_gib_of_a_gpu_at_most(monkeypatch):
    monkeypatch.setattr("urae.generate.memory.usable_bytes", lambda _: 100 * 2**30)
    assert decode_bytes(torch.device("cuda")) == 12 * 2**30
    assert decode_bytes(torch.device("cpu")) == 100 * 2**30
