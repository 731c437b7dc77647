"""The attention that trains: the fastest whose gradients are right here."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from diffusers.models.attention_dispatch import (
    AttentionBackendName,
    _AttentionBackendRegistry,
    attention_backend,
)

from urae.backbones.attention import CANDIDATES, backend, pick_attention


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
    names = CANDIDATES if wanted == AttentionBackendName.NATIVE else (wanted.value,)
    candidates = {name: backend(name) for name in names}
    with attention_backend(pick_attention(candidates, (1, tokens, heads, head_dim), dtype, device)):
        yield
