"""A run's folder: what may be there when it starts, and its loss file."""

import csv
import io
import shutil
from dataclasses import asdict, dataclass
from pathlib import Path

from urae.adapters.files import LORA_FILE_NAME
from urae.config import flatten
from urae.storage import write_atomic
from urae.train.checkpoint import PARTIAL_PATTERN, Checkpoint, find_checkpoints, load_record
from urae.train.config import TrainConfig

LOSS_FILE = "loss.csv"

# fields that may change between an interrupted run and its continuation
_FREE_FIELDS = {
    "data_dir", "output_dir", "steps", "checkpoint_every", "tracker", "resume", "overwrite",
    "gradient_checkpointing",
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
    seconds: float


def find_start(config: TrainConfig) -> Checkpoint | None:
    """Find the checkpoint that a run resumes from, without changing anything.

    Returns:
        The newest one, or None for a run that starts anew.

    Raises:
        FileExistsError: If the folder holds a run and the config says nothing about it.
        FileNotFoundError: If there is nothing to resume from.
        ValueError: If the checkpoint was made with other settings, or has more steps.
    """
    checkpoints = find_checkpoints(config.output_dir)
    done = (config.output_dir / LORA_FILE_NAME).exists()
    if not config.resume:
        if (checkpoints or done) and not config.overwrite:
            raise FileExistsError(
                f"{config.output_dir} holds a run already; go on with --resume, start anew with "
                "--overwrite, or choose another --output"
            )
        return None
    if not checkpoints:
        raise FileNotFoundError(f"{config.output_dir} holds no whole checkpoint to resume from")
    newest = checkpoints[-1]
    if newest.step > config.steps:
        raise ValueError(
            f"{newest.path} has more steps than the {config.steps} asked for; set --steps higher, "
            "or take that checkpoint as it is"
        )
    before, now = load_record(newest)["config"], flatten(asdict(config))
    for name in sorted((now.keys() | before.keys()) - _FREE_FIELDS):
        if before.get(name) != now.get(name):
            raise ValueError(
                f"{newest.path} was made with {name} = {before.get(name)}, but the run now says "
                f"{now.get(name)}; resume with the settings it began with"
            )
    return newest


def clear_output(output_dir: Path) -> None:
    """Delete an earlier run's checkpoints, whole and partial, and its adapter."""
    for checkpoint in find_checkpoints(output_dir):
        checkpoint.discard()
    for partial in output_dir.glob(PARTIAL_PATTERN):
        shutil.rmtree(partial)
    (output_dir / LORA_FILE_NAME).unlink(missing_ok=True)


class LossLog:
    """A CSV file of every step; on resuming, steps after the checkpoint are dropped."""

    def __init__(self, path: Path, step: int) -> None:
        self.path = path
        rows: list[list[str]] = []
        if step and path.exists():
            with path.open(newline="") as file:
                rows = [row for row in csv.reader(file) if row and row[0].isdecimal()]
        text = io.StringIO(newline="")
        kept = [row for row in rows if int(row[0]) <= step]
        csv.writer(text).writerows([["step", "loss", "grad_norm", "seconds"], *kept])
        write_atomic(path, text.getvalue().encode())

    def write(self, report: StepReport) -> None:
        with self.path.open("a", newline="") as file:
            csv.writer(file).writerow(
                [report.step, report.loss, report.grad_norm, f"{report.seconds:.4f}"]
            )
