"""The training loop: 2K and 4K, LoRA and minor components are recipes of it."""

import json
import logging
import os
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import asdict, dataclass, replace
from datetime import timedelta
from importlib.util import find_spec
from pathlib import Path
from threading import Event

import torch
from accelerate import Accelerator
from accelerate.utils import InitProcessGroupKwargs
from diffusers import FluxTransformer2DModel
from diffusers.models.attention_dispatch import attention_backend

from urae.adapters.adapt import choose_policy
from urae.adapters.sources import LORA_FILE_NAME
from urae.backbones.attention import name_crash
from urae.backbones.devices import pick_dtype
from urae.backbones.flux import fingerprint_component, load_transformer
from urae.backbones.free_memory import explain_memory, is_out_of_memory
from urae.backbones.ranks import explain_lost_rank
from urae.config import flatten
from urae.resolution import ResolutionPolicy, apply_policy
from urae.train.adapter import TrainingAdapter, attach_for_training
from urae.train.attention import choose_attention
from urae.train.checkpoint import check_same_origin, checkpoint_path, find_checkpoints
from urae.train.config import TrainConfig
from urae.train.guards import catch_stop
from urae.train.inputs import Inputs, check_inputs
from urae.train.loader import Loader
from urae.train.memory import choose_way, is_placed_first, place
from urae.train.mesh import build_mesh, check_mesh, distribute
from urae.train.monitor import Monitor
from urae.train.optimizer import PACKAGES
from urae.train.output import (
    StepReport,
    check_same_policy,
    hold_output,
    prepare_output,
    read_losses,
    warn_of_other_steps,
)
from urae.train.preview import Previewer
from urae.train.ranks import MAX_WAIT_MINUTES, check_alike, warn_of_other_batch
from urae.train.recompute import count_tokens, is_compiled, set_checkpointing
from urae.train.record import write_run
from urae.train.state import build_state
from urae.train.step import Stepper

logger = logging.getLogger(__name__)

_AGAIN = "start all of them again with --resume"


@dataclass(frozen=True)
class TrainResult:
    """How a run ended."""

    step: int
    adapter_path: Path
    """The finished adapter, or that of the last checkpoint if the run was stopped."""
    finished: bool
    num_steps: int
    """Steps taken since it started or went on: 0 if there was nothing left to do."""
    losses: tuple[float, ...] = ()
    """Of each step of the whole run; on the main process alone."""
    held_out_losses: tuple[float, ...] = ()
    """Of the whole run, as often as they were measured; on the main process alone."""
    stopped: bool = False
    """Whether a signal asked for a stop; one that came during the last step found it finished."""


def train(
    config: TrainConfig, *, on_step: Callable[[StepReport], None] | None = None
) -> TrainResult:
    """Train an adapter on cached features.

    Ctrl-C, SIGTERM and SIGHUP save a checkpoint first; a second one, more than a second later,
    stops at once.

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
        ConnectionError: If another process of the run is lost.
        OSError: If a checkpoint cannot be written, or the GPU fails; earlier checkpoints stay.
    """
    with explain_lost_rank(_AGAIN), torch.inference_mode(False), torch.enable_grad():
        accelerator = _build_accelerator(config)
        with hold_output(config.output_dir) if accelerator.is_main_process else nullcontext():
            return _Run(config, accelerator).train(on_step)


class _Run:
    """A run with all that it needs, at its beginning or at the checkpoint that it resumes from."""

    def __init__(self, config: TrainConfig, accelerator: Accelerator) -> None:
        inputs = check_inputs(config)
        policy = choose_policy(config.policy, inputs.adapters, inputs.model_path)
        samples = [*inputs.samples, *inputs.held_out]
        check_mesh(config, samples, inputs.model_path, policy, accelerator.num_processes)
        mesh = build_mesh(config, accelerator)
        check_same_policy(inputs.start, policy)
        check_alike(config, inputs, policy)
        config.output_dir.mkdir(parents=True, exist_ok=True)
        self.config, self.accelerator, self.mesh = config, accelerator, mesh
        self.inputs, self.policy = inputs, policy
        previewer = None
        if config.preview_prompts:  # first, so that the text encoders have room
            previewer = Previewer(config, inputs.model_path, policy)
        self.way = choose_way(config, inputs, mesh.device, num_ranks=mesh.num_ranks)
        self.compiled = is_compiled(config, self.way, inputs.samples, mesh.device)
        if config.compile and not self.compiled:
            logger.warning("compile true is ignored: with %s, blocks are not compiled", self.way)
        self.transformer, self.adapter = self._build_model()
        self.attention = self._choose_attention()
        self.state = build_state(self.adapter, config, inputs)
        self.metadata = _describe_adapter(config, inputs, policy)
        self.batches_per_step = config.gradient_accumulation * mesh.num_data_ranks
        if accelerator.is_main_process:
            warn_of_other_batch(inputs.start, self.batches_per_step)
            warn_of_other_steps(config, inputs.start)
            prepare_output(config.output_dir, inputs.start)
            write_run(config, inputs, policy, accelerator, self._describe_choices())
        self.monitor = Monitor(config, inputs, accelerator, mesh, self.transformer, previewer)

    def train(self, on_step: Callable[[StepReport], None] | None) -> TrainResult:
        """Take the steps that are left; arguments and result as of `train`."""
        config, state = self.config, self.state
        loader = self._build_loader()
        stepper = Stepper(
            config,
            self.accelerator,
            self.mesh,
            self.transformer,
            self.adapter.parameters,
            state,
            loader,
            self.batches_per_step,
        )
        with (
            _enough_memory(),
            self._explained_failure(),
            attention_backend(self.attention),
            loader,
            catch_stop() as stop,
        ):
            stopping = False
            with self._saved_on_failure():
                self.monitor.catch_up(state, stop)
            while state.step < config.steps and not stopping:
                with self._saved_on_failure():  # the step has changed nothing yet
                    gradients = stepper.compute_gradients(stop)
                report = stepper.advance(gradients)
                with self._saved_on_failure():
                    self.monitor.log_step(report, stop)
                    if self.monitor.curves is not None and on_step is not None:
                        last = [None, *self.monitor.curves.held_out_losses][-1]
                        on_step(replace(report, held_out_loss=last))
                finished = state.step == config.steps
                # before measuring too, which may take longer than a stop leaves
                is_due = state.step % config.checkpoint_every == 0
                if finished or gradients.stopping or is_due or self.monitor.is_due(state.step):
                    self._save(stop)
                if gradients.stopping and not finished:
                    break  # what is due is measured when the run goes on
                with self._saved_on_failure():
                    self.monitor.measure(state, stop=stop)
                    if self.monitor.is_due(state.step):  # which is saved, and may take minutes
                        stopping = self.monitor.agree_to_stop(stop)
            finished = state.step == config.steps
            if finished and self.accelerator.is_main_process:
                state.write_adapter(config.output_dir, self.metadata)
            self.accelerator.wait_for_everyone()
        # not looked up: a host may see of a shared folder what was there half a minute ago
        saved = checkpoint_path(config.output_dir, state.step)
        folder = config.output_dir if finished else saved
        stopped = self.monitor.agree_to_stop(stop)
        self.accelerator.end_training()
        return self._build_result(folder / LORA_FILE_NAME, stopped)

    def _build_result(self, adapter_path: Path, stopped: bool) -> TrainResult:
        step, curves = self.state.step, self.monitor.curves
        return TrainResult(
            step,
            adapter_path,
            finished=step == self.config.steps,
            num_steps=step - self.inputs.start.step,
            stopped=stopped,
            losses=tuple(read_losses(self.config.output_dir)) if curves else (),
            held_out_losses=tuple(curves.held_out_losses) if curves else (),
        )

    def _build_model(self) -> tuple[FluxTransformer2DModel, TrainingAdapter]:
        """Load the base, attach what trains, and put all of it where it is to be."""
        config, inputs, device = self.config, self.inputs, self.mesh.device
        transformer = load_transformer(inputs.model_path, dtype=pick_dtype(device))
        transformer.requires_grad_(False)
        with _enough_memory():
            if is_placed_first(self.way) and not config.shard:
                transformer.to(device)
            apply_policy(transformer, self.policy)
            adapter = attach_for_training(
                transformer, config.adapter, inputs.over, inputs.initial, config.seed, device
            )
            check_same_origin(inputs.start.checkpoint, adapter.origin_hash)
            if not config.shard:  # else block by block
                place(transformer, self.way, device, compiled=self.compiled)
            factors = [*adapter.parameters, *adapter.staying]
            distribute(transformer, factors, config, self.mesh)
        set_checkpointing(transformer, self.way, device, compiled=self.compiled)
        return transformer.train(), adapter

    def _choose_attention(self) -> str:
        shape = self.transformer.config
        with _enough_memory():
            return choose_attention(
                self.mesh.device,
                self.transformer.dtype,
                heads=shape.num_attention_heads,
                head_dim=shape.attention_head_dim,
                tokens=count_tokens(self.inputs.samples),
                context_parallel=self.config.context_parallel,
            )

    def _build_loader(self) -> Loader:
        steps = self.config.steps - self.state.step
        return Loader(
            self.inputs.samples,
            self.inputs.draws,
            self.config,
            self.mesh.device,
            end=self.state.num_batches + steps * self.batches_per_step,
            rank=self.mesh.data_rank,
            num_ranks=self.mesh.num_data_ranks,
        )

    def _save(self, stop: Event | None = None) -> None:
        """Save a checkpoint; where the disk is full wait for room, until `stop` is set."""
        if not self.accelerator.is_main_process:
            return
        record = {
            "batches_per_step": self.batches_per_step,
            "data_hash": self.inputs.data_hash,
            "config": flatten(asdict(self.config)),
            "policy": self.policy.to_json(),
        }
        self.state.save(self.config, self.metadata, record, stop)

    @contextmanager
    def _saved_on_failure(self) -> Iterator[None]:
        try:
            yield
        except Exception as error:
            if not _is_lost(error):
                self._save()
            raise

    @contextmanager
    def _explained_failure(self) -> Iterator[None]:
        try:
            yield
        except torch.AcceleratorError as error:
            if _is_lost(error):
                raise OSError(self._describe_failure(error)) from error
            raise

    def _describe_failure(self, error: torch.AcceleratorError) -> str:
        checkpoints = find_checkpoints(self.config.output_dir)
        rest = "nothing was saved yet: start over"
        if checkpoints:
            rest = f"{checkpoints[-1].path} is saved: continue with --resume"
        return (
            f"the GPU failed at step {self.state.step + 1} ({name_crash(error)}); {rest}; if it "
            f"fails again, set DIFFUSERS_ATTN_BACKEND to another attention than {self.attention} "
            "(_native_flash, _native_cudnn)"
        )

    def _describe_choices(self) -> dict[str, str | bool]:
        """Say what was decided where the recipe leaves it to the machine."""
        return {
            "memory": self.way.tier,
            "gradient_checkpointing": self.way.checkpointing,
            "compile": self.compiled,
            "attention": self.attention,
        }


def _is_lost(error: Exception) -> bool:
    """Tell whether a GPU has crashed: nothing on it can be read any more."""
    return isinstance(error, torch.AcceleratorError) and not is_out_of_memory(error)


def _describe_adapter(
    config: TrainConfig, inputs: Inputs, policy: ResolutionPolicy
) -> dict[str, str]:
    """Say in an adapter's file what it comes from."""
    return {
        "urae.policy": policy.to_json(),
        "urae.base_model": config.model,
        "urae.base_revision": fingerprint_component(inputs.model_path, "transformer"),
        "urae.config": json.dumps(flatten(asdict(config))),
    }


def _enough_memory() -> AbstractContextManager[None]:
    remedy = "--batch-size 1, --memory streamed, or features of a lower resolution"
    return explain_memory("this step", remedy)


def _build_accelerator(config: TrainConfig) -> Accelerator:
    optimizer, tracker = config.optimizer.name, config.tracker
    for choice, package in ((optimizer, PACKAGES.get(optimizer)), (tracker, tracker)):
        if package is not None and find_spec(package) is None:
            raise ModuleNotFoundError(
                f"{choice} needs the package {package}: pip install {package}"
            )
    accelerator = Accelerator(
        mixed_precision="no",
        log_with=config.tracker,
        project_dir=str(config.output_dir),
        kwargs_handlers=[InitProcessGroupKwargs(timeout=timedelta(minutes=MAX_WAIT_MINUTES))],
    )
    if accelerator.num_processes != (started := int(os.environ.get("WORLD_SIZE", "1"))):
        raise ValueError(
            f"{started} processes were started, and this one, on {accelerator.device}, would "
            "train alone: accelerate joins them only if each has a GPU; check nvidia-smi and "
            "CUDA_VISIBLE_DEVICES, or set ACCELERATE_USE_CPU=true to train on CPUs"
        )
    # the recipe decides, not the user's accelerate settings: backward would divide once more
    accelerator.gradient_accumulation_steps = 1
    return accelerator
