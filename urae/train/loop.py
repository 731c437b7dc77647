"""The training loop: 2K and 4K, LoRA and minor components are recipes of it."""

import json
import math
import time
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict, dataclass
from importlib.util import find_spec
from pathlib import Path

import torch
from accelerate import Accelerator
from accelerate.utils import DistributedDataParallelKwargs
from torch import nn

from urae.adapters.files import LORA_FILE_NAME, AdapterFile, check_fits, read_adapter
from urae.backbones.flux import (
    LatentScale,
    build_meta_transformer,
    explain_memory,
    fetch_model,
    fingerprint_component,
    load_transformer,
    pick_dtype,
    predict_velocity,
    read_latent_scale,
)
from urae.config import flatten
from urae.features.dataset import Sample, batch_for_step, check_cache, list_samples
from urae.features.store import fingerprint_encoders
from urae.flow import add_noise, flow_loss
from urae.geometry import PATCH
from urae.resolution import apply_policy, read_base_policy
from urae.train.adapter import attach_for_training, check_rank, read_adapters
from urae.train.batch import Batch, sample_batch
from urae.train.checkpoint import (
    Checkpoint,
    check_same_origin,
    find_checkpoints,
    load_optimizer,
    save_checkpoint,
)
from urae.train.config import TrainConfig
from urae.train.guards import catch_stop, safe_attention
from urae.train.optimizer import build_optimizer
from urae.train.output import LOSS_FILE, LossLog, StepReport, clear_output, find_start


@dataclass(frozen=True)
class TrainResult:
    """How a run ended."""

    step: int
    adapter_path: Path
    """The finished adapter, or that of the last checkpoint if the run was stopped."""
    finished: bool


@dataclass(frozen=True)
class Inputs:
    """What a run reads, checked."""

    model_path: Path
    samples: list[Sample]
    scale: LatentScale
    over: list[AdapterFile]
    start: AdapterFile | None
    resumed: Checkpoint | None


def train(
    config: TrainConfig, *, on_step: Callable[[StepReport], None] | None = None
) -> TrainResult:
    """Train an adapter on cached features.

    Ctrl-C and SIGTERM save a checkpoint first; a second one stops at once.

    Args:
        config: The run.
        on_step: Called on the main process after every step.

    Returns:
        Where the adapter is, and whether the run is finished.

    Raises:
        ValueError: If config, features, adapters or output folder do not fit; before weights load.
        FileNotFoundError: If the model, an adapter or the features are missing.
        FloatingPointError: At the first non-finite loss or gradient, with its step and samples;
            the state before it is saved.
        MemoryError: If the GPU's memory does not suffice for a step.
        OSError: If a checkpoint cannot be written; earlier ones stay whole.
    """
    accelerator = _build_accelerator(config)
    inputs = _check_inputs(config)
    config.output_dir.mkdir(parents=True, exist_ok=True)

    transformer = load_transformer(inputs.model_path, dtype=pick_dtype(accelerator.device))
    with _enough_memory():
        transformer.to(accelerator.device).requires_grad_(False)
    policy = config.policy or read_base_policy(inputs.model_path)
    apply_policy(transformer, policy)
    if config.gradient_checkpointing:
        transformer.enable_gradient_checkpointing()
    adapter = attach_for_training(
        transformer, config.adapter, inputs.over, inputs.start, config.seed
    )
    check_same_origin(inputs.resumed, adapter.origin_hash)
    optimizer = build_optimizer(adapter.parameters, config.optimizer)
    if inputs.resumed:
        load_optimizer(inputs.resumed, optimizer)
    model = accelerator.prepare_model(transformer.train())

    metadata = {
        "urae.policy": policy.to_json(),
        "urae.base_model": config.model,
        "urae.base_revision": fingerprint_component(inputs.model_path, "transformer"),
        "urae.config": json.dumps(flatten(asdict(config))),
    }
    step = inputs.resumed.step if inputs.resumed else 0
    log = None
    if accelerator.is_main_process:
        if not inputs.resumed:
            clear_output(config.output_dir)
        log = LossLog(config.output_dir / LOSS_FILE, step)
    _start_tracker(accelerator, config)

    def save() -> None:
        if accelerator.is_main_process:
            save_checkpoint(
                config.output_dir,
                step,
                write_adapter=lambda path: adapter.write(
                    path, {**metadata, "urae.step": str(step)}
                ),
                optimizer=optimizer,
                record={"config": json.loads(metadata["urae.config"])},
            )

    with _enough_memory(), safe_attention(), catch_stop() as stop:
        while step < config.steps:
            began = time.perf_counter()
            try:
                loss, stems = accumulate(model, inputs, step, config, accelerator)
            except Exception:
                save()  # the step has changed nothing yet
                raise
            norm = nn.utils.clip_grad_norm_(adapter.parameters, config.optimizer.max_grad_norm)
            shared = torch.stack([loss, norm, loss.new_tensor(float(stop.is_set()))])
            mean_loss, grad_norm, stopping = accelerator.reduce(shared, "mean").tolist()
            if not (math.isfinite(mean_loss) and math.isfinite(grad_norm)):
                save()
                raise FloatingPointError(
                    f"step {step + 1}: loss {mean_loss}, gradient norm {grad_norm}, on samples "
                    f"{', '.join(stems)} of rank {accelerator.process_index}; the state before "
                    f"this step is saved in {config.output_dir}"
                )
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
            step += 1
            report = StepReport(step, mean_loss, grad_norm, time.perf_counter() - began)
            if log is not None:
                log.write(report)
                if on_step is not None:
                    on_step(report)
            accelerator.log({"loss": mean_loss, "grad_norm": grad_norm}, step=step)
            if stopping or step == config.steps or step % config.checkpoint_every == 0:
                save()
            if stopping:
                break
    finished = step == config.steps
    path = config.output_dir / LORA_FILE_NAME
    if finished and accelerator.is_main_process:
        adapter.write(path, {**metadata, "urae.step": str(step)})
    accelerator.wait_for_everyone()
    if not finished:
        path = find_checkpoints(config.output_dir)[-1].adapter_path
    accelerator.end_training()
    return TrainResult(step, path, finished)


def accumulate(
    model: nn.Module, inputs: Inputs, step: int, config: TrainConfig, accelerator: Accelerator
) -> tuple[torch.Tensor, list[str]]:
    """Add up the gradients of one step on this device.

    Returns:
        The mean loss of its batches, and the samples' names.
    """
    stems: list[str] = []
    losses = torch.zeros(config.gradient_accumulation, device=accelerator.device)
    for index in range(config.gradient_accumulation):
        chosen = batch_for_step(
            inputs.samples,
            config.batch_size,
            seed=config.seed,
            step=step * config.gradient_accumulation + index,
            rank=accelerator.process_index,
            num_ranks=accelerator.num_processes,
        )
        samples = [inputs.samples[number] for number in chosen.indices]
        stems += [sample.stem for sample in samples]
        batch = sample_batch(
            samples,
            chosen.counters,
            seed=config.seed,
            original_caption_share=config.original_caption_share,
            scale=inputs.scale,
            device=accelerator.device,
        )
        last = index == config.gradient_accumulation - 1
        with nullcontext() if last else accelerator.no_sync(model):
            loss = compute_loss(model, batch, config.guidance_scale)
            accelerator.backward(loss / config.gradient_accumulation)
        losses[index] = loss.detach()
    return losses.mean(), stems


def compute_loss(model: nn.Module, batch: Batch, guidance_scale: float) -> torch.Tensor:
    """Return the mean flow-matching loss of a batch (velocity MSE, no weighting)."""
    dtype = next(model.parameters()).dtype
    noisy = add_noise(batch.latents, batch.noise, batch.sigmas)
    velocity = predict_velocity(
        model,
        noisy.to(dtype),
        batch.sigmas,
        batch.prompt_embeds.to(dtype),
        batch.pooled_prompt_embeds.to(dtype),
        guidance_scale,
    )
    return flow_loss(velocity, batch.latents, batch.noise).mean()


def _check_inputs(config: TrainConfig) -> Inputs:
    """Find and check everything that a run reads, before any weights load."""
    resumed = find_start(config)
    samples = list_samples(config.data_dir)
    model_path = fetch_model(config.model)  # encoders too: their fingerprints are checked
    meta = build_meta_transformer(model_path)
    check_cache(
        samples,
        latent_channels=meta.config.in_channels // PATCH**2,
        t5_dim=meta.config.joint_attention_dim,
        clip_dim=meta.config.pooled_projection_dim,
        resolution=config.resolution,
        fingerprints=fingerprint_encoders(model_path),
    )
    check_rank(config.adapter, meta)
    over, start = read_adapters(config.adapter)
    start = read_adapter(resumed.adapter_path) if resumed else start
    for file in [*over, *([start] if start else [])]:
        check_fits(file, meta)
    return Inputs(model_path, samples, read_latent_scale(model_path), over, start, resumed)


def _enough_memory() -> AbstractContextManager[None]:
    remedy = "--batch-size 1, --gradient-checkpointing true, or features of a lower resolution"
    return explain_memory("this step", remedy)


def _build_accelerator(config: TrainConfig) -> Accelerator:
    packages = {"prodigy": "prodigyopt", "adamw": "torch", "none": "torch"}
    for choice in (config.optimizer.name, config.tracker):
        package = packages.get(choice, choice)
        if find_spec(package) is None:
            raise ModuleNotFoundError(
                f"{choice} needs the package {package}: pip install {package}"
            )
    accelerator = Accelerator(
        mixed_precision="no",
        log_with=None if config.tracker == "none" else config.tracker,
        project_dir=str(config.output_dir),
        kwargs_handlers=[DistributedDataParallelKwargs(broadcast_buffers=False)],
    )
    # the recipe decides, not the user's accelerate settings: backward would divide once more
    accelerator.gradient_accumulation_steps = 1
    return accelerator


def _start_tracker(accelerator: Accelerator, config: TrainConfig) -> None:
    if config.tracker == "none":
        return
    flat = flatten(asdict(config))
    settings = {key: value for key, value in flat.items() if value is not None}
    accelerator.init_trackers("urae", config=settings)
