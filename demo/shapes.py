"""Captioned pictures to train on: coloured shapes on patterned backgrounds, drawn with Pillow."""

import json
import math
import random
from pathlib import Path

from PIL import Image, ImageDraw

COLOURS = {
    "red": (214, 57, 48),
    "green": (66, 148, 82),
    "blue": (50, 98, 190),
    "yellow": (240, 196, 52),
    "orange": (232, 128, 44),
    "purple": (128, 74, 160),
    "white": (244, 241, 234),
    "black": (38, 38, 42),
}
SHAPES = ("circle", "square", "triangle", "star")
PATTERNS = ("plain", "striped", "checked", "dotted")
SIZES = ((576, 576), (640, 512), (512, 640), (704, 528))  # width, height
PLACES = ("above", "below", "left of", "right of")


def write_pictures(folder: Path, count: int = 12) -> None:
    """Write pictures, every second one a PNG, with a JSON of two captions beside each."""
    folder.mkdir(parents=True)
    chooser = random.Random(0)
    for index in range(count):
        colours = chooser.sample(list(COLOURS), 3)
        shapes = chooser.sample(SHAPES, 2)
        pattern, place = PATTERNS[index % 4], chooser.choice(PLACES)
        image = _draw(SIZES[index // 3 % 4], colours, shapes, pattern, place)
        name = folder / f"image_{index}"
        image.save(name.with_suffix(".png" if index % 2 else ".jpg"), quality=92)
        captions = {
            "prompt": f"{colours[0]} {shapes[0]}",
            "generated_prompt": (
                f"a large {colours[0]} {shapes[0]} {place} a small {colours[1]} {shapes[1]} "
                f"on a {pattern} {colours[2]} background"
            ),
        }
        name.with_suffix(".json").write_text(json.dumps(captions, indent=1) + "\n")


def _draw(
    size: tuple[int, int], colours: list[str], shapes: list[str], pattern: str, place: str
) -> Image.Image:
    # twice as large, then shrunk: Pillow draws without antialiasing
    width, height = 2 * size[0], 2 * size[1]
    image = Image.new("RGB", (width, height), COLOURS[colours[2]])
    draw = ImageDraw.Draw(image)
    _draw_pattern(draw, width, height, pattern, COLOURS[colours[2]])
    side = min(width, height)
    x, y = {"above": (0, -1), "below": (0, 1), "left of": (-1, 0), "right of": (1, 0)}[place]
    for shape, colour, radius, shift in (
        (shapes[0], colours[0], 0.22 * side, 0.17 * side),
        (shapes[1], colours[1], 0.11 * side, -0.28 * side),
    ):
        _draw_shape(draw, shape, width / 2 + x * shift, height / 2 + y * shift, radius, colour)
    return image.reduce(2)


def _draw_pattern(
    draw: ImageDraw.ImageDraw, width: int, height: int, pattern: str, colour: tuple[int, int, int]
) -> None:
    darker = tuple(round(channel * 0.8) for channel in colour)
    cell = min(width, height) // 12
    for row in range(height // cell + 1):
        for column in range(width // cell + 1):
            left, top = column * cell, row * cell
            if (pattern == "striped" and row % 2) or (pattern == "checked" and (row + column) % 2):
                draw.rectangle((left, top, left + cell - 1, top + cell - 1), fill=darker)
            elif pattern == "dotted":
                draw.circle((left + cell / 2, top + cell / 2), cell / 4, fill=darker)


def _draw_shape(
    draw: ImageDraw.ImageDraw, shape: str, x: float, y: float, radius: float, colour: str
) -> None:
    fill = COLOURS[colour]
    if shape == "circle":
        draw.circle((x, y), radius, fill=fill)
        return
    if shape == "star":
        radii, turn = [radius * 1.15, radius * 0.48] * 5, -90
    else:
        num_corners = 3 if shape == "triangle" else 4
        radii, turn = [radius * 1.2] * num_corners, -90 if shape == "triangle" else -45
    corners = []
    for index, distance in enumerate(radii):
        angle = math.radians(turn + 360 * index / len(radii))
        corners.append((x + distance * math.cos(angle), y + distance * math.sin(angle)))
    draw.polygon(corners, fill=fill)
