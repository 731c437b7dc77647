import logging
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import get_args

import pytest
from PIL import Image
from typer.testing import CliRunner

from urae.adapters.files import read_adapter
from urae.adapters.packaged import FILES, PACKAGED_ADAPTERS
from urae.choices import PartName
from urae.cli.generate import _read_prompts, split_weight
from urae.cli.main import app, main
from urae.cli.terminal import set_up_logging
from urae.generate import Progress

ROOT = Path(__file__).parents[2]
GOLDEN = ROOT / "tests" / "golden"


def run(*arguments, cwd) -> str:
    """Run the installed command as a user would, and return what it printed."""
    command = [sys.executable, "-m", "urae", *map(str, arguments)]
    environment = {**os.environ, "COLUMNS": "120", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, capture_output=True, text=True, cwd=cwd, env=environment)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_the_chain_from_a_folder_of_pictures_to_a_picture(urae, tmp_path):
    """cache -> train -> convert -> generate, both stages, over the reference's folder."""
    data = tmp_path / "data"
    data.mkdir()
    for path in (GOLDEN / "train_data").iterdir():
        if path.suffix in (".jpg", ".json"):
            shutil.copy(path, data)
    model = ("--model", GOLDEN / "base_dev")
    small = (*model, "--resolution", 192)
    run("cache", data, *small, "--max-sequence-length", 48, cwd=tmp_path)
    train = (*small, "--adapter.rank", 4, "--steps", 3)
    recipe = ROOT / "recipes" / "flux_dev_2k_lora.toml"
    assert urae("train", recipe, "--data", data, "--output", "lora", *train)[0] == 0
    recipe = ROOT / "recipes" / "flux_dev_4k_minor.toml"
    over = ("--adapter.over", '["lora"]')
    assert urae("train", recipe, "--data", data, "--output", "minor", *train, *over)[0] == 0
    assert urae("convert", "lora", "minor", "--output", "plain.safetensors")[0] == 0
    layers = read_adapter(tmp_path / "plain.safetensors").layers
    assert {pair.down.shape[0] for pair in layers.values()} == {12}
    pictures = []
    for adapters in (("lora", "minor"), ("plain.safetensors",)):
        flags = [flag for adapter in adapters for flag in ("--adapter", adapter)]
        folder = tmp_path / f"{adapters[0]}-out"
        size = ("--size", "96x64", "--steps", 2, "--seed", 1, "--output", folder)
        assert urae("generate", "a red circle", *model, *size, *flags)[0] == 0
        (path,) = folder.iterdir()
        pictures.append(Image.open(path))
    assert pictures[0].size == (96, 64)
    difference = max(
        abs(a - b) for a, b in zip(pictures[0].tobytes(), pictures[1].tobytes(), strict=True)
    )
    assert difference <= 1


@pytest.fixture
def urae(monkeypatch, capsys, tmp_path):
    """Run the command in this process; return its exit code and what it wrote to stderr."""
    monkeypatch.chdir(tmp_path)

    def call(*arguments):
        monkeypatch.setattr(sys, "argv", ["urae", *map(str, arguments)])
        with pytest.raises(SystemExit) as ended:
            main()
        return ended.value.code, capsys.readouterr().err

    return call


@pytest.mark.parametrize(
    ("options", "adapters"),
    [
        ((), ()),
        (("--size", 512), ("miniature-2k",)),
        (("--size", "4k"), ("miniature-2k", "miniature-4k")),  # its own: 1024
        (("--size", "1024x512"), ("miniature-2k", "miniature-4k")),
        (("--size", 512, "--model", "miniature-dev"), ()),
        (("--size", 1024, "--adapter", "mine.safetensors"), ("mine.safetensors",)),
    ],
)
def test_beyond_native_size_the_default_is_adapted(urae, monkeypatch, options, adapters):
    """A model or an adapter that is named is taken as it is."""
    configs = []
    monkeypatch.setattr("urae.generate.generate", lambda config, **_: configs.append(config) or [])
    for name, file in FILES.items():
        monkeypatch.setitem(PACKAGED_ADAPTERS, name, Path(file))
    _, told = urae("generate", "a red circle", *options)
    assert (configs[0].model, configs[0].adapters) == ("miniature-dev", adapters)
    used = " and ".join(adapters)
    line = f"using {used} beyond 256 x 256; to leave adapters out, give --model miniature-dev\n"
    assert (line in told) == (adapters[:1] == ("miniature-2k",))
    assert told.count("\n") == 1 + (line in told)


def test_ctrl_c_says_where_the_pictures_are(urae, monkeypatch, tmp_path):
    picture = 1

    def generate(_, on_progress):
        on_progress(Progress(picture, 3, 1, 2))
        raise KeyboardInterrupt

    monkeypatch.setattr("urae.generate.generate", generate)
    (tmp_path / "some").mkdir()
    code, told = urae("generate", "a red circle", "--output", "some")
    assert code == 130
    assert "stopped; no picture is finished" in told
    picture = 2
    for options, line in (
        ((), "some\n"),
        (("--seed", 1), "some; --resume makes the others\n"),
        (("--seed", 1, "--overwrite"), "some; --overwrite makes all of them again\n"),
    ):
        code, told = urae("generate", "a red circle", "--output", "some", *options)
        assert code == 130
        assert f"stopped; finished pictures are in {line}" in told


@pytest.mark.parametrize(
    ("prompt", "options", "is_told"),
    [
        ("a red circle", (), False),
        ("a lighthouse at dawn", (), True),
        ("a lighthouse at dawn", ("--model", "flux-dev"), False),
    ],
)
def test_a_prompt_that_the_miniature_cannot_draw(urae, monkeypatch, prompt, options, is_told):
    monkeypatch.setattr("urae.generate.generate", lambda *_, **__: [])
    _, told = urae("generate", prompt, *options)
    wanted = "miniature-dev only knows scenes of its grammar and will draw a different one: caption"
    assert (wanted in told) == is_told


@pytest.mark.parametrize(
    "command", [(), ("cache",), ("train",), ("convert",), ("generate",), ("plan", "generate")]
)
def test_help(command):
    result = CliRunner().invoke(app, [*command, "--help"])
    assert result.exit_code == 0
    assert "Usage" in result.output


def test_help_names_the_parts(monkeypatch):
    monkeypatch.setenv("COLUMNS", "1000")
    result = CliRunner().invoke(app, ["generate", "--help"])
    assert all(name in result.output for name in get_args(PartName))


def test_fields_of_a_recipe():
    result = CliRunner().invoke(app, ["train", "--fields"])
    assert result.exit_code == 0


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("generate", "x", "--size", "1000x1000"), "height 1000 is not a positive multiple of 16"),
        (("generate",), "give either a prompt or --prompts FILE"),
        (("generate", "x", "--model", "{dev}", "--memory", "4bit"), "4bit needs a CUDA device"),
        (
            ("plan", "generate"),
            "no CUDA device; give the memory of the GPU to plan for, as in --gpu 24",
        ),
        (("plan", "generate", "--gpu", "1GiB"), "nothing fits with --memory auto: 1.0 GiB GPU, "),
        (
            ("plan", "generate", "--gpu", "much"),
            "memory 'much' is not an amount such as 24GiB or 24GB",
        ),
        (("generate", "x", "--adapter", "no.safetensors", "--model", "{dev}"), "neither an exist"),
        (("convert", "x.ckpt", "--output", "y.safetensors"), "x.ckpt is a pickle"),
        (("generate", "x", "--model", "flux-dex"), "model 'flux-dex' is neither a local path"),
        (("cache", "nowhere", "--model", "{dev}"), "nowhere"),
        (("train", "no.toml", "--data", "d", "--output", "o"), "recipe no.toml does not exist"),
    ],
)
def test_user_errors_are_one_line_and_code_2(urae, arguments, message):
    code, errors = urae(*[argument.format(dev=GOLDEN / "base_dev") for argument in arguments])
    assert code == 2
    assert errors.startswith("error: ")
    assert message in errors
    assert errors.count("\n") == 1


def test_one_of_several_processes_says_which_it_is(urae, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("RANK", "1")
    code, errors = urae("generate", "x", "--size", "1000x1000")
    assert code == 2
    assert errors.startswith("error in process 1: height 1000 is not")


def test_a_model_folder_that_is_not_whole(urae, tmp_path):
    leave_out = shutil.ignore_patterns("vae")
    folder = shutil.copytree(GOLDEN / "base_dev", tmp_path / "model", ignore=leave_out)
    code, errors = urae("generate", "x", "--model", folder, "--output", tmp_path / "out")
    assert code == 2
    assert "incomplete: vae is missing" in errors
    assert errors.count("\n") == 1


def test_messages_are_not_taken_for_markup(urae):
    _, errors = urae("generate", "x", "--adapter", "no", "--model", GOLDEN / "base_dev")
    assert "[hf://]owner/repo[@revision]/file" in errors


def test_verbose_shows_where(urae):
    code, told = urae("generate", "x", "--size", "1000", "--verbose")
    assert code == 2
    assert "Traceback" in told and "parse_size" in told
    assert told.splitlines()[-1].startswith("error: height 1000 is not")


def test_what_is_skipped_is_named(urae, tmp_path):
    shutil.copytree(GOLDEN / "train_data", tmp_path / "data")
    (tmp_path / "data" / "scan.tiff").write_bytes(b"")
    (tmp_path / "data" / "none.png").write_bytes(b"")
    (tmp_path / "data" / "none.txt").write_text("a caption")
    small = ("--resolution", 192, "--max-sequence-length", 48)
    code, told = urae("cache", "data", "--model", GOLDEN / "base_dev", *small)
    assert code == 0
    assert "  scan.tiff: .tiff cannot be read" in told
    assert "  none.png is not a JPEG" in told


def test_a_mistyped_attention_is_named(urae, monkeypatch):
    """diffusers reads it while it is imported, and fails in words of its own."""

    def fail(*_arguments, **_options):
        raise RuntimeError("Failed to import ...: 'fast' is not a valid AttentionBackendName")

    monkeypatch.setenv("DIFFUSERS_ATTN_BACKEND", "fast")
    monkeypatch.setattr("urae.cli.generate._read_prompts", fail)
    code, errors = urae("generate", "a red circle")
    assert code == 2
    assert "DIFFUSERS_ATTN_BACKEND=fast is not an attention backend of diffusers" in errors


def test_nothing_to_train_on_is_an_error(urae, tmp_path):
    shutil.copytree(GOLDEN / "train_data", tmp_path / "data")
    for file in (tmp_path / "data").glob("*.safetensors"):
        file.unlink()
    large = ("--resolution", 2048, "--max-sequence-length", 48)
    code, told = urae("cache", "data", "--model", GOLDEN / "base_dev", *large)
    assert code == 2
    assert "no picture in data can be trained on at --resolution 2048; choose a smaller" in told


def test_unknown_options_of_a_recipe(urae):
    recipe = ROOT / "recipes" / "flux_dev_2k_lora.toml"
    code, errors = urae("train", recipe, "--data", "d", "--output", "o", "--stesp", 3)
    assert code == 2
    assert "error: --stesp: no such field; did you mean --steps?" in errors


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--steps", 3, "{recipe}"), "the recipe comes first"),
        (
            ("{recipe}", "--data-dir", "x"),
            "data_dir is not a field to override; give it as --data",
        ),
    ],
)
def test_where_options_of_a_run_go(urae, arguments, message):
    recipe = ROOT / "recipes" / "flux_dev_2k_lora.toml"
    arguments = [str(argument).format(recipe=recipe) for argument in arguments]
    code, errors = urae("train", *arguments, "--data", "d", "--output", "o")
    assert code == 2
    assert message in errors


def test_weights_of_loras(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert split_weight("a.safetensors:0.8") == ("a.safetensors", 0.8)
    with pytest.raises(ValueError, match=r"weight '0,7' of LoRA a.safetensors must be a number"):
        split_weight("a.safetensors:0,7")
    assert split_weight("a.safetensors") == ("a.safetensors", 1.0)
    assert split_weight("hf://owner/repo/a.safetensors") == ("hf://owner/repo/a.safetensors", 1.0)
    assert split_weight("hf://o/r/a.safetensors:-1") == ("hf://o/r/a.safetensors", -1.0)


def test_prompt_files(tmp_path):
    path = tmp_path / "prompts.txt"
    path.write_text("one\n\n  two \n")
    assert _read_prompts(None, path) == ("one", "two")
    path.write_bytes(b"\xef\xbb\xbfone\r\n")  # as Windows' Notepad may write it
    assert _read_prompts(None, path) == ("one",)
    path.write_text("\n")
    with pytest.raises(ValueError, match="holds no prompt"):
        _read_prompts(None, path)
    with pytest.raises(FileNotFoundError, match="does not exist"):
        _read_prompts(None, tmp_path / "none")
    path.write_bytes(b"caf\xe9")
    with pytest.raises(ValueError, match=r"prompts.txt is not UTF-8 text"):
        _read_prompts(None, path)


def test_each_process_tells_of_what_it_reads_from_afar(monkeypatch):
    monkeypatch.setenv("RANK", "1")
    set_up_logging(False)
    assert logging.getLogger("urae.features.shard_folder").isEnabledFor(logging.WARNING)
    assert not logging.getLogger("urae.train.loop").isEnabledFor(logging.WARNING)


def test_without_a_terminal_the_cache_tells_how_far_it_is(monkeypatch, tmp_path):
    """Of a job on a cluster that takes days."""
    data = GOLDEN / "train_data"
    for path in [*data.glob("image_[01].jp*g"), *data.glob("image_[01].json")]:
        shutil.copy(path, tmp_path)
    monkeypatch.setattr("urae.cli.cache.SECONDS_BETWEEN_LINES", 0.0)
    base = GOLDEN / "base_dev"
    arguments = ["cache", str(tmp_path), "--model", str(base), "--resolution", "192"]
    outcome = CliRunner().invoke(app, arguments)
    assert outcome.exit_code == 0, outcome.output
    assert re.search(r"^images 1 of 2, [\d.]+/s, ETA 0:\d\d$", outcome.stderr, re.MULTILINE)
    assert "captions 4 of 4," in outcome.stderr


def test_home_is_written_out_after_an_equals_sign(urae, tmp_path, monkeypatch):
    """Shells do so after a space only: else a folder named ~ would be made."""
    monkeypatch.setenv("HOME", str(tmp_path))
    seen = []
    monkeypatch.setattr("urae.cli.main.app", lambda: seen.extend(sys.argv[1:]))
    monkeypatch.setattr(sys, "argv", ["urae", "generate", "a=~/b", "--output=~/pics", "--seed=1"])
    main()
    assert seen == ["generate", "a=~/b", f"--output={tmp_path}/pics", "--seed=1"]
