"""Signed distances of the shapes, and the textures of backgrounds: functions of pixel positions.

Distances are in pixels, negative inside. A shape of radius r fills the square from -r to r, the
triangle its width only. y points down.
"""

import math
from collections.abc import Callable

import torch
from jaxtyping import Float, Int64
from torch import Tensor

Field = Float[Tensor, "b h w"]

PERIOD_PIXELS = 16.0
"""Of stripes, dots and checks (two squares).

Not the 8 pixels of a latent: where all latents are alike, the decoder, which only ever repeats and
convolves them, can make no pattern.
"""
DOT_RADIUS_PIXELS = 4.0
GRAIN_PIXELS = 2.5
"""Distance of the random values that grain is interpolated from."""
_GRAIN_CONTRAST = 1.8  # makes up for what interpolation takes

_RING_HOLE = 0.5  # inner radius, of the outer
_CROSS_ARM = 0.36  # width of the bars, of their length
_TRIANGLE_HEIGHT = math.sqrt(3)  # of its half width: equilateral


def _circle(x: Field, y: Field, radius: Field) -> Field:
    return torch.hypot(x, y) - radius


def _square(x: Field, y: Field, radius: Field) -> Field:
    return torch.maximum(x.abs(), y.abs()) - radius


def _triangle(x: Field, y: Field, radius: Field) -> Field:
    half = radius * _TRIANGLE_HEIGHT / 2
    sides = x.abs() * math.cos(math.pi / 6) - (y + half) * math.sin(math.pi / 6)
    return torch.maximum(sides, y - half)


def _diamond(x: Field, y: Field, radius: Field) -> Field:
    return (x.abs() + y.abs() - radius) / math.sqrt(2)


def _cross(x: Field, y: Field, radius: Field) -> Field:
    along, across = torch.maximum(x.abs(), y.abs()), torch.minimum(x.abs(), y.abs())
    return torch.maximum(along - radius, across - _CROSS_ARM * radius)


def _ring(x: Field, y: Field, radius: Field) -> Field:
    middle, half = radius * (1 + _RING_HOLE) / 2, radius * (1 - _RING_HOLE) / 2
    return (torch.hypot(x, y) - middle).abs() - half


SIGNED_DISTANCES: dict[str, Callable[[Field, Field, Field], Field]] = {
    "circle": _circle,
    "square": _square,
    "triangle": _triangle,
    "diamond": _diamond,
    "cross": _cross,
    "ring": _ring,
}
"""By shape; arguments: x and y from the middle, radius (b 1 1)."""


def _plain(x: Field, y: Field, seeds: Int64[Tensor, " b"]) -> Field:
    return torch.full_like(x, 0.4)  # about as bright as the others on average


def _striped(x: Field, y: Field, seeds: Int64[Tensor, " b"]) -> Field:
    return _wave(x)


def _checked(x: Field, y: Field, seeds: Int64[Tensor, " b"]) -> Field:
    columns, rows = _wave(x), _wave(y)
    return columns + rows - 2 * columns * rows


def _dotted(x: Field, y: Field, seeds: Int64[Tensor, " b"]) -> Field:
    x, y = (each.remainder(PERIOD_PIXELS) - PERIOD_PIXELS / 2 for each in (x, y))
    return (DOT_RADIUS_PIXELS + 0.5 - torch.hypot(x, y)).clamp(0, 1)


def _grainy(x: Field, y: Field, seeds: Int64[Tensor, " b"]) -> Field:
    x, y = x / GRAIN_PIXELS, y / GRAIN_PIXELS
    column, row = x.floor(), y.floor()
    right, down = x - column, y - row
    column, row = column.long(), row.long()
    seeds = seeds[:, None, None]
    above = torch.lerp(_hash(column, row, seeds), _hash(column + 1, row, seeds), right)
    below = torch.lerp(_hash(column, row + 1, seeds), _hash(column + 1, row + 1, seeds), right)
    return (0.5 + _GRAIN_CONTRAST * (torch.lerp(above, below, down) - 0.5)).clamp(0, 1)


TEXTURE_FIELDS: dict[str, Callable[[Field, Field, Int64[Tensor, " b"]], Field]] = {
    "plain": _plain,
    "striped": _striped,
    "checked": _checked,
    "dotted": _dotted,
    "grainy": _grainy,
}
"""Darkness in [0, 1] by texture; arguments: x and y in pixels, seeds."""


def _wave(x: Field) -> Field:
    """Alternate between 0 and 1, half a period each, with edges one pixel wide."""
    steepness = PERIOD_PIXELS / (2 * math.pi)
    return (0.5 + steepness * torch.cos(x * (2 * math.pi / PERIOD_PIXELS))).clamp(0, 1)


def _hash(x: Int64[Tensor, "..."], y: Int64[Tensor, "..."], seeds: Int64[Tensor, "..."]) -> Field:
    """Mix integers to a number in [0, 1), the same on every device.

    The mixing is `lowbias32` of Chris Wellons' hash-prospector (github.com/skeeto/hash-prospector).
    """
    mixed = (x * 0x9E3779B1 + y * 0x85EBCA77 + seeds * 0xC2B2AE3D) & 0xFFFFFFFF
    for shift, factor in ((16, 0x7FEB352D), (15, 0x846CA68B)):
        mixed = ((mixed ^ (mixed >> shift)) * factor) & 0xFFFFFFFF
    return ((mixed ^ (mixed >> 16)) >> 8).float() / 2**24
