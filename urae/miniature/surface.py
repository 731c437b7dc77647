"""What a background's brightness says: where the light comes from, and the texture with its scale.

The light is a plane through the logarithm of the brightness; the texture is what is left over. It
is told by its power spectrum, so that the right pattern at another pixel scale is no match.
"""

from functools import cache

import numpy as np
import numpy.typing as npt
import torch
from numpy.lib.stride_tricks import sliding_window_view

from urae.miniature.render import LIGHT_FROM, LIGHT_LEVEL, LIGHT_SLOPE, TEXTURE_DEPTH
from urae.miniature.segment import Mask
from urae.miniature.shapes import TEXTURE_FIELDS

Grey = npt.NDArray[np.float32]

_TILE = 48  # pixels, three periods
_STEP = 16
_MAX_TILES = 400
_MIN_TILES = 4
_PLAIN_CONTRAST = 0.028  # a background of less is plain
_MIN_MATCH = 0.78  # cosine of two spectra
_CONTRASTS = (0.4, 1.8)  # least and most, of the renderer's
_MIN_SHARE = 0.75  # of the tiles with such a contrast


def read_light(brightness: Grey, background: Mask) -> tuple[str | None, Grey]:
    """Read the light from the background's brightness.

    Args:
        brightness: H x W, above 0.
        background: H x W, where it counts; not empty.

    Returns:
        One of `LIGHTS`, or None if it is neither even nor from one side; and the brightness that
        the background would have without texture (H x W).
    """
    height, width = brightness.shape
    y, x = np.linspace(-1, 1, height, dtype=np.float32), np.linspace(-1, 1, width, dtype=np.float32)
    rows, columns = np.nonzero(background[::2, ::2])
    rows, columns = 2 * rows, 2 * columns
    terms = np.stack([x[columns], y[rows], np.ones(len(rows), np.float32)], 1)
    logs = np.log(brightness[rows, columns])
    right, down, level = np.linalg.lstsq(terms.T @ terms, terms.T @ logs)[0]
    plane = np.exp(right * x + down * y[:, None] + level)

    full = np.log((LIGHT_LEVEL + LIGHT_SLOPE) / (LIGHT_LEVEL - LIGHT_SLOPE)) / 2
    towards = tuple(float(np.clip(np.rint(slope / full), -1, 1)) for slope in (right, down))
    return next((light for light, side in LIGHT_FROM.items() if side == towards), None), plane


def read_texture(residual: Grey, background: Mask) -> str | None:
    """Read the texture from what a background has besides its light.

    Args:
        residual: H x W, brightness over that without texture, less 1.
        background: H x W, where it counts.

    Returns:
        One of `TEXTURES`; None if it is none of them at this scale, too faint, too strong or not
        everywhere, or if hardly any background is seen.
    """
    tiles = _cut_tiles(residual, background)
    if len(tiles) < _MIN_TILES:
        return None
    contrasts = tiles.std((1, 2))
    if np.median(contrasts) < _PLAIN_CONTRAST:
        return "plain" if np.mean(contrasts < _PLAIN_CONTRAST) >= _MIN_SHARE else None
    spectrum = _find_spectrum(tiles)
    matches = {name: float((spectrum * wanted).sum()) for name, (wanted, _) in _patterns().items()}
    best = max(matches, key=lambda name: matches[name])
    least, most = (share * _patterns()[best][1] for share in _CONTRASTS)
    share = np.mean((least <= contrasts) & (contrasts <= most))
    return best if matches[best] >= _MIN_MATCH and share >= _MIN_SHARE else None


def _cut_tiles(residual: Grey, background: Mask) -> Grey:
    """Return tiles that are all background (N x 48 x 48), spread over the picture."""
    whole = sliding_window_view(background, (_TILE, _TILE))[::_STEP, ::_STEP].all((2, 3))
    rows, columns = np.nonzero(whole)
    spread = slice(None, None, max(1, -(-len(rows) // _MAX_TILES)))
    tiles = sliding_window_view(residual, (_TILE, _TILE))[::_STEP, ::_STEP]
    return tiles[rows[spread], columns[spread]]


def _find_spectrum(tiles: Grey) -> Grey:
    """Return the mean over tiles of power times frequency, of norm 1.

    The factor is between power, in which fine detail hardly counts, and the power of the gradient,
    in which a slight blur does.
    """
    window = np.outer(np.hanning(_TILE), np.hanning(_TILE))
    frequency = np.hypot(np.fft.fftfreq(_TILE)[:, None], np.fft.rfftfreq(_TILE))
    tiles = tiles - tiles.mean((1, 2), keepdims=True)
    spectrum = (np.abs(np.fft.rfft2(tiles * window)) ** 2).mean(0) * frequency
    scaled: Grey = (spectrum / np.linalg.norm(spectrum)).astype(np.float32)
    return scaled


@cache
def _patterns() -> dict[str, tuple[Grey, float]]:
    """Return spectrum and contrast of each texture but plain, as rendered."""
    y, x = (each[None] for each in torch.meshgrid(*[torch.arange(512.0) + 0.5] * 2, indexing="ij"))
    found = {}
    for name in TEXTURE_FIELDS.keys() - {"plain"}:
        darkness = TEXTURE_FIELDS[name](x, y, torch.zeros(1, dtype=torch.long))[0].numpy()
        gain = 1 - TEXTURE_DEPTH * darkness
        tiles = _cut_tiles(gain / gain.mean() - 1, np.ones(gain.shape, np.bool_))
        found[name] = _find_spectrum(tiles), float(tiles.std())
    return found
