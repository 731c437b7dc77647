"""The scene check over many captions and seeds of one pipeline."""

import multiprocessing
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass, fields

import torch
from diffusers import FluxPipeline
from jaxtyping import UInt8
from torch import Tensor

from urae.miniature.check import SceneReport, Score, check_scene, score
from urae.miniature.model import HELD_OUT_SEED
from urae.miniature.synthetic import generate_pictures
from urae.miniature.world import Scene, caption, sample_scene


@dataclass(frozen=True)
class ScoreConfig:
    """What to generate and check."""

    side: int
    """Of the square pictures in pixels."""
    num_captions: int = 500
    """Of held-out scenes."""
    num_seeds: int = 3
    """Pictures of each caption, from different noise."""
    steps: int = 24
    """Denoising steps."""
    guidance_scale: float = 3.5
    """Distilled guidance; of a pipeline without, classifier-free guidance."""
    workers: int = 1
    """Processes that check while the next pictures are made."""


def held_out_scenes(count: int) -> list[Scene]:
    """Return scenes that the miniature was not trained on."""
    return [sample_scene(HELD_OUT_SEED + number) for number in range(count)]


def score_pipeline(pipe: FluxPipeline, config: ScoreConfig) -> list[SceneReport]:
    """Generate pictures of held-out captions and check each against its caption.

    Args:
        pipe: A miniature pipeline on its device, adapted or not.
        config: How many, of which size.

    Returns:
        A report a picture: all captions with the first noise, then with the next.
    """
    scenes = held_out_scenes(config.num_captions)
    jobs = [(scene, number) for number in range(config.num_seeds) for scene in scenes]
    # not forked: this process may hold a GPU and threads
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(config.workers, context, initializer=_use_one_thread) as pool:
        checks = [
            pool.submit(check_scene, picture.numpy(), scene)
            for picture, (scene, _) in zip(_generate(pipe, jobs, config), jobs, strict=True)
        ]
        return [check.result() for check in checks]


def summarize(reports: Sequence[SceneReport]) -> dict[str, float]:
    """Return the share that passes with its 95% interval, and the share of each part."""
    passed: Score = score(reports)
    parts = {
        field.name: sum(getattr(report, field.name) for report in reports) / len(reports)
        for field in fields(SceneReport)
    }
    return {**asdict(passed), **parts}


def _use_one_thread() -> None:
    torch.set_num_threads(1)


def _generate(
    pipe: FluxPipeline, jobs: Sequence[tuple[Scene, int]], config: ScoreConfig
) -> Iterator[UInt8[Tensor, "3 h w"]]:
    noises = [torch.Generator().manual_seed(scene.seed * 1000 + number) for scene, number in jobs]
    return generate_pictures(
        pipe,
        [caption(scene) for scene, _ in jobs],
        noises,
        side=config.side,
        steps=config.steps,
        guidance_scale=config.guidance_scale,
    )
