"""Captioned pictures for training: clean renders, and `real`, the analogue of web photographs.

A `real` picture is a photograph (see `photograph.py`), and its caption is off: in `WRONG_SHARE` of
them one word is wrong, in `VAGUE_SHARE`, independently, words are left out.
"""

import json
import math
import random
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, Literal

from jaxtyping import UInt8
from torch import Tensor

from urae.geometry import check_size
from urae.miniature.grammar import (
    BACKGROUNDS,
    COLOURS,
    LIGHTS,
    RELATIONS,
    SHAPES,
    SIZES,
    TEXTURES,
    Description,
    ObjectWords,
    write_caption,
)
from urae.miniature.photograph import (
    decode_picture,
    encode_picture,
    sample_camera,
    take_photograph,
)
from urae.miniature.processes import start_processes
from urae.miniature.render import render
from urae.miniature.world import Scene, caption, training_scene
from urae.storage import write_atomic

Kind = Literal["clean", "real"]

WRONG_SHARE = 0.2
VAGUE_SHARE = 0.4
_LEFT_OUT_SHARE = 0.5  # of the words of a vague caption that can be
_CHUNK = 8  # indices that a process takes at a time
_SET_FILE = Path(".urae") / "scenes.json"  # in a folder of samples: which set they are of

Settings = Mapping[str, str | int | float]
"""What tells a set of samples from others, by name."""

_OBJECT_PARTS = {"size": SIZES, "colour": COLOURS, "shape": SHAPES}
_BACKGROUND_PARTS = {"texture": TEXTURES, "background": BACKGROUNDS, "light": LIGHTS}
PARTS = (*_OBJECT_PARTS, "relation", *_BACKGROUND_PARTS)
"""What a caption can have wrong."""


@dataclass(frozen=True)
class Sample:
    """A picture with a caption."""

    picture: UInt8[Tensor, "3 h w"]
    caption: str
    scene: Scene
    """What it truly shows."""
    file: bytes | None = None
    """The JPEG file that a photograph was decoded from."""


def sample_clean(index: int, seed: int, height: int, width: int) -> Sample:
    """Draw a scene, rendered as it is, with its caption.

    Args:
        index: Number of the sample, below 2^32.
        seed: Of the set of samples; sets of different seeds share no scene's seed.
        height: In pixels, a multiple of 16.
        width: The same.

    Raises:
        ValueError: If FLUX has no such size.
    """
    scene = training_scene(seed, index)
    return Sample(render([scene], height, width)[0], caption(scene), scene)


def sample_real(index: int, seed: int, height: int, width: int) -> Sample:
    """Draw the same scene as `sample_clean`, as a photograph with a caption that may be off."""
    check_size(height, width)
    scene = training_scene(seed, index)
    rng = random.Random(scene.seed)
    file = take_photograph(scene, sample_camera(rng), height, width)
    words = write_caption(spoil(scene.description, rng))
    return Sample(decode_picture(file), words, scene, file)


def write_folder(
    folder: Path,
    kind: Kind,
    indices: Iterable[int],
    seed: int,
    height: int,
    width: int,
    *,
    workers: int = 1,
    deadline: float = math.inf,
) -> int:
    """Write samples as a folder of captioned pictures that `urae cache` reads.

    Clean renders become PNG files, photographs JPEG files; the caption is the `prompt` of the JSON
    file beside each. What is there already is kept: a run that was killed goes on where it stopped.

    Args:
        folder: Made if it is missing.
        kind: Of the samples.
        indices: Their numbers, below 2^32.
        seed: Of the set.
        height: In pixels, a multiple of 16.
        width: The same.
        workers: Processes that share the indices.
        deadline: No sample is begun after this time, as of `time.time`.

    Returns:
        How many were written.

    Raises:
        ValueError: If FLUX has no such size, or the folder holds samples of another set.
        FileExistsError: If it holds anything else.
    """
    check_size(height, width)
    claim_folder(folder, {"kind": kind, "seed": seed, "height": height, "width": width})
    write = partial(_write_sample, folder, kind, seed, height, width, deadline)
    if workers == 1:
        return sum(map(write, indices))
    with start_processes(workers) as pool:
        return sum(pool.map(write, indices, chunksize=_CHUNK))


def claim_folder(folder: Path, settings: Settings) -> None:
    """Make a folder for samples of one set, or see that it is that set's.

    Args:
        folder: Made if it is missing.
        settings: Of the set.

    Raises:
        ValueError: If the folder holds samples of another set, or its record is damaged.
        FileExistsError: If it holds anything else: that is somebody's own.
    """
    record = folder / _SET_FILE
    if record.exists():
        there = _read_settings(record)
        if there != settings:
            raise ValueError(
                f"{folder} holds pictures of another set ({_describe(there)}), but this one is "
                f"{_describe(settings)}; choose another folder, or delete this one"
            )
        return
    if folder.exists() and any(each.name != _SET_FILE.parent.name for each in folder.iterdir()):
        raise FileExistsError(
            f"{folder} holds files, but no {_SET_FILE} that says they belong to such a set; "
            "choose a new or an empty folder"
        )
    record.parent.mkdir(parents=True, exist_ok=True)
    write_atomic(record, json.dumps(dict(settings)).encode())


def _read_settings(record: Path) -> Settings:
    try:
        there: Any = json.loads(record.read_text(encoding="utf-8"))
    except ValueError:
        there = None
    if not isinstance(there, dict):
        raise ValueError(
            f"{record} is damaged, so it is unknown which set its folder holds; choose another "
            "folder, or delete this one"
        )
    return there


def _describe(settings: Settings) -> str:
    return ", ".join(f"{name} {value}" for name, value in settings.items())


def _write_sample(
    folder: Path, kind: Kind, seed: int, height: int, width: int, deadline: float, index: int
) -> bool:
    """Tell whether it was written now."""
    draw, suffix = (sample_real, ".jpg") if kind == "real" else (sample_clean, ".png")
    image = folder / f"{index:06d}{suffix}"
    is_new = not image.exists() and time.time() < deadline
    if is_new:
        sample = draw(index, seed, height, width)
        text = json.dumps({"prompt": sample.caption})
        write_atomic(image.with_suffix(".json"), text.encode())
        write_atomic(image, sample.file or encode_picture(sample.picture, "PNG"))
    return is_new


def spoil(described: Description, rng: random.Random) -> Description:
    """Make a description partly wrong or vague, with the shares stated above."""
    if rng.random() < WRONG_SHARE:
        parts = [part for part in PARTS if part != "relation" or described.relations]
        described = make_wrong(described, rng.choice(parts), rng)
    return make_vague(described, rng) if rng.random() < VAGUE_SHARE else described


def make_wrong(described: Description, part: str, rng: random.Random) -> Description:
    """Replace one word of a full description by another of its kind.

    Args:
        described: With nothing left unsaid; of two objects or more for a relation.
        part: One of `PARTS`: which word, of an object or relation chosen at random.
        rng: Source of chance.
    """
    changes: dict[str, Any]
    if part in _BACKGROUND_PARTS:
        changes = _change(described, part, _BACKGROUND_PARTS[part], rng)
    elif part == "relation":
        n = rng.randrange(len(described.relations))
        wrong = _choose_other(RELATIONS, described.relations[n], rng)
        changes = {"relations": (*described.relations[:n], wrong, *described.relations[n + 1 :])}
    else:
        n = rng.randrange(len(described.objects))
        each = described.objects[n]
        other = replace(each, **_change(each, part, _OBJECT_PARTS[part], rng))
        changes = {"objects": (*described.objects[:n], other, *described.objects[n + 1 :])}
    return replace(described, **changes)


def make_vague(described: Description, rng: random.Random) -> Description:
    """Leave out words, each that may be with probability 1/2."""

    def keep(word: str | None) -> str | None:
        return word if rng.random() >= _LEFT_OUT_SHARE else None

    return Description(
        tuple(
            ObjectWords(keep(each.size), keep(each.colour), each.shape)
            for each in described.objects
        ),
        tuple(keep(relation) for relation in described.relations),
        keep(described.texture),
        keep(described.background),
        keep(described.light),
    )


def _change(
    item: Description | ObjectWords, part: str, words: Sequence[str], rng: random.Random
) -> dict[str, Any]:
    return {part: _choose_other(words, getattr(item, part), rng)}


def _choose_other(words: Sequence[str], word: str | None, rng: random.Random) -> str:
    return rng.choice([other for other in words if other != word])
