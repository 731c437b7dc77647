"""What a picture will take, tier by tier: the estimate alone, no weights are loaded."""

import re
from dataclasses import dataclass
from pathlib import Path

from urae.backbones.flux import build_meta_models, find_local, pick_device
from urae.backbones.free_memory import free_bytes
from urae.config import check_types
from urae.generate.estimate import Estimate, Request, list_estimates
from urae.generate.inputs import check_adapters, default_sampling
from urae.generate.memory import Memory, list_tiers
from urae.generate.speed import is_long
from urae.generate.spread import choose_spread, degrees_of
from urae.geometry import check_size, num_image_tokens

_UNITS = {"": 2**30, "gib": 2**30, "gb": 10**9, "mib": 2**20, "mb": 10**6}


@dataclass(frozen=True)
class PlanConfig:
    """What to plan for."""

    model: str = "flux-dev"
    """Base: flux-dev, flux-schnell, flux-krea, a hub id, a folder or a .safetensors file."""
    height: int = 1024
    """Pixels, a multiple of 16."""
    width: int = 1024
    """Pixels, a multiple of 16."""
    adapters: tuple[str, ...] = ()
    """Ultra-resolution adapters in order, as for generation."""
    steps: int | None = None
    """Denoising steps; by default the model's. Many make compiling the blocks pay."""
    memory: Memory = "auto"
    """A tier, or all that `auto` chooses from."""
    gpu_bytes: int | None = None
    """Of the GPU to plan for; by default what is free on this machine's."""
    gpus: int = 1
    """That make the picture together; the plan is for each of them."""

    def __post_init__(self) -> None:
        check_types(self)
        check_size(self.height, self.width)
        if self.steps is not None and self.steps < 1:
            raise ValueError(f"steps {self.steps} must be at least 1")
        if self.gpu_bytes is not None and self.gpu_bytes < 1:
            raise ValueError(f"GPU memory of {self.gpu_bytes} bytes must be more than 0")
        if self.gpus < 1:
            raise ValueError(f"gpus {self.gpus} must be at least 1")


@dataclass(frozen=True)
class Plan:
    """What each tier takes, at its best on that GPU."""

    estimates: tuple[Estimate, ...]
    """One a tier, in the order in which `auto` tries them."""
    gpu_bytes: int
    compiled: bool
    """Whether the blocks are expected to be compiled; needs Triton and a C compiler there."""

    @property
    def chosen(self) -> Estimate | None:
        """The first that fits; None if none does. The host's memory is not looked at."""
        return next((each for each in self.estimates if each.fits(self.gpu_bytes)), None)


def plan(config: PlanConfig) -> Plan:
    """Estimate what `generate` would take.

    Args:
        config: What to plan for.

    Raises:
        ValueError: If an adapter is damaged or for another base, there is no GPU to plan for, or so
            many cannot share a picture.
        FileNotFoundError: If the model or an adapter is missing.
    """
    device = pick_device()
    if config.gpu_bytes is None and device.type != "cuda":
        raise ValueError(
            "this machine has no CUDA device; name the memory of the one to plan for: --gpu 24GiB"
        )
    gpu_bytes = free_bytes(device) if config.gpu_bytes is None else config.gpu_bytes
    models = build_meta_models(config.model)
    adapter_bytes = check_adapters(config.adapters, (), models["transformer"])
    sampling = default_sampling(
        models["transformer"], find_local(config.model) or Path(config.model)
    )
    image_tokens = num_image_tokens(config.height, config.width)
    degrees = degrees_of(models["transformer"], image_tokens, sampling.max_sequence_length)
    choose_spread(1, config.gpus, degrees)
    steps = config.steps or sampling.steps
    compiled = is_long(config.height, config.width, steps, 1 / config.gpus)
    request = Request(
        config.height, config.width, sampling.max_sequence_length, adapter_bytes, compiled,
        config.gpus,
    )  # fmt: skip
    tiers = list_tiers(config.memory, config.model)
    tiers = tiers if config.memory == "auto" else (config.memory,)
    estimates = list_estimates(models, request, gpu_bytes, tiers)
    return Plan(tuple(estimates), gpu_bytes, compiled)


def parse_bytes(text: str) -> int:
    """Read an amount of memory: `24GiB`, `24GB` (10^9 bytes) or `24` (GiB).

    Raises:
        ValueError: If the text is no such amount.
    """
    found = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([a-z]*)", text.strip().lower())
    if found is None or found[2] not in _UNITS:
        raise ValueError(f"memory {text!r} is not an amount as 24GiB or 24GB")
    return int(float(found[1]) * _UNITS[found[2]])
