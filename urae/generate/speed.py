"""What makes sampling faster without changing what it computes."""

import logging
import shutil

import torch
from diffusers import FluxTransformer2DModel
from torch.utils._triton import has_triton

from urae.geometry import num_image_tokens

logger = logging.getLogger(__name__)

# on an H200 compiling took 19 s and saved 1.2e-5 s a token and step (docs/performance.md)
_PAYS_FROM_TOKEN_STEPS = 1_600_000


def is_long(height: int, width: int, steps: int, num_pictures: int) -> bool:
    """Tell whether compiling the blocks would save more time than it takes, where it can be done.

    Args:
        height: Of a picture in pixels.
        width: Of a picture in pixels.
        steps: Denoising steps of a picture.
        num_pictures: In this job.
    """
    return num_image_tokens(height, width) * steps * num_pictures >= _PAYS_FROM_TOKEN_STEPS


def pays_to_compile(
    device: torch.device, height: int, width: int, steps: int, num_pictures: int
) -> bool:
    """Tell whether the blocks are to be compiled: on a GPU, in a long job, with a compiler.

    Args:
        device: Where the transformer runs.
        height, width, steps, num_pictures: As `is_long`.
    """
    if device.type != "cuda" or not is_long(height, width, steps, num_pictures):
        return False
    if not has_triton() or not any(map(shutil.which, ("cc", "gcc", "clang"))):
        logger.info("blocks are not compiled: that needs Triton and a C compiler")
        return False
    return True


def compile_blocks(transformer: FluxTransformer2DModel, *, streamed: bool) -> None:
    """Compile the blocks, each kind once.

    Args:
        transformer: Adapted, and not offloaded yet.
        streamed: Whether each block will be offloaded by a hook around its forward. Then only the
            forward inside is compiled: hooks differ from block to block, and would be recompiled.
    """
    if not streamed:
        transformer.compile_repeated_blocks()
        return
    for block in [*transformer.transformer_blocks, *transformer.single_transformer_blocks]:
        block.forward = torch.compile(block.forward)
