"""The folder and page of a report: checked first, and never replaced by less."""

import csv
import re
from collections.abc import Iterable, Sequence
from pathlib import Path

from urae.storage import check_folder, write_atomic
from urae.study.cells import Cell
from urae.study.config import StudyConfig
from urae.study.results import Row, name_place


def check_output(config: StudyConfig, cells: Iterable[Cell], place: str) -> None:
    """Refuse an output folder that cannot take a report, or whose table is of another study.

    Args:
        config: Of the study.
        cells: All that the study has.
        place: Where they are measured, as of `name_place`.

    Raises:
        FileExistsError: If a file is in the folder's place or above it.
        PermissionError: If it cannot be written or made.
        ValueError: If its table holds other results, or the page beside it has no place for these.
    """
    folder, letter = config.output_dir, config.question
    check_folder(folder)
    if page := find_page(folder):
        _find_section(page.read_text(encoding="utf-8"), page, letter)
    keys = {cell.key for cell in cells}
    table = _read_table(folder, letter)
    others = [
        row for row in table
        if row.get("key") not in keys or name_place(row["device"], row["dtype"]) != place
    ]  # fmt: skip
    if others:
        raise ValueError(
            f"{_find_table(folder, letter)} holds {len(others)} results that this study does not "
            "have, made with other settings, seeds, weights or devices; choose another --output, "
            "or delete the file"
        )


def holds_more(config: StudyConfig, rows: Sequence[Row]) -> bool:
    """Tell whether the table in the output folder holds cells that are not among some."""
    keys = {row.cell.key for row in rows}
    return any(
        row.get("key") not in keys for row in _read_table(config.output_dir, config.question)
    )


def _find_table(folder: Path, letter: str) -> Path:
    return folder / f"{letter}.csv"


def _read_table(folder: Path, letter: str) -> list[dict[str, str]]:
    path = _find_table(folder, letter)
    if not path.is_file():
        return []
    with path.open(encoding="utf-8", errors="replace", newline="") as lines:
        return list(csv.DictReader(lines))


def find_page(folder: Path) -> Path | None:
    """Find the page that takes texts in: a Markdown file beside a folder, of its name."""
    folder = folder.resolve()  # `.` has a name too
    page = folder.parent / f"{folder.name}.md"
    return page if page.is_file() else None


def put_into_page(page: Path, letter: str, text: str) -> None:
    """Replace what a page says between the marks of a question.

    Raises:
        ValueError: If the page has no such marks.
    """
    before = page.read_text(encoding="utf-8")
    found = _find_section(before, page, letter)
    after = f"{before[: found.start(1)]}\n\n{text}\n{before[found.end(1) :]}"
    write_atomic(page, after.encode())


def _find_section(text: str, page: Path, letter: str) -> re.Match[str]:
    begin, end = f"<!-- results of {letter} -->", f"<!-- end of {letter} -->"
    found = re.search(f"{re.escape(begin)}(.*?){re.escape(end)}", text, re.DOTALL)
    if found is None:
        raise ValueError(
            f"page {page} has no place for question {letter}; put {begin} and {end} on lines of "
            "their own, or choose another --output"
        )
    return found
