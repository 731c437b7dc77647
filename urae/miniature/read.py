"""A picture read without any learnt network: what is where, whatever a caption may say."""

from dataclasses import dataclass
from functools import cache

import numpy as np
import numpy.typing as npt
import torch
from jaxtyping import UInt8
from torch import Tensor

from urae.miniature.grammar import BACKGROUNDS, COLOURS
from urae.miniature.render import BACKGROUND_RGB, RIM_GAIN, RIM_PIXELS
from urae.miniature.segment import Component, Labels, Mask, classify_colours, find_components
from urae.miniature.shapes import SIGNED_DISTANCES
from urae.miniature.surface import Grey, read_light, read_texture

Picture = UInt8[Tensor, "3 h w"] | npt.NDArray[np.uint8]

LEAST_SIDE = 192
"""Of pictures in pixels: of smaller ones more than one true render in a hundred is misread."""

_MIN_AREA = 0.0006  # of the square of the smaller side; less is a speck, not an object
_MIN_AREA_PIXELS = 40
_MIN_PURITY = 0.85  # share of an area's pixels that have its colour
_MIN_OVERLAP = 0.82  # intersection over union with a shape
_TEMPLATE = 64  # pixels a side
_MAX_STRETCH = 1.15  # most that an object's sides may be off their ratio
_SIZE_BOUNDS = {"small": (0.135, 0.214), "medium": (0.214, 0.329), "large": (0.329, 0.48)}
_RIM = int(RIM_PIXELS)
_DARK = (1 + RIM_GAIN) / 2  # of an object's brightness; below it is rim
_DARK_THING = 0.62  # of the background's brightness; below it is no background
_MIN_BACKGROUND = 0.1  # of the picture
_MARGIN_PIXELS = 4  # around objects, not read as background
_LEVELS = (0.55, 1.15)  # a background's brightness, of its palette colour's

# outline of a shape of extent 1, both of the ring's
_OUTLINES = {
    "circle": np.pi,
    "square": 4.0,
    "triangle": 3.0,
    "diamond": 2 * np.sqrt(2),
    "cross": 4.0,
    "ring": np.pi * 1.5,
}


@dataclass(frozen=True)
class FoundObject:
    """One object of a picture; None is what cannot be told."""

    size: str | None
    colour: str | None
    shape: str | None
    x: float
    """Middle of the bounding box, as a share of the width."""
    y: float
    """The same, of the height."""
    extent: float
    """Larger side of the bounding box, as a share of the picture's smaller side."""
    rim_pixels: float
    """Mean width of the dark rim."""


@dataclass(frozen=True)
class Reading:
    """What is in a picture; None is what cannot be told."""

    objects: tuple[FoundObject, ...]
    """Largest first."""
    texture: str | None
    background: str | None
    light: str | None


def read_picture(picture: Picture) -> Reading:
    """Read a picture.

    Args:
        picture: 8-bit sRGB, 3 x H x W.

    Raises:
        ValueError: If it is no such picture, or a side is below `LEAST_SIDE`.
    """
    rgb = _to_rows(picture)
    brightness = np.maximum(rgb.mean(-1, dtype=np.float32), 1)
    labels = classify_colours(rgb)
    things = _dilate(_erode(labels < len(COLOURS)))
    background = ~_dilate(things, _MARGIN_PIXELS)
    if background.mean() < _MIN_BACKGROUND:
        return Reading((), None, None, None)
    light, plane = read_light(brightness, background)
    things |= brightness < _DARK_THING * plane  # rims, where their colour is too weak
    side = min(things.shape)
    components = find_components(things, max(_MIN_AREA_PIXELS, int(_MIN_AREA * side**2)))
    return Reading(
        tuple(_read_object(each, labels, brightness) for each in components),
        read_texture(brightness / plane - 1, background & ~_dilate(things, _MARGIN_PIXELS)),
        _read_background(labels, plane, background),
        light,
    )


def _to_rows(picture: Picture) -> npt.NDArray[np.uint8]:
    pixels = picture.cpu().numpy() if isinstance(picture, Tensor) else np.asarray(picture)
    if pixels.dtype != np.uint8 or pixels.ndim != 3 or len(pixels) != 3:
        raise ValueError(
            f"picture of {pixels.dtype} and shape {pixels.shape} is not 8-bit sRGB of shape "
            "3 x H x W; scale it to 0 ... 255, round, and put the channels first"
        )
    if min(pixels.shape[1:]) < LEAST_SIDE:
        raise ValueError(
            f"picture of {pixels.shape[1]} x {pixels.shape[2]} is too small to read; "
            f"its sides must be at least {LEAST_SIDE} pixels"
        )
    return np.ascontiguousarray(pixels.transpose(1, 2, 0))


def _read_object(part: Component, labels: Labels, brightness: Grey) -> FoundObject:
    height, width = part.mask.shape
    side = min(labels.shape)
    extent = max(height, width) / side
    bright = brightness[part.box]
    dark = part.mask & (bright < _DARK * np.quantile(bright[part.mask], 0.9))
    shape = _read_shape(part.mask)
    outline = _OUTLINES[shape or "circle"] * extent * side
    return FoundObject(
        size=next((s for s, (low, high) in _SIZE_BOUNDS.items() if low <= extent < high), None),
        colour=_name_majority(labels[part.box][_find_inside(part.mask)], COLOURS),
        shape=shape,
        x=(part.left + width / 2) / labels.shape[1],
        y=(part.top + height / 2) / labels.shape[0],
        extent=extent,
        rim_pixels=float(dark.sum() / outline),
    )


def _find_inside(mask: Mask) -> Mask:
    """Return the part inside the rim, where there is one."""
    inside = _erode(np.pad(mask, _RIM), _RIM)[_RIM:-_RIM, _RIM:-_RIM]
    return inside if inside.any() else mask


def _read_background(labels: Labels, plane: Grey, background: Mask) -> str | None:
    name = _name_majority(labels[background], BACKGROUNDS, len(COLOURS))
    if name is None:
        return None
    level = plane[background].mean() / np.mean(BACKGROUND_RGB[name])
    return name if _LEVELS[0] <= level <= _LEVELS[1] else None


def _name_majority(labels: Labels, names: tuple[str, ...], first: int = 0) -> str | None:
    """Name the label that nearly all share, if it is one of the names, which start at `first`."""
    counts = np.bincount(labels)
    best = int(counts.argmax())
    known = first <= best < first + len(names) and counts[best] >= _MIN_PURITY * len(labels)
    return names[best - first] if known else None


def _read_shape(mask: Mask) -> str | None:
    """Name the shape that covers the same part of its bounding box, if one nearly does."""
    found, ratio = _fit_template(mask)
    overlaps = {
        shape: float((found & wanted).sum() / (found | wanted).sum())
        for shape, (wanted, wanted_ratio) in _templates().items()
        if 1 / _MAX_STRETCH < ratio / wanted_ratio < _MAX_STRETCH
    }
    best = max(overlaps, key=lambda shape: overlaps[shape], default=None)
    return best if best and overlaps[best] >= _MIN_OVERLAP else None


def _fit_template(mask: Mask) -> tuple[Mask, float]:
    """Stretch a mask to the templates' size; return it with its width over its height."""
    rows, columns = (
        ((np.arange(_TEMPLATE) + 0.5) * size / _TEMPLATE).astype(int) for size in mask.shape
    )
    return mask[np.ix_(rows, columns)], mask.shape[1] / mask.shape[0]


@cache
def _templates() -> dict[str, tuple[Mask, float]]:
    fine = torch.linspace(-1, 1, 513)[None]
    found = {}
    for shape, distance in SIGNED_DISTANCES.items():
        inside = distance(fine[:, None], fine[:, :, None], torch.ones(1, 1, 1))[0].numpy() <= 0
        (whole,) = find_components(inside, inside.size // 10)
        found[shape] = _fit_template(whole.mask)
    return found


def _erode(mask: Mask, pixels: int = 1) -> Mask:
    """Shrink a mask likewise, but not from the picture's border."""
    return ~_dilate(~mask, pixels)


def _dilate(mask: Mask, pixels: int = 1) -> Mask:
    """Grow a mask to the squares of `pixels` around its own."""
    for _ in range(pixels):
        mask = mask.copy()
        rows = mask.copy()
        mask[1:] |= rows[:-1]
        mask[:-1] |= rows[1:]
        columns = mask.copy()
        mask[:, 1:] |= columns[:, :-1]
        mask[:, :-1] |= columns[:, 1:]
    return mask
