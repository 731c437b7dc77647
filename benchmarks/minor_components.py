"""Time the search for minor components on random weights like FLUX's.

FLUX.1's 4K stage needs 190 of 3072 x 3072:

    python benchmarks/minor_components.py --count 190
"""

import argparse
import platform
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

from urae.adapters.minor import MinorSplit, minor_components

WEIGHT_RMS = 2.7e-2  # of FLUX.1-dev's attention projections


def random_weight(size: int, seed: int) -> Tensor:
    """Draw a bf16-valued float32 weight (size x size)."""
    generator = torch.Generator().manual_seed(seed)
    weight = torch.empty(size, size).normal_(std=WEIGHT_RMS, generator=generator)
    return weight.bfloat16().float()


def check(weight: Tensor, split: MinorSplit) -> tuple[float, float]:
    """Compare with a full float64 SVD.

    Returns:
        The largest relative error of a singular value, and that of `up @ down` in Frobenius norm.
    """
    rank = len(split.down)
    left, values, right_t = torch.linalg.svd(weight.double())
    minor = left[:, -rank:] * values[-rank:] @ right_t[-rank:]
    found_values = split.down.double().square().sum(dim=1)
    value_error = (found_values / values[-rank:].flip(0) - 1).abs().max()
    product_error = torch.dist(split.up.double() @ split.down.double(), minor) / minor.norm()
    return float(value_error), float(product_error)


def main() -> None:
    """Run the benchmark and print its figures."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--size", type=int, default=3072, help="rows and columns of a weight")
    parser.add_argument("--count", type=int, default=10, help="number of weights")
    parser.add_argument("--rank", type=int, default=16)
    parser.add_argument("--device", help="where to solve; default: the CPU")
    parser.add_argument("--check", action="store_true", help="compare with full float64 SVDs")
    arguments = parser.parse_args()

    weight_seconds = 0.0

    def loader(seed: int) -> Callable[[], Tensor]:
        def load() -> Tensor:
            nonlocal weight_seconds
            start = time.perf_counter()
            weight = random_weight(arguments.size, seed)
            weight_seconds += time.perf_counter() - start
            return weight

        return load

    weights = {f"weight_{seed}": loader(seed) for seed in range(arguments.count)}
    with tempfile.TemporaryDirectory() as folder:
        for run in ("solved", "from cache"):
            weight_seconds = 0.0
            start = time.perf_counter()
            splits = minor_components(
                weights, arguments.rank, device=arguments.device, cache_dir=Path(folder)
            )
            seconds = time.perf_counter() - start - weight_seconds
            print(
                f"{run}: {seconds:.2f} s for {arguments.count} weights, "
                f"{seconds / arguments.count:.3f} s a weight, hashing and cache included "
                f"(drawing them, not counted: {weight_seconds:.1f} s)"
            )
    if arguments.check:
        errors = [check(weights[name](), split) for name, split in splits.items()]
        print(f"largest relative error of a singular value: {max(e[0] for e in errors):.1e}")
        print(f"largest relative error of up @ down: {max(e[1] for e in errors):.1e}")
    print(
        f"{arguments.size} x {arguments.size}, rank {arguments.rank}, "
        f"device {arguments.device or 'cpu'}; {platform.processor() or platform.machine()}, "
        f"{torch.get_num_threads()} threads, torch {torch.__version__}"
    )


if __name__ == "__main__":
    main()
