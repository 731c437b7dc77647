"""The figures of a cell: scene check, held-out loss, distances from true renders."""

from collections.abc import Sequence
from pathlib import Path

import torch
from diffusers import FluxPipeline
from jaxtyping import UInt8
from torch import Tensor

from urae.backbones.flux import fetch_model, read_latent_scale
from urae.evaluate.spectrum import spectrum_distance
from urae.evaluate.wasserstein import sliced_wasserstein
from urae.features.dataset import list_samples
from urae.miniature.check import check_scene
from urae.miniature.render import render
from urae.miniature.score import draw_scenes, held_out_scenes, summarize
from urae.miniature.world import Scene
from urae.study.cells import Scoring
from urae.study.metrics import PARTS
from urae.train.batch import Draws, sample_batch
from urae.train.loss import NUM_LEVELS, list_level_losses
from urae.train.output import read_validation

_PIXELS_AT_ONCE = 2**22


def measure_pictures(pipe: FluxPipeline, scoring: Scoring) -> dict[str, float]:
    """Generate pictures of held-out captions, check them, and compare them with true renders.

    Captions and noises follow from the seed alone, so that all cells of a seed are paired; another
    seed has other captions.

    Args:
        pipe: On its device, adapted as the cell says.
        scoring: Of the cell.

    Returns:
        `score`, the share of which every part of the caption holds, the share of each part,
        `spectrum`, in decibels, and `wasserstein`, the mean over the scales.
    """
    count = scoring.num_captions
    scenes = held_out_scenes(count, first=scoring.seed * count)
    pictures = torch.stack(
        list(
            draw_scenes(
                pipe,
                scenes,
                [0] * count,
                side=scoring.side,
                steps=scoring.steps,
                guidance_scale=scoring.guidance_scale,
            )
        )
    )
    pairs = zip(pictures, scenes, strict=True)
    reports = [check_scene(picture.numpy(), scene) for picture, scene in pairs]
    shares = summarize(reports, count)
    parts = {name: shares[name] for name in PARTS}
    return {"score": shares["share"], **parts, **_compare_renders(pictures, scenes, pipe.device)}


def _compare_renders(
    pictures: UInt8[Tensor, "b 3 h w"], scenes: Sequence[Scene], device: torch.device
) -> dict[str, float]:
    height, width = pictures.shape[-2:]
    renders = render(scenes, height, width)
    found, wanted = (each.to(device).float() / 255 for each in (pictures, renders))
    wasserstein = sliced_wasserstein(found, wanted, torch.Generator().manual_seed(0))
    return {
        "spectrum": float(spectrum_distance(found, wanted)),
        "wasserstein": float(wasserstein.mean()),
    }


@torch.no_grad()
def measure_held_out(pipe: FluxPipeline, scoring: Scoring, data_dir: Path) -> float:
    """Return the mean flow loss on clean renders, at guidance 1 and the same noises for all cells.

    It is the loss of training, at the middle of each quarter of the noise levels.

    Args:
        pipe: On its device, adapted as the cell says.
        scoring: Of the cell.
        data_dir: The renders' features.
    """
    draws = Draws(
        seed=0,
        scale=read_latent_scale(fetch_model(scoring.model.name)),
        original_caption_share=1.0,
        caption_weights=None,
        caption_dropout=0.0,
        empty_prompt=None,
        timestep_sampling="uniform",
        timestep_shift=1.0,
        scheduler={},
    )
    samples = list_samples(data_dir)
    size = max(1, _PIXELS_AT_ONCE // scoring.side**2)
    total = 0.0
    for start in range(0, len(samples), size):
        some = samples[start : start + size]
        batch = sample_batch(some, range(start, start + len(some)), draws, pipe.device)
        for losses in list_level_losses(pipe.transformer, batch, 1.0):
            total += float(losses.sum())
    return total / (len(samples) * NUM_LEVELS)


def read_own_validation(run_dir: Path, step: int) -> dict[str, float]:
    """Return a run's loss on its own held-out pictures before training and after `step`."""
    rows = {at: sum(losses) / len(losses) for at, losses in read_validation(run_dir)}
    return {"validation_before": rows[0], "validation": rows[step]}
