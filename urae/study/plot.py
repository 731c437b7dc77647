"""A question's plot: scene check, parts of captions and held-out loss with their intervals."""

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path
from textwrap import fill
from typing import Any

from urae.study.cells import Factor
from urae.study.questions import Question
from urae.study.statistics import Estimate

Summary = Sequence[tuple[Mapping[str, Factor], Mapping[str, Estimate]]]
"""Factors and estimates of each cell."""

_METRICS = {
    "score": "scene check, share that passes",
    "parts": "share of parts that hold",
    "held_out_loss": "held-out flow loss",
}
_COLOURS = ("#2660be", "#d1495b", "#2a9d6f", "#e0992f", "#7b4fa3", "#5c6470")
_SPREAD = 0.5  # of the room between two values, for the lines side by side
_PANEL_INCHES = (4.2, 2.6)
_LETTERS_AN_INCH = 9  # of the title


def check_plotting() -> None:
    """Refuse a study whose plot could not be drawn.

    Raises:
        ModuleNotFoundError: If matplotlib is missing.
    """
    if find_spec("matplotlib") is None:
        raise ModuleNotFoundError(
            "the study's plots need the package matplotlib: pip install matplotlib, or in a clone "
            "pip install -e '.[study]'"
        )


def draw(question: Question, summary: Summary, path: Path) -> None:
    """Write a question's plot: a row for each metric, a column for each panel.

    Args:
        question: Says which factor is where.
        summary: Factors and estimates of each cell.
        path: The PNG to write.
    """
    from matplotlib.figure import Figure

    panels = _values(summary, question.panels) if question.panels else [None]
    width, height = _PANEL_INCHES
    size = (width * len(panels) + 1.6, height * len(_METRICS) + 0.4)
    figure = Figure(figsize=size, layout="constrained")
    figure.suptitle(fill(question.title, round(_LETTERS_AN_INCH * size[0])), fontsize=12)
    grid = figure.subplots(len(_METRICS), len(panels), sharex=True, sharey="row", squeeze=False)
    lines = list(dict.fromkeys(_line_of(factors, question) for factors, _ in summary))
    ticks = _values(summary, question.x)
    for row, (metric, label) in enumerate(_METRICS.items()):
        for column, panel in enumerate(panels):
            axes = grid[row][column]
            chosen = [
                cell for cell in summary if panel is None or cell[0][str(question.panels)] == panel
            ]
            placed = list(_place_cells(chosen, question, ticks, lines))
            for number, line in enumerate(lines):
                points = [(place, figures[metric]) for of, place, figures in placed if of == line]
                _draw_line(axes, points, line, number)
            axes.set_xticks(range(len(ticks)), [_write(tick) for tick in ticks])
            axes.set_xlim(-0.5, len(ticks) - 0.5)
            axes.grid(axis="y", color="#e2e4e8")
            axes.spines[["top", "right"]].set_visible(False)
            if row == 0 and panel is not None:
                axes.set_title(f"{question.panels}: {_write(panel)}", fontsize=10)
            if column == 0:
                axes.set_ylabel(label)
            if row == len(_METRICS) - 1:
                axes.set_xlabel(question.x)
    scores = grid[0][0]
    scores.set_ylim(0, min(1.0, scores.get_ylim()[1]))  # a share, however wide its interval
    handles = _find_handles(grid)
    labels = [line for line in lines if line in handles]
    figure.legend(
        [handles[line] for line in labels],
        labels,
        title=", ".join(question.lines),
        loc="outside right center",  # clear of the title
        frameon=False,
    )
    figure.savefig(path, dpi=150, metadata={"Software": None})


def _line_of(factors: Mapping[str, Factor], question: Question) -> str:
    return ", ".join(_write(factors[name]) for name in question.lines)


def _place_cells(
    cells: Summary, question: Question, ticks: Sequence[Factor], lines: Sequence[str]
) -> Iterator[tuple[str, float, Mapping[str, Estimate]]]:
    """Yield each cell's line, place and estimates: side by side where a tick has several lines."""
    for tick, value in enumerate(ticks):
        here = [cell for cell in cells if cell[0][question.x] == value]
        here.sort(key=lambda cell: lines.index(_line_of(cell[0], question)))
        for number, (factors, figures) in enumerate(here):
            offset = (number - (len(here) - 1) / 2) * _SPREAD / len(lines)
            yield _line_of(factors, question), tick + offset, figures


def _draw_line(axes: Any, points: Sequence[tuple[float, Estimate]], line: str, number: int) -> None:
    """Draw points with their intervals; none where there was one seed."""
    if not points:
        return
    estimates = [estimate for _, estimate in points]
    known = [e if math.isfinite(e.low) else replace(e, low=e.mean, high=e.mean) for e in estimates]
    axes.errorbar(
        [place for place, _ in points],
        [each.mean for each in estimates],
        yerr=[
            [max(0.0, each.mean - each.low) for each in known],
            [max(0.0, each.high - each.mean) for each in known],
        ],
        fmt="o",
        markersize=5,
        capsize=3,
        color=_COLOURS[number % len(_COLOURS)],
        label=line,
        clip_on=False,  # a point may lie on the axis
    )


def _find_handles(grid: Any) -> dict[str, Any]:
    """Find the legend's handle of each line, whichever panels it is in."""
    return {
        label: handle
        for axes in grid.flat
        for handle, label in zip(*axes.get_legend_handles_labels(), strict=True)
    }


def _values(summary: Summary, factor: str) -> list[Factor]:
    """Return a factor's values: numbers by size, then words as they come."""
    values = list(dict.fromkeys(factors[factor] for factors, _ in summary))
    numbers = sorted(value for value in values if not isinstance(value, str))
    return [*numbers, *(value for value in values if isinstance(value, str))]


def _write(value: Factor) -> str:
    return f"{value:g}" if isinstance(value, float) else str(value)
