"""Products with torchao's int8 weights, as one operation that the compiler does not look into.

Where inductor looked into torchao's own, a compiled step of FLUX.1 took minutes (LOG.md,
2026-11-29), most likely for what it makes of products of one row, modulation's. Here a weight is
dequantised for its product and thrown away again, forward and backward.
"""

from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int8
from torch import Tensor, nn

_OPERATION = "urae::int8_linear"


class Int8Linear(nn.Linear):
    """A linear layer whose weight torchao has quantised to int8, a scale a row."""

    def forward(self, x: Float[Tensor, "*b c"]) -> Float[Tensor, "*b d"]:
        weight: Any = self.weight
        product: Tensor = torch.ops.urae.int8_linear(x, weight.qdata, weight.scale)
        return product if self.bias is None else product + self.bias


@torch.library.custom_op(_OPERATION, mutates_args=())
def _multiply(x: Tensor, weight: Tensor, scale: Tensor) -> Tensor:
    return F.linear(x, _dequantize(weight, scale, x.dtype))


@_multiply.register_fake
def _(x: Tensor, weight: Tensor, scale: Tensor) -> Tensor:
    return x.new_empty(*x.shape[:-1], len(weight))


@torch.library.custom_op(f"{_OPERATION}_backward", mutates_args=())
def _multiply_backward(gradient: Tensor, weight: Tensor, scale: Tensor) -> Tensor:
    return gradient.contiguous() @ _dequantize(weight, scale, gradient.dtype)


@_multiply_backward.register_fake
def _(gradient: Tensor, weight: Tensor, scale: Tensor) -> Tensor:
    return gradient.new_empty(*gradient.shape[:-1], weight.shape[1])


def _keep(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
    ctx.save_for_backward(*inputs[1:])


def _differentiate(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, None, None]:
    wanted = ctx.needs_input_grad[0]
    return (_multiply_backward(gradient, *ctx.saved_tensors) if wanted else None), None, None


_multiply.register_autograd(_differentiate, setup_context=_keep)


def _dequantize(
    weight: Int8[Tensor, "d c"], scale: Float[Tensor, "..."], dtype: torch.dtype
) -> Float[Tensor, "d c"]:
    return weight.to(dtype) * scale.to(dtype).reshape(-1, 1)
