"""FLUX's frozen MLPs on some tokens at a time in training: a smaller peak, the same numbers.

What widens each token fourfold is made and used up chunk by chunk, forward and backward: nothing of
it is kept, and what the backward pass needs is computed again there. It is one operation for
`torch.compile`, which would otherwise put the chunks together again.
"""

from typing import Any

import torch
from diffusers import FluxTransformer2DModel
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn.functional import gelu, linear

from urae.generate.chunks import CHUNK_TOKENS

_OPERATION = "urae::feed_forward"
_gelu_backward = torch.ops.aten.gelu_backward.default


def chunk_mlps(transformer: FluxTransformer2DModel) -> None:
    """Run the image tokens' MLPs on `CHUNK_TOKENS` tokens at a time, for good.

    A single block's MLP moves into its last layer, whose input then is the normalised tokens.
    MLPs that are quantised, or that an adapter acts on, stay whole.

    Args:
        transformer: A stock FLUX transformer with its adapters; not yet compiled or streamed.
    """
    for block in transformer.transformer_blocks:
        up, down = block.ff.net[0].proj, block.ff.net[2]
        if _is_plain(up) and _is_plain(down):
            block.ff = _FeedForward(up, down)
    for block in transformer.single_transformer_blocks:
        if _is_plain(block.proj_mlp) and _is_plain(block.proj_out):
            block.proj_out = _MlpAndProjection(block.proj_mlp, block.proj_out)
            block.proj_mlp = block.act_mlp = nn.Identity()


def _is_plain(layer: nn.Module) -> bool:
    return type(layer) is nn.Linear and type(layer.weight.data) is Tensor


class _FeedForward(nn.Module):
    """A double block's MLP."""

    def __init__(self, up: nn.Linear, down: nn.Linear) -> None:
        super().__init__()
        self.up, self.down = up, down

    def forward(self, tokens: Float[Tensor, "b l c"]) -> Float[Tensor, "b l c"]:
        up, down = self.up, self.down
        return feed_forward(tokens, up.weight, up.bias, down.weight, down.bias)


class _MlpAndProjection(nn.Module):
    """A single block's MLP and its last projection, of attention and MLP together."""

    def __init__(self, up: nn.Linear, projection: nn.Linear) -> None:
        super().__init__()
        self.up, self.projection = up, projection

    def forward(self, joined: Float[Tensor, "b l d"]) -> Float[Tensor, "b l c"]:
        attention, normalized = joined.chunk(2, dim=2)
        channels, weight = attention.shape[2], self.projection.weight
        mlp = feed_forward(
            normalized, self.up.weight, self.up.bias, weight[:, channels:], self.projection.bias
        )
        return mlp + linear(attention, weight[:, :channels])


def feed_forward(
    tokens: Float[Tensor, "b l c"],
    up: Float[Tensor, "wide c"],
    up_bias: Float[Tensor, " wide"],
    down: Float[Tensor, "c wide"],
    down_bias: Float[Tensor, " c"],
    *,
    num_tokens: int = CHUNK_TOKENS,
) -> Float[Tensor, "b l c"]:
    """Compute gelu(tokens up^T) down^T, both with biases, on `num_tokens` tokens at a time.

    Gradients flow to the tokens alone: the weights are frozen.
    """
    output: Tensor = _feed_forward(tokens, up, up_bias, down, down_bias, num_tokens)
    return output


@torch.library.custom_op(_OPERATION, mutates_args=())
def _feed_forward(
    tokens: Tensor, up: Tensor, up_bias: Tensor, down: Tensor, down_bias: Tensor, num_tokens: int
) -> Tensor:
    made = tokens.new_empty(*tokens.shape[:2], down.shape[0])
    for part, out in zip(
        *(torch.split(each, num_tokens, 1) for each in (tokens, made)), strict=True
    ):
        out.copy_(linear(gelu(linear(part, up, up_bias), approximate="tanh"), down, down_bias))
    return made


@torch.library.custom_op(f"{_OPERATION}_backward", mutates_args=())
def _feed_forward_backward(
    gradient: Tensor, tokens: Tensor, up: Tensor, up_bias: Tensor, down: Tensor, num_tokens: int
) -> Tensor:
    made = torch.empty_like(tokens, memory_format=torch.contiguous_format)
    parts = (torch.split(each, num_tokens, 1) for each in (gradient, tokens, made))
    for of_output, part, out in zip(*parts, strict=True):
        wide = linear(part, up, up_bias)
        out.copy_(_gelu_backward(of_output @ down, wide, approximate="tanh") @ up)
    return made


@_feed_forward.register_fake
def _(tokens: Tensor, up: Tensor, up_bias: Tensor, down: Tensor, *_: Any) -> Tensor:
    return tokens.new_empty(*tokens.shape[:2], down.shape[0])


@_feed_forward_backward.register_fake
def _(gradient: Tensor, tokens: Tensor, *_: Any) -> Tensor:
    return torch.empty_like(tokens, memory_format=torch.contiguous_format)


def _keep_inputs(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    *tensors, _down_bias, ctx.num_tokens = inputs
    ctx.save_for_backward(*tensors)


def _backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
    found = _feed_forward_backward(gradient, *ctx.saved_tensors, ctx.num_tokens)
    return found, None, None, None, None, None


_feed_forward.register_autograd(_backward, setup_context=_keep_inputs)
