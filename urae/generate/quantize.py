"""Weights in 8 and 4 bits, by diffusers' own quantisation at load: approximations.

Adapters stay outside, in the dtype that the base computes in.
"""

from importlib.util import find_spec
from typing import Any

import torch

from urae.generate.estimate import Tier

_LIBRARIES: dict[Tier, str] = {"8bit": "torchao", "4bit": "bitsandbytes"}


def check_quantization(tier: Tier, device: torch.device) -> None:
    """Refuse a tier that this machine cannot quantise for; others pass.

    Raises:
        ModuleNotFoundError: If the tier's library is not installed; says how to install it.
        ValueError: If 4 bits are asked for without a CUDA device, on which they are made.
    """
    if (library := _LIBRARIES.get(tier)) is None:
        return
    if find_spec(library) is None:
        raise ModuleNotFoundError(
            f"--memory {tier} needs the package {library}: pip install {library}"
        )
    if tier == "4bit" and device.type != "cuda":
        raise ValueError(
            f"--memory 4bit needs a CUDA device to quantise on, this machine runs on "
            f"{device.type}; leave --memory out"
        )


def can_quantize(tier: Tier) -> bool:
    """Tell whether a tier needs no library, or its library is installed."""
    return tier not in _LIBRARIES or find_spec(_LIBRARIES[tier]) is not None


def build_quantization(tier: Tier, dtype: torch.dtype) -> Any:
    """Build diffusers' settings for a transformer's linear layers; None where nothing is quantised.

    Args:
        tier: `8bit` is torchao's int8 weights, `4bit` bitsandbytes' nf4; the activations keep
            `dtype`.
        dtype: To compute in.
    """
    if tier == "8bit":
        from diffusers import TorchAoConfig
        from torchao.quantization import Int8WeightOnlyConfig

        return TorchAoConfig(Int8WeightOnlyConfig(version=2))
    if tier == "4bit":
        from diffusers import BitsAndBytesConfig

        return BitsAndBytesConfig(
            load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=dtype
        )
    return None
