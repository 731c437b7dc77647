"""How large a study is: one typed object, whose defaults suit one GPU."""

import math
from dataclasses import dataclass
from pathlib import Path

from pydantic import ConfigDict

from urae.choices import Question
from urae.config import check_types
from urae.geometry import check_side
from urae.miniature.read import LEAST_SIDE

_AT_LEAST_ONE = (
    "workers",
    "num_seeds",
    "num_samples",
    "num_samples_4k",
    "num_held_out",
    "num_captions",
    "num_captions_4k",
    "steps",
    "steps_4k",
    "batch_size",
    "batch_size_4k",
    "sampling_steps",
)


@dataclass(frozen=True)
class StudyConfig:
    """One question, and how much is spent on each of its cells."""

    __pydantic_config__ = ConfigDict(extra="forbid", use_attribute_docstrings=True)

    question: Question
    """Which: see urae/study/questions.py."""
    work_dir: Path = Path("runs/miniature")
    """Folder of the miniature's stages; the study's own files go into `study` there."""
    output_dir: Path = Path("docs/study")
    """Folder for table, plot and text; a page of its name beside it takes the text in."""
    model: str = "miniature-dev"
    """The guidance-distilled base, by name or folder."""
    schnell: str = "miniature-schnell"
    """The four-step base of question f."""
    adapter_2k: str = "miniature-2k"
    """The 2K LoRA under the 4K stage of question c, by name, file or folder."""
    stand_in: bool = False
    """Train on clean renders where the teacher's pictures belong: those of one without fault."""
    workers: int = 1
    """Processes that work on cells; several share a GPU well, and all GPUs are used."""
    max_minutes: float = math.inf
    """No cell is begun after these, no picture of a data set; the same call goes on."""
    num_seeds: int = 3
    """Of each cell: initial weights, order, noise, and the captions and noises of its score."""
    num_samples: int = 1000
    """Training pictures at the 2K stage."""
    num_samples_4k: int = 400
    """Training pictures at the 4K stage."""
    num_validation: int = 16
    """Of them, those held out of training for the run's own validation."""
    num_held_out: int = 32
    """Clean renders that every cell's held-out loss is measured on."""
    num_captions: int = 100
    """Held-out captions of a score at the 2K stage, others for each seed."""
    num_captions_4k: int = 48
    """The same at the 4K stage."""
    side_2k: int = 512
    """Of the 2K stage's pictures."""
    side_4k: int = 1024
    """Of the 4K stage's pictures."""
    steps: int = 500
    """Training steps at the 2K stage."""
    steps_4k: int = 500
    """Training steps at the 4K stage."""
    batch_size: int = 16
    """Pictures a step at the 2K stage."""
    batch_size_4k: int = 8
    """Pictures a step at the 4K stage."""
    lr: float = 1e-3
    """Learning rate of AdamW."""
    sampling_steps: int = 24
    """Denoising steps of the guidance-distilled base."""

    def __post_init__(self) -> None:
        check_types(self)
        for name in _AT_LEAST_ONE:
            if getattr(self, name) < 1:
                raise ValueError(f"{name} {getattr(self, name)} must be at least 1")
        for name in ("side_2k", "side_4k"):
            check_side(name, getattr(self, name))
            if getattr(self, name) < LEAST_SIDE:
                raise ValueError(
                    f"{name} {getattr(self, name)} must be at least {LEAST_SIDE}, the smallest "
                    "that the scene check reads"
                )
        smallest = min(self.num_samples, self.num_samples_4k)
        if not 1 <= self.num_validation < smallest:
            raise ValueError(
                f"num_validation {self.num_validation} must be at least 1 and below {smallest}, "
                "the number of training pictures"
            )
        if not (math.isfinite(self.lr) and self.lr > 0):
            raise ValueError(f"lr {self.lr} must be a positive number")
        if not self.max_minutes > 0:
            raise ValueError(f"max_minutes {self.max_minutes} must be a positive number")
