"""The demo's two sheets, drawn with Pillow alone: pictures side by side, and loss curves."""

import math
from collections.abc import Mapping, Sequence
from pathlib import Path

from PIL import Image, ImageDraw, ImageFont

INK, GREY, RULE, PAPER = (34, 36, 42), (112, 116, 124), (226, 228, 232), (255, 255, 255)
LINE, DOT = (38, 96, 190), (166, 190, 226)
SCALE = 2  # everything is drawn this much larger, then shrunk: smooth lines


def draw_comparison(
    prompts: Sequence[str], columns: Mapping[str, Sequence[Image.Image]], path: Path
) -> None:
    """Write pictures as a table: a row a prompt, under the columns' labels and sizes.

    Args:
        prompts: One a row.
        columns: Pictures of each prompt, by label.
        path: The PNG to write.
    """
    side, gap, header, caption = 320, 20, 70, 40
    width = gap + len(columns) * (side + gap)
    sheet = Image.new("RGB", (width, header + len(prompts) * (side + caption)), PAPER)
    draw = ImageDraw.Draw(sheet)
    for column, (label, pictures) in enumerate(columns.items()):
        left = gap + column * (side + gap)
        size = f"{pictures[0].width} x {pictures[0].height} pixels"
        draw.text((left, 14), label, INK, ImageFont.load_default(18))
        draw.text((left, 40), size, GREY, ImageFont.load_default(14))
        for row, picture in enumerate(pictures):
            resized = picture.resize((side, side), Image.Resampling.LANCZOS)
            sheet.paste(resized, (left, header + row * (side + caption)))
    for row, prompt in enumerate(prompts):
        top = header + row * (side + caption) + side + 8
        draw.text((gap, top), prompt, INK, ImageFont.load_default(15))
    sheet.save(path)


def draw_losses(runs: Mapping[str, Sequence[float]], path: Path) -> None:
    """Write loss curves side by side: a dot a step, and a line for the mean of the last few.

    Args:
        runs: Losses of step 1, 2, ... by title.
        path: The PNG to write.
    """
    width, height = 560, 400
    sheet = Image.new("RGB", (SCALE * width * len(runs), SCALE * height), PAPER)
    for index, (title, losses) in enumerate(runs.items()):
        sheet.paste(_draw_panel(title, losses, width, height), (SCALE * width * index, 0))
    sheet.reduce(SCALE).save(path)


def _draw_panel(title: str, losses: Sequence[float], width: int, height: int) -> Image.Image:
    panel = Image.new("RGB", (SCALE * width, SCALE * height), PAPER)
    draw = ImageDraw.Draw(panel)
    left, top, right, bottom = 72, 52, width - 24, height - 56
    rows, columns = _ticks(min(losses), max(losses), 5), _ticks(0, len(losses), 6)
    low, high = rows[0], rows[-1]

    def place(step: float, loss: float) -> tuple[float, float]:
        x = left + (right - left) * step / columns[-1]
        y = bottom - (bottom - top) * (loss - low) / (high - low)
        return SCALE * x, SCALE * y

    def write(x: float, y: float, text: str, size: int, colour: tuple[int, ...], at: str) -> None:
        font = ImageFont.load_default(SCALE * size)
        draw.text((SCALE * x, SCALE * y), text, colour, font, anchor=at)

    write(left, 24, title, 16, INK, "lm")
    digits = max(0, -math.floor(math.log10(rows[1] - rows[0]) + 1e-9))
    for loss in rows:
        draw.line([place(0, loss), place(columns[-1], loss)], RULE, SCALE)
        write(left - 10, place(0, loss)[1] / SCALE, f"{loss:.{digits}f}", 13, GREY, "rm")
    for step in columns:
        x, y = place(step, low)
        draw.line([(x, y), (x, y + 5 * SCALE)], GREY, SCALE)
        write(x / SCALE, bottom + 10, f"{step:g}", 13, GREY, "mt")
    draw.line([place(0, low), place(columns[-1], low)], GREY, SCALE)
    write((left + right) / 2, height - 10, "step", 13, GREY, "mb")
    write(left - 10, top - 12, "loss", 13, GREY, "rb")

    for step, loss in enumerate(losses, start=1):
        draw.circle(place(step, loss), 2.5 * SCALE, fill=DOT)
    window = max(2, len(losses) // 6)
    ends = range(window, len(losses) + 1)
    means = [sum(losses[end - window : end]) / window for end in ends]
    points = [place(end, mean) for end, mean in zip(ends, means, strict=True)]
    draw.line(points, LINE, 3 * SCALE, joint="curve")
    write(right, 24, f"mean of {window} steps", 13, LINE, "rm")
    return panel


def _ticks(low: float, high: float, count: int) -> list[float]:
    """Return about `count` round numbers from at most `low` to at least `high`."""
    rough = max(high - low, 1e-9) / count
    power = 10 ** math.floor(math.log10(rough))
    spacing = next(power * factor for factor in (1, 2, 5, 10) if power * factor >= rough)
    first, last = math.floor(low / spacing + 1e-9), math.ceil(high / spacing - 1e-9)
    return [spacing * number for number in range(first, last + 1)]
