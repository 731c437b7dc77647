"""Fitting a picture into memory: which tier, and where weights go."""

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from diffusers import FluxPipeline
from diffusers.hooks import apply_group_offloading
from torch import nn
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from urae.backbones.free_memory import USABLE, free_bytes, free_host_bytes
from urae.backbones.ranks import Ranks
from urae.choices import Bits, Memory, Tier
from urae.generate.estimate import (
    AUTO_TIERS,
    QUANTIZED,
    Estimate,
    Request,
    estimate,
    round_pinned,
)
from urae.generate.quantize import can_quantize

logger = logging.getLogger(__name__)

_CLEARLY = 0.9  # less than a tier that ran out of memory: estimates are right to a tenth


def list_tiers(memory: Memory, model: str | Path) -> tuple[Tier, ...]:
    """List what there is to choose from: `auto`'s tiers, and what was named.

    Raises:
        ValueError: If a tier is named that quantises while it loads, and the model is a single
            file, with which that does not go.
    """
    single = Path(model).expanduser().is_file()
    if single and memory in QUANTIZED:
        raise ValueError(
            f"model file {model} is a single file, which cannot be quantised while it loads; name "
            f"a folder in diffusers layout, or leave out --memory {memory}"
        )
    tiers = tuple(tier for tier in AUTO_TIERS if not (single and tier in QUANTIZED))
    return tiers if memory == "auto" or memory in tiers else (memory, *tiers)


def leave_quantized_out(tiers: Sequence[Tier], memory: Memory, bits: Bits) -> tuple[Tier, ...]:
    """Leave out what a part that quantises the weights in place excludes.

    Raises:
        ValueError: If such a tier was named.
    """
    if memory in QUANTIZED:
        raise ValueError(
            f"--memory {memory} and --part {bits} both quantise the weights; leave one of them out"
        )
    return tuple(tier for tier in tiers if tier not in QUANTIZED)


@dataclass(frozen=True)
class Room:
    """What is free, and what each tier would take."""

    estimates: Sequence[Estimate]
    """In order of preference; none without a GPU, where nothing is to be chosen."""
    device_bytes: int
    host_bytes: int

    def choose(self, memory: Memory) -> Tier:
        """Choose the first tier that fits; a tier that was named is taken even if it does not.

        Raises:
            MemoryError: If `auto` finds none that fits.
        """
        if memory != "auto":
            return memory
        if not self.estimates:
            return "resident"
        for each in self.estimates:
            if self._fits(each) and can_quantize(each.tier):
                logger.info("%s: %.1f GiB at the peak", each.tier, each.peak / 2**30)
                return each.tier
        least = min(self.estimates, key=lambda each: each.peak)
        raise MemoryError(
            f"{self.device_bytes / 2**30:.1f} GiB are free on the GPU and "
            f"{self.host_bytes / 2**30:.1f} on the host, too little for this picture: --memory "
            f"{least.tier} needs {least.peak / 2**30:.1f} and {least.host_bytes / 2**30:.1f}; "
            "choose a smaller --size, or free some memory"
        )

    def find_fallback(self, failed: Tier) -> Tier | None:
        """Find what to try after a tier ran out of memory: the first that is clearly leaner."""
        peaks = [each.sample.peak for each in self.estimates if each.tier == failed]
        leaner = (
            each.tier
            for each in self.estimates
            if self._fits(each)
            and can_quantize(each.tier)
            and all(each.sample.peak < _CLEARLY * peak for peak in peaks)
        )
        return next(leaner, None)

    def _fits(self, estimate: Estimate) -> bool:
        return estimate.fits(self.device_bytes, self.host_bytes)


def find_room(
    models: Mapping[str, Any], request: Request, tiers: Sequence[Tier], ranks: Ranks
) -> Room:
    """Estimate what a picture takes beside what is free now, where least is.

    Args:
        models: FLUX's four, with or without weights, by their names in the pipeline.
        request: What is to be made.
        tiers: To choose from.
        ranks: The processes that make such pictures at the same time.
    """
    free, host = ranks.least(free_bytes(ranks.device), free_host_bytes())
    on_gpu = ranks.device.type == "cuda"
    estimates = [estimate(models, request, tier, free) for tier in tiers] if on_gpu else []
    return Room(estimates, free, host)


def name_held(tier: Tier, device: torch.device) -> str:
    """Name a tier as the command line does, with what it held on a GPU at its peak."""
    if device.type != "cuda":
        return f"--memory {tier}"
    held = torch.cuda.max_memory_allocated(device) / 2**30
    return f"--memory {tier}, which held {held:.1f} GiB"


def place(pipe: FluxPipeline, tier: Tier, device: torch.device) -> None:
    """Put a pipeline's weights where they belong while it samples; the text encoders are gone.

    Args:
        pipe: On the CPU; what bitsandbytes quantised is on the device already.
        tier: Where weights live.
        device: Where the pipeline runs.
    """
    if tier == "offload":
        pipe.enable_model_cpu_offload(device=device)
    elif tier == "streamed":
        stream_blocks(pipe.transformer, device)
        pipe.vae.to(device)
    else:
        pipe.to(device)


def stream_blocks(transformer: nn.Module, device: torch.device) -> None:
    """Keep a transformer's blocks on the host, and bring each to the device a block ahead.

    diffusers' group offloading, a block a group. Streams are not recorded: a GPU that waits for
    arithmetic would be run ahead of, and blocks pile up on it. So at most two are there.

    Args:
        transformer: On the CPU, adapted and compiled before.
        device: Where it runs; without CUDA there is no side stream.
    """
    on_gpu = device.type == "cuda"
    pinned = _pinned_bytes(transformer) < USABLE * free_host_bytes()
    if on_gpu and not pinned:
        logger.warning(
            "not enough host memory to pin the weights, so they are streamed more slowly"
        )
    apply_group_offloading(
        transformer,
        onload_device=device,
        offload_type="block_level",
        num_blocks_per_group=1,
        use_stream=on_gpu,
        low_cpu_mem_usage=on_gpu and not pinned,
    )


def stream_layers(encoder: nn.Module, device: torch.device) -> None:
    """Keep a model on the host, and bring each of its layers to the device when it is its turn.

    For a model that runs once: nothing is pinned for longer than a layer's copy.
    """
    on_gpu = device.type == "cuda"
    apply_group_offloading(
        encoder,
        onload_device=device,
        offload_type="leaf_level",
        use_stream=on_gpu,
        low_cpu_mem_usage=on_gpu,
    )


def _pinned_bytes(module: nn.Module) -> int:
    stored = (each for t in [*module.parameters(), *module.buffers()] for each in _list_stored(t))
    return sum(round_pinned(tensor.numel() * tensor.element_size()) for tensor in stored)


def _list_stored(tensor: Any) -> list[torch.Tensor]:
    """List the tensors that hold a tensor's numbers: of a quantised one its parts."""
    if not is_traceable_wrapper_subclass(tensor):
        return [tensor]
    names, _ = tensor.__tensor_flatten__()
    return [each for name in names for each in _list_stored(getattr(tensor, name))]
