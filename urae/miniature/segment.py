"""Pixels to colours by the palette, and masks to connected components."""

from dataclasses import dataclass
from functools import cache

import numpy as np
import numpy.typing as npt

from urae.miniature.grammar import BACKGROUNDS, COLOURS
from urae.miniature.render import BACKGROUND_RGB, OBJECT_RGB

Mask = npt.NDArray[np.bool_]
Labels = npt.NDArray[np.uint8]

_BITS = 6  # a channel, in the table of colours


def classify_colours(picture: npt.NDArray[np.uint8]) -> Labels:
    """Find the nearest palette colour of each pixel by the ratios of its channels.

    Brightness, and with it light, texture, shading and rims, does not count.

    Args:
        picture: H x W x 3, sRGB.

    Returns:
        H x W: an index into `COLOURS`, or `len(COLOURS)` plus one into `BACKGROUNDS`.
    """
    red, green, blue = (picture[..., n].astype(np.int32) >> (8 - _BITS) for n in range(3))
    classes: Labels = _colour_table()[(red << (2 * _BITS)) | (green << _BITS) | blue]
    return classes


@cache
def _colour_table() -> Labels:
    levels = (np.arange(2**_BITS, dtype=np.float32) + 0.5) * 2 ** (8 - _BITS)
    rgb = np.stack(np.meshgrid(levels, levels, levels, indexing="ij"), -1).reshape(-1, 1, 3)
    names = [OBJECT_RGB[name] for name in COLOURS] + [BACKGROUND_RGB[name] for name in BACKGROUNDS]
    palette = np.array(names, np.float32)
    ratios, wanted = (each / each.sum(-1, keepdims=True) for each in (rgb, palette))
    nearest: Labels = np.square(ratios - wanted).sum(-1).argmin(-1).astype(np.uint8)
    return nearest


@dataclass(frozen=True)
class Component:
    """A connected part of a mask."""

    mask: Mask
    """Cropped to the component's bounding box."""
    top: int
    left: int

    @property
    def box(self) -> tuple[slice, slice]:
        """Where the bounding box is in the whole picture."""
        height, width = self.mask.shape
        return slice(self.top, self.top + height), slice(self.left, self.left + width)


def find_components(mask: Mask, min_area: int) -> list[Component]:
    """Find the parts of a mask that are connected along rows and columns, largest first.

    Rows are cut into runs, and runs that touch from row to row are joined (union-find).

    Args:
        mask: H x W.
        min_area: Parts of fewer pixels are left out.
    """
    width = mask.shape[1] + 1  # one empty column keeps the rows apart
    flat = np.zeros((mask.shape[0], width), np.int8)
    flat[:, :-1] = mask
    steps = np.diff(flat.ravel(), prepend=np.int8(0))
    starts, stops = np.flatnonzero(steps == 1), np.flatnonzero(steps == -1)

    parents = list(range(len(starts)))

    def find(run: int) -> int:
        while parents[run] != run:
            parents[run] = parents[parents[run]]
            run = parents[run]
        return run

    first = np.searchsorted(stops, starts - width, side="right").tolist()
    last = np.searchsorted(starts, stops - width, side="left").tolist()
    for run, (begin, end) in enumerate(zip(first, last, strict=True)):
        for above in range(begin, end):
            parents[find(run)] = find(above)

    _, part = np.unique([find(run) for run in parents], return_inverse=True)
    areas = np.bincount(part, stops - starts) if len(starts) else np.empty(0)
    large = [n for n in np.argsort(-areas) if areas[n] >= min_area]
    return [_crop(starts[part == n], stops[part == n], width) for n in large]


def _crop(starts: npt.NDArray[np.intp], stops: npt.NDArray[np.intp], width: int) -> Component:
    rows, left, right = starts // width, starts % width, (stops - 1) % width + 1
    mask = np.zeros((rows[-1] - rows[0] + 1, right.max() - left.min()), np.bool_)
    for row, begin, end in zip(rows - rows[0], left - left.min(), right - left.min(), strict=True):
        mask[row, begin:end] = True
    return Component(mask, int(rows[0]), int(left.min()))
