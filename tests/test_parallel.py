"""Several processes on the CPU (gloo): context parallelism and data parallelism."""

import math
import os
import socket
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file
from torch import multiprocessing

from urae.backbones.flux import load_transformer
from urae.geometry import build_image_ids, build_text_ids
from urae.resolution import ResolutionPolicy, apply_policy
from urae.train.output import find_previews

ROOT = Path(__file__).parents[1]
GOLDEN = ROOT / "tests" / "golden"

pytestmark = pytest.mark.slow


def free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return listener.getsockname()[1]


def compare_with_one_process(rank: int, port: int, folder: str) -> None:
    from diffusers import ContextParallelConfig
    from torch import distributed
    from torch.distributed.device_mesh import init_device_mesh

    torch.set_num_threads(1)
    distributed.init_process_group(
        "gloo", init_method=f"tcp://127.0.0.1:{port}", rank=rank, world_size=2
    )
    transformer = load_transformer(GOLDEN / "base_dev", dtype=torch.float32)
    apply_policy(transformer, ResolutionPolicy())
    generator = torch.Generator().manual_seed(0)
    inputs = {
        "hidden_states": torch.randn(1, 64, 64, generator=generator),
        "encoder_hidden_states": torch.randn(1, 8, 32, generator=generator),
        "pooled_projections": torch.randn(1, 24, generator=generator),
        "timestep": torch.ones(1),
        "guidance": torch.ones(1),
        "img_ids": build_image_ids(8, 8),
        "txt_ids": build_text_ids(8),
    }
    with torch.no_grad():
        alone = transformer(**inputs, return_dict=False)[0]
        torch.accelerator.device_count = lambda: 1  # diffusers divides by it, and the CPU has none
        mesh = init_device_mesh("cpu", (1, 2), mesh_dim_names=("ring", "ulysses"))
        transformer.enable_parallelism(config=ContextParallelConfig(ulysses_degree=2, mesh=mesh))
        together = 1 * transformer(**inputs, return_dict=False)[0]  # waits for the gather
    torch.save((alone, together), Path(folder) / f"{rank}.pt")
    distributed.destroy_process_group()


def test_context_parallelism_has_the_global_length(tmp_path, rel):
    multiprocessing.spawn(compare_with_one_process, (free_port(), str(tmp_path)), nprocs=2)
    for rank in range(2):
        alone, together = torch.load(tmp_path / f"{rank}.pt")
        assert rel(together, alone) < 1e-5


def test_two_processes_train_as_one_that_accumulates(tmp_path, rel):
    def train(*arguments: str, launcher: tuple[str, ...]) -> None:
        command = [
            *launcher, "-m", "urae", "train", str(ROOT / "recipes" / "flux_dev_2k_lora.toml"),
            "--data", str(GOLDEN / "train_data"), "--model", str(GOLDEN / "base_dev"),
            "--resolution", "256", "--adapter.rank", "4", "--steps", "2",
            "--preview-prompts", '["a", "b", "c"]', *arguments,
        ]  # fmt: skip
        environment = {**os.environ, "ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": "1"}
        done = subprocess.run(
            command, cwd=tmp_path, env=environment, capture_output=True, text=True
        )
        assert done.returncode == 0, done.stderr

    torchrun = (sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2",
                "--master-port", str(free_port()))  # fmt: skip
    train("--output", "two", launcher=torchrun)
    train("--output", "one", "--gradient-accumulation", "2", launcher=(sys.executable,))
    two, one = (
        load_file(tmp_path / name / "pytorch_lora_weights.safetensors") for name in ("two", "one")
    )
    for key, tensor in one.items():
        assert rel(two[key], tensor) < 1e-4
    shared, alone = (
        {path.relative_to(tmp_path / name): path for path in find_previews(tmp_path / name)}
        for name in ("two", "one")
    )
    assert shared.keys() == alone.keys()
    assert len(alone) == 6  # three prompts before the first step and after the last
    for name, path in alone.items():
        first, second = (np.asarray(Image.open(each)).astype(int) for each in (path, shared[name]))
        assert np.abs(first - second).max() <= 1


class Line(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.weight = torch.nn.Parameter(torch.ones(3))


def train_a_line(rank: int, port: int, folder: str, num_ranks: int) -> None:
    from torch import distributed

    from urae.miniature.loop import LoopConfig, StageRun, run_loop

    if num_ranks > 1:
        distributed.init_process_group(
            "gloo", init_method=f"tcp://127.0.0.1:{port}", rank=rank, world_size=num_ranks
        )
    device = torch.device("cpu")
    # stopped halfway by the clock, then gone on with
    for max_seconds, done in ((-1.0, False), (math.inf, True)):
        run = StageRun(Path(folder), 0, {}, device, max_seconds, rank, num_ranks)
        line = Line()
        wanted = torch.arange(12.0).view(4, 3)
        own = wanted[rank * run.share(4) : (rank + 1) * run.share(4)]

        def compute_loss(step, generator, line=line, own=own):
            return (line.weight - own).square().mean(), {}

        found = run_loop(line, compute_loss, LoopConfig(120, 0.1), "line", run)
        assert found == done
        if num_ranks > 1:
            distributed.barrier()
    torch.save(line.weight, Path(folder) / f"{rank}.pt")
    if num_ranks > 1:
        distributed.destroy_process_group()


def test_two_processes_share_a_stage_of_the_miniature(tmp_path):
    for folder in ("two", "one"):
        (tmp_path / folder).mkdir()
    arguments = (free_port(), str(tmp_path / "two"), 2)
    multiprocessing.spawn(train_a_line, arguments, nprocs=2)
    train_a_line(0, 0, str(tmp_path / "one"), 1)
    first, second, alone = (
        torch.load(tmp_path / name) for name in ("two/0.pt", "two/1.pt", "one/0.pt")
    )
    assert torch.equal(first, second)
    torch.testing.assert_close(first, alone)
