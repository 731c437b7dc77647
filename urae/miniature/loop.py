"""The loop of every stage of the miniature's training: EMA, resumable, stopped by the clock.

Under torchrun the processes share each batch, and average their gradients.
"""

import io
import logging
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import accumulate
from pathlib import Path
from pickle import UnpicklingError
from typing import Any
from zipfile import BadZipFile, ZipFile

import torch
from torch import Tensor, distributed, nn

from urae.miniature.origin import check_same_origin, pick_origin
from urae.storage import write_atomic
from urae.train.guards import catch_stop

logger = logging.getLogger(__name__)

_LOG_EVERY_SECONDS = 20.0
_KEEP_EVERY_SECONDS = 60.0
_CLOCK_EVERY_STEPS = 50
_ALIGNMENT = 64  # elements
# what comes of a state file that holds something else, and of one that is damaged or cut short
_OTHER = (ValueError, LookupError, TypeError, AttributeError)
_DAMAGE = (*_OTHER, BadZipFile, UnpicklingError, RuntimeError)


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

    def __post_init__(self) -> None:
        for name in ("steps", "warmup_steps"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} {getattr(self, name)} must be at least 1")
        if not self.lr > 0:
            raise ValueError(f"lr {self.lr} must be above 0")
        if not 0 < self.decay_share <= 1:
            raise ValueError(f"decay_share {self.decay_share} must be above 0 and at most 1")
        if not 0 <= self.ema_decay < 1:
            raise ValueError(f"ema_decay {self.ema_decay} must be 0 or more and below 1")


@dataclass(frozen=True)
class StageRun:
    """What every stage is given beside its own settings."""

    work_dir: Path
    """Folder of the stages' files."""
    seed: int
    """Of weights and noise; the scenes are the same for all."""
    metadata: Mapping[str, str]
    """Of the file that the stage writes."""
    device: torch.device
    max_seconds: float
    """Stop this long after `began`; the same call goes on."""
    rank: int = 0
    """Of this process among those that share the stage."""
    num_ranks: int = 1
    """Processes that share the stage, each with its part of every batch."""
    began: float = field(default_factory=time.monotonic)
    """On the monotonic clock, before anything is loaded or rendered."""

    @property
    def is_over(self) -> bool:
        """Whether its time is."""
        return time.monotonic() - self.began > self.max_seconds

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
                "a number that divides it"
            )
        return count // self.num_ranks

    def file(self, stage: str) -> Path:
        """Return a stage's file."""
        return self.work_dir / f"{stage}.safetensors"

    def state_file(self, stage: str) -> Path:
        """Return the file of what a stage goes on from, after a stop."""
        return self.file(stage).with_suffix(".state.pt")

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
) -> bool:
    """Train a module; called again after a stop, it goes on where it was.

    Ctrl-C, SIGTERM and SIGHUP save its state first; a later one stops at once.

    Args:
        module: Float32, on the run's device; trained in place. When the last step is done, it holds
            the averaged weights.
        compute_loss: Calls the module.
        config: Steps and learning rate.
        stage: Name of the stage; its state between calls is a file until `discard_state`.
        run: Each step's generator is seeded from its seed, the step and the process.

    Returns:
        Whether the last step is done; if not, it was stopped before.

    Raises:
        FloatingPointError: If loss or gradient is not finite where it is looked at: every 20 s, and
            before any state is saved.
        ValueError: As `read_state`.
        OSError: If the state cannot be saved, no space being left for one; that of before is whole.
    """
    weights = FlatParameters(module)
    optimizer = torch.optim.AdamW(
        [weights.vector], lr=config.lr, betas=(0.9, 0.99), weight_decay=config.weight_decay,
        fused=run.on_gpu,
    )  # fmt: skip
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: _rate(step, config))
    average = weights.vector.detach().clone()
    tensors = {"weights": weights.vector.detach(), "average": average}
    step = _load_state(stage, run, tensors, optimizer, schedule)
    generator = torch.Generator(run.device)
    logged = kept = time.monotonic()
    logged_step = step
    with _safe_attention(), catch_stop() as stop:
        while step < config.steps:
            generator.manual_seed(run.seed_step(step))
            loss, figures = compute_loss(step, generator)
            loss.backward()  # type: ignore[no-untyped-call]
            weights.gather_gradient()
            if run.num_ranks > 1:
                distributed.all_reduce(weights.gradient)
                weights.gradient /= run.num_ranks
            norm = nn.utils.clip_grad_norm_([weights.vector], config.max_grad_norm)
            optimizer.step()
            schedule.step()
            average.lerp_(weights.vector.detach(), 1 - config.ema_decay if step else 1.0)
            step += 1
            now = time.monotonic()
            if now - logged > _LOG_EVERY_SECONDS or step == config.steps:
                values = {"loss": loss, "norm": norm, **figures}
                texts = [f"{name} {value.item():.5f}" for name, value in values.items()]
                rate = (step - logged_step) / (now - logged)
                logger.info("step %d: %s, %.1f steps/s", step, ", ".join(texts), rate)
                _check_finite(loss, step)
                logged, logged_step = now, step
            stopping = _agree_to_stop(stop.is_set() or run.is_over, step, run)
            due = stopping or now - kept > _KEEP_EVERY_SECONDS
            if (due or step == config.steps) and run.rank == 0:
                _check_finite(norm, step)
                _save_state(stage, run, tensors, optimizer, schedule, step)
                kept = time.monotonic()
            if stopping:
                break
    if step < config.steps:
        return False
    weights.vector.detach().copy_(average)
    return True


def discard_state(stage: str, run: StageRun) -> None:
    """Delete what a stage goes on from, once its file is written."""
    run.state_file(stage).unlink(missing_ok=True)


def _check_finite(value: Tensor, step: int) -> None:
    if not torch.isfinite(value):
        raise FloatingPointError(f"step {step}: loss or gradient is {value.item()}; lower lr")


@contextmanager
def _safe_attention() -> Iterator[None]:
    # cuDNN's attention backward gives NaN on the transposed views that stock FLUX hands over
    before = torch.backends.cuda.cudnn_sdp_enabled()  # type: ignore[no-untyped-call]
    torch.backends.cuda.enable_cudnn_sdp(False)
    try:
        yield
    finally:
        torch.backends.cuda.enable_cudnn_sdp(before)


class FlatParameters:
    """A module's trainable parameters as one vector, of which they become parts.

    Clipping, the optimizer, the average and the exchange between processes are then one kernel each
    in place of one a parameter: launching those takes longer than a step of so small a model.

    Args:
        module: Its trainable parameters are of one dtype, on one device, dense in memory.
    """

    def __init__(self, module: nn.Module) -> None:
        self._parameters = [each for each in module.parameters() if each.requires_grad]
        first = self._parameters[0]
        ends = list(accumulate(_aligned(each.numel()) for each in self._parameters))
        self.vector = nn.Parameter(first.new_zeros(ends[-1]))
        self.gradient = torch.zeros_like(self.vector)
        self._gradients = []
        for each, start in zip(self._parameters, [0, *ends[:-1]], strict=True):
            part, gradient = (
                flat.detach().as_strided(each.shape, each.stride(), start)
                for flat in (self.vector, self.gradient)
            )
            part.copy_(each.detach())
            each.data = part
            self._gradients.append(gradient)
        self.vector.grad = self.gradient

    def gather_gradient(self) -> None:
        """Move the parameters' gradients into the vector's."""
        gradients = [each.grad for each in self._parameters if each.grad is not None]
        torch._foreach_copy_(self._gradients, gradients)
        for each in self._parameters:
            each.grad = None


def _aligned(count: int) -> int:
    """Round up to where compiled kernels want a parameter to begin."""
    return -(-count // _ALIGNMENT) * _ALIGNMENT


def _rate(step: int, config: LoopConfig) -> float:
    rising = (step + 1) / config.warmup_steps
    falling = (config.steps - step) / (config.decay_share * config.steps)
    return min(1.0, rising, falling)


def _agree_to_stop(wanted: bool, step: int, run: StageRun) -> bool:
    """Tell whether to stop, which several processes agree on now and then."""
    if run.num_ranks == 1:
        return wanted
    if step % _CLOCK_EVERY_STEPS:
        return False
    flag = torch.tensor(float(wanted), device=run.device)
    distributed.all_reduce(flag)
    return flag.item() > 0


def read_state(stage: str, run: StageRun) -> dict[str, Any] | None:
    """Read what a stage goes on from, None if it starts.

    Raises:
        ValueError: If the file is damaged, or was made by another recipe or from other files.
    """
    path = run.state_file(stage)
    if not path.is_file():
        return None
    stream = io.BytesIO(path.read_bytes())
    try:
        with ZipFile(stream) as archive:
            if archive.testzip() is not None:
                raise _damaged(path)
        stream.seek(0)
        state: dict[str, Any] = torch.load(stream, map_location="cpu", weights_only=True)
        origin = dict(state.get("origin", {}))
    except _DAMAGE as error:
        raise _damaged(path) from error
    check_same_origin(path, origin, pick_origin(run.metadata))
    return state


def _damaged(path: Path) -> ValueError:
    return ValueError(
        f"{path} is not the complete state of a stage; delete it to start the stage over"
    )


def _save_state(
    stage: str,
    run: StageRun,
    tensors: Mapping[str, Tensor],
    optimizer: Any,
    schedule: Any,
    step: int,
) -> None:
    path = run.state_file(stage)
    path.parent.mkdir(parents=True, exist_ok=True)
    states = {"optimizer": optimizer.state_dict(), "schedule": schedule.state_dict()}
    stream = io.BytesIO()
    torch.save({"step": step, "origin": pick_origin(run.metadata), **tensors, **states}, stream)
    write_atomic(path, stream.getvalue())


def _load_state(
    stage: str, run: StageRun, tensors: Mapping[str, Tensor], optimizer: Any, schedule: Any
) -> int:
    state = read_state(stage, run)
    if state is None:
        return 0
    try:
        step = int(state["step"])
        for name, tensor in tensors.items():
            if state[name].shape != tensor.shape:
                raise _damaged(run.state_file(stage))
            tensor.copy_(state[name])
        optimizer.load_state_dict(state["optimizer"])
        schedule.load_state_dict(state["schedule"])
    except _OTHER as error:
        raise _damaged(run.state_file(stage)) from error
    logger.info("continuing from step %d", step)
    return step
