"""Attention for generation: the fastest right one, timed once at the shape at hand."""

from collections.abc import Callable
from importlib.util import find_spec
from typing import Any

import torch
from diffusers import FluxTransformer2DModel
from diffusers.models.attention_dispatch import AttentionBackendName, _AttentionBackendRegistry
from torch import nn

from urae.backbones.attention import CANDIDATES, backend, pick_attention
from urae.backbones.context_parallel import find_degree, supports_context_parallel
from urae.resolution import find_policy

# those of diffusers that other packages bring, by package
_INSTALLED = {"flash_attn": "flash", "flash_attn_interface": "_flash_3"}


def use_fastest_attention(transformer: FluxTransformer2DModel) -> Callable[[], None]:
    """Let the first forward on a GPU choose an exact attention backend; elsewhere torch decides.

    A backend that the user has set is kept, and so is that of local attention.

    Args:
        transformer: A stock FLUX transformer, adapted or not.

    Returns:
        What undoes it.
    """
    processors = list(transformer.attn_processors.values())
    chosen: list[AttentionBackendName] = []
    positions = find_policy(transformer)
    is_local = positions is not None and positions.policy.attention == "local"

    @torch.compiler.disable  # type: ignore[untyped-decorator]
    def choose(_module: nn.Module, _args: Any, kwargs: dict[str, Any]) -> None:
        hook.remove()
        tokens = kwargs["hidden_states"]
        taken = any(processor._attention_backend is not None for processor in processors)
        if taken or is_local or not _decides(tokens.device):
            return
        length = tokens.shape[1] + kwargs["encoder_hidden_states"].shape[1]
        config, degree = transformer.config, find_degree(transformer)
        heads = config.num_attention_heads // degree  # of all tokens
        shape = (len(tokens), length, heads, config.attention_head_dim)
        names = [n for n in list_candidates() if degree == 1 or supports_context_parallel(n)]
        candidates = {name: backend(name) for name in names}
        name = pick_attention(candidates, shape, tokens.dtype, tokens.device, backward=False)
        chosen.append(AttentionBackendName(name))
        for processor in processors:  # set_attention_backend would set it for the whole process
            processor._attention_backend = chosen[0]

    def undo() -> None:
        hook.remove()
        for processor in processors:
            if processor._attention_backend in chosen:
                processor._attention_backend = None

    hook = transformer.register_forward_pre_hook(choose, with_kwargs=True)
    return undo


def list_candidates() -> list[str]:
    """Name torch's exact attentions, and those that are installed here."""
    return [*CANDIDATES, *(name for package, name in _INSTALLED.items() if find_spec(package))]


def _decides(device: torch.device) -> bool:
    """Tell whether there is a choice: on a GPU, where no environment variable has made it."""
    active = _AttentionBackendRegistry.get_active_backend()[0]
    return device.type == "cuda" and active == AttentionBackendName.NATIVE
