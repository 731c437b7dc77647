"""What was done to a model beyond adapting it, and how to undo it.

`urae.optimize` leaves its steps here, `urae.restore` takes them back, last first.
"""

from contextlib import ExitStack

from torch import nn

_UNDO = "_urae_undo"


def is_optimized(model: nn.Module) -> bool:
    """Tell whether something is left to undo."""
    return hasattr(model, _UNDO)


def keep_undo(model: nn.Module, stack: ExitStack) -> None:
    """Remember what undoes the changes to a model.

    Args:
        model: A transformer that nothing is kept for.
        stack: Closing it undoes everything.
    """
    assert not is_optimized(model)
    setattr(model, _UNDO, stack)  # on the model: a table elsewhere would keep it alive


def undo(model: nn.Module) -> None:
    """Undo everything, last first; nothing happens where nothing is kept."""
    if is_optimized(model):
        stack: ExitStack = getattr(model, _UNDO)
        delattr(model, _UNDO)
        stack.close()
