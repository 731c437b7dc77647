"""The fastest of diffusers' own attentions whose numbers are right on this device."""

import logging
import math
import time
from collections.abc import Callable, Sequence
from importlib import import_module
from importlib.util import find_spec

import torch
from diffusers.models import attention_dispatch
from diffusers.models.attention_dispatch import (
    AttentionBackendName,
    _AttentionBackendRegistry,
    _check_attention_backend_requirements,
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
CANDIDATES = ("_native_cudnn", "_native_flash", "_native_efficient")
"""Those of torch, each a kernel of its own."""
FORWARD_ONLY = "fa3_fwd_interface"
"""FlashAttention-3 without its backward pass, as PyPI has it built: the package fa3-fwd."""
_CHECK_TOKENS = 1536
_MAX_ERROR = 0.03  # bfloat16's own rounding gives about 0.005 in gradients


def find_lack(name: str) -> str | None:
    """Say what one of diffusers' attentions needs and this machine lacks, if anything."""
    if name == AttentionBackendName._FLASH_3:
        _lend_flash_3()
    try:
        _check_attention_backend_requirements(AttentionBackendName(name))
    except RuntimeError as reason:  # a package is missing, too old, or not for this build of torch
        return str(reason)
    return None


def _lend_flash_3() -> None:
    """Give diffusers the FlashAttention-3 that PyPI has, where it has not found its own.

    It looks for the name of a build from source, which PyPI does not have.
    """
    if attention_dispatch._CAN_USE_FLASH_ATTN_3 or find_spec(FORWARD_ONLY) is None:
        return
    try:
        attend = import_module(FORWARD_ONLY).flash_attn_func
    except (ImportError, OSError, RuntimeError) as reason:  # built for another torch or CUDA
        logger.warning("fa3-fwd is installed but not used: %s", reason)
        return
    attention_dispatch.flash_attn_3_func = attend
    attention_dispatch._CAN_USE_FLASH_ATTN_3 = True


def check_backend(name: str) -> None:
    """Refuse one of diffusers' attentions whose package cannot be used here.

    Raises:
        ModuleNotFoundError: If it is missing, too old, or does not go with this build of torch.
    """
    if lack := find_lack(name):
        raise ModuleNotFoundError(
            f"{lack} Install it with pip (an installed copy may be built for another torch), or "
            "unset DIFFUSERS_ATTN_BACKEND"
        )


def active_backend() -> AttentionBackendName:
    """Return diffusers' attention of the process, which is also what its environment names."""
    return _AttentionBackendRegistry.get_active_backend()[0]


def check_active_backend() -> None:
    """Refuse an attention of the user's choice that cannot run here; needs no weights.

    Raises:
        ModuleNotFoundError: As `check_backend`.
    """
    check_backend(active_backend())


def name_inexact_backend() -> str | None:
    """Name the attention of the user's choice if it multiplies in 8 bits: SageAttention."""
    name: str = active_backend().value
    return name if "sage" in name else None


def backend(name: str) -> Attend:
    """Return one of diffusers' attentions as a function of query, key and value.

    Raises:
        ModuleNotFoundError: As `check_backend`.
    """
    check_backend(name)
    member = AttentionBackendName(name)

    def attend(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        output: Tensor = dispatch_attention_fn(query, key, value, backend=member)
        return output

    return attend


def pick_attention(
    candidates: dict[str, Attend],
    shape: Shape,
    dtype: torch.dtype,
    device: torch.device,
    *,
    backward: bool = True,
) -> str:
    """Return the name of the fastest attention whose gradients, or outputs, are right.

    Each is checked against float32 on up to 1,536 tokens of one sample, whose scores are small,
    then timed at the full shape, where its numbers must be finite.

    Args:
        candidates: By name.
        shape: Of the longest sequence.
        dtype: Of the activations.
        device: Where to try.
        backward: Whether gradients matter; else the outputs alone.

    Raises:
        FloatingPointError: If all are wrong; says how for each.
        OSError: If one crashes the device, which ends what this process can do on it.
    """
    _, tokens, heads, head_dim = shape
    small = (1, min(tokens, _CHECK_TOKENS), heads, head_dim)
    what = "gradients" if backward else "outputs"
    faults, seconds = {}, {}
    for name, attend in candidates.items():
        try:
            error = measure_error(attend, small, dtype, device, backward=backward)
            if error > _MAX_ERROR:
                faults[name] = f"{what} are {error:.3g} off"
                continue
            taken, finite = _time(attend, shape, dtype, device, backward)
            if finite:
                seconds[name] = taken
            else:
                faults[name] = f"{what} are not finite at {tokens} tokens"
        except torch.OutOfMemoryError:
            raise
        except (RuntimeError, ValueError) as reason:  # no such kernel for this device or dtype
            _check_alive(device, name, reason)
            faults[name] = str(reason).splitlines()[0]
    for name, fault in faults.items():
        logger.info("attention %s is left out: %s", name, fault)
    if not seconds:
        texts = "; ".join(f"{name}: {fault}" for name, fault in faults.items())
        raise FloatingPointError(
            f"no attention backend gives correct {what} on {device} in {dtype} ({texts}); try "
            "another version of torch"
        )
    best = min(seconds, key=lambda name: seconds[name])
    logger.info("attention %s: %.1f ms for %s", best, 1000 * seconds[best], what)
    return best


def measure_error(
    attend: Attend,
    shape: Shape,
    dtype: torch.dtype,
    device: torch.device,
    *,
    backward: bool = True,
) -> float:
    """Return the largest relative error of an attention's gradients, or outputs, against float32.

    Returns:
        Infinity if one is not finite.
    """
    inputs = _draw(shape, dtype, device)
    found = _run(attend, inputs, backward)
    wanted = _run(backend("_native_math"), [each.float() for each in inputs], backward)
    errors = [
        ((one.float() - other).norm() / other.norm()).item()
        for one, other in zip(found, wanted, strict=True)
    ]
    return max(error if math.isfinite(error) else math.inf for error in errors)


def _draw(shape: Shape, dtype: torch.dtype, device: torch.device) -> list[Tensor]:
    generator = torch.Generator(device).manual_seed(0)
    return [torch.randn(shape, generator=generator, device=device).to(dtype) for _ in range(3)]


def _run(
    attend: Attend, inputs: Sequence[Float[Tensor, "b l h d"]], backward: bool
) -> list[Tensor]:
    """Return the gradients of query, key and value, or the output alone."""
    if not backward:
        with torch.no_grad():
            return [attend(*inputs)]
    leaves = [each.detach().requires_grad_() for each in inputs]
    output = attend(*leaves)
    return list(torch.autograd.grad(output, leaves, inputs[0].view_as(output)))


def _time(
    attend: Attend, shape: Shape, dtype: torch.dtype, device: torch.device, backward: bool
) -> tuple[float, bool]:
    """Return the seconds of a run, and whether all its numbers are finite."""
    inputs = _draw(shape, dtype, device)
    for _ in range(2):  # the first is not counted
        _synchronize(device)
        began = time.perf_counter()
        numbers = _run(attend, inputs, backward)
        _synchronize(device)
        seconds = time.perf_counter() - began
    return seconds, all(bool(each.isfinite().all()) for each in numbers)


def _check_alive(device: torch.device, name: str, reason: Exception) -> None:
    try:
        _synchronize(device)
    except RuntimeError as error:
        raise OSError(
            f"attention {name} crashed on {device} ({name_crash(error)}); set "
            "DIFFUSERS_ATTN_BACKEND to another (_native_flash, _native_cudnn)"
        ) from reason


def name_crash(error: RuntimeError) -> str:
    """Return the first line of what CUDA says; the others are advice for its own developers."""
    return str(error).partition("\n")[0]


def _synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
