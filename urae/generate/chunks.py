"""FLUX's token-wise layers on some tokens at a time: the same numbers, a smaller peak.

The MLP widens each token fourfold, and a single block holds that map beside its attention. Here
the map is made and used up chunk by chunk. No forward is replaced: a feed-forward layer is wrapped,
and a single block's MLP moves into its last layer, whose input then is the normalised tokens.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from diffusers import FluxTransformer2DModel
from jaxtyping import Float
from torch import Tensor, nn

CHUNK_TOKENS = 4096
"""At a time: a sixteenth of a 4096 x 4096 picture, enough for full matrix products."""


@contextmanager
def token_chunks(
    transformer: FluxTransformer2DModel, num_tokens: int = CHUNK_TOKENS
) -> Iterator[None]:
    """Run the blocks' MLPs `num_tokens` tokens at a time, and restore the blocks at the end.

    Weights and adapters are used where they are. The result is that of the whole but for the
    rounding of matrix products of another height.

    Args:
        transformer: A stock FLUX transformer, adapted or not; not yet compiled or offloaded.
        num_tokens: At a time.
    """
    swaps: list[tuple[nn.Module, str, nn.Module]] = []
    for block in transformer.transformer_blocks:
        swaps.append((block, "ff", _InChunks(block.ff, num_tokens)))
    for block in transformer.single_transformer_blocks:
        swaps.append((block, "proj_out", _InChunks(_MlpAndProjection(block), num_tokens)))
        swaps += [(block, name, nn.Identity()) for name in ("proj_mlp", "act_mlp")]
    originals = [(block, name, getattr(block, name)) for block, name, _ in swaps]
    try:
        for block, name, layer in swaps:
            setattr(block, name, layer)
        yield
    finally:
        for block, name, layer in originals:
            setattr(block, name, layer)


class _InChunks(nn.Module):
    """A token-wise layer on some tokens at a time."""

    def __init__(self, layer: nn.Module, num_tokens: int) -> None:
        super().__init__()
        self.layer = layer
        self.num_tokens = num_tokens

    def forward(self, tokens: Float[Tensor, "b l c"]) -> Float[Tensor, "b l d"]:
        made: Tensor | None = None
        start = 0
        for part in torch.split(tokens, self.num_tokens, dim=1):
            done = self.layer(part)
            if made is None:
                made = done.new_empty(*tokens.shape[:2], done.shape[2])
            made[:, start : start + part.shape[1]] = done
            start += part.shape[1]
        assert made is not None
        return made


class _MlpAndProjection(nn.Module):
    """A single block's MLP and its last projection, of attention and MLP together."""

    def __init__(self, block: Any) -> None:
        super().__init__()
        self.proj_mlp: nn.Module = block.proj_mlp
        self.act_mlp: nn.Module = block.act_mlp
        self.proj_out: nn.Module = block.proj_out

    def forward(self, joined: Float[Tensor, "b l d"]) -> Float[Tensor, "b l c"]:
        attention, normalized = joined.chunk(2, dim=2)
        mlp = self.act_mlp(self.proj_mlp(normalized))
        projected: Tensor = self.proj_out(torch.cat([attention, mlp], dim=2))
        return projected
