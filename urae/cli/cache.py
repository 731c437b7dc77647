"""`urae cache`: a folder of captioned images to features."""

import time
from collections import Counter
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.progress import Progress, TaskID
from rich.table import Table
from rich.text import Text

from urae.cli.generate import MODELS
from urae.cli.terminal import (
    SECONDS_BETWEEN_LINES,
    Verbose,
    build_progress,
    console,
    format_seconds,
    is_first_rank,
    quiet_progress_bars,
)

if TYPE_CHECKING:
    from urae.features.cache import CacheReport


def cache_command(
    data_dir: Annotated[Path, typer.Argument(help="Folder of images with captions (.json, .txt).")],
    model: Annotated[
        str,
        typer.Option(help=f"Base model: {MODELS}."),
    ],
    resolution: Annotated[
        int,
        typer.Option(
            help="Training resolution: pictures of any shape get as many tokens as a square of "
            "this side."
        ),
    ] = 2048,
    max_sequence_length: Annotated[
        int | None, typer.Option(help="Number of text tokens [dim](dev 512, schnell 256)[/].")
    ] = None,
    overwrite: Annotated[
        bool,
        typer.Option(
            "--overwrite", help="Also re-encode features written by the reference implementation."
        ),
    ] = False,
    verbose: Verbose = False,
) -> None:
    """Encode images and captions into features beside them; what is up to date is kept.

    Several processes can share a folder, and a killed run continues where it stopped.
    """
    from urae.features.cache import REPORT_NAME, CacheConfig, cache
    from urae.features.store import WORK_DIR

    config = CacheConfig(data_dir, model, resolution, max_sequence_length, overwrite)
    quiet_progress_bars()
    with build_progress("rate") as bar:
        report = cache(config, progress=_Display(bar).show)
    _tell(report, data_dir / WORK_DIR / REPORT_NAME)
    if not report.num_ready:
        raise ValueError(
            f"no picture in {data_dir} can be trained on at --resolution {resolution}; choose a "
            "smaller one, or fix what is listed above"
        )
    one = report.num_ready == 1
    text = f"{report.num_ready} picture{'' if one else 's'} in {data_dir} {'is' if one else 'are'}"
    console.print("[green]done:[/]", Text(f"{text} ready to train on"))


class _Display:
    """A bar for each stage on a terminal, else a plain line a minute."""

    def __init__(self, bar: Progress) -> None:
        self._bar = bar
        self._stages: dict[str, tuple[TaskID, float]] = {}  # since when
        self._last_line = time.monotonic()

    def show(self, stage: str, done: int, total: int) -> None:
        if not total:
            return
        now = time.monotonic()
        if stage not in self._stages:
            self._stages[stage] = self._bar.add_task(stage, total=total, rate=""), now
        task, began = self._stages[stage]
        rate = done / max(now - began, 1e-9)
        self._bar.update(task, completed=done, total=total, rate=f"{rate:.2f}/s")
        is_due = now - self._last_line >= SECONDS_BETWEEN_LINES
        if done and is_due and self._bar.disable and is_first_rank():
            self._last_line = now
            left = format_seconds((total - done) / rate)
            line = f"{stage} {done} of {total}, {rate:.2f}/s, ETA {left}"
            console.print(line, soft_wrap=True)


def _tell(report: "CacheReport", whole: Path) -> None:
    """Print what was done, and what was left out or cut; `whole` has all of it."""
    table = Table("", "encoded", "unchanged", "kept, no metadata", "by others")
    for name, counts in (("latents", report.latents), ("prompts", report.embeds)):
        numbers = (counts.encoded, counts.unchanged, counts.kept, counts.shared)
        table.add_row(name, *[str(number) for number in numbers])
    console.print(table)
    if len(report.columns) > 1:
        columns = ", ".join(f"{name} {count}" for name, count in report.columns.items())
        console.print("captions used for training, by column:", Text(columns))
    for names, text in (
        (report.cut, "captions are longer than the text length and are cut there"),
        (
            report.removed,
            "feature files removed because their picture or caption can no longer be used",
        ),
        (report.pictureless, "features kept and still trained on although their picture is gone"),
    ):
        if names:
            console.print(f"[yellow]{len(names)}[/] {text}:", Text(f"{names[0]} (all in {whole})"))
    if report.skipped:
        reasons = Counter(skip.reason for skip in report.skipped)
        text = ", ".join(f"{count} {reason}" for reason, count in reasons.most_common())
        text += f" (all in {whole})"
        console.print(f"[yellow]skipped {len(report.skipped)}:[/]", Text(text))
        for skip in report.skipped[:5]:
            name = "" if skip.detail.startswith(skip.file) else f"{skip.file}: "
            console.print(f"  {name}{skip.detail}", markup=False)
