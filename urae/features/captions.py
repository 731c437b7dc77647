"""Which of its captions a sample trains with."""

from bisect import bisect
from collections.abc import Mapping, Sequence
from itertools import accumulate

import torch

from urae.features.dataset import Sample

ORIGINAL_COLUMN = "prompt"


def choose_caption(
    sample: Sample,
    original_share: float,
    generator: torch.Generator,
    weights: Mapping[str, float] | None = None,
) -> str:
    """Draw the caption column to train on.

    Args:
        sample: Its columns are drawn from.
        original_share: Probability of `prompt`, where there are others: URAE has 0.2. The rest
            is shared evenly. Not heeded where there are weights.
        generator: On the CPU.
        weights: Of columns by name, in place of the share; one that is not named has none.
    """
    draw = float(torch.rand((), generator=generator))
    if weights is not None:
        return _choose_weighted(sample, weights, draw)
    others = sorted(column for column in sample.embed_files if column != ORIGINAL_COLUMN)
    if not others or (ORIGINAL_COLUMN in sample.embed_files and draw < original_share):
        return ORIGINAL_COLUMN
    return others[int(torch.randint(len(others), (), generator=generator))]


def _choose_weighted(sample: Sample, weights: Mapping[str, float], draw: float) -> str:
    columns = [column for column in sorted(sample.embed_files) if weights.get(column, 0.0) > 0]
    ends = list(accumulate(weights[column] for column in columns))
    return columns[min(bisect(ends, draw * ends[-1]), len(columns) - 1)]


def check_weights(samples: Sequence[Sample], weights: Mapping[str, float]) -> None:
    """Refuse weights of columns that are not there, and samples that they leave without a caption.

    Raises:
        ValueError: Names the column, or the first such sample.
    """
    columns = {column for sample in samples for column in sample.embed_files}
    for name in weights:
        if name not in columns:
            raise ValueError(
                f"caption_weights has a column {name!r}, which no picture has; available: "
                f"{', '.join(sorted(columns))}"
            )
    for sample in samples:
        if not any(weights.get(column, 0.0) > 0 for column in sample.embed_files):
            raise ValueError(
                f"{sample.latent_file.name} has no caption with a weight in caption_weights, only "
                f"{', '.join(sorted(sample.embed_files))}; give one of these a weight"
            )
