"""The first forward of each kind is looked at: numbers that are not finite are named at once."""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from diffusers import FluxTransformer2DModel
from torch import Tensor, nn

from urae.backbones.attention import active_backend
from urae.generate.parts import EXACT, Part
from urae.local_attention import list_processors

_INPUTS = ("hidden_states", "encoder_hidden_states", "pooled_projections")


def check_finite(transformer: FluxTransformer2DModel, parts: Sequence[Part]) -> Callable[[], None]:
    """Look at the transformer's output once for each size, batch, dtype and kind of attention.

    That one look waits for the device; later steps do not.

    Args:
        transformer: With its parts in place.
        parts: Those parts, for the error.

    Returns:
        What undoes it.
    """
    checked: set[Any] = set()

    @torch.compiler.disable  # type: ignore[untyped-decorator]
    def check(_module: nn.Module, _args: Any, kwargs: dict[str, Any], output: Any) -> None:
        velocity: Tensor = output[0]
        is_local = "attention_mask" in (kwargs.get("joint_attention_kwargs") or {})
        tokens = kwargs["hidden_states"].shape  # which may be fewer than those of the output
        kind = (tokens, is_local, velocity.dtype, velocity.device)
        if kind in checked:
            return
        if not bool(velocity.isfinite().all()):
            raise FloatingPointError(_explain(transformer, parts, kwargs, velocity))
        checked.add(kind)

    undo: Callable[[], None] = transformer.register_forward_hook(check, with_kwargs=True).remove
    return undo


def _explain(
    transformer: Any, parts: Sequence[Part], kwargs: dict[str, Any], velocity: Tensor
) -> str:
    """Say which inputs, or else which backend and parts, the numbers may come from."""
    for name in _INPUTS:
        if (given := kwargs.get(name)) is not None and not bool(given.isfinite().all()):
            return (
                f"the transformer was given {name} that are not finite; the fault is in what made "
                "them (a text encoder, or your own latents), not in the transformer"
            )
    backends = {each._attention_backend for each in list_processors(transformer)}
    active = active_backend()
    names = sorted({getattr(each or active, "value", str(each)) for each in backends})
    inexact = [str(part) for part in parts if part.name not in EXACT]
    without = f" leaving out {', '.join(inexact)}," if inexact else ""
    return (
        f"the first step is not finite at {velocity.shape[1]} tokens, with attention "
        f"{', '.join(names)} in {velocity.dtype} on {velocity.device}; try{without} "
        "pipe.transformer.set_attention_backend('_native_math'), or "
        "DIFFUSERS_ATTN_BACKEND=_native_math in the environment; if the result is still not "
        "finite, a weight is not finite"
    )
