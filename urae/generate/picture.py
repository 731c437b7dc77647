"""A finished picture on disk: its name, its PNG and what the PNG remembers."""

import io
import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from PIL import Image
from PIL.PngImagePlugin import PngInfo

from urae.storage import write_atomic

_SLUG_LENGTH = 48


@dataclass(frozen=True)
class Picture:
    """A picture to be made."""

    path: Path
    prompt: str
    seed: int


def list_pictures(
    prompts: Sequence[str], num_images: int, seed: int, output_dir: Path
) -> list[Picture]:
    """List a job's pictures in order: of each prompt `num_images`, with rising seeds."""
    return [
        Picture(picture_path(output_dir, index, prompt, seed + k), prompt, seed + k)
        for index, prompt in enumerate(prompts)
        for k in range(num_images)
    ]


def picture_path(output_dir: Path, index: int, prompt: str, seed: int) -> Path:
    """Name a picture by its prompt's place and first words, and its seed."""
    slug = re.sub(r"[^a-z0-9]+", "-", prompt.lower()).strip("-")[:_SLUG_LENGTH].strip("-")
    return output_dir / f"{index:04d}-{slug or 'picture'}-{seed}.png"


def read_record(path: Path) -> dict[str, str]:
    """Read what a PNG says of how it was made: text as it is, other values as JSON.

    Raises:
        ValueError: If it is no whole PNG.
    """
    try:
        with Image.open(path) as image:
            image.load()
            texts = dict(getattr(image, "text", {}))
    except (OSError, SyntaxError) as error:
        raise ValueError(f"{path} is not a complete PNG ({error}); remove it") from error
    return {name: str(text) for name, text in texts.items()}


def is_recorded(record: Mapping[str, str], name: str, value: Any) -> bool:
    """Tell whether a PNG's record has a field with this value."""
    text = record.get(name)
    if text is None or isinstance(value, str):
        return bool(text == value)
    try:
        return bool(json.loads(text) == value)
    except ValueError:
        return False


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
