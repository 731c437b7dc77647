"""The generation job: prompts in, PNG files out."""

import gc
import logging
import random
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any, NamedTuple

import torch
from diffusers import FluxPipeline
from PIL import Image

from urae import __version__
from urae.adapters.adapt import adapt
from urae.adapters.files import check_fits, check_lora, read_adapter, resolve_adapter
from urae.adapters.initial import check_order
from urae.backbones import vae
from urae.backbones.flux import (
    build_meta_transformer,
    encode_prompts,
    explain_memory,
    fetch_model,
    load_pipeline,
    pick_device,
    pick_dtype,
    read_text_tokens,
)
from urae.generate.config import GenerateConfig
from urae.generate.memory import (
    choose_placement,
    decode_bytes,
    free_bytes,
    place,
    weight_bytes,
)
from urae.generate.picture import picture_path, save_picture
from urae.generate.speed import pays_to_compile
from urae.geometry import num_image_tokens
from urae.resolution import find_policy, read_base_policy

logger = logging.getLogger(__name__)

_TEXT_ACTIVATION_BYTES = 2**29


@dataclass(frozen=True)
class Progress:
    """How far a job is."""

    picture: int
    """From 1."""
    num_pictures: int
    step: int
    """Denoising steps done on this picture."""
    num_steps: int


@dataclass(frozen=True)
class _Sampling:
    steps: int
    guidance_scale: float
    max_sequence_length: int


class PromptEmbeds(NamedTuple):
    """A prompt as the transformer reads it, by the pipeline's names."""

    prompt_embeds: torch.Tensor
    """T5 features, 1 x L x D."""
    pooled_prompt_embeds: torch.Tensor
    """CLIP features, 1 x P."""


def generate(
    config: GenerateConfig, *, on_progress: Callable[[Progress], None] | None = None
) -> list[Path]:
    """Generate pictures and write them as PNG files with their whole recipe inside.

    Args:
        config: What to generate.
        on_progress: Called after each denoising step.

    Returns:
        The files, in order.

    Raises:
        ValueError: If an adapter is damaged or for another base; before weights load.
        FileNotFoundError: If the model, an adapter or a LoRA is missing.
        FileExistsError: If a picture of that name exists and `overwrite` is off.
        MemoryError: If the device's memory does not suffice; says which `memory` to try.
    """
    seed = random.SystemRandom().randrange(2**32) if config.seed is None else config.seed
    jobs = [
        (picture_path(config.output_dir, index, prompt, seed + k), prompt, seed + k)
        for index, prompt in enumerate(config.prompts)
        for k in range(config.num_images)
    ]
    _check_outputs([path for path, _, _ in jobs], config.overwrite)
    sampling = _check_model(config)
    device = pick_device()
    pipe = load_pipeline(config.model, dtype=pick_dtype(device))
    pipe.set_progress_bar_config(disable=True)
    if config.adapters or config.policy or _is_beyond_native(pipe, config, sampling):
        adapt(pipe, config.adapters, policy=config.policy)
    _load_loras(pipe, config.loras)
    embeds = _encode_prompts(pipe, config.prompts, sampling.max_sequence_length, device)
    placement = choose_placement(pipe, config.height, config.width, device, memory=config.memory)
    with _enough_memory(config, placement):
        place(pipe, placement, device)
    compiled = pays_to_compile(device, config.height, config.width, sampling.steps, len(jobs))
    if compiled:
        pipe.transformer.compile_repeated_blocks()
    written = []
    for number, (path, prompt, image_seed) in enumerate(jobs, start=1):

        def report(
            _: Any, step: int, __: Any, values: dict[str, Any], number: int = number
        ) -> dict[str, Any]:
            if on_progress is not None:
                on_progress(Progress(number, len(jobs), step + 1, sampling.steps))
            return values

        with _enough_memory(config, placement):
            image = _sample(pipe, embeds[prompt], image_seed, config, sampling, device, report)
        record = _describe(pipe, config, sampling, prompt, image_seed)
        how = {"memory": placement, "compiled": compiled}
        save_picture(path, image, {**record, **how})
        written.append(path)
    return written


def _check_outputs(paths: list[Path], overwrite: bool) -> None:
    folder = paths[0].parent
    if folder.exists() and not folder.is_dir():
        raise FileExistsError(f"output {folder} is a file; name a folder with --output")
    existing = [path for path in paths if path.exists()]
    if existing and not overwrite:
        raise FileExistsError(
            f"{existing[0]} exists and is kept ({len(existing)} of {len(paths)} pictures do); "
            "replace with --overwrite, or choose another --seed or --output"
        )


def _check_model(config: GenerateConfig) -> _Sampling:
    """Check adapters against the model's shape, and fill in the model's own defaults."""
    path = fetch_model(config.model)
    meta = build_meta_transformer(path)
    files = [read_adapter(source) for source in config.adapters]
    for file in files:
        check_fits(file, meta)
    check_order(files)
    for source, _ in config.loras:
        check_lora(source, meta)
    distilled = meta.config.guidance_embeds
    steps, guidance, length = (28, 3.5, 512) if distilled else (4, 0.0, 256)
    return _Sampling(
        steps if config.steps is None else config.steps,
        guidance if config.guidance_scale is None else config.guidance_scale,
        min(length, read_text_tokens(path))
        if config.max_sequence_length is None
        else config.max_sequence_length,
    )


def _is_beyond_native(pipe: FluxPipeline, config: GenerateConfig, sampling: _Sampling) -> bool:
    """Tell whether a base without adapters needs the policy: at its own size it is left alone."""
    native = read_base_policy(pipe.config.get("_name_or_path")).native_sequence_length
    image_tokens = num_image_tokens(config.height, config.width)
    return image_tokens + sampling.max_sequence_length > native


def _load_loras(pipe: FluxPipeline, loras: tuple[tuple[str, float], ...]) -> None:
    if not loras:
        return
    weights = dict.fromkeys(pipe.get_active_adapters(), 1.0)
    for index, (source, weight) in enumerate(loras):
        path = resolve_adapter(source)
        name = f"lora_{index}"
        pipe.load_lora_weights(path.parent, weight_name=path.name, adapter_name=name)
        weights[name] = weight
    pipe.set_adapters(list(weights), list(weights.values()))


def _encode_prompts(
    pipe: FluxPipeline, prompts: tuple[str, ...], max_sequence_length: int, device: torch.device
) -> dict[str, PromptEmbeds]:
    """Encode each prompt, and let the text encoders go: sampling needs their room."""
    encoders = (pipe.text_encoder, pipe.text_encoder_2)
    fit = sum(map(weight_bytes, encoders)) + _TEXT_ACTIVATION_BYTES < free_bytes(device)
    if not fit:
        logger.warning("not enough GPU memory for the text encoders: they run on the CPU, slower")
    for encoder in encoders:
        encoder.to(device if fit else "cpu")
    embeds = {
        prompt: PromptEmbeds(
            *(
                tensor.to(device)
                for tensor in encode_prompts(
                    pipe, [prompt], max_sequence_length=max_sequence_length
                )
            )
        )
        for prompt in dict.fromkeys(prompts)
    }
    pipe.register_modules(text_encoder=None, text_encoder_2=None)
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()
    return embeds


@torch.no_grad()
def _sample(
    pipe: FluxPipeline,
    embeds: PromptEmbeds,
    seed: int,
    config: GenerateConfig,
    sampling: _Sampling,
    device: torch.device,
    on_step_end: Callable[..., dict[str, Any]],
) -> Image.Image:
    latents = pipe(
        **embeds._asdict(),
        height=config.height,
        width=config.width,
        num_inference_steps=sampling.steps,
        guidance_scale=sampling.guidance_scale,
        generator=torch.Generator().manual_seed(seed),
        callback_on_step_end=on_step_end,
        output_type="latent",
    ).images
    return decode(pipe, latents, config.height, config.width, device)


def decode(
    pipe: FluxPipeline, tokens: torch.Tensor, height: int, width: int, device: torch.device
) -> Image.Image:
    """Decode packed latents into a picture, exactly, in stripes where memory is short.

    Args:
        pipe: Its VAE decodes.
        tokens: 1 x image tokens x 64.
        height: In pixels.
        width: In pixels.
        device: Where the VAE runs.

    Raises:
        MemoryError: If there is no way within what is free.
    """
    latents = pipe._unpack_latents(tokens, height, width, pipe.vae_scale_factor)
    latents = latents / pipe.vae.config.scaling_factor + pipe.vae.config.shift_factor
    if device.type == "cuda":
        torch.cuda.empty_cache()
    latents = latents.to(device, pipe.vae.dtype)
    pixels = vae.decode(pipe.vae, latents, max_bytes=decode_bytes(device))
    pipe.maybe_free_model_hooks()
    image: Image.Image = pipe.image_processor.postprocess(pixels, output_type="pil")[0]
    return image


def _describe(
    pipe: FluxPipeline, config: GenerateConfig, sampling: _Sampling, prompt: str, seed: int
) -> dict[str, Any]:
    positions = find_policy(pipe.transformer)
    return {
        "prompt": prompt,
        "seed": seed,
        "width": config.width,
        "height": config.height,
        "model": config.model,
        "adapters": list(config.adapters),
        "loras": [list(lora) for lora in config.loras],
        "policy": None if positions is None else asdict(positions.policy),
        **asdict(sampling),
        "versions": {
            "urae": __version__,
            **{name: version(name) for name in ("torch", "diffusers", "peft", "transformers")},
        },
    }


def _enough_memory(config: GenerateConfig, placement: str) -> AbstractContextManager[None]:
    what = f"{config.width} x {config.height} pixels with --memory {placement}"
    resident = placement == "resident"
    return explain_memory(what, "--memory offload" if resident else "a smaller --size")
