"""The loop of every stage of the miniature's training: EMA, resumable, stopped by the clock.

Under torchrun the processes share each batch, and average their gradients.
"""

import logging
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, distributed, nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from urae.train.guards import safe_attention

logger = logging.getLogger(__name__)

_LOG_EVERY_SECONDS = 20.0
_KEEP_EVERY_SECONDS = 240.0
_CLOCK_EVERY_STEPS = 50


@dataclass(frozen=True)
class LoopConfig:
    """How long and how fast a stage learns."""

    steps: int
    """Optimizer updates in all."""
    lr: float
    """Of AdamW, after the warm-up."""
    warmup_steps: int = 500
    """The learning rate rises over these."""
    decay_share: float = 0.3
    """Of the steps, the last, over which the learning rate falls to zero in a line."""
    weight_decay: float = 0.01
    """Decoupled."""
    ema_decay: float = 0.999
    """Of the averaged weights, which are what a stage gives."""
    max_grad_norm: float = 1.0
    """Gradients are clipped to this norm."""


@dataclass(frozen=True)
class StageRun:
    """What every stage is given beside its own settings."""

    work_dir: Path
    """Folder of the stages' files."""
    seed: int
    """Of weights, scenes and noise."""
    metadata: Mapping[str, str]
    """Of the file that the stage writes."""
    device: torch.device
    max_seconds: float
    """Stop after these; the same call goes on."""
    rank: int = 0
    """Of this process among those that share the stage."""
    num_ranks: int = 1
    """Processes that share the stage, each with its part of every batch."""

    def seed_step(self, step: int) -> int:
        """Return the seed of this process's chance in a step."""
        return (self.seed * 1_000_003 + step) * self.num_ranks + self.rank

    def share(self, count: int) -> int:
        """Return this process's part of a batch.

        Raises:
            ValueError: If the processes cannot share it evenly.
        """
        if count % self.num_ranks:
            raise ValueError(
                f"a batch of {count} cannot be shared evenly by {self.num_ranks} processes; start "
                "a number of them that divides it"
            )
        return count // self.num_ranks

    def file(self, stage: str) -> Path:
        """Return a stage's file."""
        return self.work_dir / f"{stage}.safetensors"

    @property
    def on_gpu(self) -> bool:
        return self.device.type == "cuda"

    def autocast(self) -> torch.autocast:
        """Compute in bfloat16 on a GPU."""
        return torch.autocast(self.device.type, torch.bfloat16, enabled=self.on_gpu)


ComputeLoss = Callable[[int, torch.Generator], tuple[Tensor, Mapping[str, Tensor]]]
"""From the step and a generator of its own to the loss, and figures to log beside it."""


def run_loop(
    module: nn.Module, compute_loss: ComputeLoss, config: LoopConfig, stage: str, run: StageRun
) -> nn.Module | None:
    """Train a module; called again after a stop, it goes on where it was.

    Args:
        module: Float32, on the run's device; trained in place.
        compute_loss: Calls the module.
        config: Steps and learning rate.
        stage: Name of the stage; its state between calls is a file until the stage is done.
        run: Each step's generator is seeded from its seed, the step and the process.

    Returns:
        The averaged module when the last step is done, None if the clock ran out before.

    Raises:
        FloatingPointError: At the first loss that is not finite.
    """
    state_path = run.file(stage).with_suffix(".state.pt")
    optimizer = torch.optim.AdamW(
        module.parameters(), lr=config.lr, betas=(0.9, 0.99), weight_decay=config.weight_decay,
        fused=run.on_gpu,
    )  # fmt: skip
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: _rate(step, config))
    decay: Any = get_ema_multi_avg_fn(config.ema_decay)  # type: ignore[no-untyped-call]
    average: Any = AveragedModel(module, multi_avg_fn=decay)
    state = {"module": module, "optimizer": optimizer, "schedule": schedule, "average": average}
    step = _load_state(state_path, state, run.device)
    generator = torch.Generator(run.device)
    began = logged = kept = time.monotonic()
    logged_step = step
    with safe_attention():
        while step < config.steps:
            generator.manual_seed(run.seed_step(step))
            loss, figures = compute_loss(step, generator)
            loss.backward()  # type: ignore[no-untyped-call]
            if run.num_ranks > 1:
                _average_gradients(module)
            norm = nn.utils.clip_grad_norm_(module.parameters(), config.max_grad_norm)
            optimizer.step()
            schedule.step()
            optimizer.zero_grad(set_to_none=True)
            average.update_parameters(module)
            step += 1
            now = time.monotonic()
            if now - logged > _LOG_EVERY_SECONDS or step == config.steps:
                values = {"loss": loss, "norm": norm, **figures}
                texts = [f"{name} {value.item():.5f}" for name, value in values.items()]
                rate = (step - logged_step) / (now - logged)
                logger.info("step %d: %s, %.1f steps/s", step, ", ".join(texts), rate)
                if not torch.isfinite(loss):
                    raise FloatingPointError(f"step {step}: loss {loss.item()}; lower lr")
                logged, logged_step = now, step
            out_of_time = _is_over(now - began > run.max_seconds, step, run)
            due = out_of_time or now - kept > _KEEP_EVERY_SECONDS
            if due and step < config.steps and run.rank == 0:
                _save_state(state_path, state, step)
                kept = time.monotonic()
            if out_of_time:
                break
    if step < config.steps:
        return None
    if run.rank == 0:
        state_path.unlink(missing_ok=True)
    averaged: nn.Module = average.module
    return averaged


def _rate(step: int, config: LoopConfig) -> float:
    rising = (step + 1) / config.warmup_steps
    falling = (config.steps - step) / (config.decay_share * config.steps)
    return min(1.0, rising, falling)


def _average_gradients(module: nn.Module) -> None:
    """Give every process the mean of the gradients of all."""
    gradients = [each.grad for each in module.parameters() if each.grad is not None]
    together = torch.cat([gradient.flatten() for gradient in gradients])
    distributed.all_reduce(together)
    together /= distributed.get_world_size()
    parts = torch.split(together, [gradient.numel() for gradient in gradients])
    for gradient, part in zip(gradients, parts, strict=True):
        gradient.copy_(part.view_as(gradient))


def _is_over(late: bool, step: int, run: StageRun) -> bool:
    """Tell whether to stop, which several processes agree on now and then."""
    if run.num_ranks == 1:
        return late
    if step % _CLOCK_EVERY_STEPS:
        return False
    flag = torch.tensor(float(late), device=run.device)
    distributed.all_reduce(flag)
    return flag.item() > 0


def _save_state(path: Path, state: Mapping[str, Any], step: int) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    beside = path.with_name(f".{path.name}.tmp")
    torch.save({"step": step, **{name: each.state_dict() for name, each in state.items()}}, beside)
    beside.replace(path)


def _load_state(path: Path, state: Mapping[str, Any], device: torch.device) -> int:
    if not path.is_file():
        return 0
    saved = torch.load(path, map_location=device, weights_only=True)
    for name, each in state.items():
        each.load_state_dict(saved[name])
    logger.info("going on from step %d", saved["step"])
    return int(saved["step"])
