"""Pictures that a miniature pipeline makes: the teacher's, with their captions, train adapters."""

import hashlib
import json
from collections.abc import Iterator, Sequence
from pathlib import Path

import torch
from diffusers import FluxPipeline
from jaxtyping import UInt8
from torch import Tensor

from urae.geometry import check_size
from urae.miniature.model import TEXT_TOKENS
from urae.miniature.photograph import encode_picture
from urae.miniature.sources import Settings, claim_folder
from urae.miniature.world import caption, training_scene
from urae.storage import write_atomic

_BATCH_PIXELS = 2**22


@torch.no_grad()
def generate_pictures(
    pipe: FluxPipeline,
    captions: Sequence[str],
    noises: Sequence[torch.Generator],
    *,
    side: int,
    steps: int,
    guidance_scale: float,
) -> Iterator[UInt8[Tensor, "3 h w"]]:
    """Generate a square picture for each caption, many at a time.

    Args:
        pipe: A miniature pipeline on its device, adapted or not.
        captions: What to draw.
        noises: A generator each, on the CPU.
        side: In pixels.
        steps: Denoising steps.
        guidance_scale: Distilled guidance; of a pipeline without, classifier-free guidance.
    """
    guided = pipe.transformer.config.guidance_embeds
    guidance = "guidance_scale" if guided else "true_cfg_scale"
    size = max(1, _BATCH_PIXELS // side**2)
    for start in range(0, len(captions), size):
        some = list(captions[start : start + size])
        pictures = pipe(
            some,
            height=side,
            width=side,
            num_inference_steps=steps,
            max_sequence_length=TEXT_TOKENS,
            generator=list(noises[start : start + size]),
            output_type="pt",
            negative_prompt=None if guided else [""] * len(some),
            **{guidance: guidance_scale},
        ).images
        yield from (pictures.float() * 255).round().clamp(0, 255).to(torch.uint8).cpu()


def write_synthetic(
    folder: Path,
    pipe: FluxPipeline,
    indices: Sequence[int],
    *,
    seed: int,
    side: int,
    steps: int = 24,
    guidance_scale: float = 3.5,
) -> int:
    """Write what a pipeline makes of scenes' captions, as `sources.write_folder` does renders.

    Args:
        folder: Made if it is missing; pictures that are there are kept.
        pipe: Of the teacher, on its device.
        indices: Of the samples, below 2^32.
        seed: Of the set.
        side: Of the square pictures in pixels.
        steps: As in `generate_pictures`.
        guidance_scale: As in `generate_pictures`.

    Returns:
        How many were written.

    Raises:
        ValueError: If FLUX has no such size, or the folder holds samples of another set: of other
            scenes or another teacher, or sampled otherwise.
        FileExistsError: If it holds anything else.
    """
    check_size(side, side)
    settings: Settings = {
        "kind": "synthetic",
        "seed": seed,
        "height": side,
        "width": side,
        "steps": steps,
        "guidance": guidance_scale,
        "teacher": _digest_weights(pipe),
    }
    claim_folder(folder, settings)
    missing = [index for index in indices if not (folder / f"{index:06d}.png").exists()]
    scenes = [training_scene(seed, index) for index in missing]
    captions = [caption(scene) for scene in scenes]
    noises = [torch.Generator().manual_seed(scene.seed) for scene in scenes]
    pictures = generate_pictures(
        pipe, captions, noises, side=side, steps=steps, guidance_scale=guidance_scale
    )
    for index, text, picture in zip(missing, captions, pictures, strict=True):
        path = folder / f"{index:06d}.png"
        write_atomic(path.with_suffix(".json"), json.dumps({"prompt": text}).encode())
        write_atomic(path, encode_picture(picture, "PNG"))
    return len(missing)


def _digest_weights(pipe: FluxPipeline) -> str:
    """Return 16 hex digits of the SHA-256 of a pipeline's weights.

    Rounded to bfloat16 they are the same in all dtypes that a stage is loaded in.
    """
    digest = hashlib.sha256()
    for part in (pipe.transformer, pipe.vae, pipe.text_encoder, pipe.text_encoder_2):
        for name, tensor in sorted(part.state_dict().items()):
            digest.update(f"{name} {tuple(tensor.shape)}\n".encode())
            bits = tensor.to("cpu", torch.bfloat16).contiguous().view(torch.int16)
            digest.update(bits.numpy().tobytes())
    return digest.hexdigest()[:16]
