"""A transformer's original weight matrices, from memory or from its files, one at a time."""

import json
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import snapshot_download
from huggingface_hub.errors import HFValidationError, LocalEntryNotFoundError
from safetensors import safe_open
from torch import Tensor, nn

ADAPTED_ATTENTION = ("to_q", "to_k", "to_v", "to_out.0")
"""The matrices that URAE adapts (arXiv:2503.16322, section 4.1): 190 in FLUX.1."""

_ORIGINAL_FILE_DTYPES = ("F32", "BF16", "F16")
_ORIGINAL_DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def find_attention_linears(transformer: nn.Module) -> list[str]:
    """Name the linear layers that URAE adapts: image-stream attention of every block."""
    blocks = [
        (f"{kind}.{index}", block)
        for kind in ("transformer_blocks", "single_transformer_blocks")
        for index, block in enumerate(getattr(transformer, kind))
    ]
    return [
        f"{prefix}.attn.{layer}"
        for prefix, block in blocks
        for layer in ADAPTED_ATTENTION
        if layer != "to_out.0" or getattr(block.attn, "to_out", None) is not None
    ]


def linear_shape(transformer: nn.Module, name: str) -> tuple[int, int] | None:
    """Return (out, in) of a linear layer, adapted or quantised or not; None if there is none."""
    try:
        layer: Any = transformer.get_submodule(name)
    except AttributeError:
        return None
    layer = layer.get_base_layer() if hasattr(layer, "get_base_layer") else layer
    if not hasattr(layer, "out_features"):
        return None
    return layer.out_features, layer.in_features


def open_original_weights(
    transformer: nn.Module, names: Iterable[str]
) -> Mapping[str, Callable[[], Tensor]]:
    """Give access to the unquantised weights of some linear layers.

    Args:
        transformer: A FLUX transformer; layers that are quantised or not in memory are read
            from the files it was loaded from.
        names: Linear layers, as `transformer_blocks.0.attn.to_q`.

    Returns:
        For each name a function that loads its matrix (out x in) in float32.

    Raises:
        FileNotFoundError: If a layer is quantised and the original files are not there.
    """
    names = list(names)
    live = {name: _live_weight(transformer, name) for name in names}
    if all(weight is not None for weight in live.values()):
        return {name: _in_float32(weight) for name, weight in live.items() if weight is not None}
    source = getattr(transformer.config, "_name_or_path", "") or "an unknown place"
    try:
        return open_weight_files(_find_files(source), names)
    except FileNotFoundError as error:
        raise FileNotFoundError(
            "the minor components must be computed from the original weights, but the transformer "
            f"is quantised or not in memory and {error}; load the base unquantised, or convert the "
            "adapter to a plain LoRA first: urae convert LORA_2K MINOR_4K --model BASE"
        ) from error


def open_weight_files(folder: Path, names: Iterable[str]) -> Mapping[str, Callable[[], Tensor]]:
    """Give access to linear weights in a transformer's safetensors files.

    Args:
        folder: The transformer's folder, or a pipeline's folder that has it as `transformer`.
        names: Linear layers.

    Raises:
        FileNotFoundError: If the folder lacks the files or one of the layers.
    """
    if folder.is_file():
        raise FileNotFoundError(f"{folder} is a single file; name a folder in diffusers layout")
    if (folder / "transformer").is_dir():
        folder = folder / "transformer"
    files = _index_tensors(folder)
    names = list(names)
    missing = [name for name in names if f"{name}.weight" not in files]
    if missing:
        raise FileNotFoundError(f"{folder} holds no original weights for {missing[0]}")
    with safe_open(files[f"{names[0]}.weight"], framework="pt") as file:
        dtype = file.get_slice(f"{names[0]}.weight").get_dtype()
    if dtype not in _ORIGINAL_FILE_DTYPES:
        raise FileNotFoundError(f"{folder} holds quantised weights ({dtype}), not the originals")
    return {name: _from_file(files[f"{name}.weight"], f"{name}.weight") for name in names}


def _find_files(source: str) -> Path:
    """Find where a transformer was loaded from: a folder, or a hub id in the hub's cache."""
    if Path(source).exists():
        return Path(source)
    try:
        patterns = ["transformer/*.safetensors*", "*.safetensors*"]
        return Path(snapshot_download(source, allow_patterns=patterns, local_files_only=True))
    except (HFValidationError, LocalEntryNotFoundError) as error:
        raise FileNotFoundError(f"{source} is not on this machine") from error


def _live_weight(transformer: nn.Module, name: str) -> Tensor | None:
    layer: Any = transformer.get_submodule(name)
    layer = layer.get_base_layer() if hasattr(layer, "get_base_layer") else layer
    weight = layer.weight
    # quantised layers are other classes (bitsandbytes) or hold tensor subclasses (torchao)
    is_plain = type(layer) is nn.Linear and type(weight.data) is Tensor
    if is_plain and weight.dtype in _ORIGINAL_DTYPES and weight.device.type != "meta":
        detached: Tensor = weight.detach()
        return detached
    return None


def _in_float32(weight: Tensor) -> Callable[[], Tensor]:
    return lambda: weight.float()


def _from_file(path: Path, key: str) -> Callable[[], Tensor]:
    def load() -> Tensor:
        with safe_open(path, framework="pt") as file:
            tensor: Tensor = file.get_tensor(key)
        return tensor.float()

    return load


def _index_tensors(folder: Path) -> dict[str, Path]:
    indices = sorted(folder.glob("*.safetensors.index.json")) if folder.is_dir() else []
    if indices:
        weight_map = json.loads(indices[0].read_text())["weight_map"]
        return {key: folder / name for key, name in weight_map.items()}
    files: dict[str, Path] = {}
    for path in sorted(folder.glob("*.safetensors")) if folder.is_dir() else []:
        with safe_open(path, framework="pt") as file:
            files.update(dict.fromkeys(file.keys(), path))
    return files
