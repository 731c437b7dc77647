"""Radial power spectra: how much of each spatial frequency sets of pictures hold.

The mean of the power over all directions shows missing detail and the grids that upsampling leaves:
Durall et al., "Watch your Up-Convolution" (arXiv:2003.01826).
"""

import torch
from jaxtyping import Float
from torch import Tensor

_FLOOR = 1e-8  # of the power, about that of 8-bit rounding


def radial_spectrum(pictures: Float[Tensor, "b c h w"]) -> Float[Tensor, "b rings"]:
    """Return the mean power of brightness in rings of equal frequency.

    A Hann window keeps the picture's borders out of it.

    Args:
        pictures: Of values from 0 to 1, at least 4 pixels a side.

    Returns:
        Power, float32, in rings one frequency of the shorter side wide: from 1 to half that side in
        periods a picture. The mean brightness is left out, and so are the corners beyond.
    """
    height, width = pictures.shape[-2:]
    device = pictures.device
    rows, columns = (torch.hann_window(side, device=device) for side in (height, width))
    window = rows[:, None] * columns
    grey = pictures.float().mean(1)
    grey = (grey - grey.mean((1, 2), keepdim=True)) * window
    # the whole plane: rfft2's half of it has vertical frequencies twice and all others once
    power = torch.fft.fft2(grey).abs().square() / window.square().sum()

    y, x = (torch.fft.fftfreq(side, device=device) for side in (height, width))
    num_rings = min(height, width) // 2
    ring = (torch.hypot(y[:, None], x) * min(height, width)).round().long()
    within = (ring >= 1) & (ring <= num_rings)
    sums = power.new_zeros(len(power), num_rings).index_add_(1, ring[within] - 1, power[:, within])
    means: Tensor = sums / torch.bincount(ring[within] - 1, minlength=num_rings)
    return means


def spectrum_distance(
    pictures: Float[Tensor, "b c h w"], others: Float[Tensor, "n c h w"]
) -> Float[Tensor, ""]:
    """Compare the mean spectra of two sets of pictures.

    Args:
        pictures: Of values from 0 to 1.
        others: Of the same size; not necessarily as many.

    Returns:
        Root mean square over the rings of the difference in decibels: 0 for equal sets, 3 for twice
        the power everywhere.

    Raises:
        ValueError: If the pictures are not of one size.
    """
    if pictures.shape[-2:] != others.shape[-2:]:
        raise ValueError(
            f"pictures of {pictures.shape[-2]} x {pictures.shape[-1]} and of {others.shape[-2]} x "
            f"{others.shape[-1]} have no common frequencies; give pictures of the same size"
        )
    return compare_spectra(*(radial_spectrum(each).mean(0) for each in (pictures, others)))


def compare_spectra(
    spectrum: Float[Tensor, " rings"], other: Float[Tensor, " rings"]
) -> Float[Tensor, ""]:
    """Return the root mean square over the rings of the difference of mean powers in decibels."""
    levels = [10 * each.clamp_min(_FLOOR).log10() for each in (spectrum, other)]
    return (levels[0] - levels[1]).square().mean().sqrt()
