"""Damaged features and lost processes: a clear error, and nothing that was done is lost."""

import os
import shutil
import socket
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from urae.train import train
from urae.train.checkpoint import find_checkpoints, find_damage

ROOT = Path(__file__).parents[2]


@pytest.fixture
def data_dir(settings, tmp_path) -> Path:
    return shutil.copytree(settings().data_dir, tmp_path / "data")


@pytest.mark.parametrize("kind", ["latent_code", "embed"])
@pytest.mark.parametrize("at", [3, 40, 0.5, -1], ids=["length", "header", "middle", "end"])
def test_truncated_features_are_refused_before_weights_load(
    settings, data_dir, monkeypatch, kind, at
):
    monkeypatch.setattr("urae.train.loop.load_transformer", None)
    path = next(data_dir.glob(f"image_2*{kind}.safetensors"))
    data = path.read_bytes()
    path.write_bytes(data[: int(at * len(data)) if isinstance(at, float) else at])
    with pytest.raises(ValueError, match=rf"feature file .*{path.name} cannot be used: .* delete"):
        train(settings(data_dir=data_dir))


def test_nan_in_features_stops_the_run_and_loses_nothing(settings, data_dir, tmp_path):
    """The sample turns bad after two steps; once it is mended the run goes on as if nothing was."""
    config = settings(data_dir=data_dir, steps=8)
    kept = shutil.copytree(data_dir, tmp_path / "kept")

    def spoil(report):
        for path in data_dir.glob("*_latent_code.safetensors") if report.step == 2 else []:
            tensors = load_file(path)
            tensors["mean"][0, 0, 0] = torch.nan
            save_file(tensors, path)

    with pytest.raises(ValueError, match=r"'mean' holds values that are not finite; delete it"):
        train(config, on_step=spoil)
    (saved,) = find_checkpoints(config.output_dir)
    assert saved.step in (2, 3)  # the third batch may have been read before
    resumed = train(replace(config, data_dir=kept, resume=True))
    whole = train(replace(config, data_dir=kept, output_dir=tmp_path / "whole"))
    found = load_file(resumed.adapter_path)
    assert all(torch.equal(found[key], t) for key, t in load_file(whole.adapter_path).items())


# --- several processes ----------------------------------------------------------------------------


def start_ranks(config, number: int, *arguments: str) -> list[subprocess.Popen]:
    """Start the processes of one run by hand, with no launcher that would end them all."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        port = listener.getsockname()[1]
    command = [
        sys.executable, "-m", "urae", "train", str(ROOT / "recipes" / "flux_dev_2k_lora.toml"),
        "--data", str(config.data_dir), "--output", str(config.output_dir),
        "--model", config.model, "--resolution", "256", "--adapter.rank", "4",
        "--checkpoint-every", "1", *arguments,
    ]  # fmt: skip
    ranks = {"WORLD_SIZE": str(number), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    return [
        subprocess.Popen(
            command,
            env={**os.environ, "ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": "1"}
            | (ranks | {"RANK": str(rank), "LOCAL_RANK": str(rank)} if number > 1 else {}),
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(number)
    ]


def wait_for_step(config, step: int, processes: list[subprocess.Popen]) -> None:
    deadline = time.monotonic() + 240
    while not any(c.step >= step for c in find_checkpoints(config.output_dir)):
        assert all(process.poll() is None for process in processes), processes[0].communicate()
        assert time.monotonic() < deadline
        time.sleep(0.05)


@pytest.mark.slow
@pytest.mark.parametrize("lost", [0, 1])
def test_a_lost_rank_ends_the_others(settings, lost):
    config = settings()
    processes = start_ranks(config, 2, "--steps", "100000")
    try:
        wait_for_step(config, 2, processes)
        processes[lost].kill()
        began = time.monotonic()
        _, errors = processes[1 - lost].communicate(timeout=60)
        assert time.monotonic() - began < 30
    finally:
        for process in processes:
            process.kill()
            process.communicate()
    assert processes[1 - lost].returncode == 1, errors
    assert "another process of this run has ended or cannot be reached (" in errors
    checkpoints = find_checkpoints(config.output_dir)
    assert all(find_damage(checkpoint) is None for checkpoint in checkpoints)
    with (config.output_dir / "loss.csv").open() as file:
        steps = [int(line.split(",")[0]) for line in list(file)[1:]]
    assert steps == list(range(1, len(steps) + 1))
    if lost == 1:  # the main process saves before it ends
        assert steps[-1] == checkpoints[-1].step


def finish(processes: list[subprocess.Popen]) -> None:
    for process in processes:
        _, errors = process.communicate(timeout=240)
        assert process.returncode == 0, errors


@pytest.mark.slow
def test_two_processes_go_on_as_one_that_accumulates(settings, tmp_path, rel):
    config, alone = settings(), settings(output_dir=tmp_path / "alone")
    as_one = ("--steps", "4", "--gradient-accumulation", "2")
    finish(start_ranks(config, 2, "--steps", "2"))
    finish([*start_ranks(config, 1, *as_one, "--resume"), *start_ranks(alone, 1, *as_one)])
    found, wanted = (
        load_file(each.output_dir / "pytorch_lora_weights.safetensors") for each in (config, alone)
    )
    for key, tensor in wanted.items():
        assert rel(found[key], tensor) < 1e-4
