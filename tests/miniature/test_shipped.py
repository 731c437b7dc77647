"""The miniature that ships with the package, as a model like any other."""

import csv
import json
import tomllib

import pytest
import torch
from diffusers import FluxPipeline

from urae.backbones.flux import PACKAGED, fetch_model, find_native_side
from urae.features.cache import CacheConfig, cache
from urae.generate import GenerateConfig, generate
from urae.miniature.check import check_scene
from urae.miniature.model import HELD_OUT_SEED, POLICY
from urae.miniature.score import held_out_scenes, summarize
from urae.miniature.sources import write_folder
from urae.miniature.synthetic import generate_pictures
from urae.miniature.world import caption, sample_scene
from urae.resolution import read_base_policy
from urae.train import train
from urae.train.config import OptimizerConfig, TrainConfig

MAX_BYTES = 36_000_000


@pytest.fixture(scope="module")
def pipe():
    pipe = FluxPipeline.from_pretrained(PACKAGED["miniature-dev"], dtype=torch.float32)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def score(pipe, *, side, count):
    scenes = held_out_scenes(count)
    captions = [caption(scene) for scene in scenes]
    noises = [torch.Generator().manual_seed(scene.seed) for scene in scenes]
    sampling = {"side": side, "steps": 16, "guidance_scale": 3.5}
    pictures = generate_pictures(pipe, captions, noises, **sampling)
    reports = [
        check_scene(each.numpy(), scene) for each, scene in zip(pictures, scenes, strict=True)
    ]
    return summarize(reports)


def test_it_is_found_by_name_and_carries_its_policy(tmp_path, monkeypatch):
    folder = fetch_model("miniature-dev")
    assert read_base_policy(folder) == POLICY
    assert find_native_side("miniature-dev") == 256
    assert find_native_side("flux-dev") == find_native_side("someone/a-flux") == 1024
    monkeypatch.chdir(tmp_path)  # a path that exists wins
    (tmp_path / "miniature-dev").mkdir()
    with pytest.raises(ValueError, match=r"no model_index\.json"):
        fetch_model("miniature-dev")


def test_it_is_small_and_says_what_it_comes_from():
    files = [file for folder in PACKAGED.values() for file in folder.rglob("*") if file.is_file()]
    assert sum(file.stat().st_size for file in files) < MAX_BYTES
    for name, folder in PACKAGED.items():
        record = json.loads((folder / "recipe.json").read_text())
        for stage, metadata in record.items():
            assert metadata["urae.stage"] == stage
            assert len(metadata["urae.commit"]) >= 7
            assert stage in tomllib.loads(metadata["urae.recipe"])
        assert name in (folder / "README.md").read_text()


def test_it_draws_what_captions_say(pipe):
    found = score(pipe, side=256, count=6)
    assert found["share"] >= 4 / 6 and found["background"] == found["texture"] == 1


@pytest.mark.slow
def test_larger_pictures_repeat_objects(pipe):
    found = score(pipe, side=512, count=8)
    assert found["share"] <= 0.5 and found["objects"] <= 0.5
    assert found["background"] == 1


def test_a_short_run_beyond_native_size_learns(tmp_path):
    """The loss on held-out pictures, each compared with itself, falls."""
    data = tmp_path / "data"
    write_folder(data, "clean", range(12), 1, 384, 384)
    cache(CacheConfig(data, "miniature-dev", 384))
    config = TrainConfig(
        model="miniature-dev",
        data_dir=data,
        output_dir=tmp_path / "run",
        resolution=384,
        steps=24,
        num_validation=5,
        gradient_checkpointing="off",
        optimizer=OptimizerConfig(name="adamw", lr=2e-3),
    )
    train(config)
    with (config.output_dir / "validation.csv").open(newline="") as file:
        first, last = csv.DictReader(file)
    names = [name for name in first if name.startswith("sample_")]
    changes = torch.tensor([float(last[name]) - float(first[name]) for name in names])
    assert changes.mean() + 1.96 * changes.std() / len(changes) ** 0.5 < 0


def test_generating_with_it(tmp_path):
    prompt = caption(sample_scene(HELD_OUT_SEED))
    config = GenerateConfig(
        (prompt,), "miniature-dev", height=64, width=64, steps=1, seed=0, output_dir=tmp_path
    )
    (path,) = generate(config)
    assert path.is_file()
