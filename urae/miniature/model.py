"""The miniature's models: a FLUX of 5 M parameters in stock classes, and how it is stored.

Its native 256 x 256 plays FLUX's 1024 x 1024: 512 x 512 is its 2K, 1024 x 1024 its 4K.
"""

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, Literal

import torch
from diffusers import FluxPipeline
from torch import nn
from transformers import CLIPTokenizer, T5Tokenizer

from urae.backbones.parts import (
    Sizes,
    build_clip_tokenizer,
    build_parts,
    build_scheduler,
    build_t5_tokenizer,
)
from urae.geometry import num_image_tokens
from urae.miniature.grammar import VOCABULARY
from urae.resolution import BASE_POLICY_FILE, ResolutionPolicy
from urae.storage import read_tensors, write_atomic, write_tensors

Kind = Literal["dev", "schnell", "teacher"]

NATIVE_SIDE = 256
TEXT_TOKENS = 64
NATIVE_IMAGE_TOKENS = num_image_tokens(NATIVE_SIDE, NATIVE_SIDE)
POLICY = ResolutionPolicy(native_sequence_length=NATIVE_IMAGE_TOKENS + TEXT_TOKENS)
"""The reference's policy at the miniature's own native size."""

HELD_OUT_SEED = 2**80
"""First seed of scenes that nothing trains on."""

_TRANSFORMER: dict[str, Any] = {
    "num_layers": 2,
    "num_single_layers": 4,
    "attention_head_dim": 32,
    "num_attention_heads": 6,
    "axes_dims_rope": (4, 14, 14),
    "joint_attention_dim": 128,
    "pooled_projection_dim": 96,
}
_SIZES: Sizes = {
    "transformer": _TRANSFORMER,
    "vae": {
        "block_out_channels": (32, 64, 96, 96),
        "layers_per_block": 1,
        "norm_num_groups": 8,
        "mid_block_add_attention": False,  # its cost grows with the square of the pixels
        "sample_size": NATIVE_SIDE,
    },
    "clip": {
        "vocab_size": 1024,
        "hidden_size": 96,
        "intermediate_size": 192,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
    },
    "t5": {
        "vocab_size": 192,
        "d_model": 128,
        "d_kv": 32,
        "d_ff": 256,
        "num_layers": 2,
        "num_heads": 4,
        "dropout_rate": 0.0,
    },
}
_TEACHER: Sizes = {**_SIZES, "transformer": {**_TRANSFORMER, "num_attention_heads": 7}}


def build_tokenizers() -> tuple[CLIPTokenizer, T5Tokenizer]:
    """Build the tokenizers: a token for each word of the grammar, letters for all else."""
    words = [*VOCABULARY, ","]
    return build_clip_tokenizer(words), build_t5_tokenizer(words, max_length=TEXT_TOKENS)


def build_miniature(kind: Kind, *, guided: bool, seed: int) -> dict[str, nn.Module]:
    """Build the miniature's four models untrained, by their names in the pipeline.

    Args:
        kind: The teacher's transformer is wider, all else is the same.
        guided: Whether the transformer has a guidance embedding.
        seed: Of the weights.
    """
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        sizes = _TEACHER if kind == "teacher" else _SIZES
        parts = build_parts(sizes, build_tokenizers()[0], guided=guided)
    _silence(parts["transformer"])
    return parts


def _silence(transformer: nn.Module) -> None:
    """Let every block begin as the identity, as in DiT (arXiv:2212.09748, section 3.2)."""
    for name, module in transformer.named_modules():
        if name == "proj_out" or name.endswith(("norm.linear", "norm1.linear", "_context.linear")):
            assert isinstance(module, nn.Linear)
            nn.init.zeros_(module.weight)
            nn.init.zeros_(module.bias)


def write_weights(path: Path, parts: Mapping[str, nn.Module], metadata: Mapping[str, str]) -> None:
    """Write models into one file in float16, by `part.weight` names."""
    tensors = {
        f"{name}.{key}": tensor.half() if tensor.is_floating_point() else tensor
        for name, part in parts.items()
        for key, tensor in part.state_dict().items()
    }
    write_tensors(path, tensors, metadata)


def read_weights(path: Path, parts: Mapping[str, nn.Module]) -> dict[str, str]:
    """Read models that `write_weights` wrote, in place and in their own dtypes.

    Returns:
        The file's metadata.

    Raises:
        FileNotFoundError: If there is none.
        ValueError: If a model is not in it, or of another shape.
    """
    if not path.is_file():
        raise FileNotFoundError(
            f"{path} does not exist; unpack the shipped one with urae miniature unpack, or train "
            f"that stage first: urae miniature train {path.stem}"
        )
    tensors, metadata = read_tensors(path)
    for name, part in parts.items():
        prefix = f"{name}."
        state = {k.removeprefix(prefix): t for k, t in tensors.items() if k.startswith(prefix)}
        try:
            part.load_state_dict(state)
        except RuntimeError as error:
            raise ValueError(f"{path} does not hold this {name}: {error}") from error
    return metadata


def build_pipeline(
    parts: Mapping[str, nn.Module],
    *,
    static_shift: float | None,
    latent_mean: float,
    latent_std: float,
) -> FluxPipeline:
    """Put models, tokenizers and scheduler together as a stock FLUX pipeline.

    Args:
        parts: As of `build_miniature`.
        static_shift: Time shift of its schedule at every size; None is dynamic, as FLUX.1-dev's.
        latent_mean: Of the VAE's latents; the pipeline shifts them by it.
        latent_std: Of the VAE's latents; the pipeline divides them by it.
    """
    clip_tokenizer, t5_tokenizer = build_tokenizers()
    vae: Any = parts["vae"]
    vae.register_to_config(shift_factor=latent_mean, scaling_factor=1 / latent_std)
    return FluxPipeline(
        scheduler=build_scheduler(
            static_shift=static_shift, native_image_tokens=NATIVE_IMAGE_TOKENS
        ),
        tokenizer=clip_tokenizer,
        tokenizer_2=t5_tokenizer,
        **parts,
    )


def write_pipeline(folder: Path, pipe: FluxPipeline) -> None:
    """Write a pipeline in diffusers layout, in float16, with the miniature's policy."""
    pipe.to(dtype=torch.float16).save_pretrained(folder)
    write_atomic(folder / BASE_POLICY_FILE, POLICY.to_json().encode())


def count_parameters(parts: Iterable[nn.Module]) -> int:
    """Count the parameters of some models."""
    return sum(parameter.numel() for part in parts for parameter in part.parameters())
