"""What a picture takes in memory and time: known before any weights load.

The one place that says so: `--memory auto` chooses by it, `urae plan generate` prints it.
"""

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from diffusers import AutoencoderKL, FluxTransformer2DModel
from torch import nn

from urae.backbones.free_memory import USABLE, vae_bytes
from urae.backbones.vae_plan import plan_decode
from urae.choices import Bits, Tier
from urae.generate.speed import list_blocks
from urae.geometry import num_image_tokens

AUTO_TIERS: tuple[Tier, ...] = ("resident", "streamed", "8bit", "4bit")
"""What `auto` tries, in order: the exact ones first."""
QUANTIZED: tuple[Tier, ...] = ("8bit", "4bit")
"""Approximations."""

# the logits of T5-XXL for 512 tokens are 64 MiB in float32, its widest maps 10 MiB in bfloat16
TEXT_ACTIVATION_BYTES = 2**29

NUMBER_BYTES = 2
"""Of bfloat16, which weights, activations and features are in on any GPU."""
# a scale a row is below 0.1%; nf4 has a float32 scale for every 64 weights
_QUANTIZED_BYTES: dict[str, float] = {"fp8": 1.0, "8bit": 1.0, "4bit": 0.5 + 4 / 64}

# maps of tokens x channels in bfloat16 that are alive at the peak, in a double and in a single
# block; the first as tests/generate/test_estimate.py tracks them in the forward whose MLPs run in
# chunks of tokens, of one rank or several, of which each has its share of the tokens
_CHUNKED = (12, 13)
# by two rows of docs/performance.md at 4096^2: a forward in 26.5 GiB with 22.2 of weights, and one
# with streamed weights in 5.2, of which a double block would have more, were its maps as many
_COMPILED = (9, 11)

# Operations a second on one H200 (docs/performance.md), fitted to forwards with a 2K LoRA:
# attention and compiled linear layers to the compiled ones at 2048^2 and 4096^2, eager layers to
# the eager one at 2048^2. tests/generate/test_estimate.py holds the other rows against them.
RATES_WIDTH = 3072
"""Channels of the transformer that the rates were measured with."""
RATES_TOKENS = 4096
"""Text and image tokens, at least: of fewer, launches cost more than operations."""
ATTENTION_RATE = 624e12
LINEAR_RATE = {True: 547e12, False: 391e12}
"""By whether the blocks are compiled."""
# blocks' weights from pinned memory, in the 1.16 s of a streamed step at 2048^2
_COPY_RATE = 20.5e9
# before the first step: compiling; eager, between what 2048^2 and schnell's 4096^2 took
_FIRST_SECONDS = {True: 19.0, False: 2.0}
# decoding: what the picture of 2048^2 took more than the benchmark, in which cuDNN had run before;
# then, by 2048^2 pixels, convolutions and attention, fitted to decodings from 1024^2 to 8192^2
_DECODE_SECONDS = (0.4, 0.365, 0.051)


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
    bits: Bits | None = None
    """What a part quantises the blocks' linear layers to."""


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


class Operations(NamedTuple):
    """Of one forward on one sample: multiplications and additions."""

    linear: float
    attention: float


@dataclass(frozen=True)
class Seconds:
    """What a picture takes on one H200, once the model is loaded and the prompt encoded."""

    first: float
    """Before the first step, once: compiling, or choosing the attention."""
    step: float
    decode: float

    def total(self, steps: int, num_pictures: int = 1) -> float:
        """Add up pictures of so many steps."""
        return self.first + num_pictures * (steps * self.step + self.decode)


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
    resident = _count_resident(transformer, request, tier)
    sample = max(_list_sampling(models, request, tier, resident), key=lambda stage: stage.peak)
    after = {"streamed": 0, "offload": 0}.get(tier, resident + request.adapter_bytes)
    host_bytes = resident if tier in ("streamed", "offload", "8bit") else 0
    return Estimate(
        tier,
        # bitsandbytes quantises on the device while the model loads
        _estimate_encode(models, tier, resident if tier == "4bit" else 0, device_bytes),
        sample,
        _estimate_decode(models["vae"], request, after + vae_bytes, device_bytes),
        host_bytes,
    )


def count_operations(
    transformer: FluxTransformer2DModel, tokens: int, keys: float | None = None
) -> Operations:
    """Count the operations of a forward on one sample.

    Args:
        transformer: Its shape counts.
        tokens: Text and image tokens.
        keys: That a token sees; all tokens unless attention is local.
    """
    channels: int = transformer.inner_dim
    blocks = len(list_blocks(transformer))
    return Operations(
        24 * channels**2 * tokens * blocks, 4 * channels * tokens * (keys or tokens) * blocks
    )


def estimate_seconds(
    transformer: FluxTransformer2DModel, request: Request, tier: Tier
) -> Seconds | None:
    """Estimate the time of a picture on an H200.

    Args:
        transformer: Its shape counts.
        request: What is to be made.
        tier: Where the weights are.

    Returns:
        None for what was not measured: all but resident and streamed weights of FLUX.1's shape in
        full precision on one GPU, from 1024 x 1024 on. Streamed, a step takes as long as copying
        the blocks, or as computing them if that is longer.
    """
    exact = tier in ("resident", "streamed") and request.bits is None
    measured = exact and request.num_ranks == 1
    tokens = num_image_tokens(request.height, request.width) + request.text_tokens
    if not measured or transformer.inner_dim != RATES_WIDTH or tokens < RATES_TOKENS:
        return None
    forward = count_operations(transformer, tokens)
    step = forward.linear / LINEAR_RATE[request.compiled] + forward.attention / ATTENTION_RATE
    if tier == "streamed":
        step = max(step, sum(map(count_bytes, _kinds(transformer))) / _COPY_RATE)
    squares = request.height * request.width / 2048**2
    fixed, convolutions, attention = _DECODE_SECONDS
    return Seconds(
        _FIRST_SECONDS[request.compiled],
        step,
        fixed + convolutions * squares + attention * squares**2,
    )


def count_bytes(module: nn.Module) -> int:
    """Return the size of a module's parameters and buffers in bfloat16."""
    return NUMBER_BYTES * sum(t.numel() for t in [*module.parameters(), *module.buffers()])


def round_pinned(num_bytes: int) -> int:
    """Return what pinning takes: torch's allocator rounds up to a power of two."""
    return 1 << max(num_bytes - 1, 0).bit_length()


def stream_text(tier: Tier, encoder_bytes: int, device_bytes: int) -> bool:
    """Tell whether text encoders are streamed: where asked for, and where they do not fit."""
    fit = encoder_bytes + TEXT_ACTIVATION_BYTES <= USABLE * device_bytes
    return tier == "streamed" or not fit


def quantized_bytes(modules: Iterable[nn.Module], bits: Tier | Bits) -> int:
    """Return the size of modules whose linear layers are quantised."""
    modules = list(modules)
    saved = NUMBER_BYTES - _QUANTIZED_BYTES[bits]
    numbers = sum(layer.weight.numel() for layer in _list_quantized(modules, bits))
    return sum(map(count_bytes, modules)) - round(saved * numbers)


def _list_quantized(modules: Iterable[nn.Module], bits: Tier | Bits) -> list[nn.Linear]:
    """List the layers that are quantised; with fp8 the modulation keeps its precision."""
    return [
        layer
        for module in modules
        for name, layer in module.named_modules()
        if isinstance(layer, nn.Linear) and not (bits == "fp8" and "norm" in name)
    ]


def _kinds(transformer: Any) -> tuple[nn.ModuleList, nn.ModuleList]:
    """Return the double and the single blocks."""
    return transformer.transformer_blocks, transformer.single_transformer_blocks


def _count_resident(transformer: Any, request: Request, tier: Tier) -> int:
    """Return the size of a transformer that is whole on the device."""
    if tier in QUANTIZED:
        return quantized_bytes([transformer], tier)
    if request.bits is None:
        return count_bytes(transformer)
    kinds = _kinds(transformer)
    saved = sum(map(count_bytes, kinds)) - quantized_bytes(kinds, request.bits)
    return count_bytes(transformer) - saved


def _list_sampling(
    models: Mapping[str, Any], request: Request, tier: Tier, resident: int
) -> Iterator[Stage]:
    """Give the peak in the double and in the single blocks."""
    transformer, vae_bytes = models["transformer"], count_bytes(models["vae"])
    tokens = num_image_tokens(request.height, request.width) + request.text_tokens
    config = transformer.config
    channels = config.num_attention_heads * config.attention_head_dim
    own_tokens = -(-tokens // request.num_ranks)
    one_map = own_tokens * channels * NUMBER_BYTES
    rope_tables = own_tokens * config.attention_head_dim * 2 * 4  # cos and sin in float32
    maps = _COMPILED if request.compiled and tier not in QUANTIZED else _CHUNKED
    kinds = _kinds(transformer)
    bits = request.bits
    blocks = [quantized_bytes([kind], bits) if bits else count_bytes(kind) for kind in kinds]
    num_blocks = sum(len(kind) for kind in kinds)
    for kind, kind_bytes, num_maps in zip(kinds, blocks, maps, strict=True):
        if not len(kind):
            continue
        weights = resident + request.adapter_bytes
        if tier == "streamed":  # this block and the next
            weights = resident - sum(blocks)
            weights += 2 * kind_bytes // len(kind) + 2 * request.adapter_bytes // num_blocks
        if tier != "offload":
            weights += vae_bytes
        yield Stage(weights, num_maps * one_map + rope_tables)
    if bits == "4bit":  # quantised on the device, before the weights go where they live
        yield Stage(resident, 0)


def _estimate_encode(models: Mapping[str, Any], tier: Tier, held: int, device_bytes: int) -> Stage:
    encoders = models["text_encoder"], models["text_encoder_2"]
    weights = sum(map(count_bytes, encoders))
    if stream_text(tier, weights, device_bytes - held):
        # a layer and the next; the smaller encoder stays on the CPU
        weights = 2 * max(p.numel() * NUMBER_BYTES for p in encoders[1].parameters())
    return Stage(held + weights, TEXT_ACTIVATION_BYTES)


def _estimate_decode(
    vae: AutoencoderKL, request: Request, weights: int, device_bytes: int
) -> Stage:
    gpu = torch.device("cuda")
    max_bytes = vae_bytes(gpu, device_bytes - weights, request.height * request.width)
    try:
        plan = plan_decode(
            vae, request.height, request.width,
            max_bytes=max_bytes, dtype=torch.bfloat16, device=gpu, num_ranks=request.num_ranks,
        )  # fmt: skip
    except MemoryError:
        return Stage(weights, None)
    return Stage(weights, plan.peak_bytes)
