"""The adapters that come with this package: their names, and which of them a size takes."""

from pathlib import Path

BASE = "miniature-dev"
"""The model that they are for, which comes with this package too."""
FILES = {
    "miniature-2k": "miniature_2k_lora.safetensors",
    "miniature-4k": "miniature_4k_minor.safetensors",
}
"""Of each adapter, in the order in which they go on top of one another."""
_FOLDER = Path(__file__).parents[1] / "miniature" / "adapters"
PACKAGED_ADAPTERS = {name: _FOLDER / file for name, file in FILES.items()}
"""Adapters that come with this package, by name."""


def pick_adapters(height: int, width: int, native_side: int) -> tuple[str, ...]:
    """Name the adapters that ship for a size of picture, in order.

    Up to twice the native side, by area, that is the 2K LoRA; above, the 4K adapter goes on top.

    Args:
        height: In pixels.
        width: In pixels.
        native_side: Of the square that the base makes by itself, in pixels.

    Returns:
        Names; none at native size.
    """
    scale = height * width / native_side**2
    return () if scale <= 1 else ("miniature-2k",) if scale <= 4 else tuple(FILES)
