"""Scenes to pictures, antialiased, whole batches at a time.

Light, shading, rims and textures all multiply a colour. They change how bright a pixel is but not
the ratios of its channels, by which the scene check tells colours apart.
"""

import random
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float, UInt8
from torch import Tensor

from urae.geometry import check_size
from urae.miniature.grammar import MAX_OBJECTS, SHAPES
from urae.miniature.shapes import PERIOD_PIXELS, SIGNED_DISTANCES, TEXTURE_FIELDS, Field
from urae.miniature.world import Scene, SceneObject

OBJECT_RGB = {
    "red": (214, 62, 58),
    "orange": (238, 138, 44),
    "yellow": (240, 206, 60),
    "green": (66, 160, 80),
    "teal": (44, 172, 178),
    "blue": (58, 100, 206),
    "purple": (132, 74, 186),
    "pink": (234, 96, 164),
}
BACKGROUND_RGB = {
    "grey": (226, 224, 220),
    "green": (184, 232, 178),
    "blue": (180, 214, 246),
    "pink": (250, 192, 206),
    "yellow": (250, 234, 172),
    "purple": (214, 190, 248),
}

RIM_PIXELS = 3.0
"""Width of the dark rim inside an object's edge."""
RIM_GAIN = 0.5
"""Brightness of the rim."""
TEXTURE_DEPTH = 0.22
"""What a texture takes from the brightness where it is darkest."""
EVEN_LIGHT = 0.95
"""Brightness of even light."""
LIGHT_LEVEL = 0.87
"""Brightness in the middle of a picture that is lit from a side."""
LIGHT_SLOPE = 0.15
"""What that light adds at its side, and takes at the other."""
_SHADING = 0.04  # added in the middle of an object, taken at its edge

LIGHT_FROM = {"even": (0, 0), "left": (-1, 0), "right": (1, 0), "top": (0, -1), "bottom": (0, 1)}


@dataclass(frozen=True)
class View:
    """What each pixel of a picture shows: a point of the scene, in pixels from its top left."""

    x: Field
    y: Field
    height: int
    """Of the whole scene, in pixels."""
    width: int


def render(
    scenes: Sequence[Scene], height: int, width: int, *, device: torch.device | str = "cpu"
) -> UInt8[Tensor, "b 3 h w"]:
    """Render whole scenes as 8-bit sRGB, on `device`.

    Devices agree up to rounding: a channel differs by one level here and there.

    Args:
        scenes: At least one.
        height: In pixels, a multiple of 16 as for all of FLUX's pictures.
        width: The same.
        device: Where to render.

    Raises:
        ValueError: If there is no scene, or FLUX has no such size.
    """
    check_size(height, width)
    y, x = (torch.arange(side, device=device) + 0.5 for side in (height, width))
    x, y = x.expand(1, height, width), y[:, None].expand(1, height, width)
    return render_view(scenes, View(x, y, height, width))


def render_view(scenes: Sequence[Scene], view: View) -> UInt8[Tensor, "b 3 h w"]:
    """Render what a camera shows of scenes, on the view's device, as `render` does.

    Args:
        scenes: At least one.
        view: One for all of them, or for each its own.

    Raises:
        ValueError: If there is no scene.
    """
    if not scenes:
        raise ValueError("there is no scene to render; give at least one")
    x, y = (each.expand(len(scenes), -1, -1) for each in (view.x, view.y))
    picture = _paint_background(scenes, x, y)
    for n in range(MAX_OBJECTS):
        for shape in SHAPES:
            rows = [
                row
                for row, scene in enumerate(scenes)
                if n < len(scene.objects) and scene.objects[n].shape == shape
            ]
            if rows:
                objects = [scenes[row].objects[n] for row in rows]
                colours, coverage = _paint_objects(objects, x[rows], y[rows], view)
                picture[rows] = torch.lerp(picture[rows], colours, coverage[:, None])
    picture *= _light_up(scenes, x / view.width, y / view.height)[:, None]
    return (picture + 0.5).clamp(0, 255).to(torch.uint8)


def _paint_background(scenes: Sequence[Scene], x: Field, y: Field) -> Float[Tensor, "b 3 h w"]:
    seeds = torch.tensor([scene.seed for scene in scenes], device=x.device)
    phases = [_sample_phase(scene.seed) for scene in scenes]
    x, y = (
        x + _column(x, [phase[0] for phase in phases]),
        y + _column(x, [phase[1] for phase in phases]),
    )
    darkness = torch.empty(x.shape, device=x.device)
    for texture, field in TEXTURE_FIELDS.items():
        if rows := [row for row, scene in enumerate(scenes) if scene.texture == texture]:
            darkness[rows] = field(x[rows], y[rows], seeds[rows])
    rgb = _rgb(x, [BACKGROUND_RGB[scene.background] for scene in scenes])
    return rgb * (1 - TEXTURE_DEPTH * darkness)[:, None]


def _sample_phase(seed: int) -> tuple[float, float]:
    rng = random.Random(seed)
    return rng.uniform(0, PERIOD_PIXELS), rng.uniform(0, PERIOD_PIXELS)


def _paint_objects(
    objects: Sequence[SceneObject], x: Field, y: Field, view: View
) -> tuple[Float[Tensor, "b 3 h w"], Field]:
    """Return the colours and the coverage of one object for each picture, all of one shape."""
    radius = _column(x, [each.extent * min(view.height, view.width) / 2 for each in objects])
    x = x - _column(x, [each.x * view.width for each in objects])
    y = y - _column(y, [each.y * view.height for each in objects])
    distance = SIGNED_DISTANCES[objects[0].shape](x, y, radius)
    coverage = (0.5 - distance).clamp(0, 1)
    inside_rim = (0.5 - distance - RIM_PIXELS).clamp(0, 1)
    shaded = 1 + _SHADING * (1 - 2 * (x**2 + y**2) / radius**2).clamp(-1, 1)
    rgb = _rgb(x, [OBJECT_RGB[each.colour] for each in objects])
    return rgb * torch.lerp(torch.full_like(x, RIM_GAIN), shaded, inside_rim)[:, None], coverage


def _light_up(scenes: Sequence[Scene], x: Field, y: Field) -> Field:
    """Return the light's brightness where x and y, from 0 to 1, are shares of the picture."""
    towards = [LIGHT_FROM[scene.light] for scene in scenes]
    right, down = (_column(x, values) for values in zip(*towards, strict=True))
    level = _column(x, [LIGHT_LEVEL if any(each) else EVEN_LIGHT for each in towards])
    return level + LIGHT_SLOPE * (right * (2 * x - 1) + down * (2 * y - 1))


def _column(like: Field, values: Sequence[float]) -> Float[Tensor, "b 1 1"]:
    return torch.tensor(values, dtype=torch.float32, device=like.device)[:, None, None]


def _rgb(like: Field, colours: Sequence[tuple[int, int, int]]) -> Float[Tensor, "b 3 1 1"]:
    return torch.tensor(colours, dtype=torch.float32, device=like.device)[:, :, None, None]
