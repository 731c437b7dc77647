"""What the backward pass keeps of a block, where, and what it recomputes; compiled blocks."""

import logging
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from diffusers import FluxTransformer2DModel
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks
from torch.utils._pytree import tree_leaves
from torch.utils.checkpoint import (
    CheckpointPolicy,
    checkpoint,
    create_selective_checkpoint_contexts,
)

from urae.features.dataset import Sample
from urae.generate.speed import (
    can_compile,
    is_long,
    keep_compiled,
    list_blocks,
    with_usual_strides,
)
from urae.geometry import num_image_tokens
from urae.train.config import TrainConfig
from urae.train.estimate import Way, may_compile
from urae.train.host import HostKeeper, keep_outputs

_VARIANTS = 32  # of one compiled function; beyond it blocks would run uncompiled
_ATTENTIONS = {
    torch.ops.aten._scaled_dot_product_cudnn_attention.default,
    torch.ops.aten._scaled_dot_product_flash_attention.default,
    torch.ops.aten._scaled_dot_product_efficient_attention.default,
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu.default,
    torch.ops.higher_order.flex_attention,
}


def is_compiled(
    config: TrainConfig, way: Way, samples: Sequence[Sample], device: torch.device
) -> bool:
    """Tell whether the blocks are compiled, as the recipe says or where it pays.

    Blocks in 4 bits are not, nor streamed ones that keep attention's outputs.

    Args:
        config: Of the run.
        way: How a step is made to fit.
        samples: Of the run; the largest counts.
        device: Where it trains.
    """
    wanted = wants_compiled(config, way, samples)
    return wanted and (config.compile is not None or can_compile(device))


def wants_compiled(config: TrainConfig, way: Way, samples: Sequence[Sample]) -> bool:
    """Tell the same of a GPU that is not here, on which blocks can be compiled."""
    if not may_compile(config, way):
        return False
    if config.compile:
        return True
    largest = max(samples, key=lambda sample: sample.height * sample.width)
    pictures = config.batch_size * config.gradient_accumulation
    return is_long(largest.height, largest.width, config.steps, pictures)


def count_tokens(samples: Sequence[Sample]) -> int:
    """Return the text and image tokens of the largest sample."""
    return samples[0].text_tokens + max(
        num_image_tokens(each.height, each.width) for each in samples
    )


def set_checkpointing(
    transformer: FluxTransformer2DModel, way: Way, device: torch.device, *, compiled: bool = False
) -> None:
    """Decide how the transformer's blocks run in training; a forward without gradients stays.

    Args:
        transformer: With its adapters; it goes through its `enable_gradient_checkpointing`.
        way: `off` keeps all activations, `full` the blocks' inputs, `selective` the outputs of
            attention too: they are the dearest to recompute. Where it is offloaded, that is kept
            in the host's memory, pinned. The numbers are the same.
        device: Where it trains.
        compiled: Whether blocks are compiled: both kinds once, and once more for all sizes when a
            second size comes. Streamed ones are compiled inside of what brings their weights.
    """
    keeper = HostKeeper(device) if way.is_offloaded else None
    compiled = compiled and way.tier != "streamed"
    options: dict[str, Any] = {}
    if way.checkpointing == "selective":
        options["context_fn"] = partial(create_selective_checkpoint_contexts, _keep_attention)
        if keeper is not None and not compiled:
            options["context_fn"] = keep_outputs(keeper, _ATTENTIONS)

    def run(block: nn.Module, *inputs: Any) -> Any:
        if way.checkpointing == "off":
            return _call(block, *inputs)
        return checkpoint(_call, block, *inputs, use_reentrant=False, **options)

    wrapped: Callable[..., Any] = run
    if compiled:
        keep_compiled()
        # it says that in-place operations would be wrong, of which these blocks have none
        logging.getLogger("torch._higher_order_ops.wrap").setLevel(logging.ERROR)
        wrapped = _limited(torch.compile(run))
    if keeper is not None:
        wrapped = _offload(wrapped, keeper, list_blocks(transformer)[0])
    if compiled:
        wrapped = _with_like_inputs(wrapped)
    transformer.enable_gradient_checkpointing(wrapped)


def _limited(run: Callable[..., Any]) -> Callable[..., Any]:
    """Let what is compiled have its variants: both kinds of blocks, sizes, batches, attentions."""
    limit = torch._dynamo.config.patch(recompile_limit=_VARIANTS)

    def run_limited(*inputs: Any) -> Any:
        with limit:
            return run(*inputs)

    return run_limited


def _call(block: nn.Module, *inputs: Any) -> Any:
    return block(*inputs)


def _with_like_inputs(run: Callable[..., Any]) -> Callable[..., Any]:
    """Make the first blocks' inputs like the others', so that one compilation serves all."""

    def run_like(block: nn.Module, hidden: Tensor, text: Tensor, *rest: Any) -> Any:
        hidden, text = with_usual_strides(hidden), with_usual_strides(text)
        hidden, text = (
            each if each.requires_grad else _make_differentiable(each) for each in (hidden, text)
        )
        return run(block, hidden, text, *rest)

    return run_like


def _make_differentiable(tensor: Tensor) -> Tensor:
    """Give a tensor that a block before might have made: a graph holds its leaves, not those."""
    made: Tensor = _Through.apply(tensor, tensor.new_empty(0).requires_grad_())  # type: ignore[no-untyped-call]
    return made


class _Through(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, tensor: Tensor, _leaf: Tensor) -> Tensor:
        return tensor.view_as(tensor)

    @staticmethod
    def backward(ctx: Any, *_: Tensor) -> tuple[None, None]:
        return None, None


def _offload(run: Callable[..., Any], keeper: HostKeeper, first: nn.Module) -> Callable[..., Any]:
    """Keep what is saved of a block on the host: neither weights nor what all blocks share."""

    def run_offloaded(block: nn.Module, hidden: Tensor, text: Tensor, *rest: Any) -> Any:
        keeper.begin_block(is_first=block is first)
        # autograd keeps the hooks, so they may hold no map
        device = hidden.device
        shared = {_address(each) for each in tree_leaves(rest) if isinstance(each, Tensor)}
        left: set[int] = set()

        def pack(saved: Tensor) -> Any:
            if not left:  # by now the weights are where the block computes with them
                left.update(shared, map(_address, (*block.parameters(), *block.buffers())))
            is_map = saved.is_floating_point() and saved.device == device
            if not is_map or _address(saved) in left:
                return saved
            return keeper.send(saved)

        def unpack(packed: Any) -> Tensor:
            return packed if isinstance(packed, Tensor) else keeper.bring(packed)

        with saved_tensors_hooks(pack, unpack):
            return run(block, hidden, text, *rest)

    return run_offloaded


def _address(tensor: Tensor) -> int:
    return tensor.untyped_storage().data_ptr()


def _keep_attention(context: Any, operation: Any, *args: Any, **kwargs: Any) -> CheckpointPolicy:
    kept = operation in _ATTENTIONS
    return CheckpointPolicy.MUST_SAVE if kept else CheckpointPolicy.MUST_RECOMPUTE
