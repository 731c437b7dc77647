"""Scenes as a varied camera sees them: cropped, turned, zoomed, blurred, exposed, compressed."""

import io
import math
import random
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float, UInt8
from PIL import Image
from torch import Tensor

from urae.miniature.render import View, render_view
from urae.miniature.world import Scene


@dataclass(frozen=True)
class Camera:
    """How a photograph is taken."""

    share: float
    """Of the scene's height and width that is in the picture; texture keeps its scale in pixels."""
    right: float
    """Where that part is, from 0 (left) to 1 (right)."""
    down: float
    """The same from the top."""
    degrees: float
    """By how much it is turned."""
    zoom: float
    """Magnification of everything, texture included."""
    blur_pixels: float
    """Standard deviation."""
    gains: tuple[float, float, float]
    """Exposure and tint: the factor of red, green and blue."""
    quality: int
    """Of the JPEG file, as Pillow counts."""


def sample_camera(rng: random.Random) -> Camera:
    """Draw a camera of the `real` source."""
    exposure = rng.uniform(0.8, 1.1)
    return Camera(
        share=rng.uniform(0.75, 1.0),
        right=rng.random(),
        down=rng.random(),
        degrees=rng.uniform(-5, 5),
        zoom=rng.uniform(0.95, 1.15),
        blur_pixels=rng.uniform(0.0, 1.2),
        gains=(
            exposure * rng.uniform(0.95, 1.05),
            exposure * rng.uniform(0.95, 1.05),
            exposure * rng.uniform(0.95, 1.05),
        ),
        quality=rng.randint(40, 85),
    )


def take_photograph(scene: Scene, camera: Camera, height: int, width: int) -> bytes:
    """Render a scene as a camera sees it.

    Returns:
        A JPEG file of `height` x `width` pixels.
    """
    picture = blur(render_view([scene], _look(camera, height, width)).float(), camera.blur_pixels)
    picture *= torch.tensor(camera.gains)[:, None, None]
    return encode_picture((picture[0] + 0.5).clamp(0, 255).byte(), "JPEG", quality=camera.quality)


def encode_picture(picture: UInt8[Tensor, "3 h w"], file_format: str, **options: Any) -> bytes:
    """Return the bytes of an image file; options are Pillow's."""
    buffer = io.BytesIO()
    Image.fromarray(picture.permute(1, 2, 0).numpy()).save(buffer, file_format, **options)
    return buffer.getvalue()


def decode_picture(file: bytes) -> UInt8[Tensor, "3 h w"]:
    """Return the pixels of an RGB image file."""
    image = Image.open(io.BytesIO(file))
    pixels = torch.frombuffer(bytearray(image.tobytes()), dtype=torch.uint8)
    return pixels.reshape(image.height, image.width, 3).permute(2, 0, 1).contiguous()


def _look(camera: Camera, height: int, width: int) -> View:
    scene_height, scene_width = round(height / camera.share), round(width / camera.share)
    y, x = torch.meshgrid(
        *((torch.arange(side) + 0.5 - side / 2) / camera.zoom for side in (height, width)),
        indexing="ij",
    )
    turn = math.radians(camera.degrees)
    left, top = camera.right * (scene_width - width), camera.down * (scene_height - height)
    return View(
        (math.cos(turn) * x - math.sin(turn) * y + left + width / 2)[None],
        (math.sin(turn) * x + math.cos(turn) * y + top + height / 2)[None],
        scene_height,
        scene_width,
    )


def blur(picture: Float[Tensor, "b 3 h w"], sigma: float) -> Float[Tensor, "b 3 h w"]:
    """Blur pictures by a Gaussian of `sigma` pixels."""
    reach = math.ceil(3 * sigma)
    weights = torch.exp(-torch.arange(-reach, reach + 1.0).square() / (2 * sigma**2 + 1e-6))
    kernel = (weights / weights.sum()).expand(3, 1, 1, -1)
    picture = F.pad(picture, [reach] * 4, mode="replicate")
    return F.conv2d(F.conv2d(picture, kernel, groups=3), kernel.mT, groups=3)
