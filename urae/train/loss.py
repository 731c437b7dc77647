"""The training loss of each sample, and its mean at each noise level."""

from collections.abc import Iterator, Sequence
from dataclasses import replace

import torch
from jaxtyping import Float
from torch import Tensor, nn

from urae.backbones.flux import predict_velocity
from urae.flow import add_noise, flow_loss
from urae.train.batch import Batch

NUM_LEVELS = 4
"""Noise levels that the loss is logged for: the quarters of (0, 1]."""


def compute_losses(model: nn.Module, batch: Batch, guidance_scale: float) -> Float[Tensor, " b"]:
    """Return the flow-matching loss of each sample (velocity MSE, no weighting)."""
    dtype = next(model.parameters()).dtype
    noisy = add_noise(batch.latents, batch.noise, batch.sigmas)
    velocity = predict_velocity(
        model,
        noisy.to(dtype),
        batch.sigmas,
        batch.prompt_embeds.to(dtype),
        batch.pooled_prompt_embeds.to(dtype),
        guidance_scale,
    )
    return flow_loss(velocity, batch.latents, batch.noise)


def list_level_losses(
    model: nn.Module, batch: Batch, guidance_scale: float
) -> Iterator[Float[Tensor, " b"]]:
    """Give the losses at the middle of each quarter of the noise levels, whatever the sigmas."""
    for level in range(NUM_LEVELS):
        sigmas = torch.full_like(batch.sigmas, (level + 0.5) / NUM_LEVELS)
        yield compute_losses(model, replace(batch, sigmas=sigmas), guidance_scale)


def sum_levels(
    losses: Float[Tensor, " b"], sigmas: Float[Tensor, " b"]
) -> Float[Tensor, "2 levels"]:
    """Return the sum and the number of the losses in each quarter of the sigmas."""
    numbers = 1 + torch.arange(NUM_LEVELS, device=sigmas.device)
    member = torch.ceil(sigmas * NUM_LEVELS) == numbers[:, None]  # levels x b
    return torch.stack([(member * losses.detach()).sum(1), member.sum(1).to(losses.dtype)])


def mean_levels(sums: Sequence[float]) -> tuple[float | None, ...]:
    """Return the mean of each level from `sum_levels`, flattened; None where there is no loss."""
    pairs = zip(sums[:NUM_LEVELS], sums[NUM_LEVELS:], strict=True)
    return tuple(total / count if count else None for total, count in pairs)
