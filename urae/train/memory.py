"""Fitting a training step into memory: which way, and where the weights go."""

import logging
from collections.abc import Sequence

import torch
from diffusers import FluxTransformer2DModel

from urae.backbones.flux import build_meta_transformer
from urae.backbones.free_memory import free_bytes, free_host_bytes
from urae.backbones.ranks import find_least
from urae.generate.estimate import QUANTIZED
from urae.generate.quantize import can_quantize, check_quantization, quantize_blocks
from urae.generate.speed import compile_blocks
from urae.train.chunks import chunk_mlps
from urae.train.config import TrainConfig
from urae.train.estimate import Estimate, Way, estimate, list_ways
from urae.train.inputs import Inputs
from urae.train.mesh import count_local_ranks
from urae.train.recompute import count_tokens
from urae.train.stream import stream_weights

logger = logging.getLogger(__name__)


def choose_way(
    config: TrainConfig, inputs: Inputs, device: torch.device, *, num_ranks: int = 1
) -> Way:
    """Choose the first way of the recipe's that fits what is free, before any weights load.

    Several ranks choose by what is free where least is, and wait here for one another.

    A tier that was named is taken even if it does not fit.

    Args:
        config: Of the run.
        inputs: Its samples; the largest counts.
        device: Where it trains.
        num_ranks: Processes of the run.

    Raises:
        ValueError: If a tier was named that this machine or run cannot have.
        ModuleNotFoundError: If its library is not installed.
        MemoryError: If `auto` finds none that fits.
    """
    ways = _list_possible(config, device, num_ranks)
    transformer = build_meta_transformer(inputs.model_path)
    tokens = count_tokens(inputs.samples)
    estimates = estimate_ways(transformer, config, tokens, ways, num_ranks=num_ranks)
    device_bytes, host_bytes = free_bytes(device), free_host_bytes()
    if num_ranks > 1:  # all take the same way: they add up their gradients
        device_bytes, host_bytes = find_least((device_bytes, host_bytes), device)
    fitting = [each for each in estimates if each.fits(device_bytes, host_bytes)]
    if not fitting and config.memory == "auto" and device.type == "cuda":
        raise _too_little(config, estimates, device_bytes, host_bytes)
    chosen = (fitting or estimates[-1:])[0]
    logger.info("%s: %.1f GiB at the peak", chosen.way, chosen.peak / 2**30)
    if chosen.way.tier in QUANTIZED and config.memory == "auto":
        logger.warning(
            "the base is quantised to %s, an approximation, because nothing exact fits",
            chosen.way.tier,
        )
    return chosen.way


def estimate_ways(
    transformer: FluxTransformer2DModel,
    config: TrainConfig,
    tokens: int,
    ways: Sequence[Way],
    *,
    num_ranks: int = 1,
) -> list[Estimate]:
    """Estimate what each way takes on one of the run's GPUs.

    Args:
        transformer: Its shape counts.
        config: Of the run.
        tokens: Text and image tokens of the largest sample, which the ranks of a context share.
        ways: Which.
        num_ranks: Processes of the run.
    """
    num_shards = count_local_ranks(num_ranks) if config.shard else 1
    own_tokens = -(-tokens // config.context_parallel)
    return [estimate(transformer, config, own_tokens, way, num_shards) for way in ways]


def _list_possible(config: TrainConfig, device: torch.device, num_ranks: int) -> list[Way]:
    """List the ways that this run can take on this machine, whatever is free."""
    ways = list_ways(config, num_ranks)
    if config.memory != "auto":
        check_quantization(config.memory, device)
    elif device.type != "cuda":
        ways = [way for way in ways if way.tier == "resident"]
    return [way for way in ways if can_quantize(way.tier)]


def name_remedies(config: TrainConfig) -> str:
    """Say what makes a step smaller, where no way fits."""
    shared = config.context_parallel > 1 and config.compile is None and not config.shard
    # compiled blocks keep what is exchanged
    return f"use {'--compile false, ' if shared else ''}--batch-size 1, or"


def _too_little(
    config: TrainConfig, estimates: Sequence[Estimate], device_bytes: int, host_bytes: int
) -> MemoryError:
    least = min(estimates, key=lambda each: each.peak)
    return MemoryError(
        f"{device_bytes / 2**30:.1f} GiB are free on the GPU and {host_bytes / 2**30:.1f} on the "
        f"host, too little for this run: --memory {least.way.tier} needs {least.peak / 2**30:.1f} "
        f"and {least.host_bytes / 2**30:.1f}; {name_remedies(config)} features of a lower "
        "resolution"
    )


def is_placed_first(way: Way) -> bool:
    """Tell whether the whole base goes to the device as soon as it is loaded."""
    return way.tier in ("resident", "offload")


def place(
    transformer: FluxTransformer2DModel, way: Way, device: torch.device, *, compiled: bool
) -> None:
    """Put the weights where they live, adapters attached: factors that train on the device.

    Weights are quantised layer by layer, so that those in bfloat16 are never whole on the device.

    Args:
        transformer: On the CPU, or on the device where `is_placed_first`.
        way: Where to.
        device: Where it trains.
        compiled: Whether blocks are compiled.
    """
    if way.tier == "streamed":
        chunk_mlps(transformer)
        if compiled:
            compile_blocks(transformer)
        stream_weights(transformer, device)
        return
    if way.tier == "8bit" or way.tier == "4bit":
        quantize_blocks(transformer, way.tier, device, keep=False)
    transformer.to(device)
