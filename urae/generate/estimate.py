"""What a picture takes in memory, by where the weights live: known before any weights load.

The one place that says so: `--memory auto` chooses by it, `urae plan generate` prints it.
"""

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, Literal

import torch
from diffusers import AutoencoderKL
from torch import nn

from urae.backbones.free_memory import USABLE, vae_bytes
from urae.backbones.vae_plan import plan_decode
from urae.geometry import num_image_tokens

Tier = Literal["resident", "streamed", "offload", "8bit", "4bit"]
"""Where a transformer's weights live, and in which precision."""
TIERS: tuple[Tier, ...] = ("resident", "streamed", "offload", "8bit", "4bit")
AUTO_TIERS: tuple[Tier, ...] = ("resident", "streamed", "8bit", "4bit")
"""What `auto` tries, in order: the exact ones first."""
QUANTIZED: tuple[Tier, ...] = ("8bit", "4bit")
"""Approximations."""

# the logits of T5-XXL for 512 tokens are 64 MiB in float32, its widest maps 10 MiB in bfloat16
TEXT_ACTIVATION_BYTES = 2**29

_NUMBER_BYTES = 2  # bfloat16, as on any GPU
# int8 (its scale a row is below 0.1%); nf4 with a float32 scale for every 64 weights
_QUANTIZED_BYTES: dict[Tier, float] = {"8bit": 1.0, "4bit": 0.5 + 4 / 64}

# maps of tokens x channels in bfloat16 that are alive at the peak, in a double and in a single
# block; the first as tests/generate/test_estimate.py tracks them in the forward whose MLPs run in
# chunks of tokens, of one rank or several, of which each has its share of the tokens
_CHUNKED = (12, 13)
# 26.5 GiB with 22.2 of weights for a forward at 4096^2 (docs/performance.md)
_COMPILED = (11, 11)


@dataclass(frozen=True)
class Request:
    """What is to be made."""

    height: int
    """Pixels."""
    width: int
    """Pixels."""
    text_tokens: int = 512
    adapter_bytes: int = 0
    """Of all adapters' factors in bfloat16."""
    compiled: bool = False
    """Whether the blocks are compiled; quantised ones never are, and run their MLPs in chunks."""
    num_ranks: int = 1
    """GPUs that make the picture together, with all weights on each."""


@dataclass(frozen=True)
class Stage:
    """What a part of the job holds on the device at its peak, in bytes."""

    weights: int
    working: int | None
    """Beside the weights; None if there is no way within what is left."""

    @property
    def peak(self) -> int:
        """Weights and what is beside them."""
        return self.weights + (self.working or 0)


@dataclass(frozen=True)
class Estimate:
    """What a tier takes."""

    tier: Tier
    encode: Stage
    """Prompts to embeddings."""
    sample: Stage
    """Denoising."""
    decode: Stage
    """Latents to pixels."""
    host_bytes: int
    """Memory that weights keep on the host; those that are only read from files are not counted."""

    @property
    def peak(self) -> int:
        """The most that is on the device at once, in bytes."""
        return max(stage.peak for stage in (self.encode, self.sample, self.decode))

    def fits(self, device_bytes: int, host_bytes: int | None = None) -> bool:
        """Tell whether there is room for it.

        Args:
            device_bytes: Free on the device; a tenth is left for allocators.
            host_bytes: Free on the host, of which a tenth is left too; None if it does not matter.
        """
        if self.decode.working is None:  # decoding takes what is left, where that suffices
            return False
        if max(self.encode.peak, self.sample.peak) > USABLE * device_bytes:
            return False
        return host_bytes is None or self.host_bytes <= USABLE * host_bytes


def list_estimates(
    models: Mapping[str, Any],
    request: Request,
    device_bytes: int,
    tiers: Iterable[Tier] = AUTO_TIERS,
) -> list[Estimate]:
    """Estimate each tier, in the order in which they are preferred.

    Args:
        models: FLUX's four, with or without weights, by their names in the pipeline.
        request: What is to be made.
        device_bytes: Free on the GPU.
        tiers: Which.
    """
    return [estimate(models, request, tier, device_bytes) for tier in tiers]


def estimate(
    models: Mapping[str, Any], request: Request, tier: Tier, device_bytes: int
) -> Estimate:
    """Estimate what a picture takes on a GPU in bfloat16.

    Args:
        models: FLUX's four, with or without weights, by their names in the pipeline.
        request: What is to be made.
        tier: Where the weights are.
        device_bytes: Free on the GPU: decoding takes no more than is left.
    """
    transformer, vae_bytes = models["transformer"], count_bytes(models["vae"])
    whole = count_bytes(transformer)
    resident = quantized_bytes([transformer], tier) if tier in QUANTIZED else whole
    sample = max(_list_sampling(models, request, tier, resident), key=lambda stage: stage.peak)
    after = {"streamed": 0, "offload": 0}.get(tier, resident + request.adapter_bytes)
    host_bytes = {"streamed": whole, "offload": whole, "8bit": resident}.get(tier, 0)
    return Estimate(
        tier,
        # bitsandbytes quantises on the device while the model loads
        _estimate_encode(models, tier, resident if tier == "4bit" else 0, device_bytes),
        sample,
        _estimate_decode(models["vae"], request, after + vae_bytes, device_bytes),
        host_bytes,
    )


def count_bytes(module: nn.Module) -> int:
    """Return the size of a module's parameters and buffers in bfloat16."""
    return _NUMBER_BYTES * sum(t.numel() for t in [*module.parameters(), *module.buffers()])


def stream_text(tier: Tier, encoder_bytes: int, device_bytes: int) -> bool:
    """Tell whether text encoders are streamed: where asked for, and where they do not fit."""
    fit = encoder_bytes + TEXT_ACTIVATION_BYTES <= USABLE * device_bytes
    return tier == "streamed" or not fit


def quantized_bytes(modules: Iterable[nn.Module], tier: Tier) -> int:
    """Return the size of modules whose linear layers are quantised."""
    modules = list(modules)
    layers = [m for module in modules for m in module.modules() if isinstance(m, nn.Linear)]
    saved = (_NUMBER_BYTES - _QUANTIZED_BYTES[tier]) * sum(m.weight.numel() for m in layers)
    return sum(map(count_bytes, modules)) - round(saved)


def _list_sampling(
    models: Mapping[str, Any], request: Request, tier: Tier, resident: int
) -> Iterator[Stage]:
    """Give the peak in the double and in the single blocks."""
    transformer, vae_bytes = models["transformer"], count_bytes(models["vae"])
    tokens = num_image_tokens(request.height, request.width) + request.text_tokens
    config = transformer.config
    channels = config.num_attention_heads * config.attention_head_dim
    own_tokens = -(-tokens // request.num_ranks)
    one_map = own_tokens * channels * _NUMBER_BYTES
    rope_tables = own_tokens * config.attention_head_dim * 2 * 4  # cos and sin in float32
    maps = _COMPILED if request.compiled and tier not in QUANTIZED else _CHUNKED
    kinds = (transformer.transformer_blocks, transformer.single_transformer_blocks)
    blocks = [count_bytes(kind) for kind in kinds]
    num_blocks = sum(len(kind) for kind in kinds)
    for kind, kind_bytes, num_maps in zip(kinds, blocks, maps, strict=True):
        if not len(kind):
            continue
        weights = resident + request.adapter_bytes
        if tier == "streamed":  # this block and the next
            weights = count_bytes(transformer) - sum(blocks)
            weights += 2 * kind_bytes // len(kind) + 2 * request.adapter_bytes // num_blocks
        if tier != "offload":
            weights += vae_bytes
        yield Stage(weights, num_maps * one_map + rope_tables)


def _estimate_encode(models: Mapping[str, Any], tier: Tier, held: int, device_bytes: int) -> Stage:
    encoders = models["text_encoder"], models["text_encoder_2"]
    weights = sum(map(count_bytes, encoders))
    if stream_text(tier, weights, device_bytes - held):
        # a layer and the next; the smaller encoder stays on the CPU
        weights = 2 * max(p.numel() * _NUMBER_BYTES for p in encoders[1].parameters())
    return Stage(held + weights, TEXT_ACTIVATION_BYTES)


@lru_cache(maxsize=len(TIERS))  # the same in chunks
def _estimate_decode(
    vae: AutoencoderKL, request: Request, weights: int, device_bytes: int
) -> Stage:
    gpu = torch.device("cuda")
    max_bytes = vae_bytes(gpu, device_bytes - weights)
    try:
        plan = plan_decode(
            vae, request.height, request.width,
            max_bytes=max_bytes, dtype=torch.bfloat16, device=gpu, num_ranks=request.num_ranks,
        )  # fmt: skip
    except MemoryError:
        return Stage(weights, None)
    return Stage(weights, plan.peak_bytes)
