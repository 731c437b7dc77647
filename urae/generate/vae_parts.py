"""How the VAE of a pipeline decodes: exactly in stripes, or by stock tiling, which is not exact."""

from collections.abc import Callable
from typing import Any

import torch
from diffusers import AutoencoderKL
from diffusers.models.autoencoders.vae import DecoderOutput
from torch import Tensor

from urae.backbones import vae as exact_vae
from urae.backbones.free_memory import free_bytes, vae_bytes

Undo = Callable[[], None]


def decode_in_stripes(vae: AutoencoderKL) -> Undo:
    """Let `vae.decode` take no more memory than is free, for the same pixels.

    Of a GPU it takes 7 GiB at most: a whole decoding of 4096 x 4096 pixels takes 38.

    Args:
        vae: Of a pipeline; stock tiling or slicing that is switched on afterwards takes its place.

    Returns:
        What undoes it.
    """
    stock = vae.decode

    def decode(
        z: Tensor, return_dict: bool = True, generator: torch.Generator | None = None
    ) -> Any:
        if vae.use_tiling or vae.use_slicing:
            return stock(z, return_dict=return_dict, generator=generator)
        budget = vae_bytes(z.device, free_bytes(z.device))
        pixels = exact_vae.decode(vae, z, max_bytes=budget)
        return DecoderOutput(sample=pixels) if return_dict else (pixels,)

    vae.decode = decode

    def undo() -> None:
        del vae.decode  # what is left is the class's

    return undo


def decode_tiled(vae: AutoencoderKL) -> Undo:
    """Let the VAE decode tile by tile as stock diffusers does; where tiles meet it is blended."""
    before = vae.use_tiling
    vae.enable_tiling()

    def undo() -> None:
        vae.use_tiling = before

    return undo
