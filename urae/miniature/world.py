"""The miniature's world: scenes of a few objects on a background, and where everything is.

Layout is relative to the picture, texture is in pixels: a larger picture of the same scene has the
same composition and more detail.
"""

import random
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

from urae.miniature.grammar import (
    BACKGROUNDS,
    COLOURS,
    LIGHTS,
    MAX_OBJECTS,
    SHAPES,
    SIZES,
    TEXTURES,
    Description,
    ObjectWords,
    write_caption,
)

EXTENTS = {"small": 0.17, "medium": 0.27, "large": 0.40}
"""Larger side of an object's bounding box, as a share of the picture's smaller side."""
_EXTENT_JITTER = 0.06  # of itself, either way
_COUNT_SHARES = (0.4, 0.4, 0.2)  # of scenes with one, two and three objects
_TRAINING_COUNT_SHARES = (0.25, 0.25, 0.5)  # the same: what is hard is shown more often
_CROWDED_SIZE_SHARES = (0.5, 0.35, 0.15)  # so that three objects find room
_BORDER = 0.04  # of the side, between object and border
_GAP = 0.05  # of the side, between the bounding boxes of two objects
_CLEAR = 1.6  # a relation's distance is at least this times the one across it


@dataclass(frozen=True)
class SceneObject:
    """An object, in words and numbers; the numbers are relative to the picture."""

    size: str
    """One of `SIZES`."""
    colour: str
    """One of `COLOURS`."""
    shape: str
    """One of `SHAPES`."""
    x: float
    """Middle of the bounding box from the left, as a share of the width."""
    y: float
    """The same from the top, as a share of the height."""
    extent: float
    """Larger side of the bounding box, as a share of the picture's smaller side."""


@dataclass(frozen=True)
class Scene:
    """Everything that determines a picture but its size."""

    objects: tuple[SceneObject, ...]
    """One to three."""
    texture: str
    """One of `TEXTURES`."""
    background: str
    """One of `BACKGROUNDS`."""
    light: str
    """One of `LIGHTS`."""
    seed: int
    """Of what no caption says: the phase of the texture, the grain."""

    @property
    def description(self) -> Description:
        """All that a caption can say of it."""
        return Description(
            tuple(ObjectWords(each.size, each.colour, each.shape) for each in self.objects),
            tuple(find_relation(a.x - b.x, a.y - b.y) for a, b in pairwise(self.objects)),
            self.texture,
            self.background,
            self.light,
        )


def caption(scene: Scene | Description) -> str:
    """Describe a scene in the grammar that `parse_caption` reads."""
    return write_caption(scene.description if isinstance(scene, Scene) else scene)


def find_relation(dx: float, dy: float) -> str:
    """Name where something is that lies `dx`, `dy` (shares of width, height) from another."""
    if abs(dx) > abs(dy):
        return "left of" if dx < 0 else "right of"
    return "above" if dy < 0 else "below"


def sample_scene(seed: int, count_shares: Sequence[float] = _COUNT_SHARES) -> Scene:
    """Draw a scene: 40% have one object, 40% two, 20% three; no two have the same colour.

    Objects never touch one another or the border in pictures of any shape, and each relation is
    clear: the distance along it is at least 1.6 times the distance across.

    Args:
        seed: The same seed gives the same scene.
        count_shares: Of scenes with one, two and three objects.
    """
    rng = random.Random(seed)
    count = rng.choices(range(1, MAX_OBJECTS + 1), count_shares)[0]
    while not (objects := _sample_objects(count, rng)):
        pass
    return Scene(
        objects,
        texture=rng.choice(TEXTURES),
        background=rng.choice(BACKGROUNDS),
        light=rng.choice(LIGHTS),
        seed=rng.getrandbits(31),
    )


def training_scene(seed: int, index: int) -> Scene:
    """Draw a scene to adapt on: 25% have one object, 25% two, 50% three.

    Args:
        seed: Of the set of scenes, at least 1; sets of different seeds share none.
        index: Number of the scene in it, below 2^32.
    """
    return sample_scene(seed << 32 | index, _TRAINING_COUNT_SHARES)


def _sample_objects(count: int, rng: random.Random) -> tuple[SceneObject, ...] | None:
    """Try to find room for some objects in a square; other pictures have more."""
    shares = _CROWDED_SIZE_SHARES if count == MAX_OBJECTS else None
    objects: tuple[SceneObject, ...] = ()
    for colour in rng.sample(COLOURS, count):
        size, shape = rng.choices(SIZES, shares)[0], rng.choice(SHAPES)
        extent = EXTENTS[size] * rng.uniform(1 - _EXTENT_JITTER, 1 + _EXTENT_JITTER)
        low, high = extent / 2 + _BORDER, 1 - extent / 2 - _BORDER
        for _ in range(8):
            x, y = rng.uniform(low, high), rng.uniform(low, high)
            each = SceneObject(size, colour, shape, x, y, extent)
            if all(_are_apart(each, other) for other in objects):
                break
        else:
            return None
        objects += (each,)
    return objects if all(_is_clear(a, b) for a, b in pairwise(objects)) else None


def _are_apart(a: SceneObject, b: SceneObject) -> bool:
    distance = max(abs(a.x - b.x), abs(a.y - b.y))
    return distance >= (a.extent + b.extent) / 2 + _GAP


def _is_clear(a: SceneObject, b: SceneObject) -> bool:
    near, far = sorted((abs(a.x - b.x), abs(a.y - b.y)))
    return far >= _CLEAR * near
