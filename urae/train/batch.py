"""One training batch, a pure function of the seed and the samples' counters."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from urae.backbones.flux import LatentScale
from urae.features.dataset import Sample, choose_caption, load_embeds, load_latents
from urae.flow import sample_sigmas


@dataclass(frozen=True)
class Batch:
    """What a flow-matching step needs; all on one device, latents and noise in float32."""

    latents: Float[Tensor, "b c h w"]
    noise: Float[Tensor, "b c h w"]
    sigmas: Float[Tensor, " b"]
    prompt_embeds: Float[Tensor, "b l d"]
    pooled_prompt_embeds: Float[Tensor, "b p"]


def sample_batch(
    samples: Sequence[Sample],
    counters: Sequence[int],
    *,
    seed: int,
    original_caption_share: float,
    scale: LatentScale,
    device: torch.device,
) -> Batch:
    """Draw caption, latents, noise and sigma of each sample.

    Args:
        samples: Of one size.
        counters: How many samples the whole run, over all devices, trained on before each; with
            the seed it decides everything random, so no two devices draw alike and a resumed run
            draws the same.
        seed: Of the run.
        original_caption_share: Probability of the caption column `prompt`.
        scale: Of the VAE's latents.
        device: Where the batch goes.

    Raises:
        ValueError: If the samples' prompt embeddings differ in length.
    """
    drawn = [
        _draw(sample, _generator(seed, counter), original_caption_share)
        for sample, counter in zip(samples, counters, strict=True)
    ]
    lengths = {embeds.shape[0] for _, _, _, embeds, _ in drawn}
    if len(lengths) > 1:
        raise ValueError(
            f"prompt embeddings of {sorted(lengths)} tokens in one batch; cache the folder again "
            "with one --max-sequence-length, or train with --batch-size 1"
        )
    latents, noise, sigmas, embeds, pooled = (
        torch.stack(column).to(device) for column in zip(*drawn, strict=True)
    )
    return Batch(scale.normalize(latents), noise, sigmas, embeds, pooled)


def _draw(
    sample: Sample, generator: torch.Generator, original_caption_share: float
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    column = choose_caption(sample, original_caption_share, generator)
    embeds, pooled = load_embeds(sample, column)
    mean, std = (part.float() for part in load_latents(sample))
    latents = mean + std * torch.randn(mean.shape, generator=generator)
    noise = torch.randn(mean.shape, generator=generator)
    return latents, noise, sample_sigmas(1, generator)[0], embeds, pooled


def _generator(seed: int, counter: int) -> torch.Generator:
    state = np.random.SeedSequence([seed, counter]).generate_state(1, np.uint64)
    return torch.Generator().manual_seed(int(state[0]))
