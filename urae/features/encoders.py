"""FLUX's text encoders and VAE, loaded when first needed, for making features."""

import gc
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from diffusers import FluxPipeline
from jaxtyping import Float
from PIL import Image
from torch import Tensor

from urae.backbones.flux import (
    TEXT_COMPONENTS,
    encode_prompts,
    load_pipeline,
    pick_device,
    pick_dtype,
)

# FLUX's VAE peaks at 24.3 GiB when it encodes 4096 x 4096 whole in bfloat16
_ENCODE_BYTES_PER_PIXEL = 1600
_ALWAYS_WHOLE_PIXELS = 2048 * 2048


class Encoders:
    """The encoders of one model on this machine's best device."""

    def __init__(self, model_path: Path) -> None:
        self.device = pick_device()
        self.dtype = pick_dtype(self.device)
        self._model_path = model_path

    @cached_property
    def _text_pipe(self) -> FluxPipeline:
        return self._load(without=["transformer", "vae"])

    @cached_property
    def _vae(self) -> Any:
        return self._load(without=["transformer", *TEXT_COMPONENTS]).vae

    def _load(self, without: list[str]) -> FluxPipeline:
        pipe = load_pipeline(str(self._model_path), dtype=self.dtype, without=without)
        return pipe.to(self.device)

    def free_text_encoders(self) -> None:
        """Make room for the VAE."""
        self.__dict__.pop("_text_pipe", None)
        gc.collect()
        if self.device.type == "cuda":
            torch.cuda.empty_cache()

    def encode_caption(
        self, caption: str, max_sequence_length: int
    ) -> tuple[Float[Tensor, "l d"], Float[Tensor, " p"]]:
        """Encode one caption with T5 and CLIP.

        One at a time: in a batch the last bits would depend on what else is in it.
        """
        prompt_embeds, pooled_prompt_embeds = encode_prompts(
            self._text_pipe, [caption], max_sequence_length=max_sequence_length
        )
        return prompt_embeds[0], pooled_prompt_embeds[0]

    @torch.no_grad()
    def encode_image(
        self, image: Image.Image, *, tiled: bool = False
    ) -> tuple[Float[Tensor, "c h w"], Float[Tensor, "c h w"]]:
        """Encode a picture to the mean and standard deviation of its latents.

        Args:
            image: 8-bit RGB, sides multiples of 16.
            tiled: Encode in stock diffusers' tiles: little memory, but not exact.
        """
        pixels = torch.from_numpy(np.array(image)).permute(2, 0, 1)[None]
        pixels = pixels.to(self.device).float().div(127.5).sub(1).to(self.dtype)
        self._vae.use_tiling = tiled
        latents = self._vae.encode(pixels).latent_dist
        return latents.mean[0], latents.std[0]

    def needs_tiling(self, height: int, width: int) -> bool:
        """Tell whether a picture above 2048 x 2048 is too large for the GPU's free memory."""
        if self.device.type != "cuda" or height * width <= _ALWAYS_WHOLE_PIXELS:
            return False
        reusable = torch.cuda.memory_reserved() - torch.cuda.memory_allocated()
        free = torch.cuda.mem_get_info()[0] + reusable
        return free < _ENCODE_BYTES_PER_PIXEL * height * width
