"""The attention that trains: the fastest whose gradients are right here."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from diffusers.models.attention_dispatch import AttentionBackendName, attention_backend

from urae.backbones.attention import CANDIDATES, active_backend, backend, pick_attention
from urae.backbones.context_parallel import supports_context_parallel

_TILE = 128  # keys that cuDNN's backward pass takes at a time
_CUDNN, _FLASH = AttentionBackendName._NATIVE_CUDNN, AttentionBackendName._NATIVE_FLASH


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
        tokens: Of the longest sequence, text and image; what `sound_attention` keeps from cuDNN is
            tried half a tile longer.
        context_parallel: Ranks that share them; each has all tokens of a part of the heads.

    Returns:
        One of diffusers' backends; on a CPU the one in use, by default `native`: torch decides.

    Raises:
        FloatingPointError: If no backend gives right gradients.
    """
    wanted = active_backend()
    if device.type != "cuda":
        return str(wanted.value)
    names = CANDIDATES if wanted == AttentionBackendName.NATIVE else (wanted.value,)
    possible = names if context_parallel == 1 else filter(supports_context_parallel, names)
    candidates = {name: backend(name) for name in possible}
    if _is_unsound(tokens):
        tokens += _TILE // 2
    shape = (1, tokens, heads // context_parallel, head_dim)
    return pick_attention(candidates, shape, dtype, device)


@contextmanager
def sound_attention(tokens: int) -> Iterator[None]:
    """Use flash attention in cuDNN's place where the backward pass of cuDNN cannot be trusted.

    With half a tile of keys left over, 1,088 tokens, it gave NaN or read beyond its memory (an
    H200, cuDNN 9.19), and not each time, so that no check at the start finds it. NaN at these
    lengths is known with a mask (pytorch issue 196678), at other ones it is not.

    Args:
        tokens: Of a batch's sequences.
    """
    if active_backend() == _CUDNN and _is_unsound(tokens):
        with attention_backend(_FLASH):
            yield
    else:
        yield


def _is_unsound(tokens: int) -> bool:
    return tokens % _TILE == _TILE // 2
