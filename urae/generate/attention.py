"""Attention for generation: the fastest right one, timed once at each shape."""

import logging
from collections.abc import Callable
from functools import cache
from importlib.util import find_spec
from typing import Any

import torch
from diffusers import FluxTransformer2DModel
from diffusers.models.attention_dispatch import AttentionBackendName
from torch import nn

from urae.backbones.attention import (
    CANDIDATES,
    FORWARD_ONLY,
    Shape,
    active_backend,
    backend,
    find_lack,
    pick_attention,
)
from urae.backbones.context_parallel import find_degree, supports_context_parallel
from urae.local_attention import list_processors

logger = logging.getLogger(__name__)

# those of diffusers that other packages bring, by package
_INSTALLED = {"flash_attn": "flash", "flash_attn_interface": "_flash_3", FORWARD_ONLY: "_flash_3"}


def use_fastest_attention(transformer: FluxTransformer2DModel) -> Callable[[], None]:
    """Let forwards on a GPU choose an exact attention backend; elsewhere torch decides.

    Each shape is timed once in a process: a picture of another size, the later steps of a
    progressive one. A backend that the user has set is kept, and so is that of a local forward.

    Args:
        transformer: A stock FLUX transformer, adapted or not.

    Returns:
        What undoes it.
    """
    processors = list_processors(transformer)
    chosen: AttentionBackendName | None = None

    def set_all(name: AttentionBackendName | None) -> None:
        nonlocal chosen
        for processor in processors:  # set_attention_backend would set it for the whole process
            processor._attention_backend = name
        chosen = name

    def release() -> None:
        for processor in processors:
            if processor._attention_backend == chosen:
                processor._attention_backend = None

    @torch.compiler.disable  # type: ignore[untyped-decorator]
    def enter(_module: nn.Module, _args: Any, _kwargs: dict[str, Any]) -> None:
        release()

    @torch.compiler.disable  # type: ignore[untyped-decorator]
    def choose(_module: nn.Module, _args: Any, kwargs: dict[str, Any]) -> None:
        if any(each._attention_backend is not None for each in processors):
            return
        tokens = kwargs["hidden_states"]
        if not _decides(tokens.device):
            set_all(None)
            return
        length = tokens.shape[1] + kwargs["encoder_hidden_states"].shape[1]
        config, degree = transformer.config, find_degree(transformer)
        heads = config.num_attention_heads // degree  # of all tokens
        shape = (len(tokens), length, heads, config.attention_head_dim)
        names = (n for n in list_candidates() if degree == 1 or supports_context_parallel(n))
        set_all(_find_fastest(tuple(names), shape, tokens.dtype, tokens.device))

    # before and after the policy's hook, which sets one where a forward is local
    hooks = [
        transformer.register_forward_pre_hook(enter, prepend=True, with_kwargs=True),
        transformer.register_forward_pre_hook(choose, with_kwargs=True),
    ]

    def undo() -> None:
        for hook in hooks:
            hook.remove()
        release()

    return undo


@cache
def list_candidates() -> tuple[str, ...]:
    """Name torch's exact attentions, and those of packages that can be used here."""
    names = [*CANDIDATES]
    for package, name in _INSTALLED.items():
        if name in names or not find_spec(package):
            continue
        if lack := find_lack(name):
            logger.warning("%s is installed but not used: %s", package, lack)
        else:
            names.append(name)
    return tuple(names)


@cache
def _find_fastest(
    names: tuple[str, ...], shape: Shape, dtype: torch.dtype, device: torch.device
) -> AttentionBackendName:
    """Time backends once in this process for each shape, dtype and device."""
    candidates = {name: backend(name) for name in names}
    return AttentionBackendName(pick_attention(candidates, shape, dtype, device, backward=False))


def _decides(device: torch.device) -> bool:
    """Tell whether there is a choice: on a GPU, where no environment variable has made it."""
    return device.type == "cuda" and active_backend() == AttentionBackendName.NATIVE
