"""Fitting a picture into memory: where weights live, and what decoding may take."""

import logging
from typing import Literal

import psutil
import torch
from diffusers import FluxPipeline
from torch import nn

from urae.backbones.vae import usable_bytes
from urae.geometry import num_image_tokens

logger = logging.getLogger(__name__)

Placement = Literal["resident", "offload"]

# stock blocks took 6.5 GiB beyond the weights for 66,048 tokens of 3072 channels in bfloat16
_TOKEN_CHANNEL_BYTES = 36
# decoding 4096^2 whole takes 38 GiB; within 12 it is 1.3 times the work by plan
_DECODE_BYTES = 12 * 2**30


def free_bytes(device: torch.device) -> int:
    """Return the memory that is free on a device, the host's for the CPU."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    return int(psutil.virtual_memory().available)


def weight_bytes(module: nn.Module) -> int:
    """Return the size of a module's parameters and buffers."""
    return sum(t.numel() * t.element_size() for t in [*module.parameters(), *module.buffers()])


def choose_placement(
    pipe: FluxPipeline,
    height: int,
    width: int,
    device: torch.device,
    *,
    memory: Literal["auto", "resident", "offload"] = "auto",
) -> Placement:
    """Decide whether all weights fit on the device at once.

    Args:
        pipe: On the CPU.
        height: Of the picture in pixels.
        width: Of the picture in pixels.
        device: Where it is to run; on the CPU everything is resident.
        memory: A placement to take, or `auto`.
    """
    if device.type == "cpu":
        return "resident"
    if memory != "auto":
        return memory
    modules = [part for part in pipe.components.values() if isinstance(part, nn.Module)]
    weights = sum(weight_bytes(module) for module in modules)
    tokens = num_image_tokens(height, width) + 512
    activations = tokens * pipe.transformer.inner_dim * _TOKEN_CHANNEL_BYTES
    free = free_bytes(device)
    placement: Placement = "resident" if weights + activations < free else "offload"
    logger.info(
        "weights %.1f GiB + activations %.1f GiB, %.1f GiB free: %s",
        weights / 2**30, activations / 2**30, free / 2**30, placement,
    )  # fmt: skip
    return placement


def place(pipe: FluxPipeline, placement: Placement, device: torch.device) -> None:
    """Put a pipeline's weights where `choose_placement` said."""
    if placement == "offload":
        pipe.enable_model_cpu_offload(device=device)
    else:
        pipe.to(device)


def decode_bytes(device: torch.device) -> int:
    """Return what decoding may take of what is free now."""
    usable = usable_bytes(device)
    return min(usable, _DECODE_BYTES) if device.type == "cuda" else usable
