"""The attention that trains: the fastest whose gradients are right here."""

from contextlib import AbstractContextManager, nullcontext

import torch
from diffusers.models.attention_dispatch import (
    AttentionBackendName,
    _AttentionBackendRegistry,
    attention_backend,
)

from urae.backbones.attention import CANDIDATES, backend, pick_attention


def choose_attention(
    device: torch.device,
    dtype: torch.dtype,
    *,
    heads: int,
    head_dim: int,
    tokens: int,
    context_parallel: int = 1,
) -> str | None:
    """Name the fastest attention whose gradients are right, for sequences of this shape.

    A backend that `DIFFUSERS_ATTN_BACKEND` names is checked and kept.

    Args:
        device: Where training runs.
        dtype: Of the activations.
        heads: Of an attention.
        head_dim: Channels of a head.
        tokens: Of the longest sequence, text and image.
        context_parallel: Ranks that share them; each has all tokens of a part of the heads.

    Returns:
        One of diffusers' backends; None on a CPU, where torch decides.

    Raises:
        FloatingPointError: If no backend gives right gradients.
    """
    if device.type != "cuda":
        return None
    wanted = _AttentionBackendRegistry.get_active_backend()[0]
    names = CANDIDATES if wanted == AttentionBackendName.NATIVE else (wanted.value,)
    possible = names if context_parallel == 1 else filter(_can_be_split, names)
    candidates = {name: backend(name) for name in possible}
    shape = (1, tokens, heads // context_parallel, head_dim)
    return pick_attention(candidates, shape, dtype, device)


def use_attention(name: str | None) -> AbstractContextManager[None]:
    """Attend as `choose_attention` says."""
    return nullcontext() if name is None else attention_backend(name)


def _can_be_split(name: str) -> bool:
    member = AttentionBackendName(name)
    return bool(_AttentionBackendRegistry._is_context_parallel_available(member))
