"""Ultra-resolution adaptation of FLUX: 2K and 4K images on stock diffusers.

`adapt` turns a stock pipeline into an ultra-resolution one, `optimize` makes it faster, `restore`
undoes both, and `ResolutionPolicy` says how positions, attention and the schedule follow the
resolution.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from urae.adapters.adapt import adapt, restore
    from urae.generate.optimize import optimize
    from urae.resolution import ResolutionPolicy

__version__ = "0.1.0"
__all__ = ["ResolutionPolicy", "__version__", "adapt", "optimize", "restore"]

_HOMES = {
    "ResolutionPolicy": "urae.resolution",
    "adapt": "urae.adapters.adapt",
    "optimize": "urae.generate.optimize",
    "restore": "urae.adapters.adapt",
}


def __getattr__(name: str) -> Any:
    # torch and diffusers take seconds to import; `urae --help` must not wait for them
    if name in _HOMES:
        return getattr(import_module(_HOMES[name]), name)
    raise AttributeError(f"module 'urae' has no attribute {name!r}")
