"""FLUX's text encoders and VAE, loaded when first needed, for making features."""

from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from diffusers import FluxPipeline
from diffusers.models.autoencoders.vae import DiagonalGaussianDistribution
from jaxtyping import Float
from PIL import Image
from torch import Tensor

from urae.backbones.devices import pick_dtype
from urae.backbones.flux import TEXT_COMPONENTS, count_tokens, encode_prompts, load_pipeline
from urae.backbones.free_memory import free_bytes, release_memory, vae_bytes
from urae.backbones.ranks import pick_own_device
from urae.backbones.vae import encode


class Encoders:
    """The encoders of one model on this machine's best device."""

    def __init__(self, model_path: Path) -> None:
        self.device = pick_own_device()
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
        release_memory(self.device)

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

    def count_tokens(self, caption: str) -> int:
        """Count the T5 tokens of a whole caption, its end included."""
        return count_tokens(self._text_pipe, caption)

    @torch.no_grad()
    def encode_image(
        self, image: Image.Image
    ) -> tuple[Float[Tensor, "c h w"], Float[Tensor, "c h w"]]:
        """Encode a picture to the mean and standard deviation of its latents.

        What does not fit into the free memory whole is split, to the same result.

        Args:
            image: 8-bit RGB, sides multiples of 16.

        Raises:
            MemoryError: If it does not fit split either.
        """
        pixels = torch.from_numpy(np.array(image)).permute(2, 0, 1)[None]
        pixels = pixels.to(self.device).float().div(127.5).sub(1).to(self.dtype)
        max_bytes = vae_bytes(self.device, free_bytes(self.device), image.width * image.height)
        moments = encode(self._vae, pixels, max_bytes=max_bytes)
        latents = DiagonalGaussianDistribution(moments)
        return latents.mean[0], latents.std[0]
