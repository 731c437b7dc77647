"""What the miniature loses beyond its native size without any adapter, by positions.

    python benchmarks/positions.py
    python benchmarks/positions.py --sides 512 --count 64 --factors 40 auto --adapter miniature-2k

The flow loss on true renders that nothing trains on, at guidance 1 and the same noises for all
rows, at noisy levels, where a picture's layout is decided, and at the rest; with the 95% interval
of its paired difference from the reference's factor of 10, by Student's t.
"""

import argparse
import platform
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import urae
from urae.backbones.devices import pick_device
from urae.backbones.flux import load_pipeline
from urae.flow import add_noise, flow_loss
from urae.miniature.export import unpack_pipelines
from urae.miniature.flow import CaptionedTransformer
from urae.miniature.model import POLICY
from urae.miniature.pool import Pool, build_pool
from urae.miniature.text import TEXT_PARTS
from urae.resolution import ResolutionPolicy
from urae.study.statistics import compare

FIRST_SEED = 2**41
LEVELS = {"sigma 0.85 to 1": (0.85, 1.0), "sigma 0.3 to 0.85": (0.3, 0.85)}
FACTORS = ["10", "1", "40", "80", "1000", "3000", "10000", "auto"]
REFERENCE = "10"


@torch.no_grad()
def measure_losses(pipe: Any, pool: Pool, levels: tuple[float, float]) -> Tensor:
    """Return each picture's flow loss at a level of its own between two."""
    count, device = len(pool), pool.latents.device
    generator = torch.Generator().manual_seed(0)
    noise = torch.randn(pool.latents.shape, generator=generator).to(device)
    low, high = levels
    sigmas = (low + (high - low) * torch.rand(count, generator=generator)).to(device)
    noisy = add_noise(pool.latents.float(), noise, sigmas)
    model = CaptionedTransformer({"transformer": pipe.transformer} | {
        name: getattr(pipe, name) for name in TEXT_PARTS
    })  # fmt: skip
    ones = torch.ones(1, device=device)
    velocity = torch.cat([
        model(noisy[[i]], sigmas[[i]], pool.t5_ids[[i]], pool.clip_ids[[i]], ones)
        for i in range(count)
    ])  # fmt: skip
    return flow_loss(velocity, pool.latents.float(), noise).cpu()


def describe(losses: Tensor, reference: Tensor) -> str:
    """Write a mean, and the mean difference from the reference with its 95% interval."""
    change = compare(losses.tolist(), reference.tolist())
    return f"{losses.mean():.3f} ({change.mean:+.3f} +- {change.high - change.mean:.3f})"


def report(side: int, count: int, factors: Sequence[str], adapters: Sequence[str]) -> None:
    """Print a table of one size."""
    device = pick_device()
    pipe = load_pipeline("miniature-dev", dtype=torch.float32).to(device)
    with tempfile.TemporaryDirectory() as folder:
        unpack_pipelines(Path(folder))
        vae = Path(folder) / "vae.safetensors"
        pool = build_pool(vae, count, side, first_seed=FIRST_SEED, device=device)
    print(f"\n| {side} x {side}, {count} pictures | {' | '.join(LEVELS)} |\n|---|---|---|")
    reference: dict[str, Tensor] = {}
    for name in [REFERENCE, *(each for each in factors if each != REFERENCE)]:
        factor: Any = name if name == "auto" else float(name)
        policy = ResolutionPolicy(factor, native_sequence_length=POLICY.native_sequence_length)
        urae.adapt(pipe, adapters, policy=policy)
        cells = []
        for level, bounds in LEVELS.items():
            losses = measure_losses(pipe, pool, bounds)
            cells.append(describe(losses, reference.setdefault(level, losses)))
        used = policy.rope_factor(pool.latents.shape[-1] ** 2 // 4, 10_000)
        print(f"| {name if factor != 'auto' else f'auto: {used:.0f}'} | {' | '.join(cells)} |")
        urae.restore(pipe)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--sides", nargs="+", type=int, default=[512, 1024])
    parser.add_argument("--count", type=int, default=32, help="pictures of 512 x 512's pixels")
    parser.add_argument("--factors", nargs="+", default=FACTORS)
    parser.add_argument("--adapter", action="append", default=[])
    arguments = parser.parse_args()
    print(f"{platform.machine()}, torch {torch.__version__}")
    for side in arguments.sides:
        count = max(2, arguments.count * 512**2 // side**2)
        report(side, count, arguments.factors, arguments.adapter)


if __name__ == "__main__":
    main()
