"""kohya's names: several of diffusers' layers are one matrix there, as in BFL's own model."""

import re
from collections.abc import Mapping

import torch
from torch import Tensor

from urae.adapters.settings import scale_factor

_DOUBLE = {
    "img_attn_qkv": ("attn.to_q", "attn.to_k", "attn.to_v"),
    "img_attn_proj": ("attn.to_out.0",),
    "img_mlp_0": ("ff.net.0.proj",),
    "img_mlp_2": ("ff.net.2",),
    "img_mod_lin": ("norm1.linear",),
    "txt_attn_qkv": ("attn.add_q_proj", "attn.add_k_proj", "attn.add_v_proj"),
    "txt_attn_proj": ("attn.to_add_out",),
    "txt_mlp_0": ("ff_context.net.0.proj",),
    "txt_mlp_2": ("ff_context.net.2",),
    "txt_mod_lin": ("norm1_context.linear",),
}
_SINGLE = {
    "linear1": ("attn.to_q", "attn.to_k", "attn.to_v", "proj_mlp"),
    "linear2": ("proj_out",),
    "modulation_lin": ("norm.linear",),
}
BLOCKS = {
    "transformer_blocks": ("double_blocks", _DOUBLE),
    "single_transformer_blocks": ("single_blocks", _SINGLE),
}
"""By diffusers' name of a kind of block: kohya's, and which layers each of its matrices joins."""
MLP_RATIO = 4
"""Height of an MLP's matrix in widths."""

_LINEAR1 = re.compile(r"lora_unet_single_blocks_\d+_linear1\.lora_up\.weight")
_HEIGHTS = (1, 1, 1, MLP_RATIO)  # of its parts, in widths
_FLUX_WIDTH = 3072


def split_linear1(tensors: Mapping[str, Tensor]) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Split q, k, v and MLP of single blocks, and name them as diffusers does.

    Stock diffusers reads all other keys at any width, but these at FLUX.1's alone, where they are
    left to it.

    Args:
        tensors: An adapter file's, of any format.

    Returns:
        What is left to diffusers, and the factors of the parts: those components that a part has.
    """
    rest, parts = dict(tensors), {}
    for up_key in filter(_LINEAR1.fullmatch, tensors):
        key = up_key.removesuffix(".lora_up.weight")
        up, down = tensors[up_key], tensors.get(f"{key}.lora_down.weight")
        if down is None or up.ndim != 2 or down.ndim != 2 or up.shape[1] != len(down):
            continue  # no pair: diffusers says so
        (height, rank), num_heights = up.shape, sum(_HEIGHTS)
        width = height // num_heights
        if width == _FLUX_WIDTH or height % num_heights or not rank:
            continue
        del rest[up_key], rest[f"{key}.lora_down.weight"]
        scale = float(rest.pop(f"{key}.alpha", torch.tensor(rank))) / rank
        block = f"transformer.single_transformer_blocks.{key.split('_')[-2]}"
        rows = up.split_with_sizes([width * times for times in _HEIGHTS])
        for part, part_up in zip(_SINGLE["linear1"], rows, strict=True):
            if (present := part_up.any(dim=0)).any():
                parts[f"{block}.{part}.lora_A.weight"] = down[present]
                parts[f"{block}.{part}.lora_B.weight"] = scale_factor(part_up[:, present], scale)
    return rest, parts
