"""What the backward pass keeps of a block, where, and what it recomputes; compiled blocks."""

import logging
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, Literal

import torch
from diffusers import FluxTransformer2DModel
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks
from torch.utils.checkpoint import (
    CheckpointPolicy,
    checkpoint,
    create_selective_checkpoint_contexts,
)

from urae.backbones.flux import MAX_TEXT_TOKENS
from urae.backbones.free_memory import free_bytes
from urae.features.dataset import Sample
from urae.generate.speed import keep_compiled, pays_to_compile
from urae.geometry import num_image_tokens
from urae.train.config import TrainConfig

logger = logging.getLogger(__name__)

Checkpointing = Literal["off", "selective", "full", "offload"]

_ATTENTIONS = {
    torch.ops.aten._scaled_dot_product_cudnn_attention.default,
    torch.ops.aten._scaled_dot_product_flash_attention.default,
    torch.ops.aten._scaled_dot_product_efficient_attention.default,
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu.default,
    torch.ops.higher_order.flex_attention,
}

# on an H200 a 2K step with 16,896 tokens of 3072 channels took 8.2 GiB beyond the adapter, 5.5 of
# them the inputs of 57 blocks and 0.3 the optimizer's (docs/performance.md)
_STEP_BYTES = 50  # a token and channel, of the block that is recomputed
_SPARE_SHARE = 0.1  # of the free memory, for what splits it up


def prepare_blocks(
    transformer: FluxTransformer2DModel,
    config: TrainConfig,
    samples: Sequence[Sample],
    device: torch.device,
) -> None:
    """Let the blocks run in training as the recipe says, or as suits the device.

    Args:
        transformer: On the device, with its adapters and nothing else to come.
        config: Of the run.
        samples: Of the run; the largest counts.
        device: Where it trains.
    """
    checkpointing = config.gradient_checkpointing
    if checkpointing == "auto":
        tokens = config.batch_size * count_tokens(samples) // config.context_parallel
        checkpointing = choose_checkpointing(
            transformer, tokens, transformer.dtype, free_bytes(device)
        )
    compiled = config.compile
    if compiled is None and config.shard:
        compiled = False
    if compiled is None:
        largest = max(samples, key=lambda sample: sample.height * sample.width)
        pictures = config.batch_size * config.gradient_accumulation
        compiled = pays_to_compile(device, largest.height, largest.width, config.steps, pictures)
    set_checkpointing(transformer, checkpointing, compiled=compiled)


def count_tokens(samples: Sequence[Sample]) -> int:
    """Return the text and image tokens of the largest sample, the text as long as FLUX reads."""
    return MAX_TEXT_TOKENS + max(num_image_tokens(each.height, each.width) for each in samples)


def choose_checkpointing(
    transformer: FluxTransformer2DModel, tokens: int, dtype: torch.dtype, free_bytes: int
) -> Checkpointing:
    """Keep the attentions' outputs where there is room, the blocks' inputs on the host where not.

    Outputs of attention are the dearest to recompute.

    Args:
        transformer: Its shape counts.
        tokens: Text and image tokens of the largest batch.
        dtype: Of the activations.
        free_bytes: On the device, weights and optimizer in place.
    """
    ways: tuple[Checkpointing, ...] = ("selective", "full", "offload")
    sizes = {way: count_step_bytes(transformer, tokens, dtype, way) for way in ways}
    fitting = (way for way in ways if sizes[way] < (1 - _SPARE_SHARE) * free_bytes)
    chosen = next(fitting, ways[-1])
    logger.info(
        "gradient checkpointing %s: %.1f GiB free, a step takes %s", chosen, free_bytes / 2**30,
        ", ".join(f"{size / 2**30:.1f} with {way}" for way, size in sizes.items()),
    )  # fmt: skip
    return chosen


def count_step_bytes(
    transformer: FluxTransformer2DModel,
    tokens: int,
    dtype: torch.dtype,
    checkpointing: Checkpointing,
) -> int:
    """Estimate the memory of the device that the activations of a training step take.

    Args:
        transformer: Its shape counts; it may be on the meta device.
        tokens: Text and image tokens of the batch.
        dtype: Of the activations.
        checkpointing: As of `set_checkpointing`, but not `off`.
    """
    channels: int = transformer.inner_dim
    num_blocks = len(transformer.transformer_blocks) + len(transformer.single_transformer_blocks)
    if checkpointing == "offload":
        num_blocks = min(num_blocks, 2)  # one is copied while the next computes
    kept = tokens * channels * dtype.itemsize
    if checkpointing == "selective":
        kept = 2 * kept + 4 * tokens * int(transformer.config.num_attention_heads)
    return num_blocks * kept + tokens * channels * _STEP_BYTES * dtype.itemsize // 2


def set_checkpointing(
    transformer: FluxTransformer2DModel, checkpointing: Checkpointing, *, compiled: bool = False
) -> None:
    """Decide how the transformer's blocks run in training; a forward without gradients stays.

    Args:
        transformer: With its adapters; it goes through its `enable_gradient_checkpointing`.
        checkpointing: `off` keeps all activations, `full` the blocks' inputs, `selective` the
            outputs of attention too: they are the dearest to recompute. `offload` keeps the blocks'
            inputs in the host's memory, pinned. The numbers are the same.
        compiled: Whether blocks are compiled: both kinds once, and once more for all sizes when a
            second size comes.
    """
    contexts = partial(create_selective_checkpoint_contexts, _keep_attention)
    options: dict[str, Any] = {"context_fn": contexts} if checkpointing == "selective" else {}

    def run(block: nn.Module, *inputs: Any) -> Any:
        if checkpointing == "off":
            return block(*inputs)
        return checkpoint(_call, block, *inputs, use_reentrant=False, **options)

    wrapped: Callable[..., Any] = run
    if compiled:
        keep_compiled()
        # it says that in-place operations would be wrong, of which these blocks have none
        logging.getLogger("torch._higher_order_ops.wrap").setLevel(logging.ERROR)
        wrapped = torch.compile(run)
    if checkpointing == "offload":
        wrapped = _offload(wrapped)
    if compiled:
        wrapped = _with_like_inputs(wrapped)
    transformer.enable_gradient_checkpointing(wrapped)


def _call(block: nn.Module, *inputs: Any) -> Any:
    return block(*inputs)


def _with_like_inputs(run: Callable[..., Any]) -> Callable[..., Any]:
    """Make the first blocks' inputs like the others', so that one compilation serves all."""

    def run_like(block: nn.Module, hidden: Tensor, text: Tensor, *rest: Any) -> Any:
        hidden, text = (
            each if each.requires_grad else each.detach().requires_grad_()
            for each in (hidden.contiguous(), text.contiguous())
        )
        return run(block, hidden, text, *rest)

    return run_like


def _offload(run: Callable[..., Any]) -> Callable[..., Any]:
    """Keep the blocks' inputs, of all that is saved, in the host's memory until they are needed.

    Copies are queued where the blocks compute, so that nobody waits and none is read too early.
    """

    def run_offloaded(block: nn.Module, hidden: Tensor, text: Tensor, *rest: Any) -> Any:
        inputs = {each.untyped_storage().data_ptr() for each in (hidden, text)}

        def pack(saved: Tensor) -> Tensor | tuple[torch.device, Tensor]:
            if saved.untyped_storage().data_ptr() not in inputs:
                return saved
            kept = torch.empty(saved.shape, dtype=saved.dtype, pin_memory=saved.is_cuda)
            return saved.device, kept.copy_(saved, non_blocking=True)

        with saved_tensors_hooks(pack, _bring_back):
            return run(block, hidden, text, *rest)

    return run_offloaded


def _bring_back(packed: Tensor | tuple[torch.device, Tensor]) -> Tensor:
    if isinstance(packed, Tensor):
        return packed
    device, kept = packed
    return kept.to(device, non_blocking=True)


def _keep_attention(context: Any, operation: Any, *args: Any, **kwargs: Any) -> CheckpointPolicy:
    kept = operation in _ATTENTIONS
    return CheckpointPolicy.MUST_SAVE if kept else CheckpointPolicy.MUST_RECOMPUTE
