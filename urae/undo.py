"""What was done to a model beyond adapting it, and how to undo it.

`urae.optimize` leaves its steps here, `urae.restore` takes them back, last first.
"""

from contextlib import ExitStack

from torch import nn

_UNDO = "_urae_undo"
_OFFLOADED = "_urae_offloaded"


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
    setattr(model, _OFFLOADED, _list_offloaded(model))


def undo(model: nn.Module) -> None:
    """Undo everything, last first; nothing happens where nothing is kept.

    Raises:
        ValueError: If layers have been offloaded since; nothing is undone.
    """
    if not is_optimized(model):
        return
    if _list_offloaded(model) - getattr(model, _OFFLOADED):
        raise ValueError(
            "the transformer's layers were offloaded after urae.optimize, so its changes cannot "
            "be undone; call pipe.remove_all_hooks() and try again, or reload the pipeline"
        )
    stack: ExitStack = getattr(model, _UNDO)
    delattr(model, _UNDO)
    delattr(model, _OFFLOADED)
    stack.close()


def _list_offloaded(model: nn.Module) -> set[str]:
    """Name the layers that accelerate moves one by one."""
    return {name for name, each in model.named_modules() if name and hasattr(each, "_hf_hook")}
