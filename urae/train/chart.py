"""Curves of a run, drawn with Pillow alone."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate
from pathlib import Path

from PIL import Image, ImageDraw, ImageFont

INK, GREY, RULE, PAPER = (34, 36, 42), (112, 116, 124), (226, 228, 232), (255, 255, 255)
_LINE, _DOT = (38, 96, 190), (166, 190, 226)
_SCALE = 2  # everything is drawn this much larger, then shrunk: smooth lines
_WIDTH, _HEIGHT = 560, 400
_MAX_DOTS = 2000  # more would be one blot


@dataclass(frozen=True)
class Curve:
    """Values to draw over steps."""

    title: str
    points: Sequence[tuple[int, float]]
    """Step and value, in order, at least one."""
    window: int = 1
    """The line is the mean of so many points; the points themselves are dots."""


def smooth(title: str, values: Sequence[float]) -> Curve:
    """Make a curve of step 1, 2, ... whose line is the mean over a sixth of them."""
    return Curve(title, list(enumerate(values, start=1)), max(1, len(values) // 6))


def draw_curves(curves: Sequence[Curve], path: Path) -> None:
    """Write curves side by side into a PNG."""
    sheet = Image.new("RGB", (_SCALE * _WIDTH * len(curves), _SCALE * _HEIGHT), PAPER)
    for index, curve in enumerate(curves):
        sheet.paste(_draw_panel(curve), (_SCALE * _WIDTH * index, 0))
    sheet.reduce(_SCALE).save(path)


def _draw_panel(curve: Curve) -> Image.Image:
    panel = Image.new("RGB", (_SCALE * _WIDTH, _SCALE * _HEIGHT), PAPER)
    draw = ImageDraw.Draw(panel)
    left, top, right, bottom = 72, 52, _WIDTH - 24, _HEIGHT - 56
    values = [value for _, value in curve.points]
    rows, columns = _ticks(min(values), max(values), 5), _ticks(0, curve.points[-1][0], 6)
    low, high = rows[0], rows[-1]

    def place(step: float, value: float) -> tuple[float, float]:
        x = left + (right - left) * step / columns[-1]
        y = bottom - (bottom - top) * (value - low) / (high - low)
        return _SCALE * x, _SCALE * y

    def write(x: float, y: float, text: str, size: int, colour: tuple[int, ...], at: str) -> None:
        font = ImageFont.load_default(_SCALE * size)
        draw.text((_SCALE * x, _SCALE * y), text, colour, font, anchor=at)

    write(left, 24, curve.title, 16, INK, "lm")
    digits = max(0, -math.floor(math.log10(rows[1] - rows[0]) + 1e-9))
    for value in rows:
        draw.line([place(0, value), place(columns[-1], value)], RULE, _SCALE)
        write(left - 10, place(0, value)[1] / _SCALE, f"{value:.{digits}f}", 13, GREY, "rm")
    for step in columns:
        x, y = place(step, low)
        draw.line([(x, y), (x, y + 5 * _SCALE)], GREY, _SCALE)
        write(x / _SCALE, bottom + 10, f"{step:g}", 13, GREY, "mt")
    draw.line([place(0, low), place(columns[-1], low)], GREY, _SCALE)
    write((left + right) / 2, _HEIGHT - 10, "step", 13, GREY, "mb")
    write(left - 10, top - 12, "loss", 13, GREY, "rb")

    for step, value in curve.points[:: math.ceil(len(curve.points) / _MAX_DOTS)]:
        draw.circle(place(step, value), 2.5 * _SCALE, fill=_DOT)
    line = [place(step, mean) for step, mean in _means(curve)]
    draw.line(line, _LINE, 3 * _SCALE, joint="curve")
    if curve.window > 1:
        write(right, 24, f"mean of {curve.window} steps", 13, _LINE, "rm")
    return panel


def _means(curve: Curve) -> list[tuple[int, float]]:
    sums = [0.0, *accumulate(value for _, value in curve.points)]
    window = curve.window
    ends = zip(curve.points[window - 1 :], sums[:-window], sums[window:], strict=True)
    return [(step, (end - begin) / window) for (step, _), begin, end in ends]


def _ticks(low: float, high: float, count: int) -> list[float]:
    """Return about `count` round numbers from at most `low` to at least `high`."""
    rough = max(high - low, 1e-9) / count
    power = 10 ** math.floor(math.log10(rough))
    spacing = next(power * factor for factor in (1, 2, 5, 10) if power * factor >= rough)
    first, last = math.floor(low / spacing + 1e-9), math.ceil(high / spacing - 1e-9)
    return [spacing * number for number in range(first, max(last, first + 1) + 1)]
