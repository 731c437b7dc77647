"""A run's folder: what may be there when it starts, and the curves that it writes."""

import csv
import io
import logging
import os
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import asdict, dataclass, field
from pathlib import Path
from statistics import fmean
from threading import Event
from typing import Any

from jaxtyping import Float
from torch import Tensor

from urae.adapters.sources import LORA_FILE_NAME
from urae.config import flatten
from urae.features.claims import Claims
from urae.resolution import ResolutionPolicy
from urae.storage import write_atomic
from urae.train.checkpoint import (
    Checkpoint,
    clear_partial,
    find_checkpoints,
    find_damage,
    load_record,
    write_once_there_is_room,
)
from urae.train.config import TrainConfig
from urae.train.loss import NUM_LEVELS

logger = logging.getLogger(__name__)

LOSS_FILE = "loss.csv"
TRACKER_NAME = "urae"
"""Of the run in a tracker, and of tensorboard's folder in its own."""
VALIDATION_FILE = "validation.csv"
PREVIEW_DIR = "previews"
_PREVIEW = re.compile(r"step-(\d+)\.png")
LOCK_FILE = ".run.lock"

LEVELS = [f"loss_q{number}" for number in range(1, NUM_LEVELS + 1)]
"""Columns of the loss by quarter of the noise levels, least noise first."""

_DIR = re.compile(r"data\.\d+\.dir")  # of one of several folders
# fields that may change between an interrupted run and its continuation
_FREE_FIELDS = {
    "data_dir", "output_dir", "steps", "checkpoint_every", "keep_checkpoints", "validate_every",
    "tracker", "resume", "overwrite", "memory", "gradient_checkpointing", "compile",
    "context_parallel", "shard", "remote_cache_gib",
    "preview_prompts", "preview_seeds", "preview_every",
    "gradient_accumulation",  # the order of samples does not depend on it
    "model", "adapter.over",  # compared by their weights, wherever they lie now
}  # fmt: skip


@dataclass(frozen=True)
class StepReport:
    """What one optimizer step did."""

    step: int
    """Steps done, this one included."""
    loss: float
    """Mean over the step's batches on all devices."""
    grad_norm: float
    """Before clipping."""
    lr: float
    """Learning rate that the step was taken with."""
    seconds: float
    loader_seconds: float
    """Of those, what the main process waited for its batches."""
    level_losses: tuple[float | None, ...]
    """Mean over the samples with sigma in each quarter, least noise first; None where none was."""
    height: int
    """In pixels, of the main process's last batch."""
    width: int
    memory_gib: float | None
    """The most GPU memory that tensors took so far on the main process's device; None on a CPU."""
    held_out_loss: float | None = None
    """As last measured, before this step; None if it was not."""


@dataclass(frozen=True)
class Start:
    """Where a run starts: anew, or from its last whole checkpoint."""

    checkpoint: Checkpoint | None = None
    record: dict[str, Any] = field(default_factory=dict)
    """What was saved with the checkpoint."""
    damaged: tuple[tuple[Checkpoint, str], ...] = ()
    """Newer checkpoints and what is wrong with them."""

    @property
    def step(self) -> int:
        return self.checkpoint.step if self.checkpoint else 0

    @property
    def num_batches(self) -> int:
        """Batches that the run, on all devices, has trained on."""
        return int(self.record.get("num_batches", 0))


def find_start(config: TrainConfig) -> Start:
    """Find the checkpoint that a run resumes from, without changing anything.

    Raises:
        FileExistsError: If the folder holds a run and the config says nothing about it.
        FileNotFoundError: If there is nothing to resume from.
        ValueError: If no checkpoint is whole, or it was made with other settings or more steps.
    """
    checkpoints = find_checkpoints(config.output_dir)
    done = (config.output_dir / LORA_FILE_NAME).exists()
    if not config.resume:
        if (checkpoints or done) and not config.overwrite:
            raise FileExistsError(
                f"{config.output_dir} already holds a run; continue with --resume, start over "
                "with --overwrite, or choose another --output"
            )
        return Start()
    if not checkpoints:
        raise FileNotFoundError(
            f"{config.output_dir} holds no complete checkpoint to resume from; start without "
            "--resume"
        )
    start = _find_last_whole(checkpoints)
    assert start.checkpoint is not None
    if start.step > config.steps:
        raise ValueError(
            f"{start.checkpoint.path} has more steps than the {config.steps} requested; set "
            "--steps higher, or use that checkpoint as it is"
        )
    _check_same_settings(start.checkpoint, start.record["config"], flatten(asdict(config)))
    return start


def _find_last_whole(checkpoints: list[Checkpoint]) -> Start:
    damaged: list[tuple[Checkpoint, str]] = []
    for checkpoint in reversed(checkpoints):
        reason = find_damage(checkpoint)
        if reason is None:
            return Start(checkpoint, load_record(checkpoint), tuple(damaged))
        damaged.append((checkpoint, reason))
    newest, reason = damaged[0]
    raise ValueError(
        f"none of the {len(damaged)} checkpoints in {newest.path.parent} is intact (newest: "
        f"{newest.path.name}, {reason}); copy one back from a backup, or start over with "
        "--overwrite"
    )


def _check_same_settings(
    checkpoint: Checkpoint, before: Mapping[str, Any], now: Mapping[str, Any]
) -> None:
    for name in sorted((now.keys() | before.keys()) - _FREE_FIELDS):
        if not _DIR.fullmatch(name) and before.get(name) != now.get(name):
            raise ValueError(
                f"{checkpoint.path} was made with {name} = {before.get(name)}, but the run now "
                f"says {now.get(name)}; resume with the settings it started with"
            )


def check_same_policy(start: Start, policy: ResolutionPolicy) -> None:
    """Refuse to resume by another policy than a run began with: its base's may have changed.

    Raises:
        ValueError: Says both.
    """
    if (text := start.record.get("policy")) is None:  # of a checkpoint of before it was kept
        return
    before = ResolutionPolicy.from_json(text, "the checkpoint")
    if before != policy:
        raise ValueError(
            f"the run started with {before} and would continue with {policy}, which its base or "
            "the adapter under it now specifies; set the first in the recipe's [policy]"
        )


def check_same_base(start: Start, base_hashes: Mapping[str, str]) -> None:
    """Refuse to resume on a base of other weights than a run began with.

    Args:
        start: Of the run.
        base_hashes: Of the base now, by layer.

    Raises:
        ValueError: Names the layers that differ.
    """
    before = start.record.get("base_hashes", base_hashes)  # older checkpoints have none
    names = sorted(before.keys() | base_hashes.keys())
    changed = [name for name in names if before.get(name) != base_hashes.get(name)]
    if changed:
        more = f" and {len(changed) - 3} more" if len(changed) > 3 else ""
        raise ValueError(
            f"the run started on a base with other weights in {', '.join(changed[:3])}{more}; "
            "resume with that base (--model)"
        )


def warn_of_other_steps(config: TrainConfig, start: Start) -> None:
    """Say so if a resumed run's learning rate falls over more or fewer steps than it began to."""
    before = start.record.get("config", {}).get("steps", config.steps)
    if before != config.steps and config.optimizer.schedule != "constant":
        logger.warning(
            f"steps was {before} and is now {config.steps}; from step {start.step + 1} on, the "
            f"learning rate follows the {config.optimizer.schedule} schedule over {config.steps} "
            f"steps instead of {before}"
        )


@contextmanager
def hold_output(output_dir: Path) -> Iterator[None]:
    """Keep other runs out of a run's folder, on any machine, for the length of a `with` block.

    The folder is made, and goes again if it is empty at the end. The kernel lets go of it when the
    process ends, however it ends.

    Raises:
        FileExistsError: If another run is going on in it.
    """
    is_new = not output_dir.exists()
    output_dir.mkdir(parents=True, exist_ok=True)
    path = output_dir / LOCK_FILE
    with Claims(path) as claims, ExitStack() as stack:
        granted = stack.enter_context(claims.claim(LOCK_FILE, wait=False))
        if not (granted and path.exists()):  # or it was the lock of a run that has just ended
            raise FileExistsError(
                f"{output_dir} is in use by another run; wait until it ends, stop it, or choose "
                "another --output"
            )
        try:
            yield
        finally:
            path.unlink(missing_ok=True)
            if is_new:
                with suppress(OSError):  # it holds the run
                    output_dir.rmdir()


def prepare_output(output_dir: Path, start: Start) -> None:
    """Make a run's folder ready: an earlier run goes, damaged checkpoints are set aside.

    Previews after the checkpoint go too: they are made again.
    """
    clear_partial(output_dir)
    if start.checkpoint is None:
        for checkpoint in find_checkpoints(output_dir):
            checkpoint.discard()
        for name in (LORA_FILE_NAME, LOSS_FILE, VALIDATION_FILE):
            (output_dir / name).unlink(missing_ok=True)
        for path in (output_dir / TRACKER_NAME).glob("events.out.tfevents*"):  # nothing else there
            path.unlink()
    for path, step in find_previews(output_dir).items():
        if start.checkpoint is None or step > start.step:
            path.unlink()
    for checkpoint, reason in start.damaged:
        aside = checkpoint.set_aside()
        logger.warning(
            f"{checkpoint.path} is damaged ({reason}); it is kept as {aside.name}, and the run "
            f"continues from step {start.step}"
        )


def find_previews(output_dir: Path) -> dict[Path, int]:
    """Find the pictures that a run has written as it went, and their steps, first ones first."""
    found = {
        path: int(match[1])
        for path in (output_dir / PREVIEW_DIR).glob("*/step-*.png")
        if (match := _PREVIEW.fullmatch(path.name))
    }
    return dict(sorted(found.items(), key=lambda item: item[1]))


class Curves:
    """The run's CSV files; on resuming, rows after the checkpoint are dropped."""

    def __init__(self, output_dir: Path, step: int, *, num_validation: int) -> None:
        self._losses = output_dir / LOSS_FILE
        self._validation = output_dir / VALIDATION_FILE
        self.held_out_losses: list[float] = []  # of the whole run, the first one first
        figures = ["loss", "grad_norm", "lr", "seconds", "loader_seconds"]
        _start_csv(self._losses, ["step", *figures, *LEVELS], step)
        if num_validation:
            samples = [f"sample_{number}" for number in range(1, num_validation + 1)]
            _start_csv(self._validation, ["step", "loss", *LEVELS, *samples], step)
            self.held_out_losses = _read_column(self._validation, "loss")

    def write_step(self, report: StepReport, stop: Event | None = None) -> None:
        """Write a step's figures; where the disk is full wait for room, until `stop` is set."""
        seconds = [f"{each:.4f}" for each in (report.seconds, report.loader_seconds)]
        row = [report.step, report.loss, report.grad_norm, report.lr, *seconds]
        _append_row(self._losses, [*row, *report.level_losses], stop)

    def write_validation(
        self, step: int, losses: Float[Tensor, "samples levels"], stop: Event | None = None
    ) -> None:
        """Write the mean, the means by level, then by sample, which make for paired intervals.

        Where the disk is full it waits as `write_step` does.
        """
        means = [losses.mean(), *losses.mean(dim=0), *losses.mean(dim=1)]
        figures = [mean.item() for mean in means]
        _append_row(self._validation, [step, *figures], stop)
        self.held_out_losses.append(figures[0])


def read_losses(output_dir: Path, column: str = "loss") -> list[float]:
    """Read the loss of each step of a run, or another figure, the first one first."""
    return _read_column(output_dir / LOSS_FILE, column)


def _read_column(path: Path, column: str) -> list[float]:
    with path.open(newline="") as file:
        return [float(row[column]) for row in csv.DictReader(file)]


def read_validation(output_dir: Path) -> list[tuple[int, tuple[float, ...]]]:
    """Read the steps at which the held-out loss was measured, and that of each sample then."""
    with (output_dir / VALIDATION_FILE).open(newline="") as file:
        return [
            (
                int(row["step"]),
                tuple(float(row[name]) for name in row if name.startswith("sample_")),
            )
            for row in csv.DictReader(file)
        ]


def find_best_step(output_dir: Path) -> int | None:
    """Find the step of the lowest held-out loss so far; None if none was measured."""
    if not (output_dir / VALIDATION_FILE).exists():
        return None
    means = {step: fmean(losses) for step, losses in read_validation(output_dir)}
    return min(means, key=lambda step: means[step], default=None)


def _start_csv(path: Path, columns: list[str], step: int) -> None:
    rows: list[list[str]] = []
    if step and path.exists():
        with path.open(newline="", errors="replace") as file:
            rows = [row for row in csv.reader(file) if len(row) == len(columns)]
    kept = [row for row in rows if row[0].isdecimal() and int(row[0]) <= step]
    text = io.StringIO(newline="")
    csv.writer(text).writerows([columns, *kept])
    write_atomic(path, text.getvalue().encode())


def _append_row(path: Path, row: Sequence[object], stop: Event | None) -> None:
    """Append a step's row; where the disk is full wait for room, until `stop` is set."""
    what = f"{path.name} of step {row[0]}"
    write_once_there_is_room(lambda: _try_to_append(path, row), what, path.parent, stop)


def _try_to_append(path: Path, row: Sequence[object]) -> None:
    size = path.stat().st_size
    try:
        with path.open("a", newline="") as file:
            csv.writer(file).writerow(row)
    except OSError as error:
        with suppress(OSError):  # what was written of it
            os.truncate(path, size)
        raise OSError(
            error.errno,
            f"a row of {path.name} could not be written ({os.strerror(error.errno or 0)}); free "
            "some space, then continue with --resume from the last checkpoint",
            str(path),
        ) from error
