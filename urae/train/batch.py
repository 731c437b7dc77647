"""One training batch, a pure function of the seed and the samples' counters."""

from collections.abc import Mapping, Sequence
from concurrent.futures import Executor
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from urae.backbones.flux import LatentScale
from urae.features.captions import choose_caption
from urae.features.dataset import Sample, load_embeds, load_latents
from urae.features.store import FeatureFile
from urae.flow import TimestepSampling, find_resolution_shift, sample_sigmas, shift_sigmas
from urae.geometry import VAE_FACTOR, num_image_tokens


@dataclass(frozen=True)
class Draws:
    """By which rules batches are drawn, the same for the whole run."""

    seed: int
    """Of the run."""
    scale: LatentScale
    """Of the VAE's latents."""
    original_caption_share: float
    """Probability of the caption column `prompt`."""
    caption_weights: Mapping[str, float] | None
    """Of caption columns, in place of the share."""
    caption_dropout: float
    """Probability of the empty prompt."""
    empty_prompt: FeatureFile | None
    """Its embeddings; None if no captions are left out."""
    timestep_sampling: TimestepSampling
    timestep_shift: float | Literal["resolution"]
    """Of the sigmas drawn; `resolution` is that of the sample's size."""
    scheduler: Mapping[str, Any]
    """The base's, whose settings say how a shift follows the size."""

    def shift(self, sample: Sample) -> float:
        """Return the time shift of a sample's sigmas."""
        if self.timestep_shift == "resolution":
            return find_resolution_shift(
                num_image_tokens(sample.height, sample.width), self.scheduler
            )
        return self.timestep_shift


@dataclass(frozen=True)
class Batch:
    """What a flow-matching step needs; all on one device, latents and noise in float32."""

    latents: Float[Tensor, "b c h w"]
    noise: Float[Tensor, "b c h w"]
    sigmas: Float[Tensor, " b"]
    prompt_embeds: Float[Tensor, "b l d"]
    pooled_prompt_embeds: Float[Tensor, "b p"]

    @property
    def num_tokens(self) -> int:
        """Text and image tokens of a sample."""
        height, width = self.latents.shape[2:]
        return self.prompt_embeds.shape[1] + height * width // 4


def sample_batch(
    samples: Sequence[Sample],
    counters: Sequence[int],
    draws: Draws,
    device: torch.device,
    *,
    readers: Executor | None = None,
) -> Batch:
    """Draw caption, latents, noise and sigma of each sample.

    Args:
        samples: Of one size.
        counters: How many samples the whole run, over all devices, trained on before each; with
            the seed it decides everything random, so no two devices draw alike and a resumed run
            draws the same.
        draws: The run's rules.
        device: Where the batch goes.
        readers: Threads that draw the samples side by side; None draws one after the other.

    Raises:
        ValueError: If the samples' prompt embeddings differ in length.
    """

    def draw(place: tuple[Sample, int]) -> tuple[Tensor, ...]:
        sample, counter = place
        return _draw(sample, _generator(draws.seed, counter), draws)

    each_of = map if readers is None else readers.map
    drawn = list(each_of(draw, zip(samples, counters, strict=True)))
    lengths = {embeds.shape[0] for _, _, _, embeds, _ in drawn}
    if len(lengths) > 1:
        raise ValueError(
            f"prompt embeddings of {sorted(lengths)} tokens cannot share a batch; cache the "
            "folder again with one --max-sequence-length, or train with --batch-size 1"
        )
    latents, noise, sigmas, embeds, pooled = (
        torch.stack(column).to(device) for column in zip(*drawn, strict=True)
    )
    return Batch(draws.scale.normalize(latents), noise, sigmas, embeds, pooled)


def _draw(
    sample: Sample, generator: torch.Generator, draws: Draws
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    column = choose_caption(sample, draws.original_caption_share, generator, draws.caption_weights)
    mean, std = (part.float() for part in load_latents(sample))
    height, width = (VAE_FACTOR * side for side in mean.shape[1:])
    if (height, width) != (sample.height, sample.width):
        raise ValueError(
            f"feature file {sample.latent_file} has changed since the run began: it holds a "
            f"picture of {width} x {height} in place of {sample.width} x {sample.height}; cache "
            "other sizes into another folder"
        )
    latents = mean + std * torch.randn(mean.shape, generator=generator)
    noise = torch.randn(mean.shape, generator=generator)
    sigmas = sample_sigmas(1, generator, draws.timestep_sampling)
    sigma = shift_sigmas(sigmas, draws.shift(sample))[0]
    # last, so that all else is drawn as without it
    is_dropped = float(torch.rand((), generator=generator)) < draws.caption_dropout
    file = draws.empty_prompt if is_dropped else sample.embed_files[column]
    assert file is not None
    return latents, noise, sigma, *load_embeds(file)


def _generator(seed: int, counter: int) -> torch.Generator:
    state = np.random.SeedSequence([seed, counter]).generate_state(1, np.uint64)
    return torch.Generator().manual_seed(int(state[0]))
