"""What trains: a LoRA from zero, or the minor components of the base and all under it."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from diffusers import FluxTransformer2DModel
from torch import nn

from urae import __version__
from urae.adapters.attach import attach_frozen, attach_trainable, read_factors
from urae.adapters.files import AdapterFile, LowRank, merge_minor, read_adapter, write_lora
from urae.adapters.initial import compute_initial, compute_updates, find_initial, fingerprint_origin
from urae.backbones.weights import find_attention_linears, linear_shape, open_original_weights
from urae.train.config import AdapterConfig

_NAME = {"lora": "urae_2k", "minor": "urae_4k"}


@dataclass(frozen=True)
class TrainingAdapter:
    """An adapter in training on a transformer whose own weights are frozen."""

    transformer: nn.Module
    name: str
    initial: Mapping[str, LowRank] | None
    """B0 and A0 of a minor adapter, float32 on the CPU."""
    parameters: list[nn.Parameter]
    metadata: Mapping[str, str]

    @property
    def origin_hash(self) -> str:
        """Of the base and the adapters under this one."""
        return self.metadata["urae.origin_hash"]

    def write(self, path: Path, metadata: Mapping[str, str]) -> None:
        """Write the adapter as a LoRA file in float32."""
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
    for index, update in enumerate(updates):
        attach_frozen(transformer, f"over_{index}", update)
    if initial is not None:
        initial = {
            name: LowRank(p.down.float().cpu(), p.up.float().cpu()) for name, p in initial.items()
        }
    parameters = attach_trainable(transformer, _NAME[config.kind], layers, initial)
    if config.trains == "down":
        for up in parameters[1::2]:  # A and B of each layer in turn
            up.requires_grad_(False)
        parameters = parameters[::2]
    return TrainingAdapter(transformer, _NAME[config.kind], initial, parameters, metadata)


def check_start(start: AdapterFile, config: AdapterConfig) -> None:
    """Refuse to start from an adapter of another kind or rank.

    Raises:
        ValueError: Says what differs.
    """
    rank = next(iter(start.layers.values())).down.shape[0]
    if (start.kind, rank) != (config.kind, config.rank):
        raise ValueError(
            f"{start.path} is a {start.kind} adapter of rank {rank}, but the recipe trains a "
            f"{config.kind} adapter of rank {config.rank}; set adapter.kind and adapter.rank to fit"
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


def read_adapters(config: AdapterConfig) -> tuple[list[AdapterFile], AdapterFile | None]:
    """Read the adapters under the one that trains, and the one that it starts from."""
    over = [read_adapter(source) for source in config.over]
    start = None if config.init is None else read_adapter(config.init)
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
