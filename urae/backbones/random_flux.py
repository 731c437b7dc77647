"""FLUX pipelines of random weights, in diffusers layout, for demo, tests and benchmarks.

Stock classes and FLUX.1's own scheduler. Every part of FLUX is there; the pictures mean nothing.
"""

import math
from pathlib import Path
from typing import Literal

import torch
from diffusers import FluxPipeline
from torch import nn
from transformers import T5EncoderModel

from urae.backbones.parts import (
    Sizes,
    build_clip_tokenizer,
    build_parts,
    build_scheduler,
    build_t5_tokenizer,
)

Shape = Literal["tiny", "flux-dev", "flux-schnell"]

_SHARD_SIZE = "5GB"
# enough for captions of rendered shapes to be a few tokens; other text goes letter by letter
_WORDS = (
    "a an the of on in at and with to above below left right before behind beside large small tiny "
    "red green blue yellow orange purple white black grey pink brown circle square triangle star "
    "ring cross diamond hexagon stripe stripes striped dotted dots plain checked background photo "
    "picture painting mountain lake sky night day city street"
).split()

_FLUX: Sizes = {
    "transformer": {},  # the defaults of diffusers are FLUX.1's
    "vae": {"block_out_channels": (128, 256, 512, 512), "layers_per_block": 2},
    "clip": {
        "vocab_size": 49408,
        "hidden_size": 768,
        "intermediate_size": 3072,
        "num_hidden_layers": 12,
        "num_attention_heads": 12,
    },
    "t5": {
        "vocab_size": 32128,
        "d_model": 4096,
        "d_kv": 64,
        "d_ff": 10240,
        "num_layers": 24,
        "num_heads": 64,
    },
}
_TINY: Sizes = {
    "transformer": {
        "num_layers": 2,
        "num_single_layers": 2,
        "attention_head_dim": 32,
        "num_attention_heads": 4,
        "axes_dims_rope": (4, 14, 14),
        "joint_attention_dim": 64,
        "pooled_projection_dim": 48,
    },
    "vae": {"block_out_channels": (16, 16, 32, 32), "layers_per_block": 1, "norm_num_groups": 8},
    "clip": {
        "vocab_size": 1024,
        "hidden_size": 48,
        "intermediate_size": 96,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
    },
    "t5": {
        "vocab_size": 256,
        "d_model": 64,
        "d_kv": 16,
        "d_ff": 128,
        "num_layers": 2,
        "num_heads": 4,
    },
}
_SHAPES: dict[Shape, Sizes] = {"tiny": _TINY, "flux-dev": _FLUX, "flux-schnell": _FLUX}


def write_random_flux(
    folder: Path,
    shape: Shape,
    *,
    seed: int = 0,
    dtype: torch.dtype = torch.float32,
    device: torch.device | str = "cpu",
) -> Path:
    """Write a FLUX pipeline of random weights.

    Args:
        folder: Where to; it must be new or empty. The full shapes take 34 GB in bfloat16.
        shape: FLUX.1-dev's or -schnell's in full (11.9 B parameters, T5-XXL 4.8 B), or `tiny`
            (under 2 M, dev's in kind), which generates on a CPU in a second.
        seed: Of the weights.
        dtype: Of the weights; bfloat16 for the full shapes.
        device: Where the weights are drawn; the full shapes want a GPU with 40 GB free.

    Returns:
        The folder.

    Raises:
        ValueError: If the shape is unknown.
        FileExistsError: If the folder holds something.
    """
    if folder.exists() and any(folder.iterdir()):
        raise FileExistsError(f"{folder} is not empty; choose a new folder, or delete it first")
    parts = build_meta_flux(shape)
    generator = torch.Generator(device).manual_seed(seed)
    for part in parts.values():
        _draw_weights(part, generator, dtype)
    pipe = FluxPipeline(
        scheduler=build_scheduler(static_shift=1.0 if shape == "flux-schnell" else None),
        tokenizer=build_clip_tokenizer(_WORDS),
        tokenizer_2=build_t5_tokenizer(_WORDS),
        **parts,
    )
    pipe.save_pretrained(folder, max_shard_size=_SHARD_SIZE)
    return folder


def build_meta_flux(shape: Shape) -> dict[str, nn.Module]:
    """Build FLUX's four models without weights, by their names in the pipeline.

    Raises:
        ValueError: If the shape is unknown.
    """
    if shape not in _SHAPES:
        raise ValueError(f"shape {shape!r} is unknown; choose one of {', '.join(_SHAPES)}")
    with torch.device("meta"):
        return build_parts(
            _SHAPES[shape], build_clip_tokenizer(_WORDS), guided=shape != "flux-schnell"
        )


@torch.no_grad()
def _draw_weights(module: nn.Module, generator: torch.Generator, dtype: torch.dtype) -> None:
    """Give a module on the meta device weights: normal, of variance 1 / inputs; norms are one.

    Activations then stay near 1 through any depth, in bfloat16 too.
    """
    nn.Module.to(module, dtype).to_empty(device=generator.device).eval()
    if isinstance(module, T5EncoderModel):
        module.tie_weights()  # its embedding has two names
    for name, parameter in module.named_parameters():
        if parameter.ndim > 1:
            parameter.normal_(std=1 / math.sqrt(parameter[0].numel()), generator=generator)
        else:
            parameter.fill_(0.0 if name.endswith("bias") else 1.0)
