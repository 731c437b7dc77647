"""Adapter files: reading, checking and writing them.

Every format comes down to one shape, `LowRank` factors a layer. This project's files are plain
LoRA files of diffusers (a minor adapter too: down [A; A0], up [B, -B0]) whose metadata says more.
"""

import os
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal, NamedTuple

import torch
from jaxtyping import Float
from peft import get_peft_config
from torch import Tensor, nn

from urae.adapters.kohya import split_linear1
from urae.adapters.layouts import (
    check_attaches,
    has_outer_layers,
    is_raw_minor,
    is_stocks,
    refuse_unread,
    split_key,
    split_raw_minor_key,
    to_diffusers,
    widen,
)
from urae.adapters.settings import (
    damaged_settings,
    find_scale,
    is_pefts_own,
    read_peft_config,
    scale_factor,
    warn_of_unknown_alpha,
)
from urae.adapters.sources import FOLDER_NAMES, resolve_adapter
from urae.adapters.variants import Variant, VariantKind, find_kind
from urae.backbones.weights import linear_shape
from urae.resolution import ResolutionPolicy
from urae.storage import read_tensors, write_tensors


class LowRank(NamedTuple):
    """Factors of an update `up @ down` to one weight matrix, scale included."""

    down: Float[Tensor, "rank in"]
    up: Float[Tensor, "out rank"]


@dataclass(frozen=True)
class AdapterFile:
    """What an adapter file says."""

    path: Path
    kind: Literal["lora", "minor"] | VariantKind
    """`minor`: the layers train in place of minor components, which must be subtracted."""
    layers: Mapping[str, LowRank]
    """By layer, as `transformer_blocks.0.attn.to_q`. Of a minor adapter: B and A alone; of DoRA,
    LoKr and OFT: none."""
    initial: Mapping[str, LowRank] | None = None
    """A minor adapter's B0 and A0, where the file holds them."""
    origin_hash: str | None = None
    """`fingerprint_origin` of the base and the adapters that it was trained over."""
    policy: ResolutionPolicy | None = None
    metadata: Mapping[str, str] = field(default_factory=dict)
    variant: Variant | None = None
    """What a DoRA, LoKr or OFT holds in place of layers."""

    @property
    def name(self) -> str:
        """What tells it from others: its file's name, or its folder's where files have one name."""
        return (self.path.parent if self.path.name in FOLDER_NAMES else self.path).name

    @property
    def rank(self) -> int:
        """Components a matrix; of OFT, the side of a block."""
        if self.variant is not None:
            return self.variant.rank
        return next(iter(self.layers.values())).down.shape[0]


def read_adapter(source: str | os.PathLike[str]) -> AdapterFile:
    """Read an adapter in any format that this project knows.

    LoRA files of diffusers and peft, kohya/ComfyUI keys, DoRA, LoKr and OFT of peft, the
    reference's raw minor files and checkpoints (with or without a `module.` prefix), and this
    project's own.

    Args:
        source: As in `resolve_adapter`.

    Raises:
        ValueError: If the file is damaged or holds no adapter of the transformer.
        FileNotFoundError: If it is not found.
    """
    path = resolve_adapter(source)
    tensors, metadata = read_tensors(path)
    refuse_unread(path, tensors)
    tensors = widen(tensors)
    policy = None
    if text := metadata.get("urae.policy"):
        policy = ResolutionPolicy.from_json(text, str(path))
    if is_raw_minor(tensors):
        factors = ((*split_raw_minor_key(path, key), t) for key, t in tensors.items())
        layers = _pair_factors(path, factors)
        _check_one_rank(path, layers)
        return AdapterFile(path, "minor", layers, policy=policy, metadata=metadata)
    origin_hash = metadata.get("urae.origin_hash")
    if (kind := find_kind(list(tensors))) is not None:
        variant = _read_variant(path, kind, tensors, metadata)
        return AdapterFile(path, kind, {}, None, origin_hash, policy, metadata, variant)
    layers = _read_lora(path, tensors, metadata)
    if metadata.get("urae.kind") != "minor":
        return AdapterFile(path, "lora", layers, None, origin_hash, policy, metadata)
    trained, initial = _split_halves(path, layers, metadata)
    return AdapterFile(path, "minor", trained, initial, origin_hash, policy, metadata)


def _read_variant(
    path: Path, kind: VariantKind, tensors: Mapping[str, Tensor], metadata: Mapping[str, str]
) -> Variant:
    config = read_peft_config(path, metadata)
    expected = {"dora": "LORA", "lokr": "LOKR", "oft": "OFT"}[kind]
    if config.get("peft_type") != expected:
        raise ValueError(
            f"{path} holds a {kind} adapter without its peft settings, which define how it is "
            "computed; keep its adapter_config.json beside it"
        )
    prefix = re.compile(r"^(base_model\.model\.|transformer\.)+")
    state = {prefix.sub("", key): tensor for key, tensor in tensors.items()}
    try:
        get_peft_config(config)
    except (TypeError, ValueError) as error:
        raise damaged_settings(path, error) from error
    return Variant(kind, config, state)


def _read_lora(
    path: Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str]
) -> dict[str, LowRank]:
    beside = is_pefts_own(path, tensors, metadata)
    tensors = {key.removeprefix("module."): tensor for key, tensor in tensors.items()}
    if any("transformer_blocks." in key for key in tensors):
        tensors = {key.removeprefix("base_model.model."): t for key, t in tensors.items()}
    tensors, split = split_linear1(tensors)
    state, alphas = to_diffusers(path, tensors)
    state |= split
    factors = []
    for key, tensor in state.items():
        if (names := split_key(path, key)) is None:
            raise ValueError(
                f"{path}: key {key!r} is not a low-rank factor of the transformer; load such a "
                "file with pipe.load_lora_weights alongside urae's adapters"
            )
        factors.append((*names, tensor))
    layers = _pair_factors(path, factors)
    config = read_peft_config(path, metadata, beside=beside)
    if beside and not config and not alphas:
        warn_of_unknown_alpha(path)
    scales = {
        name: find_scale(name, len(pair.down), alphas, config) for name, pair in layers.items()
    }
    return {
        name: LowRank(pair.down, scale_factor(pair.up, scales[name]))
        for name, pair in layers.items()
    }


def _pair_factors(path: Path, factors: Iterable[tuple[str, str, Tensor]]) -> dict[str, LowRank]:
    sides: dict[str, dict[str, Tensor]] = {}
    for name, side, tensor in factors:
        sides.setdefault(name, {})[side] = tensor
    if not sides:
        raise ValueError(f"{path} holds no adapter weights")
    layers = {}
    for name, pair in sides.items():
        if pair.keys() != {"A", "B"}:
            raise ValueError(
                f"{path}: layer {name} has only one of its two factors; the file is incomplete"
            )
        down, up = pair["A"], pair["B"]
        if not (down.is_floating_point() and up.is_floating_point()):
            raise ValueError(f"{path}: layer {name} is of type {down.dtype}, not floating point")
        if down.ndim != 2 or up.ndim != 2 or down.shape[0] != up.shape[1] or not down.shape[0]:
            raise ValueError(
                f"{path}: layer {name} has factors of shapes {list(down.shape)} and "
                f"{list(up.shape)}, which do not share a rank of 1 or more"
            )
        layers[name] = LowRank(down, up)
    return layers


def _check_one_rank(path: Path, layers: Mapping[str, LowRank]) -> None:
    ranks = {name: len(pair.down) for name, pair in layers.items()}
    first, rank = next(iter(ranks.items()))
    for name, other in ranks.items():
        if other != rank:
            raise ValueError(
                f"{path}: layer {name} is of rank {other}, but {first} is of rank {rank}; all of a "
                "minor adapter must have one rank, so the file is damaged or mixed from several"
            )


def _split_halves(
    path: Path, layers: Mapping[str, LowRank], metadata: Mapping[str, str]
) -> tuple[dict[str, LowRank], dict[str, LowRank]]:
    rank = int(text) if (text := metadata.get("urae.rank", "")).isdecimal() else 0
    trained, initial = {}, {}
    for name, pair in layers.items():
        if pair.down.shape[0] != 2 * rank:
            raise ValueError(
                f"{path}: layer {name} has {pair.down.shape[0]} components, but a minor adapter "
                f"of rank {rank} has {2 * rank}; the metadata does not match the file"
            )
        trained[name] = LowRank(pair.down[:rank], pair.up[:, :rank])
        initial[name] = LowRank(pair.down[rank:], -pair.up[:, rank:])
    return trained, initial


def check_fits(adapter: AdapterFile, transformer: nn.Module) -> None:
    """Refuse an adapter that was made for another base.

    Args:
        adapter: What was read.
        transformer: The base; one on the meta device will do.

    Raises:
        ValueError: Names the first layer that does not fit, and both shapes.
    """
    if adapter.variant is not None:
        for name in adapter.variant.layers:
            if linear_shape(transformer, name) is None:
                raise _foreign(adapter, name)
    for name, pair in adapter.layers.items():
        expected = linear_shape(transformer, name)
        found = (pair.up.shape[0], pair.down.shape[1])
        if expected is None:
            raise _foreign(adapter, name)
        if found != expected:
            raise ValueError(
                f"adapter {adapter.path} is for another base: {name} is {found[0]} x {found[1]} "
                f"in the adapter and {expected[0]} x {expected[1]} in the model; load the base it "
                "was trained on (--model)"
            )


def _foreign(adapter: AdapterFile, name: str) -> ValueError:
    return ValueError(
        f"adapter {adapter.path} is for another base: this one has no linear layer {name}; load "
        "the base it was trained on (--model)"
    )


def check_lora(source: str | os.PathLike[str], transformer: nn.Module) -> None:
    """Refuse a LoRA that cannot be put on this base beside adapters.

    Args:
        source: As in `resolve_adapter`; text encoder factors and other parts are not compared.
        transformer: The base; one on the meta device will do.

    Raises:
        ValueError: If the file is damaged, of another kind or layout, or for another base.
        FileNotFoundError: If it is not found.
    """
    path = resolve_adapter(source)
    state, _ = _read_lora_state(path)
    check_attaches(path, state)
    found = [(split_key(path, key), tensor) for key, tensor in state.items()]
    factors = [(*names, tensor) for names, tensor in found if names is not None]
    if factors or not state:
        check_fits(AdapterFile(path, "lora", _pair_factors(path, factors)), transformer)


def read_lora(source: str | os.PathLike[str]) -> Path | dict[str, Tensor]:
    """Find what stock `load_lora_weights` takes: a file, or factors where it cannot read that.

    Arguments and errors are those of `check_lora`.
    """
    path = resolve_adapter(source)
    state, is_stock = _read_lora_state(path)
    return path if is_stock else state


def _read_lora_state(path: Path) -> tuple[dict[str, Tensor], bool]:
    """Return a LoRA as diffusers names it, and whether stock diffusers can load the file."""
    tensors, metadata = read_tensors(path)
    if metadata.get("urae.kind") == "minor" or is_raw_minor(tensors):
        raise ValueError(
            f"{path} is a minor-component adapter; give it as --adapter, after its LoRA"
        )
    refuse_unread(path, tensors)
    kind, is_stock = find_kind(list(tensors)), is_stocks(tensors)
    if kind is not None and not (kind == "dora" and is_stock):  # stock diffusers has that one
        raise ValueError(
            f"{path} is a {kind} adapter, which cannot be combined with other adapters; give it "
            "as --adapter"
        )
    if is_stock:
        return to_diffusers(path, tensors)[0], not has_outer_layers(tensors)
    return name_factors(_read_lora(path, widen(tensors), metadata)), False


def merge_minor(trained: LowRank, initial: LowRank) -> LowRank:
    """Write B A - B0 A0 as one update of twice the rank: down [A; A0], up [B, -B0]."""
    down = torch.cat([trained.down, initial.down.to(trained.down.dtype)])
    up = torch.cat([trained.up, -initial.up.to(trained.up.dtype)], dim=1)
    return LowRank(down, up)


def write_lora(
    path: Path, layers: Mapping[str, LowRank], metadata: Mapping[str, str] | None = None
) -> None:
    """Write factors as a LoRA file of diffusers, whole or not at all.

    Args:
        path: Replaced if it exists.
        layers: Factors of scale 1.
        metadata: String metadata of the safetensors header.
    """
    write_tensors(path, name_factors(layers), metadata)


def name_factors(layers: Mapping[str, LowRank]) -> dict[str, Tensor]:
    """Return factors of scale 1 by diffusers' keys."""
    tensors = {}
    for name, pair in layers.items():
        tensors[f"transformer.{name}.lora_A.weight"] = pair.down
        tensors[f"transformer.{name}.lora_B.weight"] = pair.up
    return tensors
