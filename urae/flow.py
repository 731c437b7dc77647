"""Rectified flow as FLUX uses it: sigma in [0, 1] with 1 = noise, velocity = noise - latents."""

import torch
from jaxtyping import Float
from torch import Tensor

NUM_TRAIN_TIMESTEPS = 1000


def sample_sigmas(batch: int, generator: torch.Generator) -> Float[Tensor, " b"]:
    """Draw training sigmas uniformly from FLUX's 1,000 unshifted timesteps.

    URAE trains so (arXiv:2503.16322, section 4.1): no time shift acts on training.

    Args:
        batch: Number of sigmas.
        generator: CPU generator.

    Returns:
        `batch` values k / 1000 with k in 1..1000, float32, on CPU.
    """
    timesteps = torch.randint(1, NUM_TRAIN_TIMESTEPS + 1, (batch,), generator=generator)
    return timesteps.float() / NUM_TRAIN_TIMESTEPS


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
