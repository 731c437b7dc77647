"""Scenes rendered, encoded and captioned once, so that a stage trains on a transformer alone."""

import logging
import random
import time
from dataclasses import dataclass
from pathlib import Path

import torch
from diffusers import AutoencoderKL
from jaxtyping import Float, Int
from torch import Tensor

from urae.miniature.autoencoder import load_vae, sample_scenes, to_pixels
from urae.miniature.grammar import Description
from urae.miniature.model import TEXT_TOKENS, build_tokenizers
from urae.miniature.render import render
from urae.miniature.sources import make_vague
from urae.miniature.world import caption

logger = logging.getLogger(__name__)

_TERSE_SHARE = 0.25


@dataclass(frozen=True)
class Pool:
    """N scenes."""

    latents: Float[Tensor, "n c h w"]
    """Normalised as the transformer sees them, bfloat16 on a GPU."""
    t5_ids: Int[Tensor, "n l"]
    clip_ids: Int[Tensor, "n 77"]
    weights: Float[Tensor, " n"]
    """How often each is drawn, beside one another."""
    empty_t5_ids: Int[Tensor, "1 l"]
    """Of the empty caption."""
    empty_clip_ids: Int[Tensor, "1 77"]

    def __len__(self) -> int:
        return self.latents.shape[0]

    def draw(self, size: int, generator: torch.Generator) -> Int[Tensor, " size"]:
        """Draw numbers of scenes, by their weights."""
        return torch.multinomial(self.weights, size, replacement=True, generator=generator)


def build_pool(
    vae_path: Path,
    num_scenes: int,
    side: int,
    *,
    first_seed: int,
    device: torch.device,
    object_weights: tuple[float, float, float] = (1.0, 1.0, 1.0),
) -> Pool:
    """Render and encode scenes; a quarter of the captions leave something out.

    Args:
        vae_path: Of the VAE stage.
        num_scenes: N.
        side: Of the square pictures in pixels.
        first_seed: The scenes' seeds follow one another.
        device: Where to render and where the pool stays.
        object_weights: Of a scene of one, two and three objects.
    """
    vae, statistics = load_vae(vae_path, device)
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    latents = torch.empty(num_scenes, 16, side // 8, side // 8, dtype=dtype, device=device)
    generator = torch.Generator(device).manual_seed(first_seed)
    seeds = range(first_seed, first_seed + num_scenes)
    captions: list[str] = []
    num_objects: list[int] = []
    began = time.monotonic()
    for scenes in sample_scenes(seeds, side, device):
        found = _encode(vae, render(scenes, side, side, device=device), generator)
        start = len(captions)
        num_objects += [len(scene.objects) for scene in scenes]
        latents[start : start + len(scenes)] = (found - statistics.mean) / statistics.std
        captions += [
            write_terse_caption(scene.description, seed)
            for scene, seed in zip(scenes, seeds[start:], strict=False)
        ]
    t5_ids, clip_ids = tokenize([*captions, ""])
    t5_ids, clip_ids = t5_ids.to(device), clip_ids.to(device)
    logger.info("%d scenes rendered and encoded in %.0f s", num_scenes, time.monotonic() - began)
    weights = torch.tensor([object_weights[count - 1] for count in num_objects], device=device)
    return Pool(latents, t5_ids[:-1], clip_ids[:-1], weights, t5_ids[-1:], clip_ids[-1:])


@torch.no_grad()
def _encode(vae: AutoencoderKL, pictures: Tensor, generator: torch.Generator) -> Tensor:
    device = pictures.device
    with torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda"):
        posterior = vae.encode(to_pixels(pictures)).latent_dist
    noise = torch.randn(posterior.mean.shape, generator=generator, device=device)
    latents: Tensor = posterior.mean.float() + posterior.std.float() * noise
    return latents


def write_terse_caption(described: Description, seed: int) -> str:
    """Describe a scene; for a quarter of the seeds, leave out parts that may be."""
    rng = random.Random(~seed)
    if rng.random() < _TERSE_SHARE:
        described = make_vague(described, rng)
    return caption(described)


def tokenize(captions: list[str]) -> tuple[Int[Tensor, "n l"], Int[Tensor, "n 77"]]:
    """Tokenize captions as a FLUX pipeline does, for T5 and for CLIP."""
    clip_tokenizer, t5_tokenizer = build_tokenizers()
    t5, clip = (
        torch.from_numpy(
            tokenizer(
                captions,
                padding="max_length",
                max_length=length,
                truncation=True,
                return_attention_mask=False,
                return_tensors="np",
            ).input_ids
        )
        for tokenizer, length in ((t5_tokenizer, TEXT_TOKENS), (clip_tokenizer, 77))
    )
    return t5, clip
