"""Training pictures and their features: made once, shared by the cells, mixed by links."""

import json
import math
import os
import shutil
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict
from pathlib import Path

from urae.backbones.devices import pick_device
from urae.features.cache import CacheConfig, cache
from urae.miniature.check import SceneReport, check_scene, score
from urae.miniature.grammar import parse_caption
from urae.miniature.photograph import decode_picture
from urae.miniature.sources import write_folder
from urae.miniature.stages import load_stage
from urae.miniature.synthetic import write_synthetic
from urae.storage import write_atomic
from urae.study.cells import Cell, DataSet, Part, identify

_QUALITY_FILE = "quality.json"  # written last: a set that has it is whole
_NUM_CHECKED = 200  # pictures of a set, to say how good it is
_DRAWN_AT_ONCE = 64  # by the teacher, between two looks at the time: whole batches of it


class _TimeIsUpError(Exception):
    """What is made so far is kept."""


def list_data(cells: Iterable[Cell]) -> list[DataSet]:
    """List the sets that some cells train on or are measured on, each once."""
    found: dict[str, DataSet] = {}
    for cell in cells:
        parts = cell.training.parts if cell.training else ()
        for data in (*(part.data for part in parts), cell.scoring.held_out):
            found[_key(data)] = data
    return list(found.values())


def find_folder(root: Path, data: DataSet) -> Path:
    """Return where a set's pictures and features lie."""
    return root / f"{data.source}-{data.side}-{_key(data)}"


def make_data(root: Path, data: DataSet, work_dir: Path, deadline: float = math.inf) -> None:
    """Make a set's pictures and features, as far as they are not there and there is time.

    Args:
        root: Folder of all sets.
        data: Which.
        work_dir: Of the miniature's stages, where the teacher is.
        deadline: Nothing is begun after this time; another call goes on.

    Raises:
        FileNotFoundError: If the teacher is missing.
    """
    folder = find_folder(root, data)
    if (folder / _QUALITY_FILE).is_file():
        return

    def watch(*_progress: object) -> None:
        if time.time() >= deadline:
            raise _TimeIsUpError

    try:
        watch()
        if data.source == "synthetic":
            _draw(folder, data, work_dir, watch)
        else:
            workers, sides = min(os.cpu_count() or 1, data.count), (data.side, data.side)
            write_folder(
                folder, data.source, range(data.count), data.seed, *sides,
                workers=workers, deadline=deadline,
            )  # fmt: skip
        watch()  # they may not be whole
        cache(CacheConfig(folder, data.encoders.name, data.side), progress=watch)
    except _TimeIsUpError:
        return
    quality = asdict(score([_check(path) for path in _pictures(folder)[:_NUM_CHECKED]]))
    write_atomic(folder / _QUALITY_FILE, json.dumps(quality).encode())


def _draw(folder: Path, data: DataSet, work_dir: Path, watch: Callable[[], None]) -> None:
    """Let the teacher draw the pictures that are not there, and look at the time in between."""
    assert data.teacher is not None and data.teacher_steps is not None
    pipe = load_stage(data.teacher.name, work_dir).to(pick_device())
    pipe.set_progress_bar_config(disable=True)
    for start in range(0, data.count, _DRAWN_AT_ONCE):
        watch()
        some = range(start, min(start + _DRAWN_AT_ONCE, data.count))
        write_synthetic(
            folder, pipe, some, seed=data.seed, side=data.side, steps=data.teacher_steps
        )


def read_quality(root: Path, parts: Sequence[Part]) -> float:
    """Return the share of training pictures of which every part of their own caption holds."""
    sizes = [part.stop - part.start for part in parts]
    files = [find_folder(root, part.data) / _QUALITY_FILE for part in parts]
    shares = [float(json.loads(file.read_text())["share"]) for file in files]
    return sum(size * share for size, share in zip(sizes, shares, strict=True)) / sum(sizes)


def mix(root: Path, parts: Iterable[Part], folder: Path) -> None:
    """Make a folder of links to the features of some parts of sets.

    Args:
        root: Folder of all sets.
        parts: Of sets of one size; their numbers must not overlap.
        folder: Made anew.
    """
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    for part in parts:
        source = find_folder(root, part.data).resolve()
        for picture in _pictures(source)[part.start : part.stop]:
            for file in source.glob(f"{picture.stem}_*.safetensors"):
                (folder / file.name).symlink_to(file)


def _pictures(folder: Path) -> list[Path]:
    return sorted([*folder.glob("*.png"), *folder.glob("*.jpg")])


def _check(path: Path) -> SceneReport:
    words = json.loads(path.with_suffix(".json").read_text())["prompt"]
    return check_scene(decode_picture(path.read_bytes()).numpy(), parse_caption(words))


def _key(data: DataSet) -> str:
    return identify(asdict(data))
