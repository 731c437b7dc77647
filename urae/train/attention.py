"""The attention that trains: the fastest whose gradients are right here."""

import torch
from diffusers.models.attention_dispatch import (
    AttentionBackendName,
    _AttentionBackendRegistry,
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
) -> str:
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
        One of diffusers' backends; on a CPU the one in use, by default `native`: torch decides.

    Raises:
        FloatingPointError: If no backend gives right gradients.
    """
    wanted = _AttentionBackendRegistry.get_active_backend()[0]
    if device.type != "cuda":
        return str(wanted.value)
    names = CANDIDATES if wanted == AttentionBackendName.NATIVE else (wanted.value,)
    possible = names if context_parallel == 1 else filter(_can_be_split, names)
    candidates = {name: backend(name) for name in possible}
    shape = (1, tokens, heads // context_parallel, head_dim)
    return pick_attention(candidates, shape, dtype, device)


def _can_be_split(name: str) -> bool:
    member = AttentionBackendName(name)
    return bool(_AttentionBackendRegistry._is_context_parallel_available(member))
