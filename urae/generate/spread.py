"""Which ranks make which pictures: several ranks one picture, or each its own.

A rank alone wastes nothing, so as many pictures as there are ranks, or a multiple, are made one a
rank. The fewer that are left are made by groups of ranks, of the size that is done first if a group
of G ranks does the work of 0.9 G; of two sizes that are done at the same time, the smaller.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import NamedTuple

from diffusers import FluxTransformer2DModel

from urae.adapters.adapt import choose_policy
from urae.adapters.files import AdapterFile
from urae.backbones.context_parallel import list_degrees
from urae.generate.config import GenerateConfig
from urae.generate.inputs import Sampling
from urae.generate.parts import Part
from urae.geometry import num_image_tokens

_EFFICIENCY = 0.9  # of each GPU; of two H200s 0.95 at 4096^2, of more not measured


@dataclass(frozen=True)
class Spread:
    """Pictures over ranks: the first `num_shared` by groups, the others by single ranks."""

    num_pictures: int
    num_ranks: int
    degree: int = 1
    """Ranks of a group."""
    num_shared: int = 0

    def list_shared(self, rank: int) -> range:
        """List the pictures that a rank makes with its group."""
        return range(rank // self.degree, self.num_shared, self.num_ranks // self.degree)

    def list_whole(self, rank: int) -> range:
        """List the pictures that a rank makes alone."""
        return range(self.num_shared + rank, self.num_pictures, self.num_ranks)

    @property
    def num_busy(self) -> int:
        """How many ranks have something to do."""
        return min(self.num_ranks, max(self.num_pictures, self.num_shared * self.degree))

    @property
    def least_degree(self) -> int:
        """The fewest ranks that hold a picture."""
        return self.degree if self.num_shared == self.num_pictures else 1


def spread_pictures(num_pictures: int, num_ranks: int, degrees: Sequence[int]) -> Spread:
    """Decide which ranks make which pictures.

    Args:
        num_pictures: All of one size.
        num_ranks: As fast as one another.
        degrees: How many ranks can share a picture, rising, 1 among them.
    """
    rest = num_pictures % num_ranks

    def seconds(degree: int) -> float:
        """Time for the rest, in units of one picture by one rank."""
        rounds = -(-rest // (num_ranks // degree))
        return rounds if degree == 1 else rounds / (_EFFICIENCY * degree)

    degree = min((each for each in degrees if num_ranks % each == 0), key=seconds)
    return Spread(num_pictures, num_ranks, degree, rest if degree > 1 else 0)


class Degrees(NamedTuple):
    """How many ranks can share a picture of a job."""

    allowed: list[int]
    """Rising, from 1."""
    reason: str
    """Why no others can."""


def find_degrees(
    config: GenerateConfig,
    adapters: Sequence[AdapterFile],
    sampling: Sampling,
    parts: Sequence[Part],
    transformer: FluxTransformer2DModel,
    model_path: Path,
) -> Degrees:
    """Find how many ranks can share a picture.

    Args:
        config: What is to be made.
        adapters: With which, in order.
        sampling: How.
        parts: What makes it faster.
        transformer: With or without weights.
        model_path: Of the base.
    """
    names = {part.name for part in parts}
    for name in ("first-block-cache", "mag-cache"):
        if name in names:
            return Degrees(
                [1], f"with {name} each GPU would skip steps by its own part of the tokens"
            )
    policy = choose_policy(config.policy, adapters, model_path)
    if "local-attention" in names:
        policy = replace(policy, attention="local")
    image_tokens = num_image_tokens(config.height, config.width)
    if policy.attention == "local" and image_tokens > policy.native_side**2:
        return Degrees([1], "local attention needs all of a picture's tokens on one GPU")
    if "progressive" in names:  # early steps have so many
        image_tokens //= 4
    return degrees_of(transformer, image_tokens, sampling.max_sequence_length)


def degrees_of(transformer: FluxTransformer2DModel, image_tokens: int, text_tokens: int) -> Degrees:
    """Find how many ranks can share a picture where nothing but its size matters."""
    heads = transformer.config.num_attention_heads
    return Degrees(
        list_degrees(heads, image_tokens, text_tokens),
        f"its {heads} heads, {image_tokens} image tokens and {text_tokens} text tokens must be "
        "multiples of the number of GPUs",
    )


def choose_spread(num_pictures: int, num_ranks: int, degrees: Degrees) -> Spread:
    """Decide which ranks make which pictures, so that all have something to do.

    Args:
        num_pictures: All of one size.
        num_ranks: How many there are.
        degrees: How many can share a picture.

    Raises:
        ValueError: If that is not possible.
    """
    spread = spread_pictures(num_pictures, num_ranks, degrees.allowed)
    if spread.num_busy == num_ranks:
        return spread
    smaller = (spread_pictures(num_pictures, n, degrees.allowed) for n in range(num_ranks, 0, -1))
    most = next(each.num_ranks for each in smaller if each.num_busy == each.num_ranks)
    raise ValueError(
        f"a picture cannot be shared by {num_ranks} GPUs, and the job has fewer pictures "
        f"({num_pictures}): {degrees.reason}; give --gpus {most}, or more pictures"
    )
