"""Rectified flow as FLUX uses it: sigma in [0, 1] with 1 = noise, velocity = noise - latents."""

import math
from collections.abc import Mapping
from typing import Any, Literal

import torch
from diffusers.pipelines.flux.pipeline_flux import calculate_shift
from diffusers.training_utils import compute_density_for_timestep_sampling
from jaxtyping import Float
from torch import Tensor

NUM_TRAIN_TIMESTEPS = 1000

TimestepSampling = Literal["uniform", "logit-normal"]


def sample_sigmas(
    batch: int, generator: torch.Generator, sampling: TimestepSampling = "uniform"
) -> Float[Tensor, " b"]:
    """Draw training sigmas, unshifted.

    Args:
        batch: Number of sigmas.
        generator: CPU generator.
        sampling: `uniform` over FLUX's 1,000 timesteps, as URAE trains (arXiv:2503.16322, section
            4.1), or `logit-normal`: the sigmoid of a standard normal number (arXiv:2403.03206,
            section 3.1), most often in the middle.

    Returns:
        `batch` values in (0, 1], float32, on CPU; the uniform ones are k / 1000 with k in 1..1000.
    """
    if sampling == "logit-normal":
        sigmas: Tensor = compute_density_for_timestep_sampling(
            "logit_normal", batch, logit_mean=0.0, logit_std=1.0, generator=generator
        )
        return sigmas
    timesteps = torch.randint(1, NUM_TRAIN_TIMESTEPS + 1, (batch,), generator=generator)
    return timesteps.float() / NUM_TRAIN_TIMESTEPS


def shift_sigmas(sigmas: Float[Tensor, " b"], shift: float) -> Float[Tensor, " b"]:
    """Move sigmas towards noise, as FLUX's scheduler moves those it samples with.

    Args:
        sigmas: In (0, 1].
        shift: Above 0; 1 leaves them as they are.
    """
    return shift * sigmas / (1 + (shift - 1) * sigmas)


def find_resolution_shift(num_image_tokens: int, scheduler: Mapping[str, Any]) -> float:
    """Return the time shift that stock FLUX samples a picture of this size with.

    Beyond the scheduler's largest size the line goes on: with FLUX.1-dev's numbers the shift is 3.2
    for 1024 x 1024 pixels, 25 for 2048 x 2048 and 104,000 for 4096 x 4096.

    Args:
        num_image_tokens: Of the picture, 256 pixels each.
        scheduler: Config of the base's `FlowMatchEulerDiscreteScheduler`.
    """
    mu: float = calculate_shift(
        num_image_tokens,
        scheduler["base_image_seq_len"],
        scheduler["max_image_seq_len"],
        scheduler["base_shift"],
        scheduler["max_shift"],
    )
    return mu if scheduler["time_shift_type"] == "linear" else math.exp(mu)


def add_noise(
    latents: Float[Tensor, "b ..."], noise: Float[Tensor, "b ..."], sigmas: Float[Tensor, " b"]
) -> Float[Tensor, "b ..."]:
    """Mix latents and noise on the straight path between them: (1 - sigma) x + sigma n."""
    sigmas = sigmas.reshape(-1, *[1] * (latents.ndim - 1))
    return (1 - sigmas) * latents + sigmas * noise


def flow_loss(
    velocity: Float[Tensor, "b ..."],
    latents: Float[Tensor, "b ..."],
    noise: Float[Tensor, "b ..."],
) -> Float[Tensor, " b"]:
    """Mean squared error of a predicted velocity, one float32 value a sample."""
    error = velocity.float() - (noise.float() - latents.float())
    return error.square().flatten(1).mean(1)
