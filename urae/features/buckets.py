"""Aspect-ratio buckets: the sizes that a resolution's token budget allows, and fitting into them.

A resolution R, in pixels, stands for the tokens of an R x R picture. Every bucket has at most
that many, so that memory and time are the same for all shapes.
"""

import math
from functools import lru_cache

from PIL import Image, ImageOps

from urae.geometry import TOKEN_PIXELS, check_side

RATIOS = (1 / 1, 5 / 4, 4 / 3, 3 / 2, 16 / 9, 2 / 1, 21 / 9, 3 / 1, 4 / 1)
"""Long side to short side. Those of cameras and screens: pictures of these lose next to nothing,
others at most a seventh of a side (beyond 4:1, more), and so few sizes fill batches well."""
_SPLITS = 8
_SPLIT_FROM = 2048  # pixels; smaller pictures are not worth splitting, and have too few sizes


@lru_cache
def build_buckets(resolution: int) -> tuple[tuple[int, int], ...]:
    """List the sizes that images are cropped to, from the tallest to the widest.

    Args:
        resolution: R in pixels, a multiple of 16; the budget is (R / 16)^2 tokens.

    Returns:
        (height, width) in pixels, multiples of 16: for each ratio of `RATIOS` the nearest among
        the sizes that use up the budget, and the same turned on its side. From 2048 pixels on
        their tokens divide by 8, so that 2, 4 or 8 GPUs can share a picture in training.

    Raises:
        ValueError: If `resolution` is not a positive multiple of 16.
    """
    check_side("resolution", resolution)
    budget = (resolution // TOKEN_PIXELS) ** 2
    divisor = _SPLITS if resolution >= _SPLIT_FROM else 1
    wide = [
        (short * TOKEN_PIXELS, budget // short * TOKEN_PIXELS)
        for short in range(1, resolution // TOKEN_PIXELS + 1)
        if budget // short * short % divisor == 0
    ]
    chosen = {_nearest(wide, ratio) for ratio in RATIOS}
    turned = {(long, short) for short, long in chosen}
    return tuple(sorted(chosen | turned, key=lambda size: size[1] / size[0]))


def pick_bucket(height: int, width: int, resolution: int) -> tuple[int, int]:
    """Return the bucket whose ratio of sides is nearest to an image's, by its logarithm.

    A turned image gets the turned bucket.

    Args:
        height: Of the image, in pixels.
        width: Of the image, in pixels.
        resolution: As in `build_buckets`.

    Returns:
        (height, width) in pixels.
    """
    ratio = max(height, width) / min(height, width)
    wide = [size for size in build_buckets(resolution) if size[0] <= size[1]]
    short, long = _nearest(wide, ratio)
    return (short, long) if height <= width else (long, short)


def _nearest(wide: list[tuple[int, int]], ratio: float) -> tuple[int, int]:
    return min(wide, key=lambda size: abs(math.log(size[1] / size[0] / ratio)))


def covers(height: int, width: int, bucket: tuple[int, int]) -> bool:
    """Tell whether an image fills a bucket without being enlarged."""
    return height >= bucket[0] and width >= bucket[1]


def fit(image: Image.Image, bucket: tuple[int, int]) -> Image.Image:
    """Shrink an image until it just covers a bucket (Lanczos) and crop the rest at the centre."""
    assert covers(image.height, image.width, bucket)
    height, width = bucket
    return ImageOps.fit(image, (width, height), Image.Resampling.LANCZOS)
