"""The demo's sheet of pictures side by side, drawn with Pillow alone."""

from collections.abc import Mapping, Sequence
from pathlib import Path

from PIL import Image, ImageDraw, ImageFont

from urae.train.chart import GREY, INK, PAPER


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
