"""The generation job: prompts in, PNG files out."""

import logging
import random
from collections.abc import Callable, Sequence
from contextlib import ExitStack, nullcontext
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any, NamedTuple, NoReturn

import torch
from diffusers import FluxPipeline
from PIL import Image
from torch.distributed import ProcessGroup

from urae import __version__
from urae.adapters.adapt import adapt
from urae.adapters.files import resolve_adapter
from urae.backbones import vae
from urae.backbones.context_parallel import build_mesh, context_parallel
from urae.backbones.flux import (
    build_meta_models,
    build_meta_transformer,
    encode_prompts,
    fetch_model,
    load_pipeline,
    pick_device,
    pick_dtype,
)
from urae.backbones.free_memory import free_bytes, release_memory, vae_bytes
from urae.backbones.ranks import Ranks, explain_lost_rank, join_ranks
from urae.generate.chunks import token_chunks
from urae.generate.config import GenerateConfig
from urae.generate.estimate import (
    QUANTIZED,
    Request,
    Tier,
    count_bytes,
    stream_text,
)
from urae.generate.inputs import Sampling, check_adapters, check_outputs, default_sampling
from urae.generate.memory import (
    find_room,
    leave_quantized_out,
    list_tiers,
    name_held,
    place,
    stream_layers,
)
from urae.generate.optimize import apply_parts, choose_parts
from urae.generate.parts import EXACT, Part, find_bits
from urae.generate.picture import Picture, list_pictures, save_picture
from urae.generate.quantize import build_quantization, check_quantization
from urae.generate.speed import pays_to_compile
from urae.generate.spread import Spread, choose_spread, find_degrees
from urae.geometry import num_image_tokens
from urae.resolution import find_policy, read_base_policy

logger = logging.getLogger(__name__)

_SMALLER = "a smaller --size"
_AGAIN = "start all of them again with --overwrite"


@dataclass(frozen=True)
class Progress:
    """How far a job is."""

    picture: int
    """From 1."""
    num_pictures: int
    step: int
    """Denoising steps done on this picture."""
    num_steps: int


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

    In processes that torchrun has started, each with a GPU of its own, the pictures are spread over
    them (`urae.generate.spread`), with the same names and seeds; all of them call this alike.

    Args:
        config: What to generate.
        on_progress: Called after each denoising step, by the first process only.

    Returns:
        The files, in order, those of all processes.

    Raises:
        ValueError: If an adapter is damaged or for another base, or the pictures leave GPUs idle;
            before weights load.
        FileNotFoundError: If the model, an adapter or a LoRA is missing.
        FileExistsError: If a picture of that name exists and `overwrite` is off.
        ModuleNotFoundError: If the library of a quantised tier is not installed.
        MemoryError: If the device's memory does not suffice; says which `memory` to try. With
            `auto` on one GPU that is after one more try with less.
        ConnectionError: If another process is lost.
    """
    with explain_lost_rank(_AGAIN), join_ranks(pick_device()) as ranks:
        if ranks.device.type == "cuda":  # where what is free decides the tier
            release_memory(ranks.device)  # of an earlier job of this process
        return _generate(config, ranks, on_progress if ranks.rank == 0 else None)


def _generate(
    config: GenerateConfig, ranks: Ranks, on_progress: Callable[[Progress], None] | None
) -> list[Path]:
    drawn = random.SystemRandom().randrange(2**32)
    seed = ranks.agree(drawn) if config.seed is None else config.seed
    jobs = list_pictures(config.prompts, config.num_images, seed, config.output_dir)
    check_outputs([job.path for job in jobs], config.overwrite)
    model_path = fetch_model(config.model)
    sampling, adapter_bytes = _check_inputs(config, model_path)
    device = ranks.device
    pays = pays_to_compile(
        device, config.height, config.width, sampling.steps, len(jobs) / ranks.count
    )
    compiled = pays or "compile" in config.parts
    parts = choose_parts(config.speed, config.parts, compiled=compiled)
    meta = build_meta_models(model_path)
    spread = Spread(len(jobs), 1)
    if ranks.count > 1:
        degrees = find_degrees(config, sampling, parts, meta["transformer"], model_path)
        spread = choose_spread(len(jobs), ranks.count, degrees)
    request = Request(
        config.height, config.width, sampling.max_sequence_length, adapter_bytes, compiled,
        spread.least_degree,
    )  # fmt: skip
    tiers = list_tiers(config.memory, model_path)
    if (bits := find_bits(parts)) is not None:
        check_quantization(bits, device, asked="--part")
        tiers = leave_quantized_out(tiers, config.memory, bits)
    room = find_room(meta, request, tiers, ranks)
    tier, written = room.choose(config.memory), list[Path]()
    check_quantization(tier, device)
    try:
        _run(config, jobs, sampling, tier, parts, ranks, spread, written, on_progress)
        return [job.path for job in jobs]
    except (torch.OutOfMemoryError, MemoryError) as error:
        fallback = room.find_fallback(tier)
        failed = name_held(tier, device)
        if config.memory != "auto" or fallback is None or ranks.count > 1:
            remedy = _SMALLER if fallback is None else f"--memory {fallback}"
            _explain(error, config, failed, remedy)
    # out of the handler, whose traceback keeps what the failed try held
    logger.warning(
        "the GPU's memory did not suffice with %s: trying once more with --memory %s",
        failed, fallback,
    )  # fmt: skip
    release_memory(device)
    try:
        _run(config, jobs, sampling, fallback, parts, ranks, spread, written, on_progress)
    except (torch.OutOfMemoryError, MemoryError) as error:
        _explain(error, config, name_held(fallback, device), _SMALLER)
    return [job.path for job in jobs]


def _run(
    config: GenerateConfig,
    jobs: Sequence[Picture],
    sampling: Sampling,
    tier: Tier,
    parts: Sequence[Part],
    ranks: Ranks,
    spread: Spread,
    written: list[Path],
    on_progress: Callable[[Progress], None] | None,
) -> None:
    """Load the model on one tier, and make this rank's pictures that are not written yet."""
    device = ranks.device
    mesh = build_mesh(spread.degree, device) if spread.num_shared else None
    shared, whole = spread.list_shared(ranks.rank), spread.list_whole(ranks.rank)
    todo = [number for number in (*shared, *whole) if jobs[number].path not in written]
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    inexact = [str(part) for part in parts if part.name not in EXACT]
    if tier in QUANTIZED:
        inexact.append(f"weights in {tier}")
        parts = [part for part in parts if part.name != "compile"]
    if inexact:
        logger.warning("%s: the pictures are approximations", ", ".join(inexact))
    dtype = pick_dtype(device)
    quantization = build_quantization(tier, dtype)
    pipe = load_pipeline(config.model, dtype=dtype, quantization=quantization)
    pipe.set_progress_bar_config(disable=True)
    if config.adapters or config.policy or _is_beyond_native(pipe, config, sampling):
        adapt(pipe, config.adapters, policy=config.policy)
    _load_loras(pipe, config.loras)
    prompts = tuple(jobs[number].prompt for number in todo)
    embeds = _encode_prompts(pipe, prompts, sampling.max_sequence_length, device, tier)
    compiled = any(part.name == "compile" for part in parts)  # what fuses an MLP by itself
    chunks = nullcontext() if compiled else token_chunks(pipe.transformer)
    with chunks, ExitStack() as sharing:
        apply_parts(pipe, parts, device)
        place(pipe, tier, device)
        group = None
        if mesh is not None:
            sharing.enter_context(context_parallel(pipe.transformer, mesh))
            group = mesh.get_group("ulysses")
        for number in todo:
            if number not in shared:  # they come first
                sharing.close()
                group = None

            def report(
                _: Any, step: int, __: Any, values: dict[str, Any], number: int = number
            ) -> dict[str, Any]:
                if on_progress is not None:
                    on_progress(Progress(number + 1, len(jobs), step + 1, sampling.steps))
                return values

            job = jobs[number]
            image = _sample(
                pipe, embeds[job.prompt], job.seed, config, sampling, device, report, group
            )
            if group is not None and group.rank() > 0:
                continue  # one of the group writes it
            record = _describe(pipe, config, sampling, job.prompt, job.seed)
            names = [str(part) for part in parts]
            how = {"memory": tier, "compiled": compiled}
            record |= {**how, "speed": config.speed, "parts": names}
            record["gpus"] = 1 if group is None else group.size()
            save_picture(job.path, image, record)
            written.append(job.path)
    ranks.wait()


def _check_inputs(config: GenerateConfig, path: Path) -> tuple[Sampling, int]:
    """Check adapters against the model's shape, and fill in the model's own defaults.

    Returns:
        How to sample, and the adapters' size in bytes.
    """
    meta = build_meta_transformer(path)
    adapter_bytes = check_adapters(config.adapters, config.loras, meta)
    own = default_sampling(meta, path)
    sampling = Sampling(
        own.steps if config.steps is None else config.steps,
        own.guidance_scale if config.guidance_scale is None else config.guidance_scale,
        own.max_sequence_length
        if config.max_sequence_length is None
        else config.max_sequence_length,
    )
    return sampling, adapter_bytes


def _is_beyond_native(pipe: FluxPipeline, config: GenerateConfig, sampling: Sampling) -> bool:
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
    pipe: FluxPipeline,
    prompts: tuple[str, ...],
    max_sequence_length: int,
    device: torch.device,
    tier: Tier,
) -> dict[str, PromptEmbeds]:
    """Encode each prompt, and let the text encoders go: sampling needs their room."""
    encoders = (pipe.text_encoder, pipe.text_encoder_2)
    if stream_text(tier, sum(map(count_bytes, encoders)), free_bytes(device)):
        logger.info("the large text encoder is streamed, the small one runs on the CPU")
        stream_layers(pipe.text_encoder_2.encoder, device)
    else:
        for encoder in encoders:
            encoder.to(device)
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
    release_memory(device)
    return embeds


@torch.no_grad()
def _sample(
    pipe: FluxPipeline,
    embeds: PromptEmbeds,
    seed: int,
    config: GenerateConfig,
    sampling: Sampling,
    device: torch.device,
    on_step_end: Callable[..., dict[str, Any]],
    group: ProcessGroup | None = None,
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
    return decode(pipe, latents, config.height, config.width, device, group)


def decode(
    pipe: FluxPipeline,
    tokens: torch.Tensor,
    height: int,
    width: int,
    device: torch.device,
    group: ProcessGroup | None = None,
) -> Image.Image:
    """Decode packed latents into a picture, exactly, in stripes where memory is short.

    Args:
        pipe: Its VAE decodes.
        tokens: 1 x image tokens x 64.
        height: In pixels.
        width: In pixels.
        device: Where the VAE runs.
        group: Ranks that have the same latents, and share the work.

    Raises:
        MemoryError: If there is no way within what is free.
    """
    latents = pipe._unpack_latents(tokens, height, width, pipe.vae_scale_factor)
    latents = latents / pipe.vae.config.scaling_factor + pipe.vae.config.shift_factor
    if device.type == "cuda":
        torch.cuda.empty_cache()
    latents = latents.to(device, pipe.vae.dtype)
    max_bytes = vae_bytes(device, free_bytes(device))
    pixels = vae.decode(pipe.vae, latents, max_bytes=max_bytes, group=group)
    pipe.maybe_free_model_hooks()
    image: Image.Image = pipe.image_processor.postprocess(pixels, output_type="pil")[0]
    return image


def _describe(
    pipe: FluxPipeline, config: GenerateConfig, sampling: Sampling, prompt: str, seed: int
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


def _explain(error: BaseException, config: GenerateConfig, failed: str, remedy: str) -> NoReturn:
    """Raise an error that says what was held and what fits; the VAE's own says so already."""
    if not isinstance(error, torch.OutOfMemoryError):
        raise error
    raise MemoryError(
        f"the GPU's memory does not suffice for {config.width} x {config.height} pixels with "
        f"{failed}; try {remedy}"
    ) from error
