"""What trains: a LoRA or a variant of it from zero, or the minor components of base and LoRA."""

import hashlib
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from diffusers import FluxTransformer2DModel
from torch import Tensor, nn

from urae import __version__
from urae.adapters.attach import attach_frozen, attach_trainable, read_factors
from urae.adapters.files import (
    AdapterFile,
    LowRank,
    merge_minor,
    read_adapter,
    write_lora,
)
from urae.adapters.initial import (
    compute_initial,
    compute_updates,
    find_initial,
    fingerprint_origin,
    stack_updates,
)
from urae.adapters.variants import (
    as_plain,
    attach_variant,
    build_peft_config,
    is_variant,
    pack_variant,
    read_variant,
)
from urae.backbones.weights import find_attention_linears, linear_shape, open_original_weights
from urae.storage import write_tensors
from urae.train.config import AdapterConfig

_MINOR_NAME, _NAME = "urae_4k", "urae_2k"
_BLOCK = re.compile(r"^(\w+)\.\d+\.")
_NUM_SAMPLED_ROWS = 4


@dataclass(frozen=True)
class TrainingAdapter:
    """An adapter in training on a transformer whose own weights are frozen."""

    transformer: FluxTransformer2DModel
    name: str
    initial: Mapping[str, LowRank] | None
    """B0 and A0 of a minor adapter, float32 on the CPU."""
    parameters: list[nn.Parameter]
    """Those that train."""
    metadata: Mapping[str, str]
    base_hashes: Mapping[str, str]
    """Of the base's weights, as `fingerprint_base` has them."""
    staying: Sequence[nn.Parameter] = ()
    """Its up factors, where the down ones train alone."""

    @property
    def origin_hash(self) -> str:
        """Of the base and the adapters under this one."""
        return self.metadata["urae.origin_hash"]

    def pick_weights(self, file: AdapterFile) -> list[Tensor]:
        """Return a file's weights in the order of the parameters."""
        if file.variant is not None:
            return [file.variant.state[key] for key in read_variant(self.transformer, self.name)]
        layers = read_factors(self.transformer, self.name)
        weights = [factor for name in layers for factor in file.layers[name]]
        return weights[:: len(weights) // len(self.parameters)]  # half of them, if one factor stays

    def write(self, path: Path, metadata: Mapping[str, str]) -> None:
        """Write the adapter in float32, as a LoRA file where it is one."""
        if is_variant(self.metadata["urae.kind"]):
            config = as_plain(self.transformer.peft_config[self.name])
            tensors, settings = pack_variant(read_variant(self.transformer, self.name), config)
            write_tensors(path, tensors, {**self.metadata, **metadata, **settings})
            return
        layers = read_factors(self.transformer, self.name)
        if self.initial is not None:
            layers = {
                name: merge_minor(LowRank(pair.down.cpu(), pair.up.cpu()), self.initial[name])
                for name, pair in layers.items()
            }
        write_lora(path, layers, {**self.metadata, **metadata})


def attach_for_training(
    transformer: FluxTransformer2DModel,
    config: AdapterConfig,
    over: list[AdapterFile],
    start: AdapterFile | None,
    seed: int,
    device: torch.device | None = None,
) -> TrainingAdapter:
    """Attach the adapters under it, frozen, and the one that trains.

    A minor adapter computes W x + B A x - B0 A0 x, the base untouched (arXiv:2503.16322,
    section 3.2): A and B train in float32, the rest are buffers.

    Args:
        transformer: Not quantised yet; all its weights are frozen.
        config: What trains.
        over: Adapters under it, in order.
        start: Weights to start from; None starts fresh.
        seed: Of a fresh LoRA's weights.
        device: Where minor components are found; by default where the transformer is.
    """
    device = device or next(transformer.parameters()).device
    base_hashes = fingerprint_base(transformer)
    names = find_attention_linears(transformer)
    weights = open_original_weights(transformer, names)
    updates = compute_updates(
        over, lambda layers: open_original_weights(transformer, layers), device=device
    )
    metadata = {
        "urae.format": "1",
        "urae.version": __version__,
        "urae.kind": config.kind,
        "urae.rank": str(config.rank),
        "urae.origin_hash": fingerprint_origin(weights, updates),
    }
    if config.over:
        metadata["urae.over"] = config.over[-1]
    if is_variant(config.kind):
        given = None if start is None else start.variant
        peft_config = given.config if given else build_peft_config(config.kind, config.rank, names)
        weights_given = None if given is None else given.state
        parameters = attach_variant(transformer, _NAME, peft_config, weights_given, seed=seed)
        return TrainingAdapter(transformer, _NAME, None, parameters, metadata, base_hashes)
    initial = None
    if start is not None:
        layers = start.layers
        if config.kind == "minor":
            initial = find_initial(start, updates, lambda _: weights, device=device)
    elif config.kind == "minor":
        initial = compute_initial(weights, updates, config.rank, device=device)
        layers = initial
    else:
        layers = _gaussian_lora(transformer, names, config.rank, seed)
    if initial is not None:
        initial = {  # of what trains alone: a start may leave layers out
            name: LowRank(*(factor.float().cpu() for factor in initial[name])) for name in layers
        }
        updates = [*updates, {name: LowRank(p.down, -p.up) for name, p in initial.items()}]
    frozen = stack_updates(updates)
    beside = {name: frozen.pop(name) for name in layers if name in frozen}
    if frozen:
        attach_frozen(transformer, "over", frozen)
    name = _MINOR_NAME if config.kind == "minor" else _NAME
    parameters = attach_trainable(transformer, name, layers, beside)
    staying = []
    if config.trains == "down":
        parameters, staying = parameters[::2], parameters[1::2]  # A and B of each layer in turn
        for up in staying:
            up.requires_grad_(False)
    return TrainingAdapter(transformer, name, initial, parameters, metadata, base_hashes, staying)


def fingerprint_base(transformer: nn.Module) -> dict[str, str]:
    """Identify a base by a few rows of each of its weights, cheaply.

    The same for a base held in bfloat16 and in float32: numbers count as bfloat16 has them.

    Returns:
        SHA-256 by layer, 64 hex digits; those of one name in all blocks together, such as
        `transformer_blocks.*.ff.net.2`.
    """
    digests: dict[str, Any] = {}
    for name, weight in transformer.named_parameters():
        layer = _BLOCK.sub(r"\1.*.", name).rpartition(".")[0]
        stride = max(1, len(weight) // _NUM_SAMPLED_ROWS)
        rows = weight.detach()[::stride].bfloat16().float().cpu().contiguous()
        digests.setdefault(layer, hashlib.sha256()).update(rows.numpy().tobytes())
    return {layer: digest.hexdigest() for layer, digest in digests.items()}


def check_start(start: AdapterFile, config: AdapterConfig) -> None:
    """Refuse to start from an adapter of another kind or rank.

    Raises:
        ValueError: Says what differs.
    """
    if (start.kind, start.rank) != (config.kind, config.rank):
        raise ValueError(
            f"{start.path} is a {start.kind} adapter of rank {start.rank}, but the recipe trains "
            f"a {config.kind} adapter of rank {config.rank}; set adapter.kind and adapter.rank to "
            "match"
        )


def check_rank(config: AdapterConfig, transformer: FluxTransformer2DModel) -> None:
    """Refuse a rank that the base's matrices do not have.

    Raises:
        ValueError: If the rank is not below the smallest side.
    """
    shapes = [linear_shape(transformer, name) for name in find_attention_linears(transformer)]
    smallest = min(min(shape) for shape in shapes if shape is not None)
    if config.rank >= smallest:
        raise ValueError(
            f"adapter.rank {config.rank} must be below {smallest}, the side of the base's "
            "attention matrices; 16 is usual"
        )
    if config.kind == "oft" and (config.rank < 2 or smallest % config.rank):
        raise ValueError(
            f"adapter.rank {config.rank}, the side of OFT's blocks, must be 2 or more and divide "
            f"{smallest}, the side of the base's attention matrices; 16 is usual"
        )


def read_adapters(
    config: AdapterConfig, checkpoint: Path | None = None
) -> tuple[list[AdapterFile], AdapterFile | None]:
    """Read the adapters under the one that trains, and the one that it starts from.

    Args:
        config: What trains.
        checkpoint: The one's weights where a run goes on, in the place of `init`.
    """
    over = [read_adapter(source) for source in config.over]
    for file in over:
        if file.variant is not None:
            raise ValueError(
                f"adapter.over: {file.path} is a {file.kind} adapter, which cannot be combined "
                "with other adapters; train over a LoRA or minor components"
            )
    source = checkpoint or config.init
    start = None if source is None else read_adapter(source)
    if start is not None:
        check_start(start, config)
    return over, start


def _gaussian_lora(
    transformer: nn.Module, names: list[str], rank: int, seed: int
) -> dict[str, LowRank]:
    # peft's "gaussian": A from N(0, 1 / rank^2), B zero
    generator = torch.Generator().manual_seed(seed)
    layers = {}
    for name in names:
        shape = linear_shape(transformer, name)
        assert shape is not None
        down = torch.randn(rank, shape[1], generator=generator) / rank
        layers[name] = LowRank(down, torch.zeros(shape[0], rank))
    return layers
