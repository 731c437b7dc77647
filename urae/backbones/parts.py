"""FLUX's parts in any size, stock classes: models without weights, tokenizers, scheduler.

The tokenizers are made on the spot from a list of words, so nothing is downloaded.
"""

import json
from collections.abc import Sequence
from typing import Any

from diffusers import AutoencoderKL, FlowMatchEulerDiscreteScheduler, FluxTransformer2DModel
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

Sizes = dict[str, dict[str, Any]]
"""Of `transformer`, `vae`, `clip` and `t5`, by the names of their classes' arguments."""

_T5_SPECIAL = ("<pad>", "</s>", "<unk>")
_CLIP_SPECIAL = ("<|startoftext|>", "<|endoftext|>")


def build_parts(
    sizes: Sizes, clip_tokenizer: CLIPTokenizer, *, guided: bool
) -> dict[str, nn.Module]:
    """Build FLUX's four models, initialised as their classes do, by their names in the pipeline.

    Args:
        sizes: Of each; on the meta device no weights are made.
        clip_tokenizer: Whose special tokens CLIP is to know.
        guided: Whether the transformer has a guidance embedding, as FLUX.1-dev has.
    """
    return {
        "transformer": FluxTransformer2DModel(guidance_embeds=guided, **sizes["transformer"]),
        "vae": _build_vae(sizes["vae"]),
        "text_encoder": _build_clip(sizes["clip"], clip_tokenizer),
        "text_encoder_2": T5EncoderModel(T5Config(feed_forward_proj="gated-gelu", **sizes["t5"])),
    }


def _build_vae(sizes: dict[str, Any]) -> nn.Module:
    vae: nn.Module = AutoencoderKL(
        **{
            "down_block_types": ("DownEncoderBlock2D",) * 4,
            "up_block_types": ("UpDecoderBlock2D",) * 4,
            "latent_channels": 16,
            "sample_size": 1024,
            "scaling_factor": 0.3611,
            "shift_factor": 0.1159,
            "use_quant_conv": False,
            "use_post_quant_conv": False,
            **sizes,
        }
    )
    return vae


def _build_clip(sizes: dict[str, Any], tokenizer: CLIPTokenizer) -> nn.Module:
    config = CLIPTextConfig(
        projection_dim=sizes["hidden_size"],
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,  # its place is the pooled embedding's
        pad_token_id=tokenizer.pad_token_id,
        **sizes,
    )
    model: nn.Module = CLIPTextModel(config)
    return model


def build_scheduler(
    *, static_shift: float | None, native_image_tokens: int = 4096
) -> FlowMatchEulerDiscreteScheduler:
    """Build FLUX.1-dev's or -schnell's scheduler.

    Args:
        static_shift: Time shift at every size; schnell's is 1. None is dynamic, as dev's.
        native_image_tokens: Where dev's dynamic shift reaches FLUX.1's at 1024 x 1024; it starts
            at a sixteenth of it.
    """
    return FlowMatchEulerDiscreteScheduler(
        num_train_timesteps=1000,
        shift=3.0 if static_shift is None else static_shift,
        use_dynamic_shifting=static_shift is None,
        base_shift=0.5,
        max_shift=1.15,
        base_image_seq_len=native_image_tokens // 16,
        max_image_seq_len=native_image_tokens,
    )


def build_clip_tokenizer(words: Sequence[str]) -> CLIPTokenizer:
    """Build a byte-level BPE tokenizer with CLIP's special tokens, trained on some words."""
    learner = Tokenizer(models.BPE())
    learner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    last_letters = [f"{letter}</w>" for letter in letters]
    learner.train_from_iterator(
        words,
        trainers.BpeTrainer(
            vocab_size=1000,
            min_frequency=1,
            show_progress=False,
            initial_alphabet=letters,
            special_tokens=last_letters,  # else numbered as they come, and ties differ by process
            end_of_word_suffix="</w>",
        ),
    )
    merges = [tuple(merge) for merge in json.loads(learner.to_str())["model"]["merges"]]
    tokens = [*letters, *last_letters, *(first + second for first, second in merges)]
    tokens = [*dict.fromkeys(tokens), *_CLIP_SPECIAL]
    return CLIPTokenizer(
        vocab={token: number for number, token in enumerate(tokens)},
        merges=merges,
        model_max_length=77,
    )


def build_t5_tokenizer(words: Sequence[str], *, max_length: int = 512) -> T5Tokenizer:
    """Build a unigram tokenizer with T5's special tokens over words and printable ASCII.

    Args:
        words: A token each; other text goes letter by letter.
        max_length: Text tokens that the model is for.
    """
    letters = ["▁", *(chr(code) for code in range(33, 127))]
    pieces = [f"▁{word}" for word in words]
    return T5Tokenizer(
        vocab=[
            *((token, 0.0) for token in _T5_SPECIAL),
            *((piece, -4.0) for piece in pieces),
            *((letter, -8.0) for letter in letters),
        ],
        extra_ids=0,
        model_max_length=max_length,
    )
