"""What a job reads, checked before any weights load."""

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from diffusers import FluxTransformer2DModel

from urae.adapters.adapt import choose_policy, is_4k
from urae.adapters.files import AdapterFile, check_fits, check_lora
from urae.adapters.initial import check_order
from urae.adapters.sources import resolve_adapter
from urae.backbones.flux import MAX_UNGUIDED_TEXT_TOKENS, read_text_tokens
from urae.choices import PartName
from urae.generate.config import GenerateConfig
from urae.generate.estimate import NUMBER_BYTES, QUANTIZED
from urae.generate.optimize import ONLY_4K, SHARED_KEYS, TRAINED_LOCALLY
from urae.generate.parts import BARS
from urae.generate.picture import Picture, is_recorded, read_record
from urae.generate.progressive import can_halve
from urae.geometry import num_image_tokens
from urae.storage import check_folder

_COPIES = 2  # an adapter's factors, and what they are joined to


@dataclass(frozen=True)
class Sampling:
    """How to denoise."""

    steps: int
    guidance_scale: float
    max_sequence_length: int
    """T5 tokens."""


def default_sampling(transformer: FluxTransformer2DModel, model_path: Path) -> Sampling:
    """Return a model's own defaults: those of FLUX.1-dev, or of schnell, which has no guidance.

    Args:
        transformer: Its shape counts; it may be on the meta device.
        model_path: Of the model, whose tokenizer says how many text tokens it reads at most.
    """
    length = read_text_tokens(model_path)
    if transformer.config.guidance_embeds:
        return Sampling(28, 3.5, length)
    return Sampling(4, 0.0, min(MAX_UNGUIDED_TEXT_TOKENS, length))


def choose_sampling(
    model: str,
    transformer: FluxTransformer2DModel,
    model_path: Path,
    *,
    steps: int | None,
    guidance: float | None = None,
    length: int | None,
) -> Sampling:
    """Fill in a model's own defaults where nothing is asked for.

    Args:
        model: What the user calls it.
        transformer: As in `default_sampling`.
        model_path: As in `default_sampling`.
        steps: Asked for, if any; and so on.
        guidance: Scale.
        length: T5 tokens.

    Raises:
        ValueError: If guidance or a text length is asked for that the model has not.
    """
    own = default_sampling(transformer, model_path)
    if guidance and not transformer.config.guidance_embeds:
        raise ValueError(
            f"guidance_scale {guidance} would have no effect, since {model} has no distilled "
            "guidance; leave it out"
        )
    most = own.max_sequence_length
    if length is not None and length > most:
        raise ValueError(
            f"max_sequence_length {length} is more than the {most} T5 tokens that {model} reads; "
            f"leave it out, or give at most {most}"
        )
    return Sampling(
        own.steps if steps is None else steps,
        own.guidance_scale if guidance is None else guidance,
        own.max_sequence_length if length is None else length,
    )


def find_missing(config: GenerateConfig, pictures: Sequence[Picture]) -> list[Picture]:
    """List the pictures to make; refuse to replace others unasked, and a folder that is none.

    Args:
        config: Of the job.
        pictures: All of it.

    Raises:
        FileExistsError: If a picture is there, to go on with another one, or a file in their
            folder's place or above it.
        ValueError: If a picture to keep is no whole PNG.
        PermissionError: If the folder cannot be written or made.
    """
    check_folder(config.output_dir)
    existing = [picture for picture in pictures if picture.path.exists()]
    if config.overwrite or not existing:
        return list(pictures)
    if not config.resume:
        raise FileExistsError(
            f"{existing[0].path} already exists and is kept ({len(existing)} of {len(pictures)} "
            "pictures exist); make the others with --resume, replace them with --overwrite, or "
            "choose another --seed or --output (size and model are not part of the name)"
        )
    for picture in existing:
        _check_is_of(config, picture)
    return [picture for picture in pictures if picture not in existing]


def _check_is_of(config: GenerateConfig, picture: Picture) -> None:
    """Refuse to go on beside a picture that another job has made under the same name."""
    record = read_record(picture.path)
    wanted: dict[str, Any] = {
        "prompt": picture.prompt,
        "width": config.width,
        "height": config.height,
        "model": config.model,
        "adapters": [*config.adapters],
        "loras": [[*lora] for lora in config.loras],
        "speed": config.speed,
        "approximations": config.approximations,
    }
    if config.memory != "auto" and {config.memory, record.get("memory")} & {*QUANTIZED}:
        wanted["memory"] = config.memory
    given = ("steps", "guidance_scale", "max_sequence_length")
    wanted |= {name: getattr(config, name) for name in given if getattr(config, name) is not None}
    if config.policy is not None:
        wanted["policy"] = asdict(config.policy)
    for name, value in wanted.items():
        if not is_recorded(record, name, value):
            raise FileExistsError(
                f"{picture.path} already exists with {name} {record.get(name)}, but this job has "
                f"{value}; replace it with --overwrite, or choose another --seed or --output"
            )


def check_base(
    config: GenerateConfig,
    adapters: Sequence[AdapterFile],
    transformer: FluxTransformer2DModel,
    model_path: Path,
) -> tuple[int, Sampling]:
    """Check what a job asks for against a base.

    Args:
        config: Of the job.
        adapters: Of the job, in order.
        transformer: The base's; its shape counts.
        model_path: As in `default_sampling`; of a base that is not here yet its name.

    Returns:
        What `check_adapters` and `choose_sampling` say.

    Raises:
        ValueError: If the base does not paint from noise alone; and as those.
    """
    channels, made = transformer.config.in_channels, transformer.config.out_channels
    if made not in (None, channels):
        raise ValueError(
            f"model {config.model} takes {channels} channels and outputs {made}: it needs another "
            "picture as input (FLUX.1 Canny, Depth or Fill); use urae.adapt with the diffusers "
            "pipeline made for it"
        )
    adapter_bytes = check_adapters(adapters, config.loras, transformer)
    sampling = choose_sampling(
        config.model, transformer, model_path, steps=config.steps,
        guidance=config.guidance_scale, length=config.max_sequence_length,
    )  # fmt: skip
    return adapter_bytes, sampling


def check_adapters(
    adapters: Sequence[AdapterFile],
    loras: Sequence[tuple[str, float]],
    transformer: FluxTransformer2DModel,
) -> int:
    """Check adapters against a model's shape.

    Args:
        adapters: In order.
        loras: Others, with their weights.
        transformer: With or without weights.

    Returns:
        What they take in bfloat16, joined, in bytes.

    Raises:
        ValueError: If one is for another base, or no plain one beside others, or a LoRA is damaged.
        FileNotFoundError: If a LoRA is missing.
    """
    for file in adapters:
        check_fits(file, transformer)
    check_order(adapters)
    alone = next((file for file in adapters if file.variant is not None), None)
    if loras and alone is not None:
        raise ValueError(
            f"{alone.path} is a {alone.kind} adapter, which cannot be combined with other "
            f"adapters; leave out --lora {loras[0][0]}"
        )
    for source, _ in loras:
        check_lora(source, transformer)
    # a minor adapter's initial factors are attached with it
    numbers = sum(
        (2 if file.kind == "minor" else 1) * (pair.down.numel() + pair.up.numel())
        for file in adapters
        for pair in file.layers.values()
    )
    numbers += sum(
        2 * tensor.numel()  # they stay in float32
        for file in adapters
        if file.variant is not None
        for tensor in file.variant.state.values()
    )
    others = sum(resolve_adapter(source).stat().st_size for source, _ in loras)
    return (numbers * NUMBER_BYTES + others) * _COPIES


def find_excluded(
    config: GenerateConfig,
    adapters: Sequence[AdapterFile],
    sampling: Sampling,
    model_path: Path,
    shared: bool,
) -> dict[PartName, str]:
    """Say which approximations of a preset a job's pictures exclude, and why.

    Args:
        config: Of the job.
        adapters: Of the job, in order.
        sampling: Of the job.
        model_path: As in `default_sampling`.
        shared: Whether GPUs share a picture.
    """
    if config.speed not in BARS:
        return {}
    policy = choose_policy(config.policy, adapters, model_path)
    tokens = num_image_tokens(config.height, config.width) + sampling.max_sequence_length
    if tokens <= policy.native_sequence_length:
        reason = "the pictures are within the native size"
        return {"local-attention": reason, "progressive": reason}
    unfit: dict[PartName, str] = {}
    if policy.attention == "local":
        unfit["local-attention"] = TRAINED_LOCALLY
    elif shared:
        unfit["local-attention"] = SHARED_KEYS
    if not can_halve(config.height, config.width):
        unfit["progressive"] = "half the sides are not multiples of 16 pixels"
    elif adapters and all(map(is_4k, adapters)):
        unfit["progressive"] = ONLY_4K
    return unfit
