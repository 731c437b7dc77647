"""One optimizer step: the gradients of its batches over all ranks, checked, then applied."""

import math
import time
from dataclasses import dataclass
from threading import Event

import torch
from accelerate import Accelerator
from accelerate.utils import gather_object
from diffusers import FluxTransformer2DModel
from jaxtyping import Float
from torch import Tensor, nn

from urae.features.dataset import Sample
from urae.train.attention import sound_attention
from urae.train.config import TrainConfig
from urae.train.loader import Loaded, Loader
from urae.train.loss import NUM_LEVELS, compute_losses, mean_levels, sum_levels
from urae.train.mesh import Mesh, sum_gradients
from urae.train.output import StepReport
from urae.train.state import TrainingState


@dataclass(frozen=True)
class Accumulated:
    """What the batches of one step gave on this rank, beside their gradients."""

    loss: Float[Tensor, ""]
    """This rank's part of the mean over the step's samples; the ranks' parts add up to it."""
    levels: Float[Tensor, "2 levels"]
    """Sum and number of the samples' losses at each noise level."""
    samples: list[Sample]

    @property
    def stems(self) -> str:
        return ", ".join(sample.stem for sample in self.samples)


@dataclass(frozen=True)
class Gradients:
    """What a step computed over all ranks; its gradients are those of the parameters."""

    loss: float
    norm: float
    """Before clipping."""
    stopping: bool
    """Whether a rank was asked to stop."""
    levels: list[float]
    samples: list[Sample]
    """Of this rank."""
    began: float
    """On the clock of `time.perf_counter`."""
    loader_seconds: float


@dataclass(frozen=True)
class Stepper:
    """Takes a run's steps on this rank."""

    config: TrainConfig
    accelerator: Accelerator
    mesh: Mesh
    transformer: FluxTransformer2DModel
    parameters: list[nn.Parameter]
    state: TrainingState
    loader: Loader
    batches_per_step: int
    """Of all ranks."""

    def compute_gradients(self, stop: Event) -> Gradients:
        """Compute, sum and clip a step's gradients; nothing else changes.

        Args:
            stop: Set on a rank that was asked to stop.

        Raises:
            FloatingPointError: If loss or gradients are not finite, with step and samples.
        """
        began, waited = time.perf_counter(), self.loader.waited_seconds
        done = accumulate(
            self.transformer,
            self.loader,
            self.state.num_batches,
            self.config.guidance_scale,
            self.accelerator,
        )
        sum_gradients(self.parameters, self.accelerator)
        norm = nn.utils.clip_grad_norm_(self.parameters, self.config.optimizer.max_grad_norm)
        loss, grad_norm, stopping, *levels = _reduce_report(done, norm, stop, self.accelerator)
        loss *= self.mesh.num_data_ranks
        if not (math.isfinite(loss) and math.isfinite(grad_norm)):
            raise FloatingPointError(
                f"step {self.state.step + 1}: loss {loss}, gradient norm {grad_norm}, on samples "
                f"{_name_suspects(done)}; the state before this step is saved in "
                f"{self.config.output_dir}"
            )
        loader_seconds = self.loader.waited_seconds - waited
        return Gradients(
            loss, grad_norm, bool(stopping), levels, done.samples, began, loader_seconds
        )

    def advance(self, gradients: Gradients) -> StepReport:
        """Apply them, and report the step."""
        lr = self.state.advance(self.batches_per_step)
        last = gradients.samples[-1]
        return StepReport(
            step=self.state.step,
            loss=gradients.loss,
            grad_norm=gradients.norm,
            lr=lr,
            seconds=time.perf_counter() - gradients.began,
            loader_seconds=gradients.loader_seconds,
            level_losses=mean_levels(gradients.levels),
            height=last.height,
            width=last.width,
            memory_gib=_peak_memory(self.accelerator.device),
        )


def accumulate(
    model: nn.Module, loader: Loader, first: int, guidance_scale: float, accelerator: Accelerator
) -> Accumulated:
    """Add up the gradients of one step on this rank.

    Each sample weighs the same, however the step's samples fall into batches and ranks.

    Args:
        model: The transformer in training.
        loader: Draws this rank's batches.
        first: Batches that the run, on all ranks, has trained on before.
        guidance_scale: As of the run.
        accelerator: Knows the device.
    """
    chosen_samples: list[Sample] = []
    share = loader.share(first)
    losses = torch.zeros(len(share.batches), device=accelerator.device)
    levels = torch.zeros(2, NUM_LEVELS, device=accelerator.device)
    for index in range(len(share.batches)):
        samples, batch = _take_together(loader, first, index, accelerator)
        chosen_samples += samples
        with sound_attention(batch.num_tokens):
            each = compute_losses(model, batch, guidance_scale)
            loss = each.sum() / share.num_samples
            accelerator.backward(loss)
        losses[index] = loss.detach()
        levels += sum_levels(each, batch.sigmas)
    return Accumulated(losses.sum(), levels, chosen_samples)


def _take_together(loader: Loader, first: int, index: int, accelerator: Accelerator) -> Loaded:
    """Take a batch once every rank has its own: without one they would wait for it in a forward.

    Raises:
        ConnectionError: If another rank has none, with its reason.
    """
    found: Loaded | Exception
    try:
        found = loader.take(first, index)
    except Exception as error:
        found = error
    if accelerator.num_processes > 1:
        failed = torch.tensor(float(isinstance(found, Exception)), device=accelerator.device)
        if float(accelerator.reduce(failed, "sum")):
            reasons = gather_object([_name(found) if isinstance(found, Exception) else None])
            if not isinstance(found, Exception):
                rank, reason = next((rank, each) for rank, each in enumerate(reasons) if each)
                raise ConnectionError(f"process {rank} could not read its batch: {reason}")
    if isinstance(found, Exception):
        raise found
    return found


def _name(error: Exception) -> str:
    return str(error) or type(error).__name__


def _name_suspects(done: Accumulated) -> str:
    """Name the samples of the ranks whose own loss is not finite, else those of all."""
    found = gather_object([(math.isfinite(float(done.loss)), done.stems)])
    named = {rank: stems for rank, (is_finite, stems) in enumerate(found) if not is_finite}
    named = named or {rank: stems for rank, (_, stems) in enumerate(found)}
    return ", ".join(f"{stems} of rank {rank}" for rank, stems in named.items())


def _reduce_report(
    done: Accumulated, norm: Tensor, stop: Event, accelerator: Accelerator
) -> list[float]:
    """Return loss, norm and whether to stop, then levels, each the mean over all ranks."""
    sums = torch.stack([done.loss, norm, done.loss.new_tensor(float(stop.is_set()))])
    means = accelerator.reduce(torch.cat([sums, done.levels.flatten()]), "mean")
    return [float(each) for each in means.tolist()]


def _peak_memory(device: torch.device) -> float | None:
    if device.type != "cuda":
        return None
    return torch.cuda.max_memory_allocated(device) / 2**30
