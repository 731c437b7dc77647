"""The scene check: which parts of a caption hold in a picture, and the share of pictures that pass.

It reads the picture with no learnt network (see `read.py`) and compares.
"""

import math
import statistics
from collections.abc import Sequence
from dataclasses import astuple, dataclass
from itertools import pairwise, permutations

from urae.miniature.grammar import Description, ObjectWords
from urae.miniature.read import FoundObject, Picture, Reading, read_picture
from urae.miniature.world import Scene, find_relation

_RIM_BOUNDS = (1.2, 4.2)  # pixels; as rendered they measure up to 3.1, enlarged twice 4.5 at least
_MAX_COMPARED = 5  # objects, the largest; more are too many anyway


@dataclass(frozen=True)
class SceneReport:
    """Which parts of a caption hold; what it does not say holds."""

    objects: bool
    """As many objects as it names: each once, no other."""
    shapes: bool
    colours: bool
    sizes: bool
    relations: bool
    background: bool
    """The background's colour."""
    texture: bool
    """The background's texture, at its scale in pixels."""
    light: bool
    rims: bool
    """The objects' rims have their width in pixels."""

    @property
    def passed(self) -> bool:
        """Whether every part holds."""
        return all(astuple(self))


@dataclass(frozen=True)
class Score:
    """A share of pictures."""

    share: float
    low: float
    """Lower end of the 95% interval."""
    high: float
    """Upper end."""
    count: int
    """Of how many."""


def check_scene(picture: Picture, described: Scene | Description) -> SceneReport:
    """Check a picture against a description.

    Args:
        picture: 8-bit sRGB, 3 x H x W.
        described: A scene, or what `parse_caption` makes of a caption.

    Raises:
        ValueError: If it is no such picture.
    """
    return compare(read_picture(picture), described)


def compare(reading: Reading, described: Scene | Description) -> SceneReport:
    """Compare what was read in a picture with a description."""
    if isinstance(described, Scene):
        described = described.description
    found = _match_objects(reading.objects, described)
    pairs = list(zip(found, described.objects, strict=True))
    return SceneReport(
        objects=len(reading.objects) == len(described.objects),
        shapes=all(each and each.shape == wanted.shape for each, wanted in pairs),
        colours=all(each and wanted.colour in (None, each.colour) for each, wanted in pairs),
        sizes=all(each and wanted.size in (None, each.size) for each, wanted in pairs),
        relations=_count_relations(found, described) == len(described.relations),
        background=described.background in (None, reading.background),
        texture=described.texture in (None, reading.texture),
        light=described.light in (None, reading.light),
        rims=all(each and _RIM_BOUNDS[0] < each.rim_pixels < _RIM_BOUNDS[1] for each in found),
    )


def score(reports: Sequence[SceneReport], *, num_captions: int | None = None) -> Score:
    """Return the share of reports that pass, with Wilson's 95% interval.

    Pictures of one caption are alike: they count as so many independent ones as have the variance
    that is found between the captions' means (Kish, Survey Sampling, 1965: the design effect), at
    least one a caption.

    Args:
        reports: All captions with one noise, then with the next.
        num_captions: How many there are; by default as many as reports.

    Raises:
        ValueError: If there is no report.
    """
    if not reports:
        raise ValueError("there is no report to score; check at least one picture")
    captions = num_captions or len(reports)
    assert len(reports) % captions == 0
    share = sum(report.passed for report in reports) / len(reports)
    means = [
        statistics.fmean(each.passed for each in reports[i::captions]) for i in range(captions)
    ]
    between = sum((mean - share) ** 2 for mean in means)
    count = float(captions)
    if captions < len(reports) and between:
        independent = share * (1 - share) * captions * (captions - 1) / between
        count = min(max(independent, captions), len(reports))
    return Score(share, *find_interval(share, count), len(reports))


def find_interval(share: float, count: float) -> tuple[float, float]:
    """Return the 95% interval of a share of independent pictures.

    It is Wilson's score interval (Journal of the American Statistical Association 22, 1927), which
    holds for few pictures and shares near 0 and 1 too.

    Args:
        share: Of the pictures.
        count: How many they are, or are worth.
    """
    z = 1.959964
    middle = (share + z**2 / (2 * count)) / (1 + z**2 / count)
    spread = math.sqrt(share * (1 - share) / count + (z / (2 * count)) ** 2)
    half = z * spread / (1 + z**2 / count)
    return max(0.0, middle - half), min(1.0, middle + half)


def _match_objects(
    found: Sequence[FoundObject], described: Description
) -> tuple[FoundObject | None, ...]:
    """Give each described object that of the picture which together fit best."""
    choices = [*found[:_MAX_COMPARED], *[None] * len(described.objects)]
    return max(
        permutations(choices, len(described.objects)),
        key=lambda chosen: (
            sum(map(_count_agreements, chosen, described.objects)),
            _count_relations(chosen, described),
        ),
    )


def _count_agreements(found: FoundObject | None, wanted: ObjectWords) -> int:
    if found is None:
        return -1
    return (
        (found.shape == wanted.shape)
        + (wanted.colour in (None, found.colour))
        + (wanted.size in (None, found.size))
    )


def _count_relations(chosen: Sequence[FoundObject | None], described: Description) -> int:
    return sum(
        wanted is None or bool(a and b and find_relation(a.x - b.x, a.y - b.y) == wanted)
        for (a, b), wanted in zip(pairwise(chosen), described.relations, strict=True)
    )
