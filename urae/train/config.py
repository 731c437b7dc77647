"""What a training run is: one typed object, built from a recipe, the command line or Python."""

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, ConfigDict

from urae.adapters.variants import is_variant
from urae.choices import Memory
from urae.config import check_types
from urae.features.location import is_url
from urae.flow import TimestepSampling
from urae.geometry import check_side
from urae.resolution import ResolutionPolicy

Checkpointing = Literal["auto", "off", "selective", "full"]
"""What the backward pass computes again."""

_STRICT = ConfigDict(extra="forbid", use_attribute_docstrings=True)
_AT_LEAST_ONE = (
    "steps",
    "batch_size",
    "gradient_accumulation",
    "checkpoint_every",
    "keep_checkpoints",
    "validate_every",
    "preview_every",
    "context_parallel",
)


def _as_tuple(value: Any) -> Any:
    return (value,) if isinstance(value, str | int) else value


def _as_location(value: Any) -> Any:
    return Path(value) if isinstance(value, str) and not is_url(value) else value


@dataclass(frozen=True)
class AdapterConfig:
    """What is trained."""

    __pydantic_config__ = _STRICT

    kind: Literal["lora", "minor", "dora", "lokr", "oft"] = "lora"
    """`lora` starts from zero, `minor` from the smallest singular components (4K stage); `dora`,
    `lokr` and `oft` are peft's and also start from zero."""
    rank: int = 16
    """Rank of each matrix's update, and its alpha; for `oft`, the side of a block."""
    over: Annotated[tuple[str, ...], BeforeValidator(_as_tuple)] = ()
    """Frozen adapters beneath this one: files, folders, names such as miniature-2k, or
    owner/repo/file on the hub."""
    init: str | None = None
    """Start from this adapter's weights: a file, or a checkpoint folder of the reference."""
    trains: Literal["both", "down"] = "both"
    """Factors to train; with `down` the other keeps its initial values (MiCA, arXiv:2604.01694)."""

    def __post_init__(self) -> None:
        check_types(self)
        if self.rank < 1:
            raise ValueError(f"rank {self.rank} must be at least 1")
        if is_variant(self.kind) and (self.over or self.trains == "down"):
            raise ValueError(
                f"kind {self.kind} takes neither adapter.over nor adapter.trains: it cannot be "
                "combined with other adapters and has no pair of factors; use kind lora or minor"
            )
        if self.trains == "down" and self.kind == "lora" and self.init is None:
            raise ValueError(
                "trains 'down' needs adapter.init for a LoRA: in a new one the up factor is zero "
                "and would stay zero"
            )


@dataclass(frozen=True)
class OptimizerConfig:
    """The optimizer; the defaults are the paper's."""

    __pydantic_config__ = _STRICT

    name: Literal["prodigy", "adamw", "adamw8bit", "schedule-free", "muon"] = "prodigy"
    """Prodigy finds its own step size; the others need a learning rate, AdamW about 1e-4."""
    lr: float = 1.0
    """Learning rate; 1 for Prodigy."""
    schedule: Literal["constant", "linear", "cosine"] = "constant"
    """Learning rate after the warm-up: constant, or falling to 0 by the end."""
    warmup_steps: int = 0
    """Steps over which the learning rate first rises from 0."""
    beta1: float = 0.9
    """Decay of the first moment; Muon's momentum."""
    beta2: float = 0.999
    """Decay of the second moment; Muon has none."""
    weight_decay: float = 1e-4
    """Decoupled weight decay."""
    max_grad_norm: float = 1.0
    """Gradients are clipped to this norm."""

    def __post_init__(self) -> None:
        check_types(self)
        for name in ("beta1", "beta2"):
            if not 0 <= getattr(self, name) < 1:
                raise ValueError(f"{name} {getattr(self, name)} must be at least 0 and below 1")
        if self.name == "schedule-free" and self.beta1 == 0:
            raise ValueError("beta1 0.0 must be above 0 for schedule-free; 0.9 is usual")
        if self.name == "schedule-free" and self.schedule != "constant":
            raise ValueError(
                f"schedule {self.schedule} cannot be combined with schedule-free, which takes "
                "only a warm-up; leave it out, or choose another optimizer.name"
            )
        if self.warmup_steps < 0:
            raise ValueError(f"warmup_steps {self.warmup_steps} must be 0 or more")
        if not (math.isfinite(self.weight_decay) and self.weight_decay >= 0):
            raise ValueError(f"weight_decay {self.weight_decay} must be 0 or more")
        if not (math.isfinite(self.lr) and self.lr > 0):
            raise ValueError(f"lr {self.lr} must be a positive number")
        if not (math.isfinite(self.max_grad_norm) and self.max_grad_norm > 0):
            raise ValueError(f"max_grad_norm {self.max_grad_norm} must be a positive number")


@dataclass(frozen=True)
class DataConfig:
    """One of several folders to train on together."""

    __pydantic_config__ = _STRICT

    dir: Annotated[Path | str, BeforeValidator(_as_location)]
    """Features: their folder, or a folder or URL of shards."""
    resolution: int
    """As given to `urae cache` for this folder."""
    weight: int = 1
    """How many times each of its pictures occurs in an epoch."""

    def __post_init__(self) -> None:
        check_types(self)
        check_side("resolution", self.resolution)
        if self.weight < 1:
            raise ValueError(f"weight {self.weight} must be a whole number of at least 1")


@dataclass(frozen=True)
class TrainConfig:
    """A training run (arXiv:2503.16322, section 4.1)."""

    __pydantic_config__ = _STRICT

    model: str
    """Base model: a name such as flux-dev or miniature-dev, a hub id, a folder or a .safetensors
    file."""
    data_dir: Annotated[Path | str | None, BeforeValidator(_as_location)]
    """Features from `urae cache`: their folder, or a folder or URL of shards from `urae pack`; None
    if `data` names several."""
    output_dir: Path
    """Where checkpoints, the loss and the finished adapter go."""
    data: tuple[DataConfig, ...] = ()
    """Several folders instead of one, each with its own resolution."""
    resolution: int = 2048
    """Training resolution, as given to `urae cache`: a picture has as many tokens as a square of
    this side. With several folders it is that of the previews only."""
    steps: int = 2000
    """Number of optimizer steps; `urae plan train` says how many epochs that is."""
    batch_size: int = 1
    """Samples per batch and device, all of one size."""
    gradient_accumulation: int = 1
    """Batches per optimizer step and device."""
    guidance_scale: float = 1.0
    """Guidance given to a guidance-distilled base in training; 1 is crucial (section 3.3)."""
    original_caption_share: float = 0.2
    """Share of samples that train with `prompt` rather than `generated_prompt`."""
    caption_weights: Mapping[str, float] | None = None
    """Weight of each caption column in the draw, instead of the share above."""
    caption_dropout: float = 0.0
    """Share of samples that train with the empty prompt."""
    timestep_sampling: TimestepSampling = "uniform"
    """How noise levels are drawn: `uniform`, as in the paper, or `logit-normal`, mostly medium."""
    timestep_shift: float | Literal["resolution"] = 1.0
    """Shift of the levels towards noise; 1 for none, `resolution` for FLUX's own by size."""
    seed: int = 0
    """Determines initial weights, order, captions, noise and timesteps."""
    memory: Memory = "auto"
    """Memory tier, from most to least GPU memory: `resident` keeps everything on the GPU; `offload`
    keeps saved activations on the host; `streamed` the frozen weights too, with MLPs in token
    chunks. These are exact; `8bit` and `4bit` quantise the frozen base. `auto` takes the first
    that fits."""
    gradient_checkpointing: Checkpointing = "full"
    """What the backward pass recomputes, from most to least memory: nothing (`off`), all but
    attention (`selective`), or whole blocks (`full`); `auto` takes the first of the last two that
    fits. The results are the same."""
    context_parallel: int = 1
    """GPUs that share each picture by splitting its tokens: faster steps, less memory per GPU."""
    shard: bool = False
    """Shard the frozen base over the GPUs of a host, gathering each block when it is needed."""
    compile: bool | None = None
    """Compile the blocks; by default on a GPU, if the run is long enough to benefit."""
    checkpoint_every: int = 200
    """Steps between checkpoints."""
    keep_checkpoints: int = 3
    """Number of newest checkpoints to keep; older ones are deleted once a new one is complete."""
    ema_decay: float | None = None
    """Average the adapter's weights with this decay, 0.99 or more; the average is the result."""
    num_validation: int = 0
    """Number of samples held out of training, on which the loss is measured with fixed noise."""
    validate_every: int = 200
    """Steps between measurements of the held-out samples."""
    preview_prompts: Annotated[tuple[str, ...], BeforeValidator(_as_tuple)] = ()
    """Prompts to draw during training, as squares of `resolution` pixels."""
    preview_seeds: Annotated[tuple[int, ...], BeforeValidator(_as_tuple)] = (0,)
    """Seeds of the previews; each prompt is drawn with each seed."""
    preview_every: int = 200
    """Steps between previews."""
    tracker: Literal["tensorboard", "wandb", "trackio"] | None = None
    """Experiment tracker, through accelerate."""
    remote_cache_gib: float = 50.0
    """Disk space for features from a URL in GiB, in the user's cache folder; 0 for none."""
    resume: bool = False
    """Continue from the newest checkpoint in `output_dir`."""
    overwrite: bool = False
    """Start over in an `output_dir` that already holds a run."""
    adapter: AdapterConfig = field(default_factory=AdapterConfig)
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    policy: ResolutionPolicy | None = None
    """Resolution policy; by default that of the adapter beneath this one, or the base's own."""

    @property
    def sources(self) -> tuple[DataConfig, ...]:
        """The folders to train on, one or several."""
        if self.data_dir is None:
            return self.data
        return (DataConfig(self.data_dir, self.resolution),)

    def __post_init__(self) -> None:
        check_types(self)
        if (self.data_dir is None) == (not self.data):
            raise ValueError(
                "name the data once: a folder with --data, or several as [[data]] in the recipe"
            )
        check_side("resolution", self.resolution)
        for name in _AT_LEAST_ONE:
            if getattr(self, name) < 1:
                raise ValueError(f"{name} {getattr(self, name)} must be at least 1")
        shift = self.timestep_shift
        if shift != "resolution" and not (math.isfinite(shift) and shift > 0):
            raise ValueError(f"timestep_shift {shift} must be a positive number or 'resolution'")
        if not (math.isfinite(self.remote_cache_gib) and self.remote_cache_gib >= 0):
            raise ValueError(f"remote_cache_gib {self.remote_cache_gib} must be 0 or more")
        if self.num_validation < 0:
            raise ValueError(f"num_validation {self.num_validation} must be 0 or more")
        if self.ema_decay is not None and not 0 < self.ema_decay < 1:
            raise ValueError(
                f"ema_decay {self.ema_decay} must be above 0 and below 1; 0.999 is usual"
            )
        if not 0 <= self.seed < 2**63:
            raise ValueError(f"seed {self.seed} must be between 0 and 2^63 - 1")
        if not (math.isfinite(self.guidance_scale) and self.guidance_scale >= 0):
            raise ValueError(f"guidance_scale {self.guidance_scale} must be 0 or more")
        if not 0 <= self.original_caption_share <= 1:
            raise ValueError(
                f"original_caption_share {self.original_caption_share} must be between 0 and 1"
            )
        if not all(prompt.strip() for prompt in self.preview_prompts):
            raise ValueError("a prompt in preview_prompts is empty; each must have some text")
        if not self.preview_seeds or not all(0 <= seed < 2**63 for seed in self.preview_seeds):
            raise ValueError(
                f"preview_seeds {self.preview_seeds} must be one or more between 0 and 2^63 - 1"
            )
        if not 0 <= self.caption_dropout <= 1:
            raise ValueError(f"caption_dropout {self.caption_dropout} must be between 0 and 1")
        if self.optimizer.name == "muon" and self.adapter.kind in ("dora", "oft"):
            raise ValueError(
                f"muon is only for matrices, and {self.adapter.kind} has other weights too; "
                "choose another optimizer.name"
            )
        if is_variant(self.adapter.kind) and self.memory in ("streamed", "8bit", "4bit"):
            raise ValueError(
                f"memory {self.memory} is only for LoRA and minor components; {self.adapter.kind} "
                "needs the base's full weights on the GPU: choose resident or offload"
            )
        if (self.memory, self.gradient_checkpointing) == ("streamed", "off"):
            raise ValueError(
                "memory streamed cannot be combined with gradient_checkpointing off: the "
                "backward pass would keep the weights that should be freed; choose full or "
                "selective"
            )
        streamed_selective = (self.memory, self.gradient_checkpointing) == ("streamed", "selective")
        if self.compile and (self.memory == "4bit" or streamed_selective):
            kept = " with gradient_checkpointing selective" if streamed_selective else ""
            raise ValueError(
                f"compile true cannot be combined with memory {self.memory}{kept}, whose blocks "
                "are never compiled; leave one of the two out"
            )
        if self.caption_weights is not None:
            _check_caption_weights(self.caption_weights)
        if self.resume and self.overwrite:
            raise ValueError("resume and overwrite cannot be combined; choose one of them")


def _check_caption_weights(weights: Mapping[str, float]) -> None:
    for column, weight in weights.items():
        if not (math.isfinite(weight) and weight >= 0):
            raise ValueError(f"caption_weights: {weight} of {column!r} must be 0 or more")
    if not any(weights.values()):
        raise ValueError("caption_weights must give some column a weight above 0")
