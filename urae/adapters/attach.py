"""Adapters in and out of a stock transformer, as named peft adapters."""

import re
import warnings
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from diffusers import FluxTransformer2DModel
from peft import LoraConfig, set_peft_model_state_dict
from peft.tuners.lora import LoraLayer
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import nn

from urae.adapters.files import LowRank
from urae.adapters.variants import (
    Variant,
    as_plain,
    attach_variant,
    find_kind,
    read_variant,
)
from urae.resolution import peft_configs

Update = Mapping[str, LowRank] | Variant
"""What an attached adapter does: factors of scale 1 by layer, or what peft alone knows."""


def active_adapters(transformer: FluxTransformer2DModel) -> list[str]:
    """Name the adapters that take part in a forward, none for a bare transformer."""
    if not peft_configs(transformer):
        return []
    active: list[str] = transformer.active_adapters()
    return active


def attach(
    transformer: FluxTransformer2DModel,
    name: str,
    update: Update,
    *,
    pipe: Any = None,
) -> None:
    """Attach a peft adapter; those active before stay active, with their weights.

    Args:
        transformer: A stock FLUX transformer; its weights are not touched.
        name: Of the adapter; not in use yet.
        update: Factors, cast to the dtype that the base computes in, or a variant, which must be
            the only adapter.
        pipe: The pipeline around it, if any, whose offloading hooks must be moved aside.

    Raises:
        ValueError: If a variant is for another base.
    """
    if isinstance(update, Variant):
        for parameter in attach_variant(transformer, name, update.config, update.state):
            parameter.requires_grad_(False)
        return
    active = active_adapters(transformer)
    trained = {id(parameter) for parameter in transformer.parameters() if parameter.requires_grad}
    state = {}
    for layer, pair in update.items():
        state[f"{layer}.lora_A.weight"] = pair.down
        state[f"{layer}.lora_B.weight"] = pair.up
    config = _lora_config(update).to_dict()
    with _several_adapters():
        transformer.load_lora_adapter(
            state, prefix=None, adapter_name=name, metadata=config, _pipeline=pipe
        )
    _cast_to_compute(transformer, name)
    transformer.set_adapter([*active, name])  # which makes all of them trainable
    for parameter in transformer.parameters():
        parameter.requires_grad_(id(parameter) in trained)


def attach_frozen(
    transformer: FluxTransformer2DModel, name: str, layers: Mapping[str, LowRank]
) -> None:
    """Attach factors that no optimizer and no activation of adapters can ever train.

    peft makes the parameters of every activated adapter trainable, so these are buffers.

    Args:
        transformer: As in `attach`.
        name: Of the adapter; not in use yet.
        layers: Factors of scale 1.
    """
    attach(transformer, name, layers)
    for _, layer in _lora_layers(transformer, name):
        for linear in (layer.lora_A[name], layer.lora_B[name]):
            weight = linear.weight.detach()
            del linear.weight
            linear.register_buffer("weight", weight)


def attach_trainable(
    transformer: FluxTransformer2DModel,
    name: str,
    layers: Mapping[str, LowRank],
    beside: Mapping[str, LowRank] | None = None,
) -> list[nn.Parameter]:
    """Attach factors to train, in float32 whatever the base's dtype, and freeze all else.

    They compute in the base's dtype, as under autocast: weights are rounded for each product, what
    the optimizer holds is not.

    Args:
        transformer: As in `attach`.
        name: Of the adapter; not in use yet.
        layers: Factors A and B to start from, of scale 1.
        beside: Factors C and D of some of the layers, frozen: they add B A x + D C x, computed as
            one product, so that what is equal and opposite cancels before any rounding.

    Returns:
        The parameters to train.
    """
    active = active_adapters(transformer)
    transformer.requires_grad_(False)
    with _several_adapters():
        transformer.add_adapter(_lora_config(layers), name)
    for parameter in adapter_parameters(transformer, name):
        parameter.data = parameter.data.float()
    state = {}
    for layer, pair in layers.items():
        state[f"{layer}.lora_A.weight"] = pair.down.float()
        state[f"{layer}.lora_B.weight"] = pair.up.float()
    set_peft_model_state_dict(transformer, state, name)
    dtype = _compute_dtype(transformer)
    for path, layer in _lora_layers(transformer, name):
        layer.cast_input_dtype_enabled = False  # activations are large, factors are small
        down, up = (beside or {}).get(path, (None, None))
        layer.lora_A[name] = _TrainableFactor(layer.lora_A[name].weight, down, 0, dtype)
        layer.lora_B[name] = _TrainableFactor(layer.lora_B[name].weight, up, 1, dtype)
    parameters = list(adapter_parameters(transformer, name))
    transformer.set_adapter([*active, name])
    for other in active:
        for parameter in adapter_parameters(transformer, other):
            parameter.requires_grad_(False)
    return parameters


class Activity:
    """Which adapters of a transformer take part, layer by layer, and with which scales.

    Args:
        transformer: With any adapters of peft.
    """

    def __init__(self, transformer: nn.Module) -> None:
        self._layers = {
            path: (layer._active_adapter, dict(getattr(layer, "scaling", {})))
            for path, layer in _tuner_layers(transformer)
        }

    def put_back(self, transformer: nn.Module) -> None:
        """Make it so again, the adapters themselves attached anew or not."""
        for path, layer in _tuner_layers(transformer):
            if path in self._layers:
                layer._active_adapter, scaling = self._layers[path]
                if scaling:
                    layer.scaling.update(scaling)


def detach(transformer: FluxTransformer2DModel, names: Sequence[str]) -> None:
    """Remove adapters; the others stay active as they are, and without any the layers unwrap."""
    present = peft_configs(transformer)
    active = [name for name in active_adapters(transformer) if name not in names]
    transformer.delete_adapters([name for name in names if name in present])
    if not peft_configs(transformer):
        transformer.unload_lora()
        return
    for layer in transformer.modules():
        if isinstance(layer, LoraLayer):
            layer._active_adapter = active


class Rest:
    """Some adapters left out of a transformer's forwards, until `end`; what trains stays as it is.

    Args:
        transformer: With any adapters of peft.
        names: Of those to leave out.
    """

    def __init__(self, transformer: nn.Module, names: Sequence[str]) -> None:
        self._layers = []
        for layer in transformer.modules():
            if isinstance(layer, BaseTunerLayer):
                before = layer._active_adapter
                during = [name for name in layer.active_adapters if name not in names]
                if len(during) < len(layer.active_adapters):
                    layer._active_adapter = during
                    self._layers.append((layer, before, during))

    @property
    def has_fused(self) -> bool:
        """Whether some take part all the same, since they are fused into the base's weights."""
        return any(getattr(layer, "merged", False) for layer, _, _ in self._layers)

    def end(self) -> None:
        """Let them take part again, but in layers for which others have been chosen since."""
        for layer, before, during in self._layers:
            if layer._active_adapter is during:
                layer._active_adapter = before


def read_update(transformer: FluxTransformer2DModel, name: str) -> Update:
    """Return what an attached adapter does, so that it can be attached again (references)."""
    state = read_variant(transformer, name)
    kind = find_kind(list(state))
    if kind is None:
        return read_factors(transformer, name)
    return Variant(kind, as_plain(transformer.peft_config[name]), state)


def read_factors(transformer: FluxTransformer2DModel, name: str) -> dict[str, LowRank]:
    """Return an attached adapter's factors by layer (references, not copies)."""
    return {
        path: LowRank(layer.lora_A[name].weight, layer.lora_B[name].weight)
        for path, layer in _lora_layers(transformer, name)
    }


def adapter_parameters(transformer: FluxTransformer2DModel, name: str) -> list[nn.Parameter]:
    """Return an adapter's parameters: A and B of each layer in turn."""
    return [
        weight
        for pair in read_factors(transformer, name).values()
        for weight in pair
        if isinstance(weight, nn.Parameter)
    ]


@contextmanager
def _several_adapters() -> Iterator[None]:
    # peft takes a second adapter on one model for a mistake; here it is the method
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Already found a `peft_config` attribute")
        yield


def _lora_config(layers: Mapping[str, LowRank]) -> LoraConfig:
    ranks = {layer: pair.down.shape[0] for layer, pair in layers.items()}
    usual = Counter(ranks.values()).most_common(1)[0][0]
    # peft takes keys for the ends of names: proj_out would be that of each single block too
    unusual = {f"^{re.escape(layer)}": rank for layer, rank in ranks.items() if rank != usual}
    return LoraConfig(
        r=usual,
        lora_alpha=usual,
        rank_pattern=unusual,
        alpha_pattern=unusual,
        target_modules=list(layers),
    )


def _cast_to_compute(transformer: FluxTransformer2DModel, name: str) -> None:
    dtype = _compute_dtype(transformer)
    for _, layer in _lora_layers(transformer, name):
        layer.lora_A[name].to(dtype)
        layer.lora_B[name].to(dtype)


def _compute_dtype(transformer: FluxTransformer2DModel) -> torch.dtype:
    dtype: torch.dtype = transformer.dtype
    return dtype if dtype.is_floating_point else torch.bfloat16


class _TrainableFactor(nn.Module):
    """A float32 factor that computes in its input's dtype, beside a frozen one if there is one.

    The frozen one is held as it is computed with.
    """

    beside: torch.Tensor

    def __init__(
        self, weight: nn.Parameter, beside: torch.Tensor | None, dim: int, dtype: torch.dtype
    ) -> None:
        super().__init__()
        self.weight = weight
        self.dim = dim
        frozen = weight.detach().narrow(dim, 0, 0) if beside is None else beside
        self.register_buffer("beside", frozen.to(weight.device, dtype), persistent=False)

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        factors = [self.weight.to(input.dtype), self.beside.to(input.dtype)]
        return nn.functional.linear(input, torch.cat(factors, dim=self.dim))


def _tuner_layers(transformer: nn.Module) -> Iterator[tuple[str, Any]]:
    for path, layer in transformer.named_modules():
        if isinstance(layer, BaseTunerLayer):
            yield path, layer


def _lora_layers(transformer: FluxTransformer2DModel, name: str) -> Iterator[tuple[str, LoraLayer]]:
    for path, layer in transformer.named_modules():
        if isinstance(layer, LoraLayer) and name in layer.lora_A:
            yield path, layer
