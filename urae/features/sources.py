"""A training folder's images and captions, before anything is encoded."""

import json
import os
import re
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from urae.features.images import SUFFIXES
from urae.features.store import embed_path, latent_path, split_embed_name

OTHER_SUFFIXES = frozenset({".bmp", ".gif", ".heic", ".heif", ".jxl", ".tif", ".tiff"})
"""Images that are not read; they are reported."""

NO_CAPTION = "missing caption"
"""Why an image is left out that has none: not that its file cannot be read."""

_TABLES = frozenset({"metadata.csv", "metadata.jsonl", "metadata.parquet"})
"""Where peers keep the captions of a folder."""

_EXPECTED = (
    f"expected images ({' '.join(sorted(SUFFIXES))}), each with a caption file beside it: "
    "<name>.json, in which every text is a caption (`prompt`, `generated_prompt`), or <name>.txt"
)

_MAX_NAME_BYTES = 255 - len(".") - len(".tmp")  # of file systems; it is written under another

_COLUMN = re.compile(r"[^./\\\0][^/\\\0]{0,99}")
_SURROGATE = re.compile("[\ud800-\udfff]")  # from broken JSON escapes, or bytes not UTF-8


@dataclass(frozen=True)
class Skip:
    """An image or caption that was left out, and why."""

    file: str
    """Name of the file at fault."""
    reason: str
    """One of few kinds, to count by."""
    detail: str
    """The reason in full, for this file."""


@dataclass(frozen=True)
class Source:
    """An image with its captions."""

    image: Path
    captions: dict[str, str]
    """By column, at least one."""

    @property
    def stem(self) -> str:
        """Name that all of this image's files begin with."""
        return self.image.stem

    @property
    def latent_path(self) -> Path:
        """Where its latents go."""
        return latent_path(self.image.parent, self.stem)

    def embed_path(self, column: str) -> Path:
        """Where the embeddings of its caption in `column` go."""
        return embed_path(self.image.parent, self.stem, column)

    @property
    def longest_name_bytes(self) -> int:
        """Length of the longest of its features' file names, in UTF-8."""
        paths = [self.latent_path, *map(self.embed_path, self.captions)]
        return max(len(path.name.encode()) for path in paths)


def find_sources(data_dir: Path) -> tuple[list[Source], list[Skip]]:
    """Find the captioned images of a folder; hidden files and subfolders are not looked at.

    Returns:
        The images that have a caption, sorted by name, and what was left out.

    Raises:
        ValueError: If the folder is missing, has no image, no caption, or two files that would
            share one cache.
    """
    if not data_dir.is_dir():
        raise ValueError(f"data folder {data_dir} does not exist or is not a folder; {_EXPECTED}")
    files = sorted(f for f in data_dir.iterdir() if f.is_file() and not f.name.startswith("."))
    images = [file for file in files if file.suffix.lower() in SUFFIXES]
    if not images:
        kinds = Counter(file.suffix or "no suffix" for file in files)
        kinds.update("folder" for each in data_dir.iterdir() if each.is_dir())
        found = ", ".join(f"{count} {kind}" for kind, count in kinds.most_common(8)) or "nothing"
        raise ValueError(f"data folder {data_dir} has no images; it holds {found}; {_EXPECTED}")

    skips = [
        Skip(file.name, "unsupported format", f"{file.suffix} cannot be read; convert it to .png")
        for file in files
        if file.suffix.lower() in OTHER_SUFFIXES
    ]
    sources = []
    for image in images:
        if _SURROGATE.search(image.name):  # safetensors opens no such path
            name = os.fsencode(image.name).decode(errors="backslashreplace")
            skips.append(Skip(name, "unusable file name", "it is not valid UTF-8; rename the file"))
            continue
        captions, faults = read_captions(image)
        skips += faults
        if not captions:
            continue
        source = Source(image, captions)
        if (num_bytes := source.longest_name_bytes) > _MAX_NAME_BYTES:
            detail = (
                f"its features' longest file name would have {num_bytes} bytes, of "
                f"{_MAX_NAME_BYTES}; rename the file to a shorter name"
            )
            skips.append(Skip(image.name, "unfit file name", detail))
            continue
        sources.append(source)
    skips += [
        Skip(file.name, "captions not read", "put each into <name>.txt beside its picture")
        for file in files
        if file.name in _TABLES or file.suffix.lower() == ".caption"
    ]
    if not sources:
        tables = ", ".join(sorted({skip.file for skip in skips if skip.file in _TABLES}))
        beside = f"; captions in {tables} are not read" if tables else ""
        raise ValueError(
            f"none of the {len(images)} images in {data_dir} has a caption (first: "
            f"{skips[0].file}: {skips[0].detail}){beside}; {_EXPECTED}"
        )
    _check_names(images, sources)
    return sources, skips


def read_captions(image: Path) -> tuple[dict[str, str], list[Skip]]:
    """Read the captions beside an image: every text of its .json, or else its .txt as `prompt`.

    Returns:
        The captions by column, and what was left out: the whole image if no caption is left.
    """
    table, text = image.with_suffix(".json"), image.with_suffix(".txt")
    file = table if table.exists() else text
    try:
        content = file.read_text(encoding="utf-8-sig")
        columns: Any = {"prompt": content.strip()} if file is text else json.loads(content)
    except FileNotFoundError:
        detail = f"there is neither {table.name} nor {text.name}"
        return {}, [Skip(image.name, NO_CAPTION, detail)]
    except UnicodeDecodeError:
        detail = f"{file.name} is not UTF-8; save it as UTF-8"
        return {}, [Skip(image.name, "unreadable caption", detail)]
    except (OSError, ValueError) as error:
        return {}, [Skip(image.name, "unreadable caption", f"{file.name}: {error}")]
    if not isinstance(columns, dict):
        detail = f"{file.name} holds a {type(columns).__name__}, not an object"
        return {}, [Skip(image.name, "unreadable caption", detail)]

    faults = {column: _find_fault(column, caption) for column, caption in columns.items()}
    skips = [
        Skip(file.name, fault, f"column {column!r} is left out")
        for column, fault in faults.items()
        if fault
    ]
    captions = {column: columns[column] for column, fault in faults.items() if not fault}
    if not captions:
        skips.append(Skip(image.name, NO_CAPTION, f"{file.name} holds no caption"))
    return captions, skips


def _find_fault(column: str, caption: object) -> str | None:
    if not isinstance(caption, str):
        return "caption is not text"
    if not caption.strip():
        return "empty caption"
    if not _COLUMN.fullmatch(column):
        return "column not usable in a file name"
    if _SURROGATE.search(column + caption):
        return "unreadable caption"
    return None


def _check_names(images: Iterable[Path], sources: Iterable[Source]) -> None:
    by_stem: dict[str, Path] = {}
    for image in images:
        if (other := by_stem.setdefault(image.stem, image)) is not image:
            raise ValueError(
                f"images {other.name} and {image.name} would share one cache file, "
                f"{latent_path(image.parent, image.stem).name}; rename or remove one of them"
            )
    for source in sources:
        for column in source.captions:
            name = source.embed_path(column).name
            owner = split_embed_name(name, by_stem)
            assert owner is not None
            if owner[0] != source.stem:
                raise ValueError(
                    f"{name} for column {column!r} of {source.image.name} would be mistaken for "
                    f"that of {by_stem[owner[0]].name}; rename the column or one of the images"
                )
