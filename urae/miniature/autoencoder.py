"""The VAE stage: an autoencoder that keeps edges and textures of a few pixels."""

import logging
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderKL
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional as F

from urae.miniature.loop import StageRun, discard_state, run_loop
from urae.miniature.model import (
    HELD_OUT_SEED,
    NATIVE_SIDE,
    build_miniature,
    read_weights,
    write_weights,
)
from urae.miniature.recipe import VaeStage
from urae.miniature.render import render
from urae.miniature.world import Scene, sample_scene

logger = logging.getLogger(__name__)

_PYRAMID_LEVELS = 3


@dataclass(frozen=True)
class LatentStatistics:
    """Of the latents of renders at native size, over all channels."""

    mean: float
    std: float


def train_vae(config: VaeStage, run: StageRun) -> bool:
    """Train the VAE and write it, with the statistics of its latents.

    Args:
        config: The stage.
        run: As of every stage.

    Returns:
        Whether it is done; if not, call again to go on.
    """
    vae: Any = build_miniature("dev", guided=True, seed=run.seed)["vae"]
    vae.to(run.device, memory_format=torch.channels_last)
    model = _Reconstruction(vae)
    # larger ones stay eager: each size compiles anew, for a minute
    compute = torch.compile(model, dynamic=False) if run.on_gpu else model
    pictures = _render_pictures(config, run.device)

    def compute_loss(step: int, generator: torch.Generator) -> tuple[Tensor, dict[str, Tensor]]:
        pixels = _sample_pixels(pictures, config, run, step)
        pixels = pixels.contiguous(memory_format=torch.channels_last)
        with run.autocast():
            moments_noise = torch.randn(
                pixels.shape[0], 16, pixels.shape[2] // 8, pixels.shape[3] // 8,
                generator=generator, device=run.device,
            )  # fmt: skip
            forward = compute if pixels.shape[-1] == NATIVE_SIDE else model
            reconstruction, mean, logvar = forward(pixels, moments_noise)
        error, edges = reconstruction_losses(reconstruction.float(), pixels)
        mean, logvar = mean.float(), logvar.float()
        divergence = 0.5 * (mean.square() + logvar.exp() - 1 - logvar).mean()
        loss = error + config.edge_weight * edges + config.kl_weight * divergence
        return loss, {"error": error, "edges": edges, "kl": divergence}

    if not run_loop(model, compute_loss, config.loop, "vae", run):
        return False
    if run.rank:
        return True
    statistics = measure_latents(vae, config.num_held_out, run.device)
    record = {"latent_mean": str(statistics.mean), "latent_std": str(statistics.std)}
    for side in (NATIVE_SIDE, *config.large_sides):
        record[f"psnr_{side}"] = f"{measure_psnr(vae, side, config.num_held_out, run.device):.2f}"
    logger.info("vae done: %s", record)
    write_weights(run.file("vae"), {"vae": vae}, {**run.metadata, **record})
    discard_state("vae", run)
    return True


class _Reconstruction(nn.Module):
    """Encoding, sampling and decoding in one forward."""

    def __init__(self, vae: AutoencoderKL) -> None:
        super().__init__()
        self.vae = vae

    def forward(self, pixels: Tensor, noise: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        mean, logvar = self.vae.encoder(pixels).chunk(2, dim=1)
        logvar = logvar.clamp(-30, 20)
        latents = mean + (0.5 * logvar).exp() * noise
        return self.vae.decoder(latents), mean, logvar


def reconstruction_losses(
    found: Float[Tensor, "b c h w"], wanted: Float[Tensor, "b c h w"]
) -> tuple[Tensor, Tensor]:
    """Return the mean absolute error of the pixels, and of a Laplacian pyramid's bands.

    A band holds what one blur takes away, so errors at edges weigh as much as those of areas.

    Args:
        found: Pixels in [-1, 1], sides multiples of 8.
        wanted: The same.
    """
    error = found - wanted
    absolute = error.abs().mean()
    bands = error.new_zeros(())
    for _ in range(_PYRAMID_LEVELS):
        smaller = F.avg_pool2d(error, 2)
        band = error - F.interpolate(smaller, scale_factor=2.0, mode="bilinear")
        bands = bands + band.abs().mean()
        error = smaller
    return absolute, bands


def _render_pictures(config: VaeStage, device: torch.device) -> dict[int, Tensor]:
    """Render the pictures that the stage trains on, by their side."""
    pixels = config.num_scenes * NATIVE_SIDE**2
    return {
        side: torch.cat([
            render(scenes, side, side, device=device)
            for scenes in sample_scenes(range(max(1, pixels // side**2)), side, device)
        ])
        for side in (NATIVE_SIDE, *config.large_sides)
    }  # fmt: skip


def _sample_pixels(
    pictures: Mapping[int, Tensor], config: VaeStage, run: StageRun, step: int
) -> Tensor:
    generator = torch.Generator().manual_seed(run.seed_step(step))
    large = torch.rand((), generator=generator).item() < config.large_share
    sides = config.large_sides if large else (NATIVE_SIDE,)
    side = sides[int(torch.randint(len(sides), (), generator=generator))]
    count = max(1, run.share(config.pixels) // side**2)
    chosen = torch.randint(len(pictures[side]), (count,), generator=generator)
    return to_pixels(pictures[side][chosen.to(pictures[side].device)])


def sample_scenes(seeds: range, side: int, device: torch.device) -> Iterator[list[Scene]]:
    """Draw scenes, as many at a time as are best rendered together."""
    size = max(1, (2**24 if device.type == "cuda" else 2**20) // side**2)
    for start in range(0, len(seeds), size):
        yield [sample_scene(number) for number in seeds[start : start + size]]


def to_pixels(pictures: Tensor) -> Float[Tensor, "b 3 h w"]:
    """Turn 8-bit pictures into what the VAE encodes, [-1, 1]."""
    return pictures.float() / 127.5 - 1


@torch.no_grad()
def measure_latents(vae: AutoencoderKL, count: int, device: torch.device) -> LatentStatistics:
    """Measure the latents of some held-out renders at native size."""
    latents = torch.cat(
        [vae.encode(pixels).latent_dist.mean for pixels in _held_out(NATIVE_SIDE, count, device)]
    )
    return LatentStatistics(latents.mean().item(), latents.std().item())


@torch.no_grad()
def measure_psnr(vae: AutoencoderKL, side: int, count: int, device: torch.device) -> float:
    """Measure the reconstruction of some held-out renders, in dB."""
    squares = []
    for pixels in _held_out(side, count, device):
        latents = vae.encode(pixels).latent_dist.mean
        squares.append((vae.decode(latents).sample.clamp(-1, 1) - pixels).square().mean())
    return 10 * math.log10(4 / torch.stack(squares).mean().item())


def _held_out(side: int, count: int, device: torch.device) -> Iterator[Tensor]:
    for number in range(HELD_OUT_SEED, HELD_OUT_SEED + count):
        yield to_pixels(render([sample_scene(number)], side, side, device=device))


def load_vae(path: Path, device: torch.device) -> tuple[AutoencoderKL, LatentStatistics]:
    """Load the VAE that `train_vae` wrote, frozen."""
    vae: AutoencoderKL = build_miniature("dev", guided=True, seed=0)["vae"]
    metadata = read_weights(path, {"vae": vae})
    statistics = LatentStatistics(float(metadata["latent_mean"]), float(metadata["latent_std"]))
    return vae.to(device).requires_grad_(False).eval(), statistics
