"""kill -9 at random moments, then --resume: the adapter of an uninterrupted run, to the bit."""

import csv
import multiprocessing
import random
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from urae.train import OptimizerConfig, TrainConfig, train
from urae.train.checkpoint import find_checkpoints, find_damage
from urae.train.output import find_previews

pytestmark = pytest.mark.slow

NUM_KILLS, NUM_STEPS = 20, 24

# a server that has imported everything forks each run, so that a start takes no time
server = multiprocessing.get_context("forkserver")
server.set_forkserver_preload(["urae.train", "urae.features.dataset", "torch._dynamo"])


def run(config: TrainConfig) -> None:
    torch.set_num_threads(1)
    train(config)


def start(config: TrainConfig) -> multiprocessing.process.BaseProcess:
    resume = bool(find_checkpoints(config.output_dir)) and not config.overwrite
    process = server.Process(target=run, args=(replace(config, resume=resume),))
    process.start()
    return process


def same(one: Path, other: Path) -> bool:
    first, second = load_file(one), load_file(other)
    return first.keys() == second.keys() and all(torch.equal(first[k], second[k]) for k in first)


def curve(path: Path) -> list[list[str]]:
    with path.open(newline="") as file:
        return [row[:4] for row in csv.reader(file)]  # the rest has seconds


@pytest.mark.parametrize("kind", ["adamw", "prodigy", "minor"])
def test_killed_runs_resume_bitwise(settings, minor, tmp_path, kind):
    """Runs are killed anywhere, from their first breath to their last file, until all are done."""
    config = settings(
        steps=NUM_STEPS,
        checkpoint_every=1,
        keep_checkpoints=2,
        ema_decay=0.9 if kind == "adamw" else None,
        num_validation=1 if kind == "adamw" else 0,
        validate_every=5,
        preview_prompts=("a lighthouse",) if kind == "adamw" else (),
        preview_every=10,
        optimizer=OptimizerConfig(
            "prodigy" if kind == "prodigy" else "adamw",
            schedule="constant" if kind == "minor" else "cosine",
            warmup_steps=3 if kind == "adamw" else 0,
        ),
    )
    if kind == "minor":
        config = replace(config, adapter=minor)
    for _ in range(2):  # the server itself starts with the first
        began = time.monotonic()
        whole = start(replace(config, overwrite=True))
        whole.join()
        assert whole.exitcode == 0
        seconds = time.monotonic() - began

    moments = random.Random(kind)
    num_kills = num_done = 0
    while num_kills < NUM_KILLS or not num_done:
        output_dir = tmp_path / f"killed_{num_done}"
        process = start(replace(config, output_dir=output_dir))
        if num_kills < NUM_KILLS:
            process.join(moments.uniform(0, seconds))
            process.kill()
        process.join()
        if process.exitcode == 0:
            assert same(output_dir / "pytorch_lora_weights.safetensors",
                        config.output_dir / "pytorch_lora_weights.safetensors")  # fmt: skip
            for name in ("loss.csv", "validation.csv") if kind == "adamw" else ("loss.csv",):
                assert curve(output_dir / name) == curve(config.output_dir / name)
            previews = [
                [path.read_bytes() for path in find_previews(each)]
                for each in (output_dir, config.output_dir)
            ]
            assert previews[0] == previews[1]
            assert len(previews[0]) == (4 if kind == "adamw" else 0)
            assert not list(output_dir.glob(".*"))
            num_done += 1
            continue
        assert process.exitcode == -9
        num_kills += 1
        for checkpoint in find_checkpoints(output_dir):
            assert find_damage(checkpoint) is None
