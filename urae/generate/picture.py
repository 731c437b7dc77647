"""A finished picture on disk: its name, its PNG and what the PNG remembers."""

import json
import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from PIL import Image
from PIL.PngImagePlugin import PngInfo

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
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".{path.name}.{os.getpid()}.partial")
    try:
        image.save(partial, format="PNG", pnginfo=info)
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)
