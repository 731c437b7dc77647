"""The scene check over many captions and seeds of one pipeline."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path

import torch
from diffusers import FluxPipeline
from jaxtyping import UInt8
from torch import Tensor

from urae.adapters.adapt import adapt
from urae.adapters.packaged import BASE
from urae.backbones.devices import pick_device, pick_dtype
from urae.backbones.flux import load_pipeline
from urae.config import check_types
from urae.geometry import check_side
from urae.miniature.check import SceneReport, Score, check_scene, score
from urae.miniature.model import HELD_OUT_SEED
from urae.miniature.processes import start_processes
from urae.miniature.read import LEAST_SIDE
from urae.miniature.stages import load_stage
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
    first_caption: int = 0
    """Number of the first held-out scene: a setting is not to be chosen on those it is told by."""

    def __post_init__(self) -> None:
        check_types(self)
        check_side("side", self.side)
        if self.side < LEAST_SIDE:
            raise ValueError(
                f"side {self.side} must be at least {LEAST_SIDE}, the smallest that the scene "
                "check reads"
            )


def load_scored(
    *,
    model: str | None = None,
    stage: str | None = None,
    work_dir: Path = Path(),
    adapters: Sequence[str] = (),
) -> FluxPipeline:
    """Load what is to be scored, on this machine's device.

    Args:
        model: As `urae generate` takes it; the miniature that ships if no stage is named either.
        stage: A trained stage of the work folder, in place of a model.
        work_dir: Of the stages' files.
        adapters: For the model, in order; without any it is the stock pipeline.

    Raises:
        ValueError: If both model and stage are named, or adapters for a stage.
        FileNotFoundError: If a model, stage or adapter is missing.
    """
    if stage is not None and (model is not None or adapters):
        given = f"model {model}" if model is not None else f"adapter {adapters[0]}"
        raise ValueError(
            f"stage {stage} and {given} cannot be combined; leave out the stage to score a model, "
            "with or without adapters"
        )
    device = pick_device()
    if stage is not None:
        pipe = load_stage(stage, work_dir).to(dtype=pick_dtype(device))
    else:
        pipe = load_pipeline(model or BASE, dtype=pick_dtype(device))
    pipe.set_progress_bar_config(disable=True)
    pipe.to(device)
    return adapt(pipe, adapters) if adapters else pipe


def default_sampling(pipe: FluxPipeline, stage: str | None = None) -> tuple[int, float]:
    """Return the steps and guidance scale that a miniature is made for.

    Args:
        pipe: Of a model or stage.
        stage: Its name, if it is one: those without distilled guidance take a classifier-free one.
    """
    few = stage == "schnell" if stage else not pipe.transformer.config.guidance_embeds
    return (4, 0.0) if few else (24, 3.5)


def held_out_scenes(count: int, first: int = 0) -> list[Scene]:
    """Return scenes that the miniature was not trained on, from number `first` on."""
    return [sample_scene(HELD_OUT_SEED + number) for number in range(first, first + count)]


def score_pipeline(
    pipe: FluxPipeline,
    config: ScoreConfig,
    *,
    on_progress: Callable[[int, int], None] = lambda _done, _total: None,
) -> list[SceneReport]:
    """Generate pictures of held-out captions and check each against its caption.

    Args:
        pipe: A miniature pipeline on its device, adapted or not.
        config: How many, of which size.
        on_progress: Told how many pictures are made, of how many.

    Returns:
        A report a picture: all captions with the first noise, then with the next.
    """
    scenes = held_out_scenes(config.num_captions, config.first_caption) * config.num_seeds
    numbers = [index // config.num_captions for index in range(len(scenes))]
    pictures = draw_scenes(
        pipe,
        scenes,
        numbers,
        side=config.side,
        steps=config.steps,
        guidance_scale=config.guidance_scale,
    )
    with start_processes(config.workers) as pool:
        checks = []
        for picture, scene in zip(pictures, scenes, strict=True):
            checks.append(pool.submit(check_scene, picture.numpy(), scene))
            on_progress(len(checks), len(scenes))
        return [check.result() for check in checks]


def draw_scenes(
    pipe: FluxPipeline,
    scenes: Sequence[Scene],
    numbers: Sequence[int],
    *,
    side: int,
    steps: int,
    guidance_scale: float,
) -> Iterator[UInt8[Tensor, "3 h w"]]:
    """Generate a picture of each scene's caption; the same scene and number give the same noise.

    Args:
        pipe: A miniature pipeline on its device, adapted or not.
        scenes: Their captions are drawn.
        numbers: Of each picture's noise, 0 to 999.
        side: Of the square pictures in pixels.
        steps: Denoising steps.
        guidance_scale: As in `ScoreConfig`.
    """
    noises = [
        torch.Generator().manual_seed(scene.seed * 1000 + number)
        for scene, number in zip(scenes, numbers, strict=True)
    ]
    captions = [caption(scene) for scene in scenes]
    return generate_pictures(
        pipe, captions, noises, side=side, steps=steps, guidance_scale=guidance_scale
    )


def summarize(reports: Sequence[SceneReport], num_captions: int) -> dict[str, float]:
    """Return the share that passes with its 95% interval, and the share of each part.

    Args:
        reports: As of `score_pipeline`.
        num_captions: Of them.
    """
    passed: Score = score(reports, num_captions=num_captions)
    parts = {
        field.name: sum(getattr(report, field.name) for report in reports) / len(reports)
        for field in fields(SceneReport)
    }
    return {**asdict(passed), **parts}
