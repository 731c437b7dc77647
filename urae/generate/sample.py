"""One picture with a stock pipeline: noise to latents, latents to pixels."""

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from diffusers import FluxPipeline
from PIL import Image
from torch.distributed import ProcessGroup

from urae.backbones.vae import decode_within_free
from urae.generate.inputs import Sampling


class PromptEmbeds(NamedTuple):
    """A prompt as the transformer reads it, by the pipeline's names."""

    prompt_embeds: torch.Tensor
    """T5 features, 1 x L x D."""
    pooled_prompt_embeds: torch.Tensor
    """CLIP features, 1 x P."""


def sample(
    pipe: FluxPipeline,
    embeds: PromptEmbeds,
    seed: int,
    height: int,
    width: int,
    sampling: Sampling,
    on_step: Callable[[int], None] | None = None,
) -> torch.Tensor:
    """Denoise a picture.

    Args:
        pipe: Its transformer and scheduler run, where the transformer is.
        embeds: On that device.
        seed: Of the noise, which is drawn on the CPU: the same on every machine.
        height: In pixels.
        width: In pixels.
        sampling: How.
        on_step: Called after each step with the number of those that are done.

    Returns:
        Packed latents, 1 x image tokens x 64.
    """

    def report(_: Any, step: int, __: Any, values: dict[str, Any]) -> dict[str, Any]:
        if on_step is not None:
            on_step(step + 1)
        return values

    tokens: torch.Tensor = pipe(
        **embeds._asdict(),
        height=height,
        width=width,
        num_inference_steps=sampling.steps,
        guidance_scale=sampling.guidance_scale,
        generator=torch.Generator().manual_seed(seed),
        callback_on_step_end=report,
        output_type="latent",
    ).images
    return tokens


@torch.no_grad()
def decode(
    pipe: FluxPipeline,
    tokens: torch.Tensor,
    height: int,
    width: int,
    device: torch.device,
    group: ProcessGroup | None = None,
) -> Image.Image:
    """Decode packed latents into a picture, exactly, in stripes where memory is short.

    A VAE whose stock tiling is switched on decodes by that.

    Args:
        pipe: Its VAE decodes.
        tokens: 1 x image tokens x 64.
        height: In pixels.
        width: In pixels.
        device: Where the VAE runs.
        group: Ranks that have the same latents, and share the work.

    Raises:
        MemoryError: If there is no way within what is free.
        FloatingPointError: If latents or pixels are not finite.
    """
    if not bool(tokens.isfinite().all()):
        raise FloatingPointError(
            f"the last step's latents are not finite in {tokens.dtype} on {tokens.device}, though "
            "the first step's were; leave out the parts that approximate (--speed exact), or set "
            "DIFFUSERS_ATTN_BACKEND=_native_math in the environment"
        )
    latents = pipe._unpack_latents(tokens, height, width, pipe.vae_scale_factor)
    latents = latents / pipe.vae.config.scaling_factor + pipe.vae.config.shift_factor
    if device.type == "cuda":
        torch.cuda.empty_cache()
    latents = latents.to(device, pipe.vae.dtype)
    if pipe.vae.use_tiling:
        (pixels,) = pipe.vae.decode(latents, return_dict=False)
    else:
        pixels = decode_within_free(pipe.vae, latents, group)
    if not bool(pixels.isfinite().all()):
        raise FloatingPointError(
            f"the VAE turns finite latents into pixels that are not finite, in {pixels.dtype} on "
            f"{pixels.device}; one of its weights is not finite, or too large for {pixels.dtype}"
        )
    pipe.maybe_free_model_hooks()
    image: Image.Image = pipe.image_processor.postprocess(pixels, output_type="pil")[0]
    return image
