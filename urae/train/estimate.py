"""What a training step takes in memory, operations and time: known before any weights load.

The one place that says so: `--memory auto` chooses by it, `urae plan train` prints it.
"""

from collections.abc import Sequence
from dataclasses import dataclass, fields
from typing import Literal, NamedTuple

import torch
from diffusers import FluxTransformer2DModel
from torch import nn

from urae.adapters.variants import attach_variant, build_peft_config, is_variant
from urae.backbones.free_memory import USABLE
from urae.backbones.weights import find_attention_linears, linear_shape
from urae.choices import Tier
from urae.generate.estimate import (
    ATTENTION_RATE,
    LINEAR_RATE,
    NUMBER_BYTES,
    QUANTIZED,
    RATES_TOKENS,
    RATES_WIDTH,
    count_bytes,
    quantized_bytes,
    round_pinned,
)
from urae.generate.estimate import count_operations as count_forward
from urae.generate.speed import list_blocks
from urae.train.config import AdapterConfig, TrainConfig

TIERS: tuple[Tier, ...] = ("resident", "offload", "streamed", "8bit", "4bit")
"""The memory ladder, in the order in which `auto` tries it: the exact ones first."""
STATES = {"prodigy": 4.0, "adamw": 2.0, "adamw8bit": 0.5, "schedule-free": 2.0, "muon": 1.0}
"""Float32 numbers that an optimizer holds for each one that trains."""

# maps of tokens x channels in bfloat16 that are alive when a block is recomputed and gone back
# through, by count (tests/train/test_estimate.py), and what the rows of docs/performance.md take
# more where MLPs are whole
_WHOLE, _CHUNKED = 25, 15.4
# maps that a compiled block of a shared picture keeps on the device whatever is recomputed: as many
# as q, k, v and the output that are exchanged; by the one such step (docs/performance.md)
_EXCHANGED = 4
_ROPE_BYTES = 8  # cos and sin in float32
_LOSS_BYTES = 32  # float32 maps of what goes in and comes out, a number of it
_WORKSPACE_BYTES = 2**25  # of matrix products

# Operations a second of attention on one H200, beside generate.estimate's (docs/performance.md);
# tests/train/test_estimate.py holds the rows that none was fitted to against them
_BACKWARD_RATE = 559e12  # compiled steps that keep attention's outputs, at 2048^2 and 4096^2
_EAGER_RATE = 312e12  # both ways, by flash; the two steps at 2048^2 that were not compiled
_EAGER_TOKENS = 12_000  # at least: at 1024^2 launches cost as much again
_LOCAL_RATE = 389e12  # both ways, by flex; the one compiled step with local attention, at 4096^2
_EIGHT_BIT = 1.05  # times the same with a base in bfloat16; the one such compiled step, at 2048^2
_STREAMED = 2.48e-5  # more a token than with resident weights; the one such step at 2048^2
_STREAMED_TOKENS = 16_384  # at least: with fewer the weights take longer to come than to be used
_BACKWARD = 2.5  # attention's backward pass, in forwards
COMPILING_SECONDS = 24.0
"""What the first compiled step took longer, and that of a second size."""


class Way(NamedTuple):
    """How a step is made to fit."""

    tier: Tier
    checkpointing: Literal["off", "selective", "full"]

    @property
    def is_offloaded(self) -> bool:
        """Whether what the backward pass keeps is on the host."""
        return self.tier in ("offload", "streamed")

    def __str__(self) -> str:
        return f"memory {self.tier}, gradient checkpointing {self.checkpointing}"


@dataclass(frozen=True)
class Estimate:
    """What a way takes at its peak, in bytes."""

    way: Way
    weights: int
    """Of the base, on the device."""
    adapter: int
    """All adapters, and the optimizer's state."""
    gradients: int
    kept: int
    """What the backward pass keeps of the blocks, on the device."""
    block: int
    """The block that is recomputed, in its backward pass."""
    loss: int
    """Inputs, output and loss; position tables; workspace."""
    host_bytes: int
    """Pinned on the host."""

    @property
    def peak(self) -> int:
        """The most that is on the device at once."""
        return sum(int(getattr(self, name)) for name in TERMS)

    def fits(self, device_bytes: int, host_bytes: int | None = None) -> bool:
        """Tell whether there is room for it.

        Args:
            device_bytes: Free on the device; a tenth is left for allocators.
            host_bytes: Free on the host; None if it does not matter.
        """
        enough = self.peak <= USABLE * device_bytes
        return enough and (host_bytes is None or self.host_bytes <= USABLE * host_bytes)


TERMS = tuple(each.name for each in fields(Estimate) if each.name not in ("way", "host_bytes"))
"""What a peak is made of."""


class RunSeconds(NamedTuple):
    """What a run's steps take."""

    step: float
    """In the mean over all sizes."""
    total: float
    """Of all steps, compiling included."""


def list_ways(config: TrainConfig, num_ranks: int = 1) -> list[Way]:
    """List what a run may take, in the order of preference.

    Args:
        config: Of the run.
        num_ranks: Its processes.

    Raises:
        ValueError: If a tier was named that such a run cannot have.
    """
    if config.shard and config.memory in QUANTIZED:
        raise ValueError(
            f"--memory {config.memory} cannot be combined with shard, which spreads the weights "
            "as they are; leave one of the two out"
        )
    if config.memory == "streamed" and num_ranks > 1:
        raise ValueError(
            f"--memory streamed is for one process, but this run has {num_ranks}; choose offload "
            "or resident"
        )
    tiers = TIERS if config.memory == "auto" else (config.memory,)
    kept: tuple[Literal["off", "selective", "full"], ...] = ("selective", "full")
    if config.gradient_checkpointing != "auto":
        kept = (config.gradient_checkpointing,)
    ways = [Way(tier, each) for tier in tiers for each in kept]
    return [way for way in ways if _is_allowed(way, config, num_ranks)]


def count_fewest_ranks(config: TrainConfig) -> int:
    """Return how many processes a run has at least, by its config."""
    return max(config.context_parallel, 2 if config.shard else 1)


def estimate(
    transformer: FluxTransformer2DModel,
    config: TrainConfig,
    tokens: int,
    way: Way,
    num_shards: int = 1,
) -> Estimate:
    """Estimate what a step takes on a GPU in bfloat16.

    Args:
        transformer: Its shape counts; it may be on the meta device.
        config: Of the run: adapter, optimizer and batch size.
        tokens: Text and image tokens of the largest sample, this rank's part of them.
        way: How.
        num_shards: Ranks that the base is spread over.
    """
    one_map = config.batch_size * tokens * transformer.inner_dim * NUMBER_BYTES
    blocks = list_blocks(transformer)
    trained = count_adapter(transformer, config.adapter)
    frozen = len(config.adapter.over) + (config.adapter.kind == "minor")
    copies = 1 + STATES[config.optimizer.name] + (config.ema_decay is not None)
    kept = _count_kept(transformer, one_map, way)
    shared = config.context_parallel > 1 and may_compile(config, way)
    exchanged = len(blocks) * _EXCHANGED * one_map if shared and way.checkpointing != "off" else 0
    on_device = 2 if way.is_offloaded else len(blocks)  # one is copied while the next computes
    host = round_pinned(kept // len(blocks)) * len(blocks) if way.is_offloaded else 0
    if way.tier == "streamed":
        host += sum(round_pinned(NUMBER_BYTES * p.numel()) for b in blocks for p in b.parameters())
    return Estimate(
        way,
        weights=_count_weights(transformer, blocks, way.tier, num_shards),
        adapter=int(4 * trained * copies) + frozen * trained * NUMBER_BYTES,
        gradients=4 * trained,
        kept=kept * on_device // len(blocks) + exchanged,
        block=int(one_map * (_CHUNKED if way.tier == "streamed" else _WHOLE)),
        loss=config.batch_size * tokens
        * (_ROPE_BYTES * transformer.config.attention_head_dim
           + _LOSS_BYTES * transformer.config.in_channels)
        + _WORKSPACE_BYTES,
        host_bytes=host,
    )  # fmt: skip


def may_compile(config: TrainConfig, way: Way) -> bool:
    """Tell whether blocks are compiled in a run that is long enough, on a machine that can."""
    if way.tier == "4bit" or (way.tier, way.checkpointing) == ("streamed", "selective"):
        return False
    return not config.shard if config.compile is None else config.compile


def count_adapter(transformer: FluxTransformer2DModel, config: AdapterConfig) -> int:
    """Return how many numbers an adapter has; of a variant, as peft attaches it to such a base.

    Both factors count, also where one of them stays as it begins.
    """
    names = find_attention_linears(transformer)
    if is_variant(config.kind):
        with torch.device("meta"):
            base = FluxTransformer2DModel.from_config(transformer.config)
        peft_config = build_peft_config(config.kind, config.rank, names)
        return sum(each.numel() for each in attach_variant(base, "counted", peft_config))
    shapes = [linear_shape(transformer, name) for name in names]
    return config.rank * sum(sum(shape) for shape in shapes if shape is not None)


def count_operations(
    transformer: FluxTransformer2DModel,
    tokens: int,
    checkpointing: Literal["off", "selective", "full"],
    *,
    keys: float | None = None,
) -> float:
    """Count the operations of a step on one sample, multiplications and additions.

    Args:
        transformer: Its shape counts.
        tokens: Text and image tokens.
        checkpointing: What is computed twice.
        keys: That a token sees; all tokens unless attention is local.
    """
    forward = count_forward(transformer, tokens, keys)
    # backward: the frozen weights have no gradient; attention's has five products to its two
    times_linear = 2 + (checkpointing != "off")
    times_attention = 1 + (checkpointing == "full") + _BACKWARD
    return forward.linear * times_linear + forward.attention * times_attention


def estimate_seconds(
    transformer: FluxTransformer2DModel,
    config: TrainConfig,
    tokens: int,
    way: Way,
    *,
    compiled: bool,
    keys: float | None = None,
) -> float | None:
    """Estimate the time of a step on one sample on an H200.

    Args:
        transformer: Its shape counts.
        config: Of the run.
        tokens: Text and image tokens.
        way: How.
        compiled: Whether the blocks are compiled.
        keys: That a token sees where attention is local.

    Returns:
        None for what was not measured, or cannot be told by what was.
    """
    split = config.shard or config.context_parallel > 1
    known = not split and not is_variant(config.adapter.kind)
    least = RATES_TOKENS if compiled else _EAGER_TOKENS
    if not known or transformer.inner_dim != RATES_WIDTH or config.batch_size * tokens < least:
        return None
    forward = count_forward(transformer, tokens, keys)
    linear = 3 * forward.linear / LINEAR_RATE[compiled]
    backward = _BACKWARD * forward.attention / _BACKWARD_RATE
    once = forward.attention / ATTENTION_RATE
    both = (2 + _BACKWARD) * forward.attention
    match (*way, compiled):
        case ("resident", "selective", True) if keys is not None:
            return linear + (1 + _BACKWARD) * forward.attention / _LOCAL_RATE
        case _ if keys is not None:
            return None
        case ("resident" | "offload", "full", True):
            return linear + 2 * once + backward
        case ("8bit", "full", True):
            return _EIGHT_BIT * (linear + 2 * once + backward)
        case ("streamed", *_) if config.batch_size * tokens < _STREAMED_TOKENS:
            return None
        case ("streamed", "full", True):
            return linear + 2 * once + backward + _STREAMED * tokens
        case ("streamed", "selective", False):
            return linear + once + backward + _STREAMED * tokens
        case ("resident", "selective", True):
            return linear + once + backward
        case ("resident", "full", False):
            return linear + both / _EAGER_RATE
    return None


def _is_allowed(way: Way, config: TrainConfig, num_ranks: int) -> bool:
    if way.tier == "streamed" and (num_ranks > 1 or way.checkpointing == "off"):
        return False
    if way.tier in QUANTIZED and config.shard:
        return False
    return way.tier in ("resident", "offload") or not is_variant(config.adapter.kind)


def _count_weights(
    transformer: FluxTransformer2DModel, blocks: Sequence[nn.Module], tier: Tier, num_shards: int
) -> int:
    if tier == "8bit" or tier == "4bit":
        return quantized_bytes(blocks, tier) + _count_rest(transformer, blocks)
    here = 2 * max(map(count_bytes, blocks))  # this block and the next
    if tier == "streamed":
        return _count_rest(transformer, blocks) + here
    if num_shards > 1:
        return count_bytes(transformer) // num_shards + here
    return count_bytes(transformer)


def _count_rest(transformer: nn.Module, blocks: Sequence[nn.Module]) -> int:
    return count_bytes(transformer) - sum(map(count_bytes, blocks))


def _count_kept(transformer: FluxTransformer2DModel, one_map: int, way: Way) -> int:
    blocks = len(list_blocks(transformer))
    if way.checkpointing == "off":
        return blocks * one_map * _WHOLE
    if way.checkpointing == "full":
        return blocks * one_map
    lse = one_map * 4 // (NUMBER_BYTES * int(transformer.config.attention_head_dim))
    return blocks * (2 * one_map + lse)
