"""Sliced Wasserstein distance between the patches of two sets of pictures, scale by scale.

As in Karras et al., "Progressive Growing of GANs" (arXiv:1710.10196, section 5): a Laplacian
pyramid, 128 patches of 7 x 7 pixels from each picture and level, the mean and standard deviation of
each colour channel set to 0 and 1, and 512 directions to project on. Unlike there, the patches'
places are drawn once for all pictures, so that the order of a set does not matter.
"""

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

_PATCH = 7  # pixels a side
_NUM_PATCHES = 128  # of each picture and level
_NUM_DIRECTIONS = 512
_DIRECTIONS_AT_ONCE = 64  # they bound the memory
_MIN_SIDE = 16  # of the coarsest level
_BINOMIAL = (1, 4, 6, 4, 1)  # Burt and Adelson's filter, over 16


def sliced_wasserstein(
    pictures: Float[Tensor, "b c h w"],
    others: Float[Tensor, "b c h w"],
    generator: torch.Generator,
) -> Float[Tensor, " levels"]:
    """Compare two sets of pictures.

    The same state of the generator gives the same patches and directions, so compare candidates
    with one seed. Any affine change of a channel's values is without effect.

    Args:
        pictures: At least 16 pixels a side, of any range.
        others: As many, of the same size.
        generator: CPU generator of patches and directions.

    Returns:
        Distance of each level, float32: the finest detail first, the remaining blur last; from 0
        (equal sets) to about 1 (unrelated ones).

    Raises:
        ValueError: If the sets differ in shape, or a side is shorter than 16 pixels.
    """
    if pictures.shape != others.shape:
        raise ValueError(
            f"sets of pictures of shapes {tuple(pictures.shape)} and {tuple(others.shape)} cannot "
            "be compared; give the same number of each, all of one size"
        )
    if min(pictures.shape[-2:]) < _MIN_SIDE:
        raise ValueError(
            f"pictures of {pictures.shape[-2]} x {pictures.shape[-1]} have no level of "
            f"{_MIN_SIDE} pixels; give larger ones"
        )
    distances = []
    for level, other in zip(build_pyramid(pictures), build_pyramid(others), strict=True):
        places = _sample_places(level, generator)
        patches, other_patches = _cut_patches(level, places), _cut_patches(other, places)
        distances.append(_slice(patches, other_patches, generator))
    return torch.stack(distances)


def build_pyramid(pictures: Float[Tensor, "b c h w"]) -> list[Float[Tensor, "b c _h _w"]]:
    """Split pictures into levels of detail, halving the sides down to 16 pixels.

    Returns:
        The detail that each halving loses, finest first, then what is left; float32.
    """
    levels, current = [], pictures.float()
    while min(current.shape[-2:]) >= 2 * _MIN_SIDE:
        smaller = _blur(current)[..., ::2, ::2]
        levels.append(current - enlarge(smaller, current.shape))
        current = smaller
    return [*levels, current]


def _blur(pictures: Float[Tensor, "b c h w"], gain: int = 1) -> Float[Tensor, "b c h w"]:
    row = torch.tensor(_BINOMIAL, dtype=pictures.dtype, device=pictures.device) / 16
    kernel = (gain * row[:, None] * row).expand(pictures.shape[1], 1, -1, -1)
    padded = F.pad(pictures, [2, 2, 2, 2], mode="reflect")
    return F.conv2d(padded, kernel, groups=pictures.shape[1])


def enlarge(pictures: Float[Tensor, "b c h w"], shape: torch.Size) -> Float[Tensor, "b c _h _w"]:
    """Double the sides of pictures to those of `shape`: what a halving leaves of them."""
    sparse = pictures.new_zeros(shape)
    sparse[..., ::2, ::2] = pictures
    return _blur(sparse, gain=4)


def _sample_places(
    level: Float[Tensor, "b c h w"], generator: torch.Generator
) -> tuple[Tensor, Tensor]:
    """Return rows and columns (each patches x 1 x 1) of the patches' corners."""
    rows, columns = (
        torch.randint(0, side - _PATCH + 1, (_NUM_PATCHES, 1, 1), generator=generator)
        for side in level.shape[-2:]
    )
    return rows.to(level.device), columns.to(level.device)


def _cut_patches(
    level: Float[Tensor, "b c h w"], places: tuple[Tensor, Tensor]
) -> Float[Tensor, "n values"]:
    offset = torch.arange(_PATCH, device=level.device)
    rows, columns = places[0] + offset[:, None], places[1] + offset
    patches = level[:, :, rows, columns]  # b c patches 7 7
    axes = (0, 2, 3, 4)
    patches = patches - patches.mean(axes, keepdim=True)
    patches = patches / patches.std(axes, keepdim=True).clamp_min(1e-6)
    return patches.transpose(1, 2).flatten(0, 1).flatten(1)


def _slice(
    patches: Float[Tensor, "n values"],
    others: Float[Tensor, "n values"],
    generator: torch.Generator,
) -> Float[Tensor, ""]:
    """Return the mean over directions of the distance in one dimension, by sorted values."""
    directions = torch.randn(patches.shape[1], _NUM_DIRECTIONS, generator=generator)
    directions = F.normalize(directions, dim=0).to(patches.device)
    distances = [
        ((patches @ some).sort(0).values - (others @ some).sort(0).values).abs().mean()
        for some in torch.split(directions, _DIRECTIONS_AT_ONCE, 1)
    ]
    return torch.stack(distances).mean()
