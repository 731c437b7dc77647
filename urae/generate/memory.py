"""Fitting a picture into memory: where weights live, and how the VAE decodes."""

import logging
from typing import Literal

import psutil
import torch
from diffusers import FluxPipeline
from torch import nn

from urae.geometry import num_image_tokens

logger = logging.getLogger(__name__)

Placement = Literal["resident", "offload"]

# of stock diffusers at 4096^2 in bfloat16, not measured here: 6.5 GiB beyond the weights for 66,048
# tokens of 3072 channels, and 38.3 GiB to decode 16.8 million pixels whole
_TOKEN_CHANNEL_BYTES = 36
_PIXEL_BYTES_HALF = 2500


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


def needs_tiling(pipe: FluxPipeline, height: int, width: int, device: torch.device) -> bool:
    """Tell whether decoding a picture whole would not fit into what is free now."""
    bytes_per_pixel = _PIXEL_BYTES_HALF * pipe.vae.dtype.itemsize // 2
    channels = pipe.vae.config.block_out_channels[0] / 128
    needed: float = height * width * bytes_per_pixel * channels
    return needed > free_bytes(device)
