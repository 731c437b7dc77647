"""Two GPUs against one in bfloat16 on trained weights: random ones blow rounding up.

    torchrun --nproc-per-node 2 benchmarks/trained.py figures.json

Two processes share a forward of the adapted miniature. Beside how far that is from one process's
stands how far bfloat16 is from float32 on one. `h200.py` starts it too.
"""

import json
import sys
from pathlib import Path
from typing import Any

import torch
from diffusers import FluxPipeline
from torch import Tensor
from two_gpus import relative_difference

import urae
from urae.backbones.context_parallel import build_mesh, context_parallel
from urae.backbones.devices import pick_device
from urae.backbones.flux import LatentScale, load_pipeline, predict_velocity
from urae.backbones.ranks import join_ranks
from urae.flow import add_noise
from urae.miniature.autoencoder import to_pixels
from urae.miniature.model import TEXT_TOKENS
from urae.miniature.render import render
from urae.miniature.world import caption, sample_scene

MODEL = "miniature-dev"
ADAPTERS = {512: ["miniature-2k"], 1024: ["miniature-2k", "miniature-4k"]}
LEVELS = (1.0, 0.9, 0.7, 0.3)
SCENE = sample_scene(0)
GUIDANCE = 3.5


@torch.no_grad()
def main() -> None:
    """Compare in one of two processes; the first writes the figures."""
    with join_ranks(pick_device()) as ranks:
        mesh = build_mesh(2, ranks.device)
        found: dict[str, Any] = {}
        for side, adapters in ADAPTERS.items():
            full, half = (
                urae.adapt(load_pipeline(MODEL, dtype=dtype).to(ranks.device), adapters)
                for dtype in (torch.float32, torch.bfloat16)
            )
            clean = encode(full, side)
            noise = torch.randn(clean.shape, generator=torch.Generator().manual_seed(0))
            found[str(side)] = {}
            for level in LEVELS:
                noisy = add_noise(clean, noise.to(clean), clean.new_tensor([level]))
                one = predict(half, noisy, level)
                with context_parallel(half.transformer, mesh):
                    two = predict(half, noisy, level)
                found[str(side)][str(level)] = {
                    "difference": relative_difference(two, one),
                    "rounding": relative_difference(one, predict(full, noisy, level)),
                }
        if ranks.rank == 0:
            Path(sys.argv[1]).write_text(json.dumps(found))


def encode(pipe: FluxPipeline, side: int) -> Tensor:
    """Encode the scene's render to a latent as the transformer sees it."""
    vae = pipe.vae
    picture = to_pixels(render([SCENE], side, side, device=vae.device))
    scale = LatentScale(vae.config.shift_factor, vae.config.scaling_factor)
    return scale.normalize(vae.encode(picture).latent_dist.mean)


def predict(pipe: FluxPipeline, noisy: Tensor, level: float) -> Tensor:
    """Predict the velocity of the noised render at a noise level."""
    embeds, pooled, _ = pipe.encode_prompt(caption(SCENE), None, max_sequence_length=TEXT_TOKENS)
    sigma = noisy.new_tensor([level])
    return predict_velocity(
        pipe.transformer, noisy.to(embeds.dtype), sigma, embeds, pooled, GUIDANCE
    )


if __name__ == "__main__":
    main()
