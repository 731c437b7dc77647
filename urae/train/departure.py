"""Early warnings: the held-out loss rises, or the previews stay as they were."""

import logging
import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from PIL import Image, ImageChops, ImageStat

from urae.train.output import find_previews, read_validation

logger = logging.getLogger(__name__)

MIN_SAMPLES = 8
"""Held-out samples from which a rise is told from chance."""
NUM_ERRORS = 3
"""Standard errors of the change beyond which it is a rise."""
MIN_CHANGE = 1.0
"""Mean difference of previews, in levels of 255, from which the adapter is seen to act."""
MIN_STEPS = 20
"""Steps between previews from which an adapter is expected to act."""


@dataclass(frozen=True)
class Measurement:
    """The held-out loss at a step."""

    step: int
    losses: tuple[float, ...]
    """Of each sample, always in the same order."""

    @property
    def mean(self) -> float:
        return statistics.fmean(self.losses)


def warn_of_departure(output_dir: Path) -> None:
    """Say so if the last held-out loss, or the last previews, show that a run goes wrong.

    Everything is read from the run's folder, so a resumed run says what one in one piece says.
    """
    measurements = [Measurement(step, losses) for step, losses in read_validation(output_dir)]
    if (best := find_rise(measurements)) is not None:
        last = measurements[-1]
        better = f"checkpoint-{best.step:06d}" if best.step else "none of this run"
        logger.warning(
            f"the held-out loss has risen from {best.mean:.4f} at step {best.step} to "
            f"{last.mean:.4f} at step {last.step}: the adapter is getting worse; use "
            f"{better}, or try a lower learning rate, more pictures or fewer steps"
        )


def warn_of_standstill(output_dir: Path) -> None:
    """Say so if the last previews are as good as the first ones."""
    first, last, change = measure_change(output_dir)
    if last - first >= MIN_STEPS and change < MIN_CHANGE:
        logger.warning(
            f"the previews of step {last} differ from those of step {first} by {change:.2f} of "
            "255 levels: the adapter does almost nothing; try a higher learning rate"
        )


def find_rise(measurements: Sequence[Measurement]) -> Measurement | None:
    """Find the measurement that the last two are both worse than, beyond chance.

    Worse is a mean of the samples' differences above three of its standard errors. Each sample is
    compared with itself at the same noises, so that how samples differ does not count.

    Returns:
        That of the lowest loss before the last two; None if they are not worse, or there are fewer
        than three measurements or eight samples.
    """
    if len(measurements) < 3 or len(measurements[-1].losses) < MIN_SAMPLES:
        return None
    best = min(measurements[:-2], key=lambda each: each.mean)
    is_worse = all(_rises(best.losses, each.losses) for each in measurements[-2:])
    return best if is_worse else None


def _rises(before: Sequence[float], after: Sequence[float]) -> bool:
    changes = [b - a for a, b in zip(before, after, strict=True)]
    error = statistics.stdev(changes) / math.sqrt(len(changes))
    return statistics.fmean(changes) > NUM_ERRORS * error


def measure_change(output_dir: Path) -> tuple[int, int, float]:
    """Compare the last previews with the first of the same prompts and seeds.

    Returns:
        The first and the last step, and the largest mean difference of a picture, in levels of 255.
    """
    pictures = find_previews(output_dir)
    last_step = max(pictures.values())
    first_step, change = last_step, 0.0
    for path, step in pictures.items():
        if step != last_step:
            continue
        first = next(each for each in pictures if each.parent == path.parent)
        first_step = min(first_step, pictures[first])
        with Image.open(first) as before, Image.open(path) as after:
            difference = ImageStat.Stat(ImageChops.difference(before, after))
        change = max(change, statistics.fmean(difference.mean))
    return first_step, last_step, change
