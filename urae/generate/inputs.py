"""What a job reads, checked before any weights load."""

import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from diffusers import FluxTransformer2DModel

from urae.adapters.files import check_fits, check_lora, read_adapter, resolve_adapter
from urae.adapters.initial import check_order
from urae.backbones.flux import MAX_UNGUIDED_TEXT_TOKENS, read_text_tokens

_NUMBER_BYTES = 2  # bfloat16
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
            f"guidance_scale {guidance} would do nothing, since {model} has no distilled "
            "guidance; leave it out"
        )
    most = read_text_tokens(model_path)
    if length is not None and length > most:
        raise ValueError(
            f"max_sequence_length {length} is more than the {most} T5 tokens that {model} "
            f"reads; leave it out, or give {most} at most"
        )
    return Sampling(
        own.steps if steps is None else steps,
        own.guidance_scale if guidance is None else guidance,
        own.max_sequence_length if length is None else length,
    )


def check_outputs(paths: Sequence[Path], overwrite: bool) -> None:
    """Refuse to replace pictures unasked, and a folder that could not be written.

    Raises:
        FileExistsError: If a picture is there, or a file in their folder's place or above it.
        PermissionError: If the folder cannot be written or made.
    """
    folder = paths[0].parent
    place = next(each for each in (folder, *folder.parents) if os.access(each, os.F_OK))
    if not place.is_dir():
        raise FileExistsError(
            f"output {folder} cannot be a folder: {place} is a file; name another with --output"
        )
    if not os.access(place, os.W_OK | os.X_OK):
        raise PermissionError(
            f"output {folder} cannot be written: no permission in {place}; name another folder "
            "with --output"
        )
    existing = [path for path in paths if path.exists()]
    if existing and not overwrite:
        raise FileExistsError(
            f"{existing[0]} exists and is kept ({len(existing)} of {len(paths)} pictures do); "
            "replace with --overwrite, or choose another --seed or --output"
        )


def check_adapters(
    adapters: Sequence[str], loras: Sequence[tuple[str, float]], transformer: FluxTransformer2DModel
) -> int:
    """Check adapters against a model's shape.

    Args:
        adapters: Sources, in order.
        loras: Others, with their weights.
        transformer: With or without weights.

    Returns:
        What they take in bfloat16, joined, in bytes.

    Raises:
        ValueError: If one is damaged, for another base, or no plain one beside others.
        FileNotFoundError: If one is missing.
    """
    files = [read_adapter(source) for source in adapters]
    for file in files:
        check_fits(file, transformer)
    check_order(files)
    alone = next((file for file in files if file.variant is not None), None)
    if loras and alone is not None:
        raise ValueError(
            f"{alone.path} is a {alone.kind} adapter, which acts alone; leave out --lora "
            f"{loras[0][0]}"
        )
    for source, _ in loras:
        check_lora(source, transformer)
    # a minor adapter's initial factors are attached with it
    numbers = sum(
        (2 if file.kind == "minor" else 1) * (pair.down.numel() + pair.up.numel())
        for file in files
        for pair in file.layers.values()
    )
    numbers += sum(
        2 * tensor.numel()  # they stay in float32
        for file in files
        if file.variant is not None
        for tensor in file.variant.state.values()
    )
    others = sum(resolve_adapter(source).stat().st_size for source, _ in loras)
    return (numbers * _NUMBER_BYTES + others) * _COPIES
