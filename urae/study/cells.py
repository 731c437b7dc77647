"""What a study is made of: cells, each a training run and how it is scored.

A cell is known by its content: all its settings and the weights that it starts from, wherever they
lie. Another setting, base, teacher or adapter is another cell.
"""

import hashlib
import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from typing import Any, Literal

from urae.resolution import ResolutionPolicy

Source = Literal["synthetic", "real", "clean"]
Adapter = Literal["lora", "minor", "principal", "random", "mica", "bf16 residual"]
Factor = str | int | float


@dataclass(frozen=True)
class Weights:
    """A model, teacher or adapter."""

    name: str
    """Where it is; no part of what a cell is known by."""
    revision: str
    """SHA-256 of what is in it."""


@dataclass(frozen=True)
class DataSet:
    """Captioned pictures with their features."""

    source: Source
    side: int
    """Of the square pictures in pixels."""
    count: int
    seed: int
    """Of the set: sets of one seed show the same scenes."""
    encoders: Weights
    """The model whose VAE and text encoders make the features."""
    teacher: Weights | None = None
    """What draws synthetic pictures."""
    teacher_steps: int | None = None
    """Denoising steps of the teacher: fewer make it worse."""


@dataclass(frozen=True)
class Part:
    """Some pictures of a set."""

    data: DataSet
    start: int
    stop: int
    """From number `start` to below this."""


@dataclass(frozen=True)
class Training:
    """A training run: what `TrainConfig` is built from."""

    model: Weights
    parts: tuple[Part, ...]
    """Sets of one size whose parts make up the training data."""
    adapter: Adapter
    """What trains; `bf16 residual` is the reference's form of the minor components."""
    rank: int
    guidance_scale: float
    policy: ResolutionPolicy
    steps: int
    batch_size: int
    lr: float
    num_validation: int
    checkpoint_every: int
    """Steps between checkpoints, each of which can be scored; the last step is one."""
    over: Weights | None = None
    """An adapter under this one."""
    seed: int = 0

    @property
    def side(self) -> int:
        """Of the pictures in pixels."""
        return self.parts[0].data.side


@dataclass(frozen=True)
class Scoring:
    """How pictures are made and checked."""

    model: Weights
    side: int
    num_captions: int
    steps: int
    """Of denoising."""
    guidance_scale: float
    policy: ResolutionPolicy | None
    """None leaves the pipeline stock."""
    held_out: DataSet
    """Clean renders to measure the flow loss on."""
    at_step: int | None = None
    """Of the training run; None is its end."""
    seed: int = 0


@dataclass(frozen=True)
class Cell:
    """One cell of a question's table, for one seed."""

    factors: Mapping[str, Factor]
    """What the question varies: the cell's place in the table."""
    training: Training | None
    """None scores the base as it is."""
    scoring: Scoring

    @property
    def seed(self) -> int:
        """Of training and scoring."""
        return self.scoring.seed

    @property
    def key(self) -> str:
        """What the cell is known by."""
        training = self.training and asdict(self.training)
        return identify({"training": training, "scoring": asdict(self.scoring)})

    def with_seed(self, seed: int) -> "Cell":
        """Return the same cell for another seed."""
        training = self.training and replace(self.training, seed=seed)
        return replace(self, training=training, scoring=replace(self.scoring, seed=seed))


def identify(settings: Mapping[str, Any]) -> str:
    """Hash settings, all but the names of weights.

    Args:
        settings: As `asdict` gives them.

    Returns:
        16 hex digits.
    """
    text = json.dumps(_drop_names(settings), sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def _drop_names(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {key: _drop_names(each) for key, each in value.items() if key != "name"}
    return [_drop_names(each) for each in value] if isinstance(value, tuple) else value
