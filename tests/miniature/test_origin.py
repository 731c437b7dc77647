"""A stage goes on with the recipe and the files that it began with, and works with no others."""

import errno
import json

import pytest
import torch

from urae.backbones.flux import PACKAGED
from urae.miniature.export import export_pipelines, unpack_pipelines
from urae.miniature.model import build_miniature, read_weights, write_weights
from urae.miniature.origin import describe_origin
from urae.miniature.recipe import FlowStage, LoopConfig
from urae.miniature.stages import load_stage, train_stage, write_record
from urae.miniature.text import TEXT_PARTS

STAGE = "batch_size = 2\nnum_scenes = 2\nloop = { steps = 3, lr = 1e-3, warmup_steps = 1 }\n"
RECIPE = "[vae]\nloop = { steps = 1, lr = 1e-3 }\n[text]\n" + STAGE.replace("scenes", "captions")
RECIPE += "".join(
    f"[{name}]\n{STAGE}"
    for name in ("base", "refined", "dev", "schnell", "teacher_256", "teacher_512", "teacher_1024")
)


@pytest.fixture
def recipe(tmp_path):
    path = tmp_path / "recipe.toml"
    path.write_text(RECIPE)
    return path


@pytest.fixture
def work(tmp_path):
    """A folder with a VAE and text encoders that say nothing of what they are made from."""
    folder = tmp_path / "work"
    for name, parts in (("vae", ("vae",)), ("text", TEXT_PARTS)):
        write_stage(folder, name, parts, {"latent_mean": "0.0", "latent_std": "1.0"})
    return folder


def write_stage(work, name, parts=("transformer",), metadata=None, seed=0):
    models = build_miniature("dev", guided=name == "dev", seed=seed)
    found = {part: models[part] for part in parts}
    metadata = {"urae.stage": name, "urae.recipe": RECIPE, **(metadata or {})}
    write_weights(work / f"{name}.safetensors", found, write_record({name: metadata}, name))


def origin_of(work, *names):
    section = FlowStage(LoopConfig(steps=1, lr=1e-3))
    return describe_origin(0, section, [work / f"{name}.safetensors" for name in names])


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("lr = 1e-3, w", "lr = 2e-3, w", "made with lr = 0.001, but the recipe now says 0.002"),
        ("[vae]", "seed = 5\n[vae]", "made with seed = 0, but the recipe now says 5"),
        (
            "num_captions = 2",
            "num_captions = 3",
            "made with num_captions = 2, but the recipe now says 3",
        ),
    ],
)
def test_a_stage_does_not_go_on_with_another_recipe(recipe, tmp_path, old, new, message):
    assert train_stage("text", recipe, tmp_path, max_seconds=0) is None
    recipe.write_text(RECIPE.replace(old, new))
    with pytest.raises(ValueError, match=f"text.state.pt was {message}; .* or delete this file"):
        train_stage("text", recipe, tmp_path)
    recipe.write_text(RECIPE.replace("[dev]", "[dev]\nsigma_shift = 2.0"))  # another stage's
    assert train_stage("text", recipe, tmp_path, max_seconds=0) is None
    (tmp_path / "text.state.pt").unlink()
    recipe.write_text(RECIPE.replace(old, new))
    assert train_stage("text", recipe, tmp_path, max_seconds=0) is None


def test_a_stage_does_not_go_on_with_other_files(recipe, work):
    assert train_stage("base", recipe, work, max_seconds=0) is None
    kept = (work / "text.safetensors").read_bytes()
    write_stage(work, "text", TEXT_PARTS, seed=1)
    with pytest.raises(ValueError, match=r"base\.state\.pt was made from a different text\.saf"):
        train_stage("base", recipe, work)
    (work / "text.safetensors").write_bytes(kept)
    assert train_stage("base", recipe, work) == work / "base.safetensors"
    assert json.loads(read_weights(work / "base.safetensors", {})["urae.inputs"]).keys() == {
        "vae.safetensors",
        "text.safetensors",
    }


def test_a_stage_that_is_done_is_kept(recipe, work):
    before = (work / "text.safetensors").read_bytes()
    with pytest.raises(
        FileExistsError, match=r"text\.safetensors already exists and is kept; delete"
    ):
        train_stage("text", recipe, work)
    assert (work / "text.safetensors").read_bytes() == before


def test_a_stage_works_with_the_files_that_it_was_trained_on(recipe, work, tmp_path):
    write_stage(work, "dev", metadata=origin_of(work, "vae", "text"))
    write_stage(work, "base", metadata=origin_of(work, "vae", "text"))
    load_stage("dev", work)
    write_stage(work, "text", TEXT_PARTS, seed=1)
    message = r"{}.safetensors was trained on another .*text.safetensors; restore .* train {}"
    with pytest.raises(ValueError, match=message.format("dev", "dev")):
        load_stage("dev", work)
    with pytest.raises(ValueError, match=message.format("dev", "dev")):
        export_pipelines(work, tmp_path / "models")
    assert not (tmp_path / "models").exists()
    with pytest.raises(ValueError, match=message.format("base", "base")):
        train_stage("refined", recipe, work)


def test_files_that_do_not_say_what_they_come_from_are_taken(work):
    write_stage(work, "dev")
    write_stage(work, "text", TEXT_PARTS, seed=1)
    load_stage("dev", work)


def test_what_ships_unpacks_to_the_very_files_it_was_made_from(work, tmp_path, monkeypatch):
    """So that stages know them by their SHA-256."""
    write_stage(work, "dev", metadata=origin_of(work, "vae", "text"))
    record = {
        name: read_weights(work / f"{name}.safetensors", {}) for name in ("vae", "text", "dev")
    }
    for each in record.values():
        each.pop("urae.history")
    weights = build_miniature("dev", guided=True, seed=0)
    write_weights(
        work / "dev.safetensors",
        {"transformer": weights["transformer"]},
        write_record(record, "dev"),
    )
    (folder,) = export_pipelines(work, tmp_path / "models")
    monkeypatch.setitem(PACKAGED, "miniature-dev", folder)
    monkeypatch.delitem(PACKAGED, "miniature-schnell")
    for path in unpack_pipelines(tmp_path / "unpacked"):
        assert path.read_bytes() == (work / path.name).read_bytes()
    load_stage("dev", tmp_path / "unpacked")


# --- the disk -------------------------------------------------------------------------------------


@pytest.mark.parametrize("damage", ["empty", "text", "cut", "bit", "other", "shape", "list"])
def test_a_damaged_state_is_named(recipe, tmp_path, damage):
    train_stage("text", recipe, tmp_path, max_seconds=0)
    path = tmp_path / "text.state.pt"
    whole = path.read_bytes()
    state = torch.load(path)
    flipped = bytes([whole[len(whole) // 2] ^ 1])
    files = {
        "empty": b"",
        "text": b"junk",
        "cut": whole[: len(whole) // 2],
        "bit": whole[: len(whole) // 2] + flipped + whole[len(whole) // 2 + 1 :],
    }
    if damage in files:
        path.write_bytes(files[damage])
    elif damage == "other":
        torch.save({"junk": 1}, path)
    elif damage == "shape":
        torch.save({**state, "weights": torch.zeros(1)}, path)
    else:
        torch.save([1], path)
    with pytest.raises(
        ValueError, match=r"text\.state\.pt is not the complete state of a stage; delete"
    ):
        train_stage("text", recipe, tmp_path)


@pytest.mark.slow
def test_a_full_disk_leaves_the_state_of_before(recipe, tmp_path, monkeypatch):
    train_stage("text", recipe, tmp_path, max_seconds=0)
    before = (tmp_path / "text.state.pt").read_bytes()

    def fill(_):
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr("urae.storage.os.fsync", fill)
        with pytest.raises(OSError, match=r"no space left for .* MiB"):
            train_stage("text", recipe, tmp_path, max_seconds=0)
    assert (tmp_path / "text.state.pt").read_bytes() == before
    assert sorted(path.name for path in tmp_path.iterdir()) == ["recipe.toml", "text.state.pt"]
    assert train_stage("text", recipe, tmp_path) == tmp_path / "text.safetensors"
