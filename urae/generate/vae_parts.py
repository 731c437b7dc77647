"""How the VAE of a pipeline decodes: exactly in stripes, or by stock tiling, which is not exact."""

import logging
from collections.abc import Callable
from typing import Any

import torch
from diffusers import AutoencoderKL
from diffusers.models.autoencoders.vae import DecoderOutput
from torch import Tensor

from urae.adapters.adapt import unwrap
from urae.backbones.vae import decode_within_free
from urae.backbones.vae_chain import list_decoder

logger = logging.getLogger(__name__)

Undo = Callable[[], None]


def decode_in_stripes(vae: AutoencoderKL) -> Undo:
    """Let `vae.decode` take no more memory than is free, for the same pixels.

    Of a GPU it takes 7 GiB at most up to 4096 x 4096 pixels, whose whole decoding takes 38.

    Args:
        vae: Of a pipeline; stock tiling or slicing that is switched on afterwards takes its place.
            One of another kind, as AutoencoderTiny, decodes as it does.

    Returns:
        What undoes it.
    """
    vae = unwrap(vae)
    if not _can_split(vae):
        logger.info("%s decodes whole: it is not FLUX's kind of VAE", type(vae).__name__)
        return lambda: None
    striped = vars(vae).get("decode")
    if not isinstance(striped, _StripedDecode):
        striped = vae.decode = _StripedDecode(vae)
    return striped.add_pipe()


def _can_split(vae: Any) -> bool:
    if not isinstance(vae, AutoencoderKL):
        return False
    try:
        list_decoder(vae)
    except ValueError:  # blocks that are none of FLUX's
        return False
    return True


class _StripedDecode:
    """A VAE's `decode`, for as many pipelines as share the VAE."""

    def __init__(self, vae: AutoencoderKL) -> None:
        self._vae = vae
        self._own = vars(vae).get("decode")  # a user's, in the place of the class's
        self._stock = vae.decode
        self._num_pipes = 0

    def __call__(
        self, z: Tensor, return_dict: bool = True, generator: torch.Generator | None = None
    ) -> Any:
        if self._vae.use_tiling or self._vae.use_slicing:
            return self._stock(z, return_dict=return_dict, generator=generator)
        pixels = decode_within_free(self._vae, z)
        return DecoderOutput(sample=pixels) if return_dict else (pixels,)

    def add_pipe(self) -> Undo:
        """Count a pipeline; the last one's undoing puts back what was there."""
        self._num_pipes += 1

        def undo() -> None:
            self._num_pipes -= 1
            if self._num_pipes or vars(self._vae).get("decode") is not self:
                return
            del self._vae.decode
            if self._own is not None:
                self._vae.decode = self._own

        return undo


def decode_tiled(vae: AutoencoderKL) -> Undo:
    """Let the VAE decode tile by tile as stock diffusers does; where tiles meet it is blended."""
    before = vae.use_tiling
    vae.enable_tiling()

    def undo() -> None:
        vae.use_tiling = before

    return undo
