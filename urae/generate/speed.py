"""What makes sampling faster without changing what it computes."""

import logging
import shutil

import torch
from torch.utils._triton import has_triton

from urae.geometry import num_image_tokens

logger = logging.getLogger(__name__)

# on an H200 compiling took 19 s and saved 1.2e-5 s a token and step (docs/performance.md)
_PAYS_FROM_TOKEN_STEPS = 1_600_000


def pays_to_compile(
    device: torch.device, height: int, width: int, steps: int, num_pictures: int
) -> bool:
    """Tell whether compiling the blocks saves more time than it takes.

    Args:
        device: Where the transformer runs; only a GPU is worth it.
        height: Of a picture in pixels.
        width: Of a picture in pixels.
        steps: Denoising steps of a picture.
        num_pictures: In this job.
    """
    if device.type != "cuda":
        return False
    if num_image_tokens(height, width) * steps * num_pictures < _PAYS_FROM_TOKEN_STEPS:
        return False
    if not has_triton() or not any(map(shutil.which, ("cc", "gcc", "clang"))):
        logger.info("blocks are not compiled: that needs Triton and a C compiler")
        return False
    return True
