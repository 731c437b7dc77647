"""What a study leaves: a CSV of all figures, a plot, and a text with intervals and verdicts."""

import csv
import io
from collections.abc import Iterable, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from statistics import fmean
from typing import Any

from urae.config import flatten
from urae.storage import write_atomic
from urae.study.cells import Cell, Factor
from urae.study.config import StudyConfig
from urae.study.metrics import DATA_SCORE, METRICS
from urae.study.output import find_page, put_into_page
from urae.study.plot import Summary, draw
from urae.study.questions import QUESTIONS, Claim, Question
from urae.study.results import Row
from urae.study.statistics import Estimate, compare, compare_shares, estimate, estimate_share

_DECIDING = next(iter(METRICS))


def write_report(config: StudyConfig, rows: Sequence[Row], num_cells: int) -> Path:
    """Write table, plot and text of a question, and put the text into the page if there is one.

    The page is a Markdown file beside the folder, of its name, with a place for each question.

    Args:
        config: Of the study.
        rows: The cells that are done, one or more.
        num_cells: Cells times seeds that there are to be.

    Returns:
        The text's path.
    """
    question, folder, letter = QUESTIONS[config.question], config.output_dir, config.question
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{letter}.md"
    write_atomic(folder / f"{letter}.csv", write_csv(rows).encode())
    draw(question, summarize(rows), folder / f"{letter}.png")
    write_atomic(path, write_text(letter, question, rows, num_cells).encode())
    if page := find_page(folder):
        prefix = f"{page.stem}/"
        put_into_page(page, letter, write_text(letter, question, rows, num_cells, prefix))
    return path


def write_csv(rows: Sequence[Row]) -> str:
    """Write a line for each cell and seed: factors, seed, figures, settings, where it ran."""
    lines = []
    for row in rows:
        settings = _describe_settings(row.cell)
        lines.append(
            {
                **row.cell.factors,
                "seed": row.cell.seed,
                **row.figures,
                "key": row.cell.key,
                **row.origin,
                **settings,
            }
        )
    columns = list(dict.fromkeys(column for line in lines for column in line))
    text = io.StringIO(newline="")
    writer = csv.DictWriter(text, columns, lineterminator="\n")
    writer.writeheader()
    writer.writerows(lines)
    return text.getvalue()


def _describe_settings(cell: Cell) -> dict[str, Any]:
    """Write all settings on one level, without the folders that things lie in."""
    settings = flatten(asdict(cell))
    described = {
        name: Path(value).name if name.endswith(".name") else value
        for name, value in settings.items()
        if not name.startswith("factors.")
    }
    if cell.training is not None:
        described["training.parts"] = ", ".join(
            f"{part.start} to {part.stop} of {part.data.count} {part.data.source}"
            + (f" in {part.data.teacher_steps} steps" if part.data.teacher_steps else "")
            for part in cell.training.parts
        )
    return described


def summarize(rows: Sequence[Row]) -> Summary:
    """Return the estimate of each figure over the seeds, cell by cell."""
    groups: dict[tuple[tuple[str, Factor], ...], list[Row]] = {}
    for row in rows:
        groups.setdefault(tuple(row.cell.factors.items()), []).append(row)
    return [
        (dict(factors), {name: _estimate(name, group) for name in group[0].figures})
        for factors, group in groups.items()
    ]


def _estimate(name: str, rows: Sequence[Row]) -> Estimate:
    """Return the estimate of a figure from a cell's seeds."""
    values = [row.figures[name] for row in rows]
    if _is_share(name):
        return estimate_share(values, sum(row.cell.scoring.num_captions for row in rows))
    return replace(estimate(values), varies=not _is_fixed(values, rows))


def _is_share(name: str) -> bool:
    return name in METRICS and METRICS[name].is_share


def _is_fixed(values: Sequence[float], rows: Iterable[Row]) -> bool:
    """Tell whether no seed changes what was measured, as the loss of a base without adapter."""
    return (
        all(row.cell.training is None for row in rows) and len(values) > 1 and len(set(values)) == 1
    )


def decide(claim: Claim, rows: Sequence[Row]) -> dict[str, Estimate] | None:
    """Return the mean paired difference, better less worse, of each metric.

    Of each seed, the differences of all pairs of cells are averaged; the interval is that of these
    means over the seeds. A figure in which no pair differs is left out: what the claim is about
    does not bear on it. The deciding one stays, without an interval.

    Returns:
        By metric; None if there is no pair of finished cells.
    """
    names = set(claim.better) | set(claim.worse)
    rest = {
        id(row): tuple(item for item in row.cell.factors.items() if item[0] not in names)
        for row in rows
    }
    better = [row for row in rows if claim.better.items() <= row.cell.factors.items()]
    worse = {
        (rest[id(row)], row.cell.seed): row
        for row in rows
        if claim.worse.items() <= row.cell.factors.items()
    }
    pairs: dict[int, list[tuple[Row, Row]]] = {}
    for row in better:
        if other := worse.get((rest[id(row)], row.cell.seed)):
            pairs.setdefault(row.cell.seed, []).append((row, other))
    most = max((len(each) for each in pairs.values()), default=0)
    whole = [each for each in pairs.values() if len(each) == most]
    if not whole:
        return None
    return {
        name: _compare(name, whole)
        for name in METRICS
        if name == _DECIDING or _differs(name, whole)
    }


Pairs = Sequence[Sequence[tuple[Row, Row]]]
"""Of each seed: a better cell by the claim, and a worse one."""


def _differs(name: str, pairs: Pairs) -> bool:
    return any(row.figures[name] != other.figures[name] for each in pairs for row, other in each)


def _compare(name: str, pairs: Pairs) -> Estimate:
    """Return the mean paired difference of a figure over the seeds."""
    better = [fmean(row.figures[name] for row, _ in each) for each in pairs]
    worse = [fmean(other.figures[name] for _, other in each) for each in pairs]
    differs = _differs(name, pairs)
    if _is_share(name):
        num_pictures = sum(row.cell.scoring.num_captions for each in pairs for row, _ in each)
        return replace(compare_shares(better, worse, num_pictures), varies=differs)
    differences = [a - b for a, b in zip(better, worse, strict=True)]
    rows = [row for each in pairs for pair in each for row in pair]
    is_fixed = _is_fixed(differences, rows)
    return replace(compare(better, worse), varies=differs and not is_fixed)


def judge(difference: Estimate) -> str:
    """Say whether an interval of the deciding metric agrees with a claim."""
    if difference.is_positive:
        return "agrees"
    return "disagrees" if difference.is_negative else "cannot tell"


def write_text(
    letter: str, question: Question, rows: Sequence[Row], num_cells: int, prefix: str = ""
) -> str:
    """Write the Markdown section of a question.

    Args:
        letter: Of the question.
        question: Its claims and title.
        rows: The cells that are done, one or more.
        num_cells: Cells times seeds that there are to be.
        prefix: Of the links to plot and table.
    """
    lines = [_describe_run(rows, num_cells), ""]
    lines += [_write_claim(claim, rows) for claim in question.claims]
    lines += ["", *_write_table(summarize(rows)), ""]
    lines += [
        f"![{question.title}]({prefix}{letter}.png)",
        "",
        f"All figures and settings: [{letter}.csv]({prefix}{letter}.csv).",
    ]
    return "\n".join(lines) + "\n"


def _describe_run(rows: Sequence[Row], num_cells: int) -> str:
    def name(key: str) -> str:
        return ", ".join(sorted({str(row.record[key]) for row in rows}))

    cells = len({tuple(row.cell.factors.items()) for row in rows})
    seeds = len({row.cell.seed for row in rows})
    notes = "" if len(rows) == num_cells else f" Unfinished: {len(rows)} of {num_cells} runs."
    parts = (part for row in rows if row.cell.training for part in row.cell.training.parts)
    if any(part.data.source == "clean" for part in parts):
        notes = f" Clean renders take the teacher's place.{notes}"
    return (
        f"{_count(cells, 'cell')}, {_count(seeds, 'seed')}, on {name('device')} in "
        f"{name('dtype')}, torch {name('torch')}, commit {name('commit')}.{notes}"
    )


def _count(number: int, thing: str) -> str:
    return f"{number} {thing}{'' if number == 1 else 's'}"


def _write_claim(claim: Claim, rows: Sequence[Row]) -> str:
    head = f"- {claim.text} ({claim.source}):"
    found = decide(claim, rows)
    if found is None:
        return f"{head} **not tested**, its cells are missing."
    score = found[_DECIDING]
    others = "; ".join(
        f"{metric.title} {metric.write_estimate(found[name], sign=True)}"
        for name, metric in METRICS.items()
        if name in found
    )
    verdict, seeds = judge(score), _count(score.count, "seed")
    return f"{head} **{verdict}**. Paired difference over {seeds}: {others}."


def _write_table(summary: Summary) -> list[str]:
    metrics = dict(METRICS)
    if any("data_score" in figures for _, figures in summary):
        metrics["data_score"] = DATA_SCORE
    head = [*summary[0][0], *(metric.title for metric in metrics.values())]
    lines = [f"| {' | '.join(head)} |", f"|{'---|' * len(head)}"]
    for factors, figures in summary:
        cells = [f"{value:g}" if isinstance(value, float) else str(value)
                 for value in factors.values()]  # fmt: skip
        for name, metric in metrics.items():
            if name not in figures:
                cells.append("")
            elif name == "data_score":  # the same pictures for every seed
                cells.append(metric.write(figures[name].mean))
            else:
                cells.append(metric.write_estimate(figures[name]))
        lines.append(f"| {' | '.join(cells)} |")
    return lines
