"""What finished cells leave: a small file each."""

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean
from typing import Any

from urae.backbones.devices import name_device, name_dtype, pick_device, pick_dtype
from urae.study.cells import Cell
from urae.study.metrics import METRICS, PARTS

_ORIGIN = ("device", "dtype", "torch", "commit")
_STORED = {*METRICS, *PARTS} - {"parts"}


@dataclass(frozen=True)
class Row:
    """A finished cell."""

    cell: Cell
    record: Mapping[str, Any]
    """What its file says."""

    @property
    def figures(self) -> Mapping[str, float]:
        """By name: what was measured, and the mean share of the caption's parts."""
        stored: Mapping[str, float] = self.record["figures"]
        return {**stored, "parts": fmean(stored[name] for name in PARTS)}

    @property
    def origin(self) -> dict[str, Any]:
        """Where and with what it was measured."""
        return {key: self.record[key] for key in _ORIGIN}


def find_result(folder: Path, cell: Cell) -> Path:
    """Return where a cell leaves its figures."""
    return folder / f"{cell.key}.json"


def read_results(folder: Path, cells: Iterable[Cell]) -> list[Row]:
    """Read what the finished ones of some cells have left.

    Raises:
        ValueError: If a file is not what a cell leaves.
    """
    paths = ((cell, find_result(folder, cell)) for cell in cells)
    return [Row(cell, _read_record(path)) for cell, path in paths if path.is_file()]


def _read_record(path: Path) -> dict[str, Any]:
    try:
        record = json.loads(path.read_bytes())
    except ValueError:
        record = None
    if not _is_record(record):
        raise ValueError(
            f"{path} is not a complete result of a cell; delete it, and the same command makes it "
            "again"
        )
    whole: dict[str, Any] = record
    return whole


def _is_record(value: Any) -> bool:
    if not isinstance(value, dict) or not value.keys() >= {"figures", *_ORIGIN}:
        return False
    figures = value["figures"]
    return (
        isinstance(figures, dict)
        and figures.keys() >= _STORED
        and all(isinstance(each, int | float) for each in figures.values())
    )


def name_place(device: str, dtype: str) -> str:
    """Name what figures depend on beside their cell: `cpu in float32`, `cuda in bfloat16`.

    Args:
        device: As records spell it; all GPUs of CUDA count as one.
        dtype: The same.
    """
    kind = device if device in ("cpu", "mps") else "cuda"
    return f"{kind} in {dtype}"


def check_place(rows: Sequence[Row], folder: Path, *, goes_on: bool) -> str:
    """Refuse results that would be compared across devices or precisions.

    Args:
        rows: What there is of a study.
        folder: Of the results.
        goes_on: Whether this process will add to them.

    Returns:
        Where all of them were measured, or will be.

    Raises:
        ValueError: If it is not one place.
    """
    found = {
        name_place(row.record["device"], row.record["dtype"]): find_result(folder, row.cell)
        for row in rows
    }
    device = pick_device()
    here = name_place(name_device(device), name_dtype(pick_dtype(device)))
    *_, wanted = [*found, here] if goes_on or not found else found
    for place, path in found.items():
        if place != wanted:
            raise ValueError(
                f"{path} was measured on {place}, but other cells of the question on {wanted}, "
                "and the two cannot be compared; choose another --work, or delete the results of "
                "one kind"
            )
    return wanted
