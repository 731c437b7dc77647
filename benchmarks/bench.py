"""Where the GPU benchmark runs, and how it runs commands."""

import json
import os
import shlex
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from measure import stopwatch
from torch import Tensor

ROOT = Path(__file__).resolve().parents[1]
RANK = 16


@dataclass(frozen=True)
class Bench:
    """Where and at which size to measure."""

    shape: str
    output: Path
    work: Path

    @property
    def tiny(self) -> bool:
        """Tell whether this is a try of the script itself."""
        return self.shape == "tiny"

    @property
    def device(self) -> torch.device:
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")

    @property
    def dtype(self) -> torch.dtype:
        return torch.bfloat16 if self.device.type == "cuda" else torch.float32

    @property
    def base(self) -> Path:
        return self.work / f"base-{self.shape}"

    @property
    def lora(self) -> Path:
        return self.work / f"lora_2k-{self.shape}.safetensors"

    @property
    def minor(self) -> Path:
        return self.work / f"minor_4k-{self.shape}.safetensors"

    def side(self, pixels: int) -> int:
        """Return the side in pixels that stands for one of the full size."""
        return pixels // 8 if self.tiny else pixels


def random_inputs(transformer: Any, bench: Bench, side: int) -> tuple[Tensor, ...]:
    """Draw latents, a sigma and 512 text tokens for `predict_velocity`."""
    config, cells = transformer.config, bench.side(side) // 8
    generator = torch.Generator(bench.device).manual_seed(0)

    def draw(*shape: int) -> Tensor:
        numbers = torch.randn(*shape, generator=generator, device=bench.device)
        return numbers.to(bench.dtype)

    sigma = torch.full((1,), 0.7, device=bench.device)
    latents = draw(1, config.in_channels // 4, cells, cells)
    text = draw(1, 512, config.joint_attention_dim), draw(1, config.pooled_projection_dim)
    return latents, sigma, *text


@torch.no_grad()
def time_forwards(transformer: Any, bench: Bench, side: int, count: int) -> list[float]:
    """Time forwards at a size, after one that is not counted."""
    from urae.backbones.flux import predict_velocity

    inputs = random_inputs(transformer, bench, side)
    found = []
    for index in range(count + 1):
        with stopwatch() as seconds:
            velocity = predict_velocity(transformer, *inputs, 3.5)
        assert velocity.isfinite().all(), "the forward is not finite"
        if index:
            found.append(seconds())
    return found


def find_attention(transformer: Any) -> str:
    """Name the attention that a transformer's layers have been set to, or the process's own."""
    names = {processor._attention_backend for processor in transformer.attn_processors.values()}
    return ", ".join(sorted(str(name.value) if name else "default" for name in names))


def torchrun(num_processes: int) -> list[str]:
    """Return the words before a script that is to run in several processes."""
    module = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    return [*module, "--nproc-per-node", str(num_processes)]


def run_urae(
    bench: Bench, *arguments: str, cap_gib: float | None = None, gpus: int = 1
) -> dict[str, Any]:
    """Run a `urae` command in a process a GPU, watched, and return the first one's figures.

    Args:
        bench: Where.
        arguments: Of the command.
        cap_gib: Device memory that torch may take; by default all.
        gpus: Processes.
    """
    figures = bench.work / "figures.json"
    figures.unlink(missing_ok=True)
    print("$ urae", shlex.join(arguments), flush=True)
    start = [sys.executable] if gpus == 1 else torchrun(gpus)
    watch = [*start, str(ROOT / "benchmarks" / "watch.py"), str(figures)]
    environment = dict(os.environ)
    if cap_gib is not None:
        environment["URAE_BENCHMARK_CAP_GIB"] = str(cap_gib)
    if bench.device.type == "cpu":
        environment["ACCELERATE_USE_CPU"] = "true"
    subprocess.run([*watch, *arguments], check=True, cwd=ROOT, env=environment)
    return {"command": f"urae {shlex.join(arguments)}", **json.loads(figures.read_text())}
