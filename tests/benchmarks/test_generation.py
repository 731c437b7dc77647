import json
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

sys.path.append(str(Path(__file__).parents[2] / "benchmarks"))

import watch
from generation import GENERATION, link_schnell
from h200 import PARTS

from urae.backbones.flux import load_pipeline

ROOT = Path(__file__).parents[2]


def test_a_base_of_schnells_shape_is_made_of_links(bases, tmp_path):
    bench = SimpleNamespace(work=tmp_path, shape="tiny", base=bases["dev"])
    for _ in range(2):  # made anew by each part
        folder = link_schnell(bench)
    pipe = load_pipeline(str(folder), dtype=torch.float32)
    assert not pipe.transformer.config.guidance_embeds
    assert pipe.scheduler.config.shift == 1
    assert not (bases["dev"] / "transformer" / "config.json").is_symlink()


def test_what_is_watched_is_there():
    for stages in watch.STAGES.values():
        for owner, name in stages.values():
            assert hasattr(watch._find(owner), name)


def test_every_part_of_generation_is_one_of_the_benchmark():
    assert set(GENERATION) < set(PARTS)


@pytest.mark.slow
def test_parts_run_at_a_small_shape(tmp_path):
    folders = ["--output", str(tmp_path / "out"), "--work", str(tmp_path / "work")]
    parts = ["base", "generate_4k_schnell_turbo", "generate_2k_streamed_8gib", "cold_start"]
    parts += ["generate_2k_turbo", "cache_4k"]
    run = [sys.executable, "benchmarks/h200.py", "--shape", "tiny", *folders, "--parts", *parts]
    subprocess.run(run, check=True, cwd=ROOT, env={**os.environ, "PYTHONPATH": str(ROOT)})
    found = {part: json.loads((tmp_path / "out" / f"{part}.json").read_text()) for part in parts}
    ((name, streamed),) = found["generate_2k_streamed_8gib"]["result"].items()
    assert name == "2K LoRA, under 8 GiB"
    assert (streamed["pixels"], streamed["memory"], streamed["cap_gib"]) == (
        [256] * 2,
        "streamed",
        8,
    )
    for each in found["cold_start"]["result"].values():
        assert 0 < each["steps_at"][0] < each["total_seconds"] + 60
    fast = found["generate_2k_turbo"]["result"]["2K LoRA, turbo"]
    assert [len(fast["seconds"][stage]) for stage in ("load", "sample", "decode")] == [1, 4, 4]
    assert len(fast["steps_at"]) == 4 * fast["steps"]
    pictures = found["cache_4k"]["result"]["pictures at 4096^2, cap 10 GiB"]
    assert pictures["pictures_per_second"] > 0
    assert "captions" not in pictures["seconds"]  # they came before
    text = (tmp_path / "out" / "results.md").read_text()
    assert "to its first step" in text
    assert "| pictures at 4096^2, cap 10 GiB |" in text
