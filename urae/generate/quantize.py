"""Weights in 8 and 4 bits, at load by diffusers' own quantisation or in place: approximations.

Adapters stay outside, in the dtype that the base computes in.
"""

from collections.abc import Callable, Iterator
from contextlib import ExitStack
from importlib.util import find_spec
from typing import Any

import torch
from diffusers import FluxTransformer2DModel
from torch import nn

from urae.backbones.devices import name_device
from urae.choices import Bits, Tier
from urae.generate.int8 import Int8Linear
from urae.generate.speed import check_not_offloaded, list_blocks

LIBRARIES: dict[str, str] = {"fp8": "torchao", "8bit": "torchao", "4bit": "bitsandbytes"}
_FP8_CAPABILITY = (8, 9)
_FP8_MULTIPLE = 16  # of both sides of a matrix


def check_quantization(bits: Tier | Bits, device: torch.device, asked: str = "--memory") -> None:
    """Refuse what this machine cannot quantise to; tiers that quantise nothing pass.

    Args:
        bits: A memory tier, or bits.
        device: Where the pipeline runs.
        asked: How it was asked for, for the error.

    Raises:
        ModuleNotFoundError: If the library is not installed; says how to install it.
        ValueError: If the device cannot do it: 4 bits are made on CUDA, fp8 wants tensor cores that
            have it.
    """
    if (library := LIBRARIES.get(bits)) is None:
        return
    if find_spec(library) is None:
        raise ModuleNotFoundError(
            f"{asked} {bits} needs the package {library}: pip install {library}"
        )
    if bits == "4bit" and device.type != "cuda":
        raise ValueError(
            f"{asked} 4bit needs a CUDA device to quantise on, but this machine runs on "
            f"{device.type}; leave it out"
        )
    if bits == "fp8" and not _has_fp8(device):
        raise ValueError(
            f"{asked} fp8 needs a GPU of compute capability 8.9 or more (Ada, Hopper, Blackwell), "
            f"but this machine runs on {name_device(device)}; leave it out"
        )


def can_quantize(tier: Tier) -> bool:
    """Tell whether a tier needs no library, or its library is installed."""
    return tier not in LIBRARIES or find_spec(LIBRARIES[tier]) is not None


def build_quantization(tier: Tier, dtype: torch.dtype) -> Any:
    """Build diffusers' settings for a transformer's linear layers; None where nothing is quantised.

    Args:
        tier: `8bit` is torchao's int8 weights, `4bit` bitsandbytes' nf4; the activations keep
            `dtype`.
        dtype: To compute in.
    """
    if tier == "8bit":
        from diffusers import TorchAoConfig

        return TorchAoConfig(_build_torchao("8bit"))
    if tier == "4bit":
        from diffusers import BitsAndBytesConfig

        return BitsAndBytesConfig(
            load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=dtype
        )
    return None


def quantize_blocks(
    transformer: FluxTransformer2DModel, bits: Bits, device: torch.device, *, keep: bool = True
) -> Callable[[], None]:
    """Quantise the blocks' linear layers in place.

    With fp8 the modulation of the blocks, one row a picture, keeps its precision.

    Args:
        transformer: Adapted or not; not quantised, compiled or offloaded yet.
        bits: To which precision.
        device: Where to quantise. Eight bits go back to where the weights were, four stay there.
        keep: Whether to keep the original weights, on the host.

    Returns:
        What puts the original weights back, bitwise; nothing, where they are not kept.

    Raises:
        ModuleNotFoundError, ValueError: As `check_quantization`, and if the weights are quantised
            or offloaded already.
    """
    check_quantization(bits, device, asked="part")
    check_not_offloaded(transformer)
    linears = [
        (parent, name, layer)
        for block in list_blocks(transformer)
        for parent, name, layer in _list_linears(block, bits)
    ]
    if any(type(layer.weight) is not nn.Parameter for _, _, layer in linears) or not linears:
        raise ValueError(f"the weights are already quantised; leave out part {bits}")
    quantize = _quantize_4bit if bits == "4bit" else _quantize_8bit
    with ExitStack() as stack:  # where one fails, those before it are put back
        for parent, name, _ in linears:
            put_back = quantize(parent, name, bits, device)
            if keep:
                stack.callback(put_back)
        return stack.pop_all().close


def _list_linears(block: nn.Module, bits: Bits) -> Iterator[tuple[nn.Module, str, nn.Linear]]:
    """Give a block's linear layers with where they are; those of adapters are none of them."""
    for path, module in block.named_modules():
        name = path.rpartition(".")[2]
        if not isinstance(module, nn.Linear) or "lora_" in path:
            continue
        if bits == "fp8" and ("norm" in path or not _suits_fp8(module)):
            continue
        yield block.get_submodule(path.rpartition(".")[0]), name, module


def _suits_fp8(layer: nn.Linear) -> bool:
    return layer.in_features % _FP8_MULTIPLE == 0 and layer.out_features % _FP8_MULTIPLE == 0


def _quantize_8bit(
    parent: nn.Module, name: str, bits: Bits, device: torch.device
) -> Callable[[], None]:
    """Let torchao quantise one layer's weight, by matrices that F.linear knows how to multiply."""
    from torchao.quantization import quantize_

    layer: nn.Linear = getattr(parent, name)
    original, home = layer.weight, layer.weight.device
    layer.weight = nn.Parameter(original.detach().to(device), requires_grad=False)
    quantize_(layer, _build_torchao(bits))
    layer.weight = nn.Parameter(layer.weight.detach().to(home), requires_grad=False)
    vars(layer).pop("extra_repr", None)  # torchao's, which would outlive the weights
    kind = type(layer)
    if bits == "8bit":
        layer.__class__ = Int8Linear
    original.data = original.data.cpu()

    def undo() -> None:
        original.data = original.data.to(layer.weight.device)
        layer.weight = original
        layer.__class__ = kind

    return undo


def _quantize_4bit(
    parent: nn.Module, name: str, _bits: Bits, device: torch.device
) -> Callable[[], None]:
    """Put a layer of bitsandbytes in the place of one; it stays where it was quantised."""
    from bitsandbytes.nn import Linear4bit, Params4bit

    layer: nn.Linear = getattr(parent, name)
    small = Linear4bit(
        layer.in_features,
        layer.out_features,
        bias=layer.bias is not None,
        compute_dtype=layer.weight.dtype,
        quant_type="nf4",
        device="meta",
    )
    weight = Params4bit(layer.weight.detach(), requires_grad=False, quant_type="nf4")
    small.weight = weight.to(device)
    small.bias = layer.bias
    setattr(parent, name, small)
    layer.weight.data = layer.weight.data.cpu()

    def undo() -> None:
        layer.weight.data = layer.weight.data.to(small.weight.device)
        layer.bias = small.bias
        setattr(parent, name, layer)

    return undo


def _build_torchao(bits: Bits) -> Any:
    # without the inductor settings that it recommends: they are the whole process's, and compiling
    # a block of FLUX.1 takes minutes with them
    if bits == "8bit":
        from torchao.quantization import Int8WeightOnlyConfig

        return Int8WeightOnlyConfig(version=2, set_inductor_config=False)
    from torchao.quantization import Float8DynamicActivationFloat8WeightConfig, PerRow

    return Float8DynamicActivationFloat8WeightConfig(
        granularity=PerRow(), set_inductor_config=False
    )


def _has_fp8(device: torch.device) -> bool:
    return device.type == "cuda" and torch.cuda.get_device_capability(device) >= _FP8_CAPABILITY
