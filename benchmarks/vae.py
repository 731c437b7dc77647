"""Time the VAE, whole and split, on random weights of FLUX's shape: seconds and peak memory.

    python benchmarks/vae.py --sides 2048 4096 --budgets 10 8 6

runs in bfloat16 on a GPU. Without one, by default, it tries one small picture in float32.
"""

import argparse
import statistics

import torch
from diffusers import AutoencoderKL
from measure import describe_run, peak_gib, reset_peak, stopwatch, synchronize
from report import table
from torch import Tensor

from urae.backbones.devices import pick_device, pick_dtype
from urae.backbones.random_flux import build_meta_flux
from urae.backbones.vae import decode, encode
from urae.backbones.vae_plan import plan_decode, plan_encode

GIB = 2**30


def build_vae(device: torch.device, dtype: torch.dtype) -> AutoencoderKL:
    """Build FLUX's VAE, initialised as torch does."""
    config = build_meta_flux("flux-dev")["vae"].config
    torch.manual_seed(0)
    with torch.device(device):
        vae = AutoencoderKL.from_config(config)
    return vae.eval().requires_grad_(False).to(dtype=dtype)


def measure(
    vae: AutoencoderKL, job: str, side: int, max_bytes: int | None, repeats: int
) -> tuple[list[str | float | None], Tensor | None]:
    """Encode or decode a random picture of `side` x `side` pixels.

    Args:
        vae: On the device.
        job: `encode` or `decode`.
        side: In pixels.
        max_bytes: Beside the weights; None: whole.
        repeats: Runs after the first, whose median counts.

    Returns:
        Seconds, those of the first run, work, planned and measured GiB; and the result, on the CPU.
    """
    plan, run = (plan_encode, encode) if job == "encode" else (plan_decode, decode)
    try:
        planned = plan(vae, side, side, max_bytes=max_bytes)
    except MemoryError:
        return ["no way", None, None, None, None], None
    expected = [planned.work, planned.peak_bytes / GIB]
    shape = (1, 3, side, side) if job == "encode" else (1, 16, side // 8, side // 8)
    given = torch.randn(shape, generator=torch.Generator().manual_seed(side))
    given = given.to(vae.device, vae.dtype)
    seconds = []
    reset_peak()
    try:
        for _ in range(1 + repeats):
            found = None  # not two results at once
            synchronize()
            with stopwatch() as read_seconds:
                found = run(vae, given, max_bytes=max_bytes)
            seconds.append(read_seconds())
    except torch.OutOfMemoryError:
        return ["out of memory", None, *expected, None], None
    return [statistics.median(seconds[1:]), seconds[0], *expected, peak_gib()], found.float().cpu()


def compare(found: Tensor | None, whole: Tensor | None) -> str | None:
    """Write the relative difference from the unsplit result."""
    if found is None or whole is None:
        return None
    return f"{float((found - whole).norm() / whole.norm()):.1e}"


def main() -> None:
    """Run the benchmark and print its table."""
    on_gpu = pick_device().type == "cuda"
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--sides", type=int, nargs="+", default=[2048, 4096] if on_gpu else [128])
    parser.add_argument(
        "--budgets", type=float, nargs="+", default=[10, 8, 6] if on_gpu else [0.03, 0.02],
        help="GiB beside the weights",
    )  # fmt: skip
    parser.add_argument("--jobs", nargs="+", default=["decode", "encode"])
    parser.add_argument("--repeats", type=int, default=2, help="at least 1")
    arguments = parser.parse_args()

    device = pick_device()
    vae = build_vae(device, pick_dtype(device))
    rows = []
    for job in arguments.jobs:
        for side in arguments.sides:
            whole = None
            for budget in (None, *arguments.budgets):
                max_bytes = None if budget is None else int(budget * GIB)
                figures, found = measure(vae, job, side, max_bytes, arguments.repeats)
                whole = found if budget is None else whole
                way = "whole" if budget is None else f"at most {budget:g} GiB"
                rows.append([f"{job} {side} x {side}", way, *figures, compare(found, whole)])
    header = ["VAE", "way", "s", "first run, s", "work", "planned, GiB", "peak with weights, GiB"]
    print("\n".join(table([*header, "difference"], rows)))
    print(f"\n{describe_run()}; {vae.dtype}")


if __name__ == "__main__":
    main()
