"""Validation: the loss on held-out samples, always with the same captions, noises and sigmas."""

import random
from collections.abc import Sequence
from dataclasses import replace

import torch
from accelerate import Accelerator
from jaxtyping import Float
from torch import Tensor, nn

from urae.features.dataset import Sample
from urae.train.batch import Draws, sample_batch
from urae.train.config import TrainConfig
from urae.train.loss import NUM_LEVELS, list_level_losses
from urae.train.mesh import Mesh

_FIRST_COUNTER = 2**62  # no training sample has it


def hold_out(
    samples: Sequence[Sample], num_validation: int, seed: int
) -> tuple[list[Sample], list[Sample]]:
    """Split samples into those to train on and those to validate with.

    A picture that is there in several sizes, by its name, is held out in all of them.

    Raises:
        ValueError: If none is left to train on.
    """
    pictures = list(dict.fromkeys(sample.stem for sample in samples))
    if num_validation >= len(pictures):
        raise ValueError(
            f"num_validation {num_validation} must be below {len(pictures)}, the number of samples"
        )
    held = set(random.Random(f"urae validation {seed}").sample(pictures, num_validation))
    return (
        [sample for sample in samples if sample.stem not in held],
        [sample for sample in samples if sample.stem in held],
    )


@torch.no_grad()
def measure_loss(
    model: nn.Module,
    samples: Sequence[Sample],
    config: TrainConfig,
    draws: Draws,
    accelerator: Accelerator,
    mesh: Mesh,
) -> Float[Tensor, "samples levels"]:
    """Return each sample's loss at the middle of each quarter of the noise levels.

    Args:
        model: The transformer.
        samples: Held out; shared out among the ranks.
        config: Of the run.
        draws: Of the run; here sigmas are fixed and no caption is left out.
        accelerator: Gathers from the ranks.
        mesh: The ranks.
    """
    device = accelerator.device
    whole = replace(draws, caption_dropout=0.0)
    sums = torch.zeros(2, len(samples), NUM_LEVELS, device=device)  # of losses, of times measured
    for number in mesh.share(len(samples)):
        batch = sample_batch([samples[number]], [_FIRST_COUNTER + number], whole, device)
        for level, losses in enumerate(list_level_losses(model, batch, config.guidance_scale)):
            sums[0, number, level] = losses[0]
        sums[1, number] = 1
    total, times = accelerator.reduce(sums, "sum").unbind()
    mean: Tensor = total / times
    return mean
