"""The transformer stages: flow matching, guidance distilled, and four steps distilled."""

import logging
from collections.abc import Callable, Mapping
from itertools import pairwise
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from urae.backbones.flux import predict_velocity
from urae.flow import add_noise, flow_loss, shift_sigmas
from urae.miniature.loop import ComputeLoss, StageRun, discard_state, run_loop
from urae.miniature.model import (
    NATIVE_SIDE,
    Kind,
    build_miniature,
    count_parameters,
    read_weights,
    write_weights,
)
from urae.miniature.paths import GuidedPaths
from urae.miniature.pool import Pool, build_pool
from urae.miniature.recipe import DistillStage, FlowStage
from urae.miniature.text import PIPELINE_TOKENS, TEXT_PARTS

logger = logging.getLogger(__name__)

_SCHNELL_STEPS = 4
_TEACHER_STEPS = 4  # of the guided model within one of the student's
_LONG_TEXT_EVERY, _LONG_TEXT_SHARE = 50, 4  # of the steps, and of a batch, those padded to 512


class Batch(NamedTuple):
    """Scenes of a step."""

    latents: Tensor
    t5_ids: Tensor
    clip_ids: Tensor
    noise: Tensor


class CaptionedTransformer(nn.Module):
    """A FLUX transformer with its text encoders, frozen, from token ids to velocity."""

    def __init__(self, parts: Mapping[str, nn.Module]) -> None:
        super().__init__()
        for name in TEXT_PARTS:
            parts[name].requires_grad_(False)
        self.transformer: Any = parts["transformer"]
        self.text_encoder: Any = parts["text_encoder"]
        self.text_encoder_2: Any = parts["text_encoder_2"]

    def encode(self, t5_ids: Tensor, clip_ids: Tensor) -> tuple[Tensor, Tensor]:
        """Encode as a FLUX pipeline does: no attention mask, CLIP pooled."""
        return (
            self.text_encoder_2(t5_ids).last_hidden_state,
            self.text_encoder(clip_ids).pooler_output,
        )

    def forward(
        self, latents: Tensor, sigmas: Tensor, t5_ids: Tensor, clip_ids: Tensor, guidance: Tensor
    ) -> Tensor:
        prompt_embeds, pooled_prompt_embeds = self.encode(t5_ids, clip_ids)
        return predict_velocity(
            self.transformer, latents, sigmas, prompt_embeds, pooled_prompt_embeds, guidance
        )


def train_flow(
    config: FlowStage,
    kind: Kind,
    stage: str,
    run: StageRun,
    *,
    start: str | None = None,
) -> bool:
    """Train a transformer on renders by flow matching, and write it.

    Args:
        config: The stage.
        kind: Which transformer.
        stage: Its name.
        run: As of every stage.
        start: Stage whose transformer to start from; None starts from random weights.

    Returns:
        Whether it is done; if not, call again to go on.
    """
    parts = build_miniature(kind, guided=False, seed=run.seed)
    model = CaptionedTransformer(parts)
    if start is not None:
        read_weights(run.file(start), {"transformer": model.transformer})
    read_weights(run.file("text"), {name: parts[name] for name in TEXT_PARTS})
    model.to(run.device)
    logger.info("%.2f M parameters", count_parameters([model.transformer]) / 1e6)
    pool = _build_pool(config, config.side, run)
    compute = _compile(model, run)
    batch_size = run.share(config.batch_size)

    def compute_loss(step: int, generator: torch.Generator) -> tuple[Tensor, dict[str, Tensor]]:
        long_text = step % _LONG_TEXT_EVERY == 0
        size = batch_size // _LONG_TEXT_SHARE or 1 if long_text else batch_size
        batch = sample_batch(pool, size, generator, config.caption_dropout)
        uniform = torch.rand(size, generator=generator, device=run.device)
        sigmas = shift_sigmas(uniform, config.sigma_shift)
        noisy = add_noise(batch.latents, batch.noise, sigmas)
        t5_ids = batch.t5_ids
        if long_text:
            t5_ids = nn.functional.pad(t5_ids, (0, PIPELINE_TOKENS - t5_ids.shape[1]))
        with run.autocast():
            forward = model if long_text else compute  # another length would compile anew
            velocity = forward(noisy, sigmas, t5_ids, batch.clip_ids, torch.ones_like(sigmas))
        losses = flow_loss(velocity, batch.latents, batch.noise)
        return losses.mean(), {"noisy half": losses[sigmas > 0.5].mean()}

    return _run(model, compute_loss, config, stage, run)


def train_guided(config: DistillStage, stage: str, run: StageRun) -> bool:
    """Distil classifier-free guidance into a guidance embedding (arXiv:2210.03142, stage one).

    It learns from the refined base's transformer, on noised renders and, as many again, on states
    of the guided paths, where the renders alone leave much to learn. Arguments and result as of
    `train_flow`.
    """
    teacher = _load("refined", run, stored_guided=False, guided=False)
    student = _load("refined", run, stored_guided=False, guided=True)
    pool = _build_pool(config, NATIVE_SIDE, run)
    compute, look_up = _compile(student, run), _compile(teacher, run)
    low, high = config.guidance
    half = run.share(config.batch_size) // 2
    paths = GuidedPaths(pool, half, config.guidance, config.sigma_shift)
    ones = torch.ones(2 * half, device=run.device)

    def compute_loss(step: int, generator: torch.Generator) -> tuple[Tensor, dict[str, Tensor]]:
        batch = sample_batch(pool, half, generator, 0.0)
        uniform, drawn = torch.rand(2, half, generator=generator, device=run.device)
        drawn_sigmas = shift_sigmas(uniform, config.sigma_shift)
        paths.restart(generator)
        noisy = torch.cat([add_noise(batch.latents, batch.noise, drawn_sigmas), paths.latents])
        sigmas = torch.cat([drawn_sigmas, paths.sigmas])
        guidance = torch.cat([low + (high - low) * drawn, paths.guidance])
        t5_ids = torch.cat([batch.t5_ids, paths.t5_ids])
        clip_ids = torch.cat([batch.clip_ids, paths.clip_ids])
        with run.autocast():
            with torch.no_grad():
                with_caption = look_up(noisy, sigmas, t5_ids, clip_ids, ones).float()
                empty = pool.empty_t5_ids.expand_as(t5_ids).contiguous()
                empty_clip = pool.empty_clip_ids.expand_as(clip_ids).contiguous()
                without = look_up(noisy, sigmas, empty, empty_clip, ones).float()
            target = without + guidance[:, None, None, None] * (with_caption - without)
            velocity = compute(noisy, sigmas, t5_ids, clip_ids, guidance)
        errors = (velocity.float() - target).square().mean(dim=(1, 2, 3))
        paths.advance(target[half:])
        return errors.mean(), {"on paths": errors[half:].mean()}

    return _run(student, compute_loss, config, stage, run)


def train_four_steps(config: DistillStage, stage: str, run: StageRun) -> bool:
    """Distil four steps: each learns where the guided model's path ends up after four of its own.

    Half of the paths start from noised renders, half from where the student itself came. It learns
    from the dev stage's transformer, at the middle of the stage's guidance. Arguments and result as
    of `train_flow`.
    """
    teacher = _load("dev", run, stored_guided=True, guided=True)
    student = _load("dev", run, stored_guided=True, guided=False)
    pool = _build_pool(config, NATIVE_SIDE, run)
    compute, look_up = _compile(student, run), _compile(teacher, run)
    low, high = config.guidance
    batch_size = run.share(config.batch_size)

    every = torch.linspace(1, 0, _SCHNELL_STEPS * _TEACHER_STEPS + 1)
    grid = shift_sigmas(every, config.sigma_shift).tolist()

    def compute_loss(step: int, generator: torch.Generator) -> tuple[Tensor, dict[str, Tensor]]:
        batch = sample_batch(pool, batch_size, generator, 0.0)
        segment = step % _SCHNELL_STEPS  # 0 starts from pure noise
        own_path = (step // _SCHNELL_STEPS) % 2 == 1
        guidance = batch.noise.new_full((batch_size,), (low + high) / 2)

        def follow(model: Any, latents: Tensor, path: list[float]) -> Tensor:
            for sigma, following in pairwise(path):
                sigmas = latents.new_full((batch_size,), sigma)
                velocity = model(latents, sigmas, batch.t5_ids, batch.clip_ids, guidance)
                latents = latents + (following - sigma) * velocity.float()
            return latents

        first, last = segment * _TEACHER_STEPS, (segment + 1) * _TEACHER_STEPS
        start, stop = grid[first], grid[last]
        with run.autocast():
            with torch.no_grad():
                if own_path:
                    latents = follow(compute, batch.noise, grid[: first + 1 : _TEACHER_STEPS])
                else:
                    sigmas = batch.noise.new_full((batch_size,), start)
                    latents = add_noise(batch.latents, batch.noise, sigmas)
                target = (follow(look_up, latents, grid[first : last + 1]) - latents) / (
                    stop - start
                )
            sigmas = latents.new_full((batch_size,), start)
            velocity = compute(latents, sigmas, batch.t5_ids, batch.clip_ids, guidance)
        loss = (velocity.float() - target).square().mean()
        return loss, {}

    return _run(student, compute_loss, config, stage, run)


def sample_batch(
    pool: Pool,
    size: int,
    generator: torch.Generator,
    caption_dropout: float,
) -> Batch:
    """Draw scenes and noise; some captions are emptied."""
    device = pool.latents.device
    chosen = pool.draw(size, generator)
    latents = pool.latents[chosen].float()
    noise = torch.randn(latents.shape, generator=generator, device=device)
    dropped = torch.rand(size, 1, generator=generator, device=device) < caption_dropout
    t5_ids = torch.where(dropped, pool.empty_t5_ids, pool.t5_ids[chosen])
    clip_ids = torch.where(dropped, pool.empty_clip_ids, pool.clip_ids[chosen])
    return Batch(latents, t5_ids, clip_ids, noise)


def _build_pool(config: FlowStage | DistillStage, side: int, run: StageRun) -> Pool:
    """Build the pool, or this process's part of it."""
    count = run.share(config.num_scenes)
    return build_pool(
        run.file("vae"),
        count,
        side,
        first_seed=run.rank * count,
        device=run.device,
        object_weights=config.object_weights,
    )


def _load(stage: str, run: StageRun, *, stored_guided: bool, guided: bool) -> CaptionedTransformer:
    """Load a stage's transformer and the text encoders; a new guidance embedding is zero."""
    parts = build_miniature("dev", guided=guided, seed=0)
    read_weights(run.file("text"), {name: parts[name] for name in TEXT_PARTS})
    model = CaptionedTransformer(parts)
    if stored_guided == guided:
        read_weights(run.file(stage), {"transformer": model.transformer})
    else:
        stored = build_miniature("dev", guided=stored_guided, seed=0)["transformer"]
        read_weights(run.file(stage), {"transformer": stored})
        model.transformer.load_state_dict(stored.state_dict(), strict=False)
        if guided:
            last = model.transformer.time_text_embed.guidance_embedder.linear_2
            nn.init.zeros_(last.weight)
            nn.init.zeros_(last.bias)
    return model.to(run.device)


def _compile(model: CaptionedTransformer, run: StageRun) -> Callable[..., Tensor]:
    """Compile a model on a GPU, as CUDA graphs: launching its small kernels one by one is slow."""
    if not run.on_gpu:
        return model
    compiled: Callable[..., Tensor] = torch.compile(model, mode="reduce-overhead", dynamic=False)
    return compiled


def _run(
    model: CaptionedTransformer,
    compute_loss: ComputeLoss,
    config: FlowStage | DistillStage,
    stage: str,
    run: StageRun,
) -> bool:
    if not run_loop(model, compute_loss, config.loop, stage, run):
        return False
    if run.rank == 0:
        write_weights(run.file(stage), {"transformer": model.transformer}, run.metadata)
        discard_state(stage, run)
    return True
