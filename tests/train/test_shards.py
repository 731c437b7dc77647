"""A run reads shards as it reads loose files: the same adapter, and nothing lost when they fail."""

import os
import shutil
import subprocess
import sys
import tomllib
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from fsspec.implementations.memory import MemoryFileSystem
from safetensors.torch import load_file
from typer.testing import CliRunner

from urae.cli.main import app
from urae.features.pack import PackConfig, pack
from urae.train import TrainConfig, train
from urae.train.checkpoint import find_checkpoints
from urae.train.plan import plan_training

ROOT = Path(__file__).parents[2]
TWO_SAMPLES = 260 / 2**20  # GiB, of the tiny model
FAR = "memory://bucket/data"


@pytest.fixture
def shards(settings, tmp_path) -> Path:
    pack(PackConfig(settings().data_dir, tmp_path / "shards", TWO_SAMPLES))
    assert len(list((tmp_path / "shards").glob("*.tar"))) == 2
    return tmp_path / "shards"


@pytest.fixture
def bucket(shards, tmp_path, monkeypatch):
    """The shards at a URL: fsspec's memory stands for a bucket, with a local cache of its own."""
    monkeypatch.setenv("URAE_CACHE_DIR", str(tmp_path / "cache"))
    files = MemoryFileSystem()
    files.put(f"{shards}/", "/bucket/data/", recursive=True)
    yield files
    files.rm("/bucket", recursive=True)


@pytest.fixture
def whole(settings, tmp_path) -> dict[str, torch.Tensor]:
    """The adapter of an uninterrupted run on loose files."""
    return load_file(train(settings(output_dir=tmp_path / "whole")).adapter_path)


def assert_same(path: Path, wanted: dict[str, torch.Tensor]) -> None:
    found = load_file(path)
    assert found.keys() == wanted.keys()
    assert all(torch.equal(found[key], tensor) for key, tensor in wanted.items())


def test_any_form_of_the_features_gives_the_same_adapter(settings, shards, bucket, whole, tmp_path):
    """Also where a run goes on from another form than it began with."""
    for number, place in enumerate((shards, f"file://{shards}", FAR)):
        config = settings(output_dir=tmp_path / f"{number}", data_dir=place)
        assert_same(train(config).adapter_path, whole)
    config = settings(steps=1)
    train(config)
    for steps, place in ((2, shards), (3, FAR), (4, config.data_dir)):
        result = train(replace(config, steps=steps, data_dir=place, resume=True))
    assert_same(result.adapter_path, whole)


def test_other_features_are_refused(settings, shards, tmp_path):
    train(settings(steps=1, data_dir=shards))
    loose = shutil.copytree(settings().data_dir, tmp_path / "data")
    for path in loose.glob("image_3_*"):
        path.unlink()
    pack(PackConfig(loose, shards))
    with pytest.raises(ValueError, match=r"the features in \S+shards are not those that"):
        train(settings(steps=2, data_dir=shards, resume=True))


def test_a_shard_damaged_on_the_way_loses_nothing(settings, shards, whole, tmp_path):
    config = settings(data_dir=shards)
    kept = shutil.copytree(shards, tmp_path / "kept")

    def spoil(report):
        for path in shards.glob("*.tar") if report.step == 1 else []:
            data = path.read_bytes()
            path.write_bytes(bytes([data[0]]) + bytes(byte ^ 1 for byte in data[1:]))

    message = r"image_\d_\w+.safetensors in shard \S+.tar cannot be used: its bytes have changed"
    with pytest.raises(ValueError, match=message):
        train(config, on_step=spoil)
    (checkpoint,) = find_checkpoints(config.output_dir)
    assert checkpoint.step in (1, 2)  # a step's batch may have been read ahead
    assert_same(train(replace(config, data_dir=kept, resume=True)).adapter_path, whole)


def test_a_bucket_that_vanishes_loses_nothing(settings, shards, bucket, whole):
    config = settings(data_dir=FAR, remote_cache_gib=0.0)

    def vanish(report):
        for path in bucket.glob("/bucket/data/*.tar") if report.step == 1 else []:
            bucket.rm(path)

    message = r"image_\d_\w+.safetensors in shard memory://bucket/data/\S+ is missing; restore"
    with pytest.raises(FileNotFoundError, match=message):
        train(config, on_step=vanish)
    (checkpoint,) = find_checkpoints(config.output_dir)
    assert checkpoint.step in (1, 2)  # a step's batch may have been read ahead
    bucket.put(f"{shards}/", "/bucket/data/", recursive=True)
    assert_same(train(replace(config, resume=True)).adapter_path, whole)


def test_the_command_takes_a_url(settings, bucket, whole, tmp_path):
    config = settings()
    arguments = [
        ROOT / "recipes" / "flux_dev_2k_lora.toml", "--data", FAR, "--output", config.output_dir,
        "--model", config.model, "--resolution", 256, "--steps", 4, "--adapter.rank", 4,
        "--optimizer.name", "adamw", "--optimizer.lr", 1e-3,
    ]  # fmt: skip
    outcome = CliRunner().invoke(app, ["train", *map(str, arguments)])
    assert outcome.exit_code == 0, outcome.output
    record = tomllib.loads((config.output_dir / "run.toml").read_text())["record"]
    assert record["data_dir"] == record["data"]["path"] == FAR
    assert_same(config.output_dir / "pytorch_lora_weights.safetensors", whole)


def test_a_plan_is_the_same(settings, shards):
    plans = [
        plan_training(settings(data_dir=data), 2**34) for data in (settings().data_dir, shards)
    ]
    assert plans[0] == plans[1]
    assert plans[0].cache_bytes > 0


def test_a_size_of_the_cache_that_makes_no_sense():
    with pytest.raises(ValueError, match=r"remote_cache_gib -1.0 must be 0 or more"):
        TrainConfig("a", Path("b"), Path("c"), remote_cache_gib=-1)


@pytest.mark.slow
def test_two_processes_on_shards_train_as_on_loose_files(settings, shards, tmp_path):
    """Also where they stop halfway, and resume."""
    config = settings()

    def run(data: Path, output: str, *arguments: str) -> Path:
        command = [
            sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2",
            "-m", "urae", "train", ROOT / "recipes" / "flux_dev_2k_lora.toml", "--data", data,
            "--output", tmp_path / output, "--model", config.model, "--resolution", "256",
            "--adapter.rank", "4", *arguments,
        ]  # fmt: skip
        environment = {**os.environ, "ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": "1"}
        done = subprocess.run(
            map(str, command), env=environment, capture_output=True, text=True, check=False
        )
        assert done.returncode == 0, done.stderr
        return tmp_path / output / "pytorch_lora_weights.safetensors"

    wanted = load_file(run(config.data_dir, "loose", "--steps", "4"))
    run(shards, "packed", "--steps", "2")
    assert_same(run(shards, "packed", "--steps", "4", "--resume"), wanted)
