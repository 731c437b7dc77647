"""FLUX pipelines of random weights, in diffusers layout: for demos, tests and benchmarks.

Stock classes and FLUX.1's own scheduler; the tokenizers are made on the spot, so nothing is
downloaded. The pictures mean nothing, but every part of FLUX is there.
"""

import json
import math
from pathlib import Path
from typing import Any, Literal

import torch
from diffusers import (
    AutoencoderKL,
    FlowMatchEulerDiscreteScheduler,
    FluxPipeline,
    FluxTransformer2DModel,
)
from tokenizers import Tokenizer, models, pre_tokenizers, trainers
from torch import nn
from transformers import (
    CLIPTextConfig,
    CLIPTextModel,
    CLIPTokenizer,
    T5Config,
    T5EncoderModel,
    T5Tokenizer,
)

Shape = Literal["tiny", "flux-dev", "flux-schnell"]
Sizes = dict[str, dict[str, Any]]

_SHARD_SIZE = "5GB"
_T5_SPECIAL = ("<pad>", "</s>", "<unk>")
_CLIP_SPECIAL = ("<|startoftext|>", "<|endoftext|>")
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
        scheduler=_build_scheduler(shape),
        tokenizer=_build_clip_tokenizer(),
        tokenizer_2=_build_t5_tokenizer(),
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
    sizes = _SHAPES[shape]
    with torch.device("meta"):
        return {
            "transformer": FluxTransformer2DModel(
                guidance_embeds=shape != "flux-schnell", **sizes["transformer"]
            ),
            "vae": _build_vae(sizes["vae"]),
            "text_encoder": _build_clip(sizes["clip"]),
            "text_encoder_2": T5EncoderModel(
                T5Config(feed_forward_proj="gated-gelu", **sizes["t5"])
            ),
        }


def _build_vae(sizes: dict[str, Any]) -> nn.Module:
    vae: nn.Module = AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        latent_channels=16,
        sample_size=1024,
        scaling_factor=0.3611,
        shift_factor=0.1159,
        use_quant_conv=False,
        use_post_quant_conv=False,
        **sizes,
    )
    return vae


def _build_clip(sizes: dict[str, Any]) -> nn.Module:
    tokenizer = _build_clip_tokenizer()
    config = CLIPTextConfig(
        projection_dim=sizes["hidden_size"],
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,  # its place is the pooled embedding's
        pad_token_id=tokenizer.pad_token_id,
        **sizes,
    )
    model: nn.Module = CLIPTextModel(config)
    return model


def _build_scheduler(shape: Shape) -> FlowMatchEulerDiscreteScheduler:
    schnell = shape == "flux-schnell"
    return FlowMatchEulerDiscreteScheduler(
        num_train_timesteps=1000,
        shift=1.0 if schnell else 3.0,
        use_dynamic_shifting=not schnell,
        base_shift=0.5,
        max_shift=1.15,
        base_image_seq_len=256,
        max_image_seq_len=4096,
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


def _build_clip_tokenizer() -> CLIPTokenizer:
    """Build a byte-level BPE tokenizer with CLIP's special tokens, trained on a few words."""
    learner = Tokenizer(models.BPE())
    learner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    learner.train_from_iterator(
        _WORDS,
        trainers.BpeTrainer(
            vocab_size=1000,
            min_frequency=1,
            show_progress=False,
            initial_alphabet=letters,
            end_of_word_suffix="</w>",
        ),
    )
    merges = [tuple(merge) for merge in json.loads(learner.to_str())["model"]["merges"]]
    tokens = [*letters, *(f"{letter}</w>" for letter in letters)]
    tokens += [first + second for first, second in merges]
    tokens = [*dict.fromkeys(tokens), *_CLIP_SPECIAL]
    return CLIPTokenizer(
        vocab={token: number for number, token in enumerate(tokens)},
        merges=merges,
        model_max_length=77,
    )


def _build_t5_tokenizer() -> T5Tokenizer:
    """Build a unigram tokenizer with T5's special tokens over words and printable ASCII."""
    letters = ["▁", *(chr(code) for code in range(33, 127))]
    pieces = [f"▁{word}" for word in _WORDS]
    return T5Tokenizer(
        vocab=[
            *((token, 0.0) for token in _T5_SPECIAL),
            *((piece, -4.0) for piece in pieces),
            *((letter, -8.0) for letter in letters),
        ],
        extra_ids=0,
        model_max_length=512,
    )
