"""A question's plot: scene check and held-out loss with their intervals."""

import math
from collections.abc import Mapping, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from urae.study.cells import Factor
from urae.study.questions import Question
from urae.study.statistics import Estimate

Summary = Sequence[tuple[Mapping[str, Factor], Mapping[str, Estimate]]]

_METRICS = {"score": "scene check, share that passes", "held_out_loss": "held-out flow loss"}
_COLOURS = ("#2660be", "#d1495b", "#2a9d6f", "#e0992f", "#7b4fa3", "#5c6470")
_SPREAD = 0.5  # of the room between two values, for the lines side by side
_PANEL_INCHES = (4.2, 3.2)


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
    figure.suptitle(question.title, fontsize=12)
    grid = figure.subplots(len(_METRICS), len(panels), sharex=True, sharey="row", squeeze=False)
    lines = list(dict.fromkeys(_line_of(factors, question) for factors, _ in summary))
    ticks = _values(summary, question.x)
    for row, (metric, label) in enumerate(_METRICS.items()):
        for column, panel in enumerate(panels):
            axes = grid[row][column]
            chosen = [
                cell for cell in summary if panel is None or cell[0][str(question.panels)] == panel
            ]
            for number, line in enumerate(lines):
                some = [cell for cell in chosen if _line_of(cell[0], question) == line]
                offset = _SPREAD * ((number + 0.5) / len(lines) - 0.5)
                places = [ticks.index(factors[question.x]) + offset for factors, _ in some]
                _draw_line(axes, places, [figures[metric] for _, figures in some], line, number)
            axes.set_xticks(range(len(ticks)), [_write(tick) for tick in ticks])
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
        loc="outside right upper",
        frameon=False,
    )
    figure.savefig(path, dpi=150, metadata={"Software": None})


def _line_of(factors: Mapping[str, Factor], question: Question) -> str:
    return ", ".join(_write(factors[name]) for name in question.lines)


def _draw_line(
    axes: Any, places: Sequence[float], estimates: Sequence[Estimate], line: str, number: int
) -> None:
    """Draw points with their intervals; none where there was one seed."""
    if not places:
        return
    halves = [0.0 if math.isinf(e.high) else e.high - e.mean for e in estimates]
    axes.errorbar(
        places,
        [each.mean for each in estimates],
        yerr=halves,
        fmt="o",
        markersize=5,
        capsize=3,
        color=_COLOURS[number % len(_COLOURS)],
        label=line,
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
