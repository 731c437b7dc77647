"""Whose keys an adapter file has: which layouts are read, and what is said of the others."""

import re
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

from diffusers import FluxPipeline
from diffusers.utils import convert_state_dict_to_diffusers
from torch import Tensor

from urae.adapters.kohya import split_linear1
from urae.adapters.settings import scale_factor

_TEXT_PREFIX = "text_encoder"
_LORA_KEY = re.compile(r"^(?:transformer\.)?(.+)\.lora_(A|B)(?:\.default(?:_\d+)?)?\.weight$")
_LAYER = re.compile(
    r"(?:(?:single_)?transformer_blocks\.\d+|time_text_embed|norm_out)\.\w"
    r"|(?:x_embedder|context_embedder|proj_out)$"
)
_RAW_MINOR = re.compile(
    r"^(?:module\.)?(?:transformer\.)?((?:single_)?transformer_blocks\.\d+\.attn)"
    r"\.processor\.(to_q|to_k|to_v|to_out)_(a|b)\.weight$"
)
_OUTER_LAYER = re.compile(
    r"(?:lora_unet_|diffusion_model\.)(?:(?:img|txt|time|vector|guidance)_in|final_layer)[_.]"
)
_FINAL_ALPHA = re.compile(
    r"((?:lora_unet_|diffusion_model\.)final_layer[_.](?:linear|adaLN_modulation[_.]1)\.)alpha"
)
_NO_FACTORS = re.compile(r"\.(?:lokr|hada|oft|boft)_")
_KOHYA_PREFIXES = (
    "lora_unet_", "lora_te_", "lora_te1_", "lora_transformer_", "diffusion_model.",
    "text_encoders.clip_l.transformer.",
)  # fmt: skip
_DROPPED = re.compile(r"\.diff(?:_b)?$|text_projection|position_embedding")
_LYCORIS_PREFIXES = ("lora_unet_", "lora_te", "lycoris_", "diffusion_model.")


def split_key(path: Path, key: str) -> tuple[str, str] | None:
    """Return the layer and the side, A or B, of a transformer's factor, None for other keys.

    Raises:
        ValueError: If FLUX's transformer, as diffusers has it, has no layers of such names.
    """
    match = _LORA_KEY.match(key)
    if match is None or key.startswith(_TEXT_PREFIX):
        return None
    if _LAYER.match(match[1]) is None:
        raise _unknown_layout(path, key)
    return match[1], match[2]


def is_raw_minor(keys: Collection[str]) -> bool:
    """Tell whether a file holds minor components as the reference writes them."""
    return any(map(_RAW_MINOR.match, keys))


def split_raw_minor_key(path: Path, key: str) -> tuple[str, str]:
    """Return the layer and the side, A or B, of a factor in the reference's raw minor file.

    Raises:
        ValueError: If the key is not of that format.
    """
    match = _RAW_MINOR.match(key)
    if match is None:
        raise ValueError(f"{path}: key {key!r} does not belong in a minor-component adapter")
    attention, layer, side = match.groups()
    return f"{attention}.{'to_out.0' if layer == 'to_out' else layer}", side.upper()


def widen(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Turn float8 into float32: it is not computed with."""
    is_float8 = {k: t.is_floating_point() and t.dtype.itemsize == 1 for k, t in tensors.items()}
    return {k: t.float() if is_float8[k] else t for k, t in tensors.items()}


def refuse_unread(path: Path, tensors: Mapping[str, Tensor]) -> None:
    """Refuse what would be taken for another kind, or read without a part of it.

    Raises:
        ValueError: For a DoRA of kohya's, for what LyCORIS has in place of low-rank factors, and
            for what diffusers leaves out of a file with kohya's keys.
    """
    if any(key.endswith(".dora_scale") for key in tensors):
        raise ValueError(
            f"{path} is a DoRA with kohya's keys, whose magnitudes (dora_scale) cannot be read; "
            "use a plain LoRA or a peft DoRA"
        )
    if any(map(_NO_FACTORS.search, tensors)) and any(
        key.endswith(".alpha") or key.startswith(_LYCORIS_PREFIXES) for key in tensors
    ):
        raise ValueError(
            f"{path} is a LyCORIS LoKr, LoHa or OFT, which cannot be read; use a plain LoRA, or a "
            "peft LoKr or OFT"
        )
    if (key := _find_dropped(tensors)) is not None:
        raise ValueError(
            f"{path}: key {key!r} is of a part that cannot be read, such as T5's factors or "
            "differences (.diff) of norms and biases; remove those keys, or use a plain LoRA"
        )


def _find_dropped(tensors: Mapping[str, Tensor]) -> str | None:
    """Return the first key with an effect that diffusers leaves out of a file of kohya's keys."""
    if not any(".lora_down." in key for key in tensors):
        return None
    if any(key.startswith("transformer.") for key in tensors):  # what else is there repeats it
        return None
    for key, tensor in tensors.items():
        is_read = key.removeprefix("module.").startswith(_KOHYA_PREFIXES)
        if is_read and not _DROPPED.search(key):
            continue
        # a down factor or an alpha does nothing where the up factor is zero
        if ".lora_down." not in key and not key.endswith(".alpha") and tensor.float().any():
            return key
    return None


def to_diffusers(
    path: Path, tensors: Mapping[str, Tensor]
) -> tuple[dict[str, Tensor], Mapping[str, Any]]:
    """Name a file's factors as stock diffusers does.

    Returns:
        Them, and alphas by key.

    Raises:
        ValueError: If diffusers cannot.
    """
    try:
        scaled = _scale_final_layer(tensors)
        state, alphas = FluxPipeline.lora_state_dict(scaled, return_alphas=True)
    except (KeyError, IndexError, AssertionError, NotImplementedError, ValueError) as error:
        reason = f"{type(error).__name__}: {error}".splitlines()[0].rstrip(" :")
        raise ValueError(
            f"{path} is not a LoRA that diffusers can read ({reason}); it is damaged, or its keys "
            f"have an unknown layout, such as {next(iter(tensors))!r}"
        ) from error
    return {_with_prefix(key): tensor for key, tensor in state.items()}, alphas or {}


def _with_prefix(key: str) -> str:
    """Say that a factor is the transformer's: diffusers does not of layers outside the blocks."""
    match = _LORA_KEY.match(key)
    is_bare = match is not None and match.start(1) == 0 and _LAYER.match(match[1]) is not None
    return f"transformer.{key}" if is_bare else key


def has_outer_layers(keys: Collection[str]) -> bool:
    """Tell whether kohya's keys name layers outside the blocks: stock diffusers drops those."""
    return any(map(_OUTER_LAYER.match, keys))


def _scale_final_layer(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Apply the alphas of kohya's final layer: diffusers drops them."""
    scaled = dict(tensors)
    for match in filter(None, map(_FINAL_ALPHA.fullmatch, tensors)):
        up_key = f"{match[1]}lora_up.weight"
        if up_key in tensors and (rank := tensors[up_key].shape[-1]):
            scale = float(scaled.pop(match[0])) / rank
            scaled[up_key] = scale_factor(tensors[up_key], scale)
    return scaled


def is_stocks(tensors: Mapping[str, Tensor]) -> bool:
    """Tell whether stock diffusers may load a LoRA by itself; else it needs other names.

    Those that it needs them for: keys of peft or without a prefix, kohya's joined layers of
    another width than FLUX.1's, kohya's in float8.
    """
    for key, tensor in tensors.items():
        if "transformer_blocks." in key and not key.startswith("transformer."):
            return False
        if ".lora_down." in key and tensor.dtype.itemsize == 1:
            return False
    return not split_linear1(tensors)[1]


def check_attaches(path: Path, state: Mapping[str, Tensor]) -> None:
    """Refuse a LoRA of which stock diffusers would attach nothing, or which it fails on.

    Args:
        path: Of the file.
        state: As `to_diffusers` returns it.

    Raises:
        ValueError: Says what its keys are like.
    """
    text = {key: tensor for key, tensor in state.items() if key.startswith(f"{_TEXT_PREFIX}.")}
    if text:
        try:
            convert_state_dict_to_diffusers(
                {key.removeprefix(f"{_TEXT_PREFIX}."): tensor for key, tensor in text.items()}
            )
        except (KeyError, ValueError) as error:
            raise ValueError(
                f"{path}: diffusers cannot read its factors for the text encoder, such as "
                f"{next(iter(text))!r} ({error}); remove them from the file"
            ) from error
    elif state and not any(key.startswith("transformer.") and "lora" in key for key in state):
        raise _unknown_layout(path, next(iter(state)))


def _unknown_layout(path: Path, key: str) -> ValueError:
    """Say that a file's keys are of no layout that is read."""
    return ValueError(
        f"{path}: its keys have an unknown layout, such as {key!r}; save the LoRA with the keys "
        "of diffusers, peft or kohya"
    )
