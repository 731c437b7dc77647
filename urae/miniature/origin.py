"""What a stage is made from, its part of the recipe and the files it reads, and that both hold."""

import json
from collections.abc import Iterable, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from urae.storage import digest_file

_SETTINGS = "urae.settings"
_INPUTS = "urae.inputs"


def describe_origin(seed: int, section: Any, files: Iterable[Path]) -> dict[str, str]:
    """Return what a stage is made from, as metadata of its file.

    Args:
        seed: Of the recipe.
        section: The stage's own, as `recipe.TextStage`.
        files: Those that it reads, of other stages.
    """
    fields = asdict(section)
    settings = {"seed": seed, **fields.pop("loop"), **fields}
    inputs = {file.name: digest_file(file) for file in files}
    return {_SETTINGS: json.dumps(settings), _INPUTS: json.dumps(inputs)}


def pick_origin(metadata: Mapping[str, str]) -> dict[str, str]:
    """Return the part of a file's metadata that says what it is made from."""
    return {key: metadata[key] for key in (_SETTINGS, _INPUTS) if key in metadata}


def check_same_origin(path: Path, before: Mapping[str, str], now: Mapping[str, str]) -> None:
    """Refuse to go on from a state of other settings or files; one that says nothing will do.

    Args:
        path: Of the state.
        before: As `pick_origin` returns it, of the state.
        now: The same, of the stage as it would go on.

    Raises:
        ValueError: Names what differs.
    """
    if (name := _find_change(before, now, _SETTINGS)) is not None:
        there, here = (json.loads(each[_SETTINGS]).get(name) for each in (before, now))
        raise ValueError(
            f"{path} was made with {name} = {there}, but the recipe now says {here}; continue "
            "with the original recipe, or delete this file to start over"
        )
    if (name := _find_change(before, now, _INPUTS)) is not None:
        raise ValueError(
            f"{path} was made from a different {name} than the current one; restore the original, "
            "or delete this file to start over"
        )


def _find_change(before: Mapping[str, str], now: Mapping[str, str], key: str) -> str | None:
    """Name the first thing that differs, where both say something."""
    if key not in before or key not in now:
        return None
    there, here = json.loads(before[key]), json.loads(now[key])
    changed = (n for n in sorted(there.keys() | here.keys()) if there.get(n) != here.get(n))
    return next(changed, None)


def check_inputs(path: Path, metadata: Mapping[str, str], files: Iterable[Path]) -> None:
    """Refuse a stage's file beside others than it was trained on, if it says which those were.

    Args:
        path: Of the stage's file.
        metadata: Of that file.
        files: Of other stages, which are used with it.

    Raises:
        ValueError: Names the file that is another.
    """
    recorded = json.loads(metadata.get(_INPUTS, "{}"))
    for file in files:
        if file.name in recorded and digest_file(file) != recorded[file.name]:
            raise ValueError(
                f"{path} was trained on another {file}; restore that one, or delete the former "
                f"and train it again: urae miniature train {path.stem}"
            )
