"""A finished picture on disk: its name, its PNG and what the PNG remembers."""

import io
import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from PIL import Image
from PIL.PngImagePlugin import PngInfo

from urae.storage import write_atomic

_SLUG_LENGTH = 48


def picture_path(output_dir: Path, index: int, prompt: str, seed: int) -> Path:
    """Name a picture by its prompt's place and first words, and its seed."""
    slug = re.sub(r"[^a-z0-9]+", "-", prompt.lower()).strip("-")[:_SLUG_LENGTH].strip("-")
    return output_dir / f"{index:04d}-{slug or 'picture'}-{seed}.png"


def save_picture(path: Path, image: Image.Image, record: Mapping[str, Any]) -> None:
    """Write a PNG whole or not at all, with a text chunk a field.

    Args:
        path: Replaced if it exists.
        image: The picture.
        record: JSON values by name; text goes in as it is.
    """
    info = PngInfo()
    for name, value in record.items():
        info.add_itxt(name, value if isinstance(value, str) else json.dumps(value))
    stream = io.BytesIO()
    image.save(stream, format="PNG", pnginfo=info)
    path.parent.mkdir(parents=True, exist_ok=True)
    write_atomic(path, stream.getvalue())
