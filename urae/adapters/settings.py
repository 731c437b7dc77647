"""peft's settings of an adapter file: where they are, and the scale that they give."""

import json
import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from peft.utils.other import get_pattern_key
from torch import Tensor

logger = logging.getLogger(__name__)

PEFT_CONFIG_NAME = "adapter_config.json"
"""The file beside a peft adapter that says its alpha and how it is computed."""

_PEFT_FILE_NAME = "adapter_model.safetensors"
_PEFT_PREFIX = "base_model.model."


def read_peft_config(
    path: Path, metadata: Mapping[str, str], *, beside: bool = True
) -> dict[str, Any]:
    """Return peft's settings of a file: diffusers keeps them inside, peft itself beside it.

    Args:
        path: Of the file.
        metadata: The file's.
        beside: Whether an `adapter_config.json` in its folder is of this file.

    Raises:
        ValueError: If they are damaged.
    """
    config = path.parent / PEFT_CONFIG_NAME
    try:
        if text := metadata.get("lora_adapter_metadata"):
            pairs = dict(json.loads(text)).items()
            return {key.removeprefix("transformer."): value for key, value in pairs}
        return dict(json.loads(config.read_text())) if beside and config.is_file() else {}
    except (TypeError, ValueError) as error:
        raise damaged_settings(path, error) from error


def damaged_settings(path: Path, error: Exception) -> ValueError:
    """Say that a file's settings are of no use."""
    return ValueError(f"{path}: its LoRA settings are damaged ({error})")


def is_pefts_own(path: Path, keys: Mapping[str, Any], metadata: Mapping[str, str]) -> bool:
    """Tell by its name or keys whether peft wrote a LoRA file, with its settings beside it.

    Others in the folder, such as what was converted from it, hold their scale.
    """
    if "urae.format" in metadata:
        return False
    return path.name == _PEFT_FILE_NAME or any(_PEFT_PREFIX in key for key in keys)


def warn_of_unknown_alpha(path: Path) -> None:
    """Say that a LoRA of peft is read as if its alpha were its rank."""
    logger.warning(
        "%s is a LoRA of peft without its %s, so its alpha is unknown and taken to be its rank; "
        "keep that file beside it",
        path, PEFT_CONFIG_NAME,
    )  # fmt: skip


def find_scale(name: str, rank: int, alphas: Mapping[str, Any], config: Mapping[str, Any]) -> float:
    """Return what a layer's update is multiplied by.

    Args:
        name: Of the layer.
        rank: Of its factors.
        alphas: The file's own, by key, which go first.
        config: peft's settings.
    """
    for key in (f"transformer.{name}.alpha", f"{name}.alpha"):
        if key in alphas:
            return float(alphas[key]) / rank
    pattern = config.get("alpha_pattern") or {}
    alpha = pattern.get(get_pattern_key(pattern, name), config.get("lora_alpha"))
    if alpha is None:
        return 1.0
    return float(alpha) / (rank**0.5 if config.get("use_rslora") else rank)


def scale_factor(up: Tensor, scale: float) -> Tensor:
    """Multiply a factor, in float32: half precision may have no normal number so small."""
    return up if scale == 1 else up.float() * scale
