"""What a picture will take, tier by tier: the estimate alone, no weights are loaded."""

import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from urae.adapters.files import read_adapter
from urae.backbones.devices import check_gpu_is_known, pick_device
from urae.backbones.flux import MAX_TEXT_TOKENS, build_meta_models, find_local
from urae.backbones.free_memory import free_bytes, free_host_bytes
from urae.choices import Bits, Memory, Tier
from urae.config import check_types
from urae.generate.estimate import (
    Estimate,
    Request,
    Seconds,
    count_operations,
    estimate,
    estimate_seconds,
)
from urae.generate.inputs import check_adapters, choose_sampling
from urae.generate.memory import leave_quantized_out, list_tiers
from urae.generate.speed import is_long
from urae.generate.spread import choose_spread, degrees_of
from urae.geometry import check_size, num_image_tokens

_UNITS = {"": 2**30, "gib": 2**30, "gb": 10**9, "mib": 2**20, "mb": 10**6}


@dataclass(frozen=True)
class PlanConfig:
    """What to plan for."""

    model: str = "flux-dev"
    """Base: a name as flux-dev or miniature-dev, a hub id, a folder or a .safetensors file."""
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
    """That make the pictures together; the plan is for each of them."""
    loras: tuple[tuple[str, float], ...] = ()
    """Other LoRAs on top, each with its weight."""
    max_sequence_length: int | None = None
    """Text tokens; by default the model's."""
    num_images: int = 1
    """Pictures in all."""
    part: Bits | None = None
    """What quantises the blocks' weights in place, if anything does."""

    def __post_init__(self) -> None:
        check_types(self)
        check_size(self.height, self.width)
        if self.steps is not None and self.steps < 1:
            raise ValueError(f"steps {self.steps} must be at least 1")
        if self.gpu_bytes is not None and self.gpu_bytes < 1:
            raise ValueError(f"GPU memory of {self.gpu_bytes} bytes must be more than 0")
        for name in ("gpus", "num_images"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} {getattr(self, name)} must be at least 1")
        length = self.max_sequence_length
        if length is not None and not 1 <= length <= MAX_TEXT_TOKENS:
            raise ValueError(
                f"max_sequence_length {length} must be between 1 and {MAX_TEXT_TOKENS} (T5 tokens)"
            )


@dataclass(frozen=True)
class Plan:
    """What each tier takes, at its best on that GPU."""

    estimates: tuple[Estimate, ...]
    """One a tier, in the order in which `auto` tries them."""
    gpu_bytes: int
    compiled: bool
    """Whether the blocks are expected to be compiled; needs Triton and a C compiler there."""
    host_bytes: int | None
    """Free on the host for each process, where the GPU is this machine's; None: not known."""
    steps: int
    """Of a picture."""
    num_images: int
    operations: float
    """Of one step, counted: multiplications and additions."""
    seconds: Mapping[Tier, Seconds]
    """On one H200, of the tiers whose time was measured there."""

    @property
    def chosen(self) -> Estimate | None:
        """The first that fits; None if none does."""
        return next((each for each in self.estimates if self.fits(each)), None)

    def fits(self, estimate: Estimate) -> bool:
        """Tell whether there is room for a tier."""
        return estimate.fits(self.gpu_bytes, self.host_bytes)


def plan(config: PlanConfig) -> Plan:
    """Estimate what `generate` would take.

    Args:
        config: What to plan for.

    Raises:
        ValueError: If an adapter is damaged or for another base, the model has no such text length,
            there is no GPU to plan for, or so many cannot share a picture.
        FileNotFoundError: If the model or an adapter is missing.
    """
    device = pick_device()
    check_gpu_is_known(config.gpu_bytes, device)
    gpu_bytes = free_bytes(device) if config.gpu_bytes is None else config.gpu_bytes
    models = build_meta_models(config.model)
    transformer = models["transformer"]
    adapters = [read_adapter(source) for source in config.adapters]
    adapter_bytes = check_adapters(adapters, config.loras, transformer)
    path = find_local(config.model) or Path(config.model)
    sampling = choose_sampling(
        config.model, transformer, path, steps=config.steps, length=config.max_sequence_length
    )
    steps, text_tokens = sampling.steps, sampling.max_sequence_length
    image_tokens = num_image_tokens(config.height, config.width)
    degrees = degrees_of(transformer, image_tokens, text_tokens)
    spread = choose_spread(config.num_images, config.gpus, degrees)
    compiled = is_long(config.height, config.width, steps, config.num_images / config.gpus)
    request = Request(
        config.height, config.width, text_tokens, adapter_bytes, compiled,
        spread.least_degree, config.part,
    )  # fmt: skip
    tiers = list_tiers(config.memory, config.model)
    if config.part is not None:
        tiers = leave_quantized_out(tiers, config.memory, config.part)
    tiers = tiers if config.memory == "auto" else (config.memory,)
    times = {tier: estimate_seconds(transformer, request, tier) for tier in tiers}
    return Plan(
        tuple(estimate(models, request, tier, gpu_bytes) for tier in tiers),
        gpu_bytes,
        compiled,
        free_host_bytes() // config.gpus if config.gpu_bytes is None else None,
        steps,
        config.num_images,
        sum(count_operations(transformer, image_tokens + text_tokens)),
        {tier: seconds for tier, seconds in times.items() if seconds and config.gpus == 1},
    )


def parse_bytes(text: str) -> int:
    """Read an amount of memory: `24GiB`, `24GB` (10^9 bytes) or `24` (GiB).

    Raises:
        ValueError: If the text is no such amount.
    """
    found = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([a-z]*)", text.strip().lower())
    if found is None or found[2] not in _UNITS:
        raise ValueError(f"memory {text!r} is not an amount such as 24GiB or 24GB")
    return int(float(found[1]) * _UNITS[found[2]])
