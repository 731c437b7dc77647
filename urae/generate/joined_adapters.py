"""Active adapters of a layer as one pair of products, or merged into a copy of its weight: exact.

peft adds adapters one by one: two products, a scale and a sum each. Here those that are active are
stacked, scales inside, y = W x + [s1 B1, s2 B2] [A1; A2] x; or W + s1 B1 A1 + s2 B2 A2 is kept
beside W, where it has lost nothing to rounding.

**That is in float32.** A bfloat16 weight has 8 significant bits. Merging changes a layer's output
by less than 1e-3 only if the update is below 1e-3 of the weight, and then four fifths of the update
are rounded away; an update large enough to survive costs 1.7e-3 of the output. So the error is
measured against what the adapters add as well, and in bfloat16 they stay products.

**Nothing goes stale.** Layers, factors and weights of peft stay in place and untouched, so that
`set_adapters`, `load_lora_weights`, `delete_adapters` and a scale in `joint_attention_kwargs` work
as ever. Before each forward of the transformer what was made of them is compared with what they
are now, and made anew if they have changed. New numbers written past torch's count of versions, as
peft's hotswap writes them, are looked for when a picture begins, unless blocks are
offloaded. Where they are by the time of another change, peft's own forward comes back instead.
"""

import logging
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from diffusers import FluxTransformer2DModel
from diffusers.hooks.group_offloading import _is_group_offload_enabled
from jaxtyping import Float
from peft.tuners.lora import Linear, LoraLayer
from torch import Tensor, nn

from urae.backbones.free_memory import free_bytes
from urae.generate.speed import check_not_offloaded, fingerprint, list_blocks
from urae.resolution import find_policy, peft_configs

logger = logging.getLogger(__name__)

_MAX_ERROR = 1e-3
"""Of a merged layer's output, relative to the attached form."""
_MOST_COPIES = 0.1
"""Of the memory that is free, for a preset to merge."""
_MAX_LOSS = 1e-2
"""Of what the adapters add to it."""


def join_adapters(
    transformer: FluxTransformer2DModel, *, merge: bool, warn: bool = True
) -> Callable[[], None]:
    """Compute all active adapters of each layer at once, from now on and whatever they are.

    Layers that do more than a plain LoRA (dropout, DoRA, biases, other dtypes) keep peft's forward.

    Args:
        transformer: Adapted or not, not offloaded yet.
        merge: Whether to merge them into copies of the weights, where that is exact.
        warn: Whether to say so where it is exact nowhere.

    Returns:
        What undoes it, bitwise.

    Raises:
        ValueError: If the blocks are offloaded already.
    """
    check_not_offloaded(transformer)
    joined = _JoinedAdapters(transformer, merge, warn)
    register = partial(transformer.register_forward_pre_hook, with_kwargs=True)
    with ExitStack() as stack:  # undone too where a layer fails
        stack.callback(joined.release)
        stack.callback(register(joined.enter).remove)
        # before the policy's hook, which makes new ids of the pipeline's
        stack.callback(register(joined.note_picture, prepend=True).remove)
        joined.join()
        return stack.pop_all().close


def pays_to_merge(transformer: FluxTransformer2DModel) -> bool:
    """Tell whether merging is exact and its copies of weights are small beside what is free."""
    if transformer.dtype != torch.float32:
        return False
    layers = [each for each in transformer.modules() if isinstance(each, LoraLayer)]
    copies: int = sum(each.get_base_layer().weight.nbytes for each in layers)
    return copies <= _MOST_COPIES * free_bytes(transformer.device)


class _OneProduct(Linear):  # type: ignore[misc]
    """A LoRA layer with its active adapters stacked."""

    joined_down: Tensor
    joined_up: Tensor

    def forward(self, x: Float[Tensor, "*b c"], *_: Any, **__: Any) -> Float[Tensor, "*b d"]:
        if "joined_down" not in self._buffers:  # released, under hooks that call this all the same
            return Linear.forward(self, x)  # type: ignore[no-any-return]
        base: Tensor = self.base_layer(x)
        return base + F.linear(F.linear(x, self.joined_down), self.joined_up)


class _Merged(Linear):  # type: ignore[misc]
    """A LoRA layer with its active adapters in a weight of its own."""

    merged_weight: Tensor
    merged_bias: Tensor | None

    def forward(self, x: Float[Tensor, "*b c"], *_: Any, **__: Any) -> Float[Tensor, "*b d"]:
        if "merged_weight" not in self._buffers:
            return Linear.forward(self, x)  # type: ignore[no-any-return]
        return F.linear(x, self.merged_weight, self.merged_bias)


_BITS = {2: torch.int16, 4: torch.int32, 8: torch.int64}  # by the bytes of a number
_BUFFERS = ("joined_down", "joined_up", "merged_weight", "merged_bias")


class _JoinedAdapters:
    """What was made of a transformer's adapters, and of which."""

    def __init__(self, transformer: FluxTransformer2DModel, merge: bool, warn: bool) -> None:
        self._transformer = transformer
        self._merge = merge
        self._layers: list[Any] = []
        self._held: list[Any] = []  # so that nothing else takes their place in memory
        self._state: list[Any] = []
        self._ids: Tensor | None = None  # of the last forward
        self._is_other_picture = True
        self._sums: list[int] = []
        self._may_warn = merge and warn

    def note_picture(self, _module: nn.Module, _args: Any, kwargs: dict[str, Any]) -> None:
        """Tell a picture's first forward: pipelines make position ids anew for each."""
        self._is_other_picture = kwargs.get("img_ids") is not self._ids
        self._ids = kwargs.get("img_ids")

    @torch.compiler.disable  # type: ignore[untyped-decorator]
    def enter(self, _module: nn.Module, _args: Any, kwargs: dict[str, Any]) -> None:
        """Follow what has changed since the last forward."""
        # the forward multiplies the adapters' scales by it after this hook
        scale = (kwargs.get("joint_attention_kwargs") or {}).get("scale", 1.0)
        may_have = self._is_other_picture  # which waits for the device, so once a picture
        if self._read(scale) == self._state and not (may_have and self._have_other_numbers()):
            return
        were_joined = any(isinstance(layer, _OneProduct | _Merged) for layer in self._layers)
        self.release()
        if not _is_offloaded(self._transformer):
            self.join(scale)
            return
        positions = find_policy(self._transformer)
        if positions is not None and positions.is_resting:  # which nobody can do before offloading
            logger.info(
                "some adapters are switched off: in an offloaded transformer all are now "
                "computed one by one"
            )
        elif were_joined:
            logger.warning(
                "adapters have changed in an offloaded transformer, so they are computed one by "
                "one; call urae.restore, urae.adapt and urae.optimize before offloading to join "
                "them again"
            )
        self._state = self._read(scale)

    def join(self, scale: float = 1.0) -> None:
        """Stack or merge the active adapters of all layers."""
        self._layers = [m for m in self._transformer.modules() if isinstance(m, LoraLayer)]
        self._state = self._read(scale)
        self._held = [weight for layer in self._layers for weight in _list_weights(layer)]
        self._held.extend(peft_configs(self._transformer).values())
        dtype = self._transformer.dtype  # diffusers goes through all modules for it
        plain = [layer for layer in self._layers if _is_plain(layer, dtype)]
        count = sum(_join_layer(layer, scale, self._merge) for layer in plain)
        self._sums = _sum_up(self._layers)
        if self._may_warn and plain and not count:
            self._may_warn = False
            logger.warning(
                "adapters are not merged in any of %d layers, since in %s that would not be "
                "exact; they are joined instead, as by joined-adapters",
                len(plain), dtype,
            )  # fmt: skip
        elif self._merge and count:
            logger.info("adapters merged in %d of %d layers", count, len(self._layers))

    def release(self) -> None:
        """Give the layers peft's forward back."""
        for layer in self._layers:
            if isinstance(layer, _OneProduct | _Merged):
                layer.__class__ = Linear
            for name in _BUFFERS:
                layer._buffers.pop(name, None)
                layer._non_persistent_buffers_set.discard(name)

    def _have_other_numbers(self) -> bool:
        """Tell whether factors hold others than those that were joined; waits for the device."""
        if _is_offloaded(self._transformer):  # where they may be anywhere
            return False
        return _sum_up(self._layers) != self._sums

    def _read(self, scale: float) -> list[Any]:
        """Describe all that peft's forwards read, but for the numbers of the weights."""
        # a new adapter of the same name has settings of its own
        configs = [(name, id(each)) for name, each in peft_configs(self._transformer).items()]
        return [scale, configs, *map(_describe, self._layers)]


def _is_offloaded(transformer: FluxTransformer2DModel) -> bool:
    """Tell whether blocks are moved in parts, which would leave new tensors behind."""
    parts = (module for block in list_blocks(transformer) for module in block.modules())
    return _is_group_offload_enabled(transformer) or any(hasattr(m, "_hf_hook") for m in parts)


def _list_active(layer: Any) -> list[str]:
    return [name for name in layer.active_adapters if name in layer.lora_A]


def _list_weights(layer: Any) -> Iterator[Tensor]:
    base = layer.get_base_layer()
    yield from (each for each in (base.weight, base.bias) if each is not None)
    for name in _list_active(layer):
        yield layer.lora_A[name].weight
        yield layer.lora_B[name].weight


def _sum_up(layers: list[Any]) -> list[int]:
    """Return the sum of each factor's bits, of the layers that are joined; equal on any device."""
    joined = [layer for layer in layers if isinstance(layer, _OneProduct | _Merged)]
    factors = [
        each[name].weight.detach()
        for layer in joined
        for name in _list_active(layer)
        for each in (layer.lora_A, layer.lora_B)
    ]
    return [int(each.view(_BITS[each.dtype.itemsize]).sum(dtype=torch.int64)) for each in factors]


def _describe(layer: Any) -> tuple[Any, ...]:
    scales = [(name, layer.scaling[name]) for name in _list_active(layer)]
    weights = map(fingerprint, _list_weights(layer))
    return (layer.disable_adapters, layer.merged, *scales, *weights)


def _is_plain(layer: Any, dtype: torch.dtype) -> bool:
    """Tell whether peft's forward is W x + sum of s B A x, and nothing else."""
    names = _list_active(layer)
    if type(layer) is not Linear or not names or layer.disable_adapters or layer.merged:
        return False
    return all(
        name not in layer.lora_variant
        and isinstance(layer.lora_dropout[name], nn.Identity)
        and _is_factor(layer.lora_A[name], dtype)
        and _is_factor(layer.lora_B[name], dtype)
        for name in names
    )


def _is_factor(layer: Any, dtype: torch.dtype) -> bool:
    is_linear: bool = type(layer) is nn.Linear
    return is_linear and layer.bias is None and bool(layer.weight.dtype == dtype)


@torch.no_grad()
def _join_layer(layer: Any, scale: float, merge: bool) -> bool:
    """Stack or merge one layer's adapters; return whether they are merged."""
    names = _list_active(layer)
    down = torch.cat([layer.lora_A[name].weight for name in names])
    ups = [layer.lora_B[name].weight * (layer.scaling[name] * scale) for name in names]
    up = torch.cat(ups, dim=1)
    base = layer.get_base_layer()
    merged = merge_weight(base.weight, down, up) if merge else None
    made = {"joined_down": down, "joined_up": up}
    if merged is not None:
        made = {"merged_weight": merged, "merged_bias": base.bias}
    for name, tensor in made.items():  # buffers move with the layer
        layer.register_buffer(name, tensor, persistent=False)
    layer.__class__ = _OneProduct if merged is None else _Merged
    return merged is not None


def merge_weight(
    weight: Float[Tensor, "out in"], down: Float[Tensor, "rank in"], up: Float[Tensor, "out rank"]
) -> Float[Tensor, "out in"] | None:
    """Merge factors into a copy of a weight, if the result is that of the attached form.

    Norms of matrices stand for those of outputs: they are what inputs with channels of equal
    strength give on average, which those of FLUX's adapted layers, normalised tokens, come near.

    Returns:
        W + B A in the weight's dtype. None where rounding takes more than 1e-3 of the output or
        1e-2 of what the adapter adds, or the weight is quantised.
    """
    if type(weight) is not nn.Parameter or not weight.is_floating_point():
        return None
    update = up.double() @ down.double()
    wanted = weight.double() + update
    merged = wanted.to(weight.dtype)
    error = (merged.double() - wanted).norm()
    is_exact = error <= _MAX_ERROR * wanted.norm() and error <= _MAX_LOSS * update.norm()
    return merged if is_exact else None
