"""The part of the GPU benchmark that caches features."""

import shutil
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from bench import Bench, run_urae

CAP_GIB = 10
NUM_PICTURES, NUM_TINY_PICTURES = 8, 2
NOISE = 6.0  # standard deviation, of 255: a JPEG of quality 95 then has 3 bits a pixel


def measure_cache(bench: Bench, *, side: int) -> dict[str, Any]:
    """Cache pictures of a side: captions with all of the memory, then pictures under the cap.

    T5 alone takes 8.9 GiB. The captions come with latents of a quarter of the side, which the
    pictures' own replace.
    """
    folder = bench.work / "pictures-to-cache"
    num_pictures = NUM_TINY_PICTURES if bench.tiny else NUM_PICTURES
    write_pictures(folder, bench.side(side), num_pictures)
    command = ("cache", str(folder), "--model", str(bench.base), "--resolution")
    captions = run_urae(bench, *command, str(bench.side(side // 4)))
    figures = run_urae(bench, *command, str(bench.side(side)), cap_gib=CAP_GIB)
    ended = sorted(file.stat().st_mtime for file in folder.glob("*_latent_code.safetensors"))
    assert len(ended) == num_pictures, "pictures were skipped"
    rate = (num_pictures - 1) / (ended[-1] - ended[0])  # loading is before the first
    return {
        f"captions, and pictures at {side // 4}^2": captions,
        f"pictures at {side}^2, cap {CAP_GIB} GiB": {"pictures_per_second": rate, **figures},
    }


def write_pictures(folder: Path, side: int, count: int) -> None:
    """Write smooth random pictures with noise over them, as JPEG, and their captions."""
    from PIL import Image

    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    generator = torch.Generator().manual_seed(4)
    for index in range(count):
        coarse = 255 * torch.rand(1, 3, 16, 16, generator=generator)
        pixels = F.interpolate(coarse, (side, side), mode="bicubic")[0].permute(1, 2, 0)
        pixels = pixels + NOISE * torch.randn(pixels.shape, generator=generator)
        image = Image.fromarray(pixels.clamp(0, 255).byte().numpy())
        image.save(folder / f"picture_{index}.jpg", quality=95)
        (folder / f"picture_{index}.txt").write_text(f"random colours, number {index}")
