"""Sizes in pixels, latents and tokens, and the packing that FLUX puts between them.

A FLUX token covers 16 x 16 pixels: the VAE shrinks by 8, the transformer packs 2 x 2 latents.
"""

import torch
from jaxtyping import Float
from torch import Tensor

VAE_FACTOR = 8
PATCH = 2
TOKEN_PIXELS = VAE_FACTOR * PATCH
_MAX_SIDE = 2**20  # what no machine has memory for


def check_side(name: str, pixels: int) -> None:
    """Refuse a side that FLUX has no whole number of tokens for.

    Args:
        name: What the side is called, for the error.
        pixels: Its length.

    Raises:
        ValueError: If it is not a positive multiple of 16 pixels, up to 2^20.
    """
    if pixels > _MAX_SIDE:
        raise ValueError(f"{name} {pixels} must be at most {_MAX_SIDE} pixels")
    if pixels >= TOKEN_PIXELS and pixels % TOKEN_PIXELS == 0:
        return
    below = pixels // TOKEN_PIXELS * TOKEN_PIXELS
    nearest = [str(side) for side in (below, below + TOKEN_PIXELS) if side > 0]
    raise ValueError(
        f"{name} {pixels} is not a positive multiple of {TOKEN_PIXELS} "
        f"(VAE {VAE_FACTOR} x patch {PATCH}); try {' or '.join(nearest or [str(TOKEN_PIXELS)])}"
    )


def check_size(height: int, width: int) -> None:
    """Refuse a picture size as `check_side` does."""
    check_side("height", height)
    check_side("width", width)


def num_image_tokens(height: int, width: int) -> int:
    """Return the image tokens of a picture of `height` x `width` pixels."""
    return (height // TOKEN_PIXELS) * (width // TOKEN_PIXELS)


def pack(latents: Float[Tensor, "b c h w"]) -> Float[Tensor, "b tokens patch"]:
    """Fold each 2 x 2 patch of latents into one token, rows first (FLUX's own layout).

    Args:
        latents: B x C x H x W with even H and W.

    Returns:
        B x (H/2 * W/2) x 4C.
    """
    batch, channels, height, width = latents.shape
    patches = latents.reshape(batch, channels, height // PATCH, PATCH, width // PATCH, PATCH)
    return patches.permute(0, 2, 4, 1, 3, 5).reshape(batch, -1, channels * PATCH * PATCH)


def unpack(
    tokens: Float[Tensor, "b tokens patch"], height: int, width: int
) -> Float[Tensor, "b c h w"]:
    """Undo `pack`.

    Args:
        tokens: B x (H/2 * W/2) x 4C.
        height: H of the latents, even.
        width: W of the latents, even.

    Returns:
        B x C x H x W.
    """
    batch, _, patch = tokens.shape
    rows, columns = height // PATCH, width // PATCH
    patches = tokens.reshape(batch, rows, columns, patch // PATCH**2, PATCH, PATCH)
    return patches.permute(0, 3, 1, 4, 2, 5).reshape(batch, patch // PATCH**2, height, width)


def build_image_ids(
    rows: int, columns: int, device: torch.device | str | None = None
) -> Float[Tensor, "tokens 3"]:
    """Number the tokens of a `rows` x `columns` grid: (0, row, column), rows first, float32."""
    ids = torch.zeros(rows, columns, 3, device=device)
    ids[..., 1] = torch.arange(rows, device=device)[:, None]
    ids[..., 2] = torch.arange(columns, device=device)[None, :]
    return ids.reshape(-1, 3)


def build_text_ids(length: int, device: torch.device | str | None = None) -> Float[Tensor, "l 3"]:
    """Place all text tokens at position zero, float32, as FLUX does."""
    return torch.zeros(length, 3, device=device)


def widen_ids(ids: Float[Tensor, "*b tokens 3"]) -> Float[Tensor, "*b tokens 3"]:
    """Give position ids in float32, undoing the rounding of half precision.

    Pipelines cast ids to the prompt's dtype, and bfloat16 has no integers between 256 and 258:
    above 4096 pixels a side neighbours would share a position. The grid is rebuilt from the
    number of tokens in its first row; ids that are no such grid keep their rounded values.
    No value is read back to the host, so it compiles and never waits for the device.
    """
    if ids.dtype in (torch.float32, torch.float64):
        return ids
    token = torch.arange(ids.shape[-2], device=ids.device)
    columns = (ids[..., 1:2] == 0).sum(-2, keepdim=True).clamp(min=1)
    row = torch.div(token[:, None], columns, rounding_mode="floor")
    column = token[:, None] - row * columns
    grid = torch.cat([ids[..., :1].float(), row.float(), column.float()], dim=-1)
    is_grid = (grid.to(ids.dtype) == ids).all()
    return torch.where(is_grid, grid, ids.float())


_NAMED_SIZES = {"1k": 1, "2k": 2, "4k": 4}  # of the native side


def parse_size(text: str, native_side: int = 1024) -> tuple[int, int]:
    """Read a picture size: `1k`, `2k`, `4k` (squares), a side, or WIDTHxHEIGHT.

    Args:
        text: The size.
        native_side: What the model calls 1k, in pixels: FLUX.1 1024, the miniature 256.

    Returns:
        Height and width in pixels.

    Raises:
        ValueError: If the text is no size, or FLUX has no whole number of tokens for it.
    """
    named = _NAMED_SIZES.get(text.lower())
    parts = [str(named * native_side)] if named else text.lower().split("x")
    if not 1 <= len(parts) <= 2 or not all(part.isdecimal() for part in parts):
        raise ValueError(
            f"size {text!r} is not 1k, 2k, 4k, a side, or WIDTHxHEIGHT such as 3840x2160"
        )
    width, height = int(parts[0]), int(parts[-1])
    check_size(height, width)
    return height, width
