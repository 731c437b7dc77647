"""DoRA, LoKr and OFT: adapters that are no pair of factors, as peft has them.

Each acts alone on a transformer, and computes in float32 whatever the base's dtype: DoRA divides
norms that are nearly equal, OFT rotates by angles that are nearly zero.
"""

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, TypeGuard, get_args

import torch
from diffusers import FluxTransformer2DModel
from diffusers.loaders.lora_base import LORA_ADAPTER_METADATA_KEY
from peft import (
    LoKrConfig,
    LoraConfig,
    OFTConfig,
    PeftConfig,
    get_peft_config,
    get_peft_model_state_dict,
    set_peft_model_state_dict,
)
from peft.tuners.lokr import LoKrLayer
from peft.tuners.lora import LoraLayer
from torch import Tensor, nn

VariantKind = Literal["dora", "lokr", "oft"]

_SUFFIX = re.compile(r"\.(lora_|lokr_|oft_).*$")
_MARKS: dict[str, VariantKind] = {
    ".lora_magnitude_vector": "dora",
    ".lokr_": "lokr",
    ".oft_": "oft",
}


@dataclass(frozen=True)
class Variant:
    """An adapter in peft's own terms."""

    kind: VariantKind
    config: Mapping[str, Any]
    """peft's settings."""
    state: Mapping[str, Tensor]
    """By peft's keys, as `transformer_blocks.0.attn.to_q.lokr_w1`."""

    @property
    def rank(self) -> int:
        """Rank; of OFT, the side of a block."""
        return int(self.config["oft_block_size" if self.kind == "oft" else "r"])

    @property
    def layers(self) -> list[str]:
        """Names of the linear layers that it acts on."""
        return sorted({_SUFFIX.sub("", key) for key in self.state})


def is_variant(kind: str) -> TypeGuard[VariantKind]:
    """Tell whether a kind of adapter is none of plain factors."""
    return kind in get_args(VariantKind)


def find_kind(keys: Sequence[str]) -> VariantKind | None:
    """Tell by its keys which variant a file holds, None for plain factors."""
    kinds = (kind for mark, kind in _MARKS.items() if any(mark in key for key in keys))
    return next(kinds, None)


def build_peft_config(kind: VariantKind, rank: int, layers: Sequence[str]) -> dict[str, Any]:
    """Return peft's settings of a fresh variant.

    Args:
        kind: Which; all else is peft's default.
        rank: As alpha; of OFT, the side of a block.
        layers: Names of the linear layers that it acts on.
    """
    options: dict[str, Any] = {"target_modules": list(layers)}
    if kind == "oft":
        return as_plain(OFTConfig(oft_block_size=rank, **options))
    if kind == "lokr":
        return as_plain(LoKrConfig(r=rank, alpha=rank, **options))
    options |= {"use_dora": True, "init_lora_weights": "gaussian"}
    return as_plain(LoraConfig(r=rank, lora_alpha=rank, **options))


def attach_variant(
    transformer: FluxTransformer2DModel,
    name: str,
    config: Mapping[str, Any],
    state: Mapping[str, Tensor] | None = None,
    *,
    seed: int = 0,
) -> list[nn.Parameter]:
    """Attach a variant.

    Args:
        transformer: A stock FLUX transformer without adapters; its weights are not touched.
        name: Of the adapter.
        config: peft's settings.
        state: Its weights; None for fresh ones, which change nothing.
        seed: Of fresh ones.

    Returns:
        Its parameters, in float32.

    Raises:
        ValueError: If the weights do not fit.
    """
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)
        transformer.add_adapter(get_peft_config(dict(config)), name)
    parameters = list(_find_parameters(transformer, name).values())
    for parameter in parameters:
        parameter.data = parameter.data.float()
    for layer in transformer.modules():
        if isinstance(layer, LoKrLayer):
            # it drops itself out where a random number is not above this, which 0 may fail to be
            layer.module_dropout[name] = -1.0
        elif state is None and isinstance(layer, LoraLayer):
            norms = layer.get_base_layer().weight.detach().float().norm(dim=1)
            layer.lora_magnitude_vector[name].weight.data = norms
    if state is not None:
        _load(transformer, name, state)
    return parameters


def read_variant(transformer: FluxTransformer2DModel, name: str) -> dict[str, Tensor]:
    """Return an attached variant's weights by peft's keys (references), as its parameters come."""
    parameters = _find_parameters(transformer, name)
    state: dict[str, Tensor] = get_peft_model_state_dict(transformer, parameters, name)
    return state


def pack_variant(
    state: Mapping[str, Tensor], config: Mapping[str, Any]
) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Return the tensors and metadata of a file, as diffusers writes adapters of peft."""
    tensors = {f"transformer.{key}": tensor for key, tensor in state.items()}
    prefixed = {f"transformer.{key}": value for key, value in config.items()}
    return tensors, {LORA_ADAPTER_METADATA_KEY: json.dumps(prefixed, sort_keys=True)}


def _load(transformer: FluxTransformer2DModel, name: str, state: Mapping[str, Tensor]) -> None:
    wanted = read_variant(transformer, name)
    for key in sorted(wanted.keys() | state.keys()):
        there, given = wanted.get(key), state.get(key)
        if there is None or given is None or there.shape != given.shape:
            shapes = [each if each is None else tuple(each.shape) for each in (given, there)]
            raise ValueError(
                f"adapter {name} is for another base or damaged: {key} has shape {shapes[0]} in "
                f"the adapter and {shapes[1]} in the model; load the base it was trained on"
            )
    whole = {key: tensor.float() for key, tensor in state.items()}
    set_peft_model_state_dict(transformer, whole, name)


def _find_parameters(transformer: FluxTransformer2DModel, name: str) -> dict[str, nn.Parameter]:
    return {
        path: parameter
        for path, parameter in transformer.named_parameters()
        if f".{name}." in path or path.endswith(f".{name}")
    }


def as_plain(config: PeftConfig) -> dict[str, Any]:
    """Return peft's settings as JSON has them, those that are None left out."""
    return {
        key: sorted(value) if isinstance(value, set) else value
        for key, value in config.to_dict().items()
        if value is not None and key not in ("auto_mapping", "peft_version")
    }
