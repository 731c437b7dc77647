"""What is the same in all steps of a picture is computed in its first: position tables, the text.

FLUX's forward turns position ids into cos and sin, and projects both text encoders' outputs, which
the step changes nothing about. Within a picture a result is reused while its inputs are the very
tensors that it was made of, unchanged: pipelines hand the same ones over in each step. Modulation
depends on the step and is left alone.
"""

from collections import deque
from collections.abc import Callable, Sequence
from typing import Any
from weakref import ref

import torch
from diffusers import FluxTransformer2DModel
from diffusers.hooks import HookRegistry, ModelHook
from peft.tuners.lora import LoraLayer
from torch import Tensor, nn

from urae.generate.speed import fingerprint
from urae.resolution import ResolutionPositions

_HOOK = "urae_constants"
_KEPT = 2  # results a module: true guidance has two prompts in turn


def keep_constants(transformer: FluxTransformer2DModel) -> Callable[[], None]:
    """Compute position tables and text projections once for all steps, bitwise the same.

    Args:
        transformer: A stock FLUX transformer, adapted or not, with its policy in place.

    Returns:
        What undoes it.
    """
    texts = _Known(), _Known()
    positions = _KnownPositions(texts)
    hooks = {
        transformer.pos_embed: positions,
        # an adapter that comes later wraps the layer, and acts on what is reused
        getattr(transformer.context_embedder, "base_layer", transformer.context_embedder): texts[0],
        transformer.time_text_embed.text_embedder: texts[1],
    }
    for module, hook in hooks.items():
        HookRegistry.check_if_exists_or_initialize(module).register_hook(hook, _HOOK)
    # before the policy's hook, which makes new ids of the pipeline's
    handle = transformer.register_forward_pre_hook(positions.enter, prepend=True, with_kwargs=True)

    def undo() -> None:
        handle.remove()
        for module in hooks:
            module._diffusers_hook.remove_hook(_HOOK, recurse=False)

    return undo


class _Known(ModelHook):  # type: ignore[misc]
    """Reuses a module's output for the same input and weights."""

    def __init__(self) -> None:
        super().__init__()
        self._known: deque[tuple[list[ref[Tensor]], Any, Any]] = deque(maxlen=_KEPT)

    def forget(self) -> None:
        """Compute anew what comes."""
        self._known.clear()

    def find_inputs(self, args: Sequence[Any]) -> Sequence[Tensor]:
        """Return the tensors whose identity stands for the inputs'."""
        return args[:1]

    def describe(self, module: nn.Module, args: Sequence[Any]) -> Any:
        """Return what else the output follows from; None if that cannot be told."""
        if any(isinstance(each, LoraLayer) for each in module.modules()):
            return None
        weights = [(fingerprint(each), each.device) for each in module.parameters()]
        return weights

    def new_forward(self, module: nn.Module, *args: Any, **kwargs: Any) -> Any:
        state = None if torch.is_grad_enabled() else self.describe(module, args)
        if state is None:
            return self.fn_ref.original_forward(*args, **kwargs)
        inputs = self.find_inputs(args)
        state = (state, [fingerprint(each) for each in inputs])
        for references, known, output in self._known:
            same = [reference() for reference in references]
            if known == state and all(a is b for a, b in zip(same, inputs, strict=True)):
                return output
        output = self.fn_ref.original_forward(*args, **kwargs)
        self._known.append(([ref(each) for each in inputs], state, output))
        return output


class _KnownPositions(_Known):
    """The same for position tables, whose input the forward makes anew from the pipeline's ids."""

    def __init__(self, others: Sequence[_Known]) -> None:
        super().__init__()
        self._others = others
        self._ids: list[ref[Tensor]] = []

    @torch.compiler.disable  # type: ignore[untyped-decorator]
    def enter(self, _module: nn.Module, _args: Any, kwargs: dict[str, Any]) -> None:
        if not self._ids or self._ids[0]() is not kwargs["img_ids"]:
            # another picture: in between, a LoRA may have been fused, which changes a weight and
            # leaves no trace on it
            for each in self._others:
                each.forget()
        self._ids = [ref(kwargs["img_ids"]), ref(kwargs["txt_ids"])]

    def find_inputs(self, args: Sequence[Any]) -> Sequence[Tensor]:
        return [ids for reference in self._ids if (ids := reference()) is not None]

    def describe(self, module: nn.Module, args: Sequence[Any]) -> Any:
        if not self._ids or any(reference() is None for reference in self._ids):
            return None
        follows: tuple[Any, ...] = (args[0].shape, args[0].device)
        if isinstance(module, ResolutionPositions):
            counts = (module.sequence_length, module.num_image_tokens, module.num_local_keys)
            follows += (module.policy, *counts)
        return follows
