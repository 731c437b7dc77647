"""kill -9 at random moments, then --resume: the adapter of an uninterrupted run, to the bit."""

import os
import random
import subprocess
import sys
import time

import pytest
import torch
from safetensors.torch import load_file

from urae.train import train
from urae.train.checkpoint import find_checkpoints

pytestmark = pytest.mark.slow

NUM_KILLS, NUM_STEPS = 6, 120


def test_killed_runs_resume_bitwise(settings, tmp_path):
    config = settings(steps=NUM_STEPS, checkpoint_every=1)
    recipe = tmp_path / "recipe.toml"
    recipe.write_text(
        f'model = "{config.model}"\nresolution = 256\nsteps = {NUM_STEPS}\ncheckpoint_every = 1\n'
        "gradient_checkpointing = false\n"
        '[adapter]\nrank = 4\n[optimizer]\nname = "adamw"\nlr = 1e-3\n'
    )
    command = [sys.executable, "-m", "urae", "train", str(recipe), "--data", str(config.data_dir),
               "--output", str(config.output_dir)]  # fmt: skip
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    waits = random.Random(0)
    for _ in range(NUM_KILLS):
        before = len(find_checkpoints(config.output_dir))
        resume = ["--resume"] if before else []
        process = subprocess.Popen([*command, *resume], env=environment, stderr=subprocess.DEVNULL)
        while process.poll() is None and len(find_checkpoints(config.output_dir)) <= before:
            time.sleep(0.01)
        time.sleep(waits.uniform(0, 0.5))
        assert process.poll() is None, "the run ended before it could be killed; give it more steps"
        process.kill()
        process.wait()
    subprocess.run([*command, "--resume"], env=environment, check=True, capture_output=True)
    whole = train(settings(steps=NUM_STEPS, output_dir=tmp_path / "whole"))
    resumed = load_file(config.output_dir / whole.adapter_path.name)
    for key, tensor in load_file(whole.adapter_path).items():
        assert torch.equal(resumed[key], tensor)
    assert not list(config.output_dir.glob(".*"))
