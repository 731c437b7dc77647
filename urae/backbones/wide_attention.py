"""Attention of one wide head, which VAEs have in their middle: FLUX's is 512 wide.

torch's fast kernels end at 256, and the one for wider heads makes an eighth of an H200's
arithmetic. Two matrix products a block of queries, with a softmax in float32 between them, take
half of its time, and the memory of a block's scores (LOG.md).
"""

from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

_WIDEST = 256  # head that the fast kernels take
_BLOCK_ROWS = 2048  # queries at most
_LEAST_BLOCKS = 8  # of few queries, which are few where memory is short
_BLOCK_SCORES = 2**27  # 512 MiB in float32
_SCORE_BYTES = 4 + 4  # of a score and its softmax


def attend(
    query: Float[Tensor, "b heads queries d"],
    key: Float[Tensor, "b heads keys d"],
    value: Float[Tensor, "b heads keys d"],
) -> Float[Tensor, "b heads queries d"]:
    """Return what torch's `scaled_dot_product_attention` does, to rounding."""
    if not _is_slow(query.device, query.dtype, query.shape[-1]):
        return F.scaled_dot_product_attention(query, key, value)
    rows = _count_rows(query.shape[:2].numel(), query.shape[2], key.shape[2])
    return attend_in_blocks(query, key, value, rows)


def count_score_bytes(
    device: torch.device, dtype: torch.dtype, *, heads: int, queries: int, keys: int, width: int
) -> int:
    """Return the bytes that `attend` takes for scores, 0 where it leaves them to torch.

    Args:
        device: Where it runs.
        dtype: Of query, key and value.
        heads: Of all pictures.
        queries: Of each head.
        keys: Of each head.
        width: Of a head.
    """
    if not _is_slow(device, dtype, width):
        return 0
    return _SCORE_BYTES * heads * _count_rows(heads, queries, keys) * keys


def attend_in_blocks(query: Tensor, key: Tensor, value: Tensor, rows: int) -> Tensor:
    """Attend as `attend`, `rows` queries at a time: in float32, or half precision on CUDA."""
    queries, keys, values = (each.flatten(0, 1) for each in (query, key, value))
    found = [_attend_block(block, keys, values) for block in torch.split(queries, rows, dim=1)]
    return torch.cat(found, dim=1).view(query.shape)


def _attend_block(
    query: Float[Tensor, "heads rows d"],
    key: Float[Tensor, "heads keys d"],
    value: Float[Tensor, "heads keys d"],
) -> Float[Tensor, "heads rows d"]:
    heads, rows, width = query.shape
    precision: dict[str, Any] = {}
    if query.dtype != torch.float32:
        precision = {"out_dtype": torch.float32}
    nothing = query.new_empty(1, dtype=torch.float32).expand(heads, rows, key.shape[1])
    scores = torch.baddbmm(nothing, query, key.mT, beta=0, alpha=width**-0.5, **precision)
    shares = scores.softmax(-1)
    del scores
    return torch.bmm(shares.to(value.dtype), value)


def _count_rows(heads: int, queries: int, keys: int) -> int:
    share = -(-queries // _LEAST_BLOCKS)
    return max(1, min(_BLOCK_ROWS, share, _BLOCK_SCORES // (heads * keys)))


def _is_slow(device: torch.device, dtype: torch.dtype, width: int) -> bool:
    """Tell whether torch's own is: products of half precision into float32 are CUDA's."""
    on_cuda = device.type == "cuda" and torch.version.hip is None
    return on_cuda and dtype in (torch.bfloat16, torch.float16) and width > _WIDEST
