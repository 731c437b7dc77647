"""The figures that tables and claims show, and how they are written."""

import math
from dataclasses import dataclass, fields

from urae.miniature.check import SceneReport
from urae.study.statistics import Estimate


@dataclass(frozen=True)
class Metric:
    """How a figure is written."""

    title: str
    scale: float
    digits: int
    is_share: bool = False
    """Of the pictures: between 0 and 1."""

    def write(self, value: float, sign: bool = False) -> str:
        """Write a value."""
        return f"{self.scale * value:{'+' if sign else ''}.{self.digits}f}"

    def write_estimate(self, found: Estimate, sign: bool = False) -> str:
        """Write a mean with its interval, if it has one."""
        mean = self.write(found.mean, sign)
        if not found.varies:
            return mean
        if math.isinf(found.low):
            return f"{mean} (no interval)"
        return f"{mean} ({self.write(found.low, sign)} to {self.write(found.high, sign)})"


PARTS = tuple(field.name for field in fields(SceneReport))
"""Of a caption: the scene check's."""

METRICS = {
    "score": Metric("scene check, %", 100, 1, is_share=True),
    "parts": Metric("parts that hold, %", 100, 1, is_share=True),
    "held_out_loss": Metric("held-out loss", 1, 4),
    "spectrum": Metric("spectrum, dB", 1, 2),
    "wasserstein": Metric("sliced Wasserstein", 1, 4),
}
"""Those of the tables, the one that decides first; more is better of it, less of the others."""

DATA_SCORE = Metric("training pictures, %", 100, 1)
