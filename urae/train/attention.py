"""The attention that trains: the fastest of diffusers' own whose gradients are right here."""

import logging
import math
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

import torch
from diffusers.models.attention_dispatch import (
    AttentionBackendName,
    _AttentionBackendRegistry,
    attention_backend,
    dispatch_attention_fn,
)
from jaxtyping import Float
from torch import Tensor

logger = logging.getLogger(__name__)

Attend = Callable[[Tensor, Tensor, Tensor], Tensor]
Shape = tuple[int, int, int, int]
"""Batch, tokens, heads, channels of a head."""

# plain `native` is no candidate: it gives cuDNN transposed views, on which the gradients of torch
# 2.11 are NaN; `_native_cudnn` gives it copies
_CANDIDATES = ("_native_cudnn", "_native_flash", "_native_efficient")
_CHECK_TOKENS = 1536
_MAX_ERROR = 0.03  # of gradients; bfloat16's own rounding gives about 0.005


@contextmanager
def right_attention(
    device: torch.device, dtype: torch.dtype, *, heads: int, head_dim: int, tokens: int
) -> Iterator[None]:
    """Train with the fastest attention whose gradients are right, for sequences of this shape.

    A backend that `DIFFUSERS_ATTN_BACKEND` names is checked and kept. On a CPU torch decides.

    Args:
        device: Where training runs.
        dtype: Of the activations.
        heads: Of an attention.
        head_dim: Channels of a head.
        tokens: Of the longest sequence, text and image.

    Raises:
        FloatingPointError: If no backend gives right gradients.
    """
    if device.type != "cuda":
        yield
        return
    wanted = _AttentionBackendRegistry.get_active_backend()[0]
    names = _CANDIDATES if wanted == AttentionBackendName.NATIVE else (wanted.value,)
    candidates = {name: backend(name) for name in names}
    with attention_backend(pick_attention(candidates, (1, tokens, heads, head_dim), dtype, device)):
        yield


def backend(name: str) -> Attend:
    """Return one of diffusers' attentions as a function of query, key and value."""

    member = AttentionBackendName(name)

    def attend(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        output: Tensor = dispatch_attention_fn(query, key, value, backend=member)
        return output

    return attend


def pick_attention(
    candidates: dict[str, Attend], shape: Shape, dtype: torch.dtype, device: torch.device
) -> str:
    """Return the name of the fastest attention whose gradients are right.

    Each is checked against float32 on up to 1,536 tokens, then timed at the full shape, where its
    gradients must be finite.

    Args:
        candidates: By name.
        shape: Of the longest sequence.
        dtype: Of the activations.
        device: Where to try.

    Raises:
        FloatingPointError: If all gradients are wrong; says how for each.
    """
    batch, tokens, heads, head_dim = shape
    small = (batch, min(tokens, _CHECK_TOKENS), heads, head_dim)
    faults, seconds = {}, {}
    for name, attend in candidates.items():
        try:
            error = measure_error(attend, small, dtype, device)
            if error > _MAX_ERROR:
                faults[name] = f"gradients are {error:.3g} off"
                continue
            taken, finite = _time(attend, shape, dtype, device)
            if finite:
                seconds[name] = taken
            else:
                faults[name] = f"gradients are not finite at {tokens} tokens"
        except torch.OutOfMemoryError:
            raise
        except RuntimeError as reason:  # this device or build of torch has no such kernel
            faults[name] = str(reason).splitlines()[0]
    for name, fault in faults.items():
        logger.info("attention %s is left out: %s", name, fault)
    if not seconds:
        texts = "; ".join(f"{name}: {fault}" for name, fault in faults.items())
        raise FloatingPointError(
            f"no attention gives right gradients on {device} in {dtype} ({texts}); another version "
            "of torch may"
        )
    best = min(seconds, key=lambda name: seconds[name])
    logger.info("attention %s: %.1f ms forward and backward", best, 1000 * seconds[best])
    return best


def measure_error(attend: Attend, shape: Shape, dtype: torch.dtype, device: torch.device) -> float:
    """Return the largest relative error of an attention's gradients against float32.

    Returns:
        Infinity if one is not finite.
    """
    inputs = _draw(shape, dtype, device)
    found = _differentiate(attend, inputs)
    wanted = _differentiate(backend("_native_math"), [each.float() for each in inputs])
    errors = [
        ((one.float() - other).norm() / other.norm()).item()
        for one, other in zip(found, wanted, strict=True)
    ]
    return max(error if math.isfinite(error) else math.inf for error in errors)


def _draw(shape: Shape, dtype: torch.dtype, device: torch.device) -> list[Tensor]:
    generator = torch.Generator(device).manual_seed(0)
    return [torch.randn(shape, generator=generator, device=device).to(dtype) for _ in range(3)]


def _differentiate(attend: Attend, inputs: Sequence[Float[Tensor, "b l h d"]]) -> list[Tensor]:
    """Return the gradients of query, key and value."""
    leaves = [each.detach().requires_grad_() for each in inputs]
    output = attend(*leaves)
    return list(torch.autograd.grad(output, leaves, inputs[0].view_as(output)))


def _time(
    attend: Attend, shape: Shape, dtype: torch.dtype, device: torch.device
) -> tuple[float, bool]:
    """Return seconds forward and backward, and whether all gradients are finite."""
    inputs = _draw(shape, dtype, device)
    for _ in range(2):  # the first is not counted
        _synchronize(device)
        began = time.perf_counter()
        gradients = _differentiate(attend, inputs)
        _synchronize(device)
        seconds = time.perf_counter() - began
    return seconds, all(bool(each.isfinite().all()) for each in gradients)


def _synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
