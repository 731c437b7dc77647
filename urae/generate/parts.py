"""What can make a pipeline faster, part by part, and which parts the presets hold.

A part that approximates enters a preset when it has passed that preset's bar on the adapted
miniature at 1024 x 1024 (`benchmarks/speed_quality.py`), and not before.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Self, get_args

from urae.choices import Bits, PartName, Speed
from urae.generate.step_cache import DEFAULT_STRENGTH

EXACT: tuple[PartName, ...] = (
    "attention-backend",
    "joined-adapters",
    "merged-adapters",
    "constants",
    "compile",
    "striped-vae",
)
"""Parts that change nothing but the rounding."""
_PAYING = tuple(name for name in EXACT if name != "merged-adapters")

_MEASURED = (*_PAYING, "fp8", "progressive=0.35", "taylorseer-cache=3")

PRESETS: dict[Speed, tuple[str, ...]] = {
    "exact": _PAYING,
    "fast": _MEASURED,
    "turbo": (*_MEASURED, "local-attention=0.87"),
}
BARS: dict[Speed, float] = {"fast": 0.02, "turbo": 0.05}
"""What a preset's pictures may lose at most of the scene check's share: the lower end of the 95%
interval of the difference. What they gain does not count against it."""

COMPILED: tuple[PartName, ...] = ("fp8", "local-attention")
"""Parts that cost time where blocks are not compiled, at 2048 x 2048 (docs/performance.md)."""
SCHEDULED: tuple[PartName, ...] = (
    "local-attention",
    "progressive",
    "first-block-cache",
    "mag-cache",
    "taylorseer-cache",
)
"""Parts that can act on some steps only."""
_EXCLUSIVE: tuple[tuple[PartName, ...], ...] = (
    get_args(Bits),
    ("first-block-cache", "mag-cache", "taylorseer-cache"),
    ("joined-adapters", "merged-adapters"),
    ("striped-vae", "tiled-vae"),
)
_STRENGTHS: Mapping[str, float] = {
    **{str(name): strength for name, strength in DEFAULT_STRENGTH.items()},
    "local-attention": 1.0,  # noise level from which on it is local: in all steps
    "progressive": 0.35,  # of the steps; with 0.5 textures suffer (docs/performance.md)
}
_WHOLE: tuple[PartName, ...] = ("taylorseer-cache",)  # strengths that are counts
_TO_ONE: tuple[PartName, ...] = ("local-attention", "progressive")  # and those that are shares


@dataclass(frozen=True)
class Part:
    """One part, and how strong it is."""

    name: PartName
    """Which."""
    strength: float | None = None
    """Higher is faster and further from exact; None where there is nothing to set."""
    is_preset: bool = False
    """Whether nobody named it."""

    def __post_init__(self) -> None:
        if self.name not in get_args(PartName):
            raise ValueError(
                f"part {self.name!r} is unknown; known: {', '.join(get_args(PartName))}"
            )
        if self.strength is None:
            object.__setattr__(self, "strength", _STRENGTHS.get(self.name))
            return
        if self.name not in _STRENGTHS:
            raise ValueError(f"part {self.name} has no strength to set; leave out ={self.strength}")
        least = 1 if self.name in _WHOLE else 0
        most = 1 if self.name in _TO_ONE else math.inf
        inside = least <= self.strength <= most and math.isfinite(self.strength)
        if not inside or (self.name in _WHOLE and self.strength != round(self.strength)):
            kind = "whole" if self.name in _WHOLE else "finite"
            to = f" to {most}" if self.name in _TO_ONE else ""
            raise ValueError(
                f"strength {self.strength} of {self.name} must be a {kind} number from {least}{to}"
            )

    @property
    def is_scheduled(self) -> bool:
        """Whether it has to know the step."""
        always = self.name == "local-attention" and self.strength == 1
        return self.name in SCHEDULED and not always

    @classmethod
    def parse(cls, text: str) -> Self:
        """Read NAME or NAME=STRENGTH.

        Raises:
            ValueError: If it is no such part.
        """
        if not isinstance(text, str):
            raise ValueError(f"part {text!r} must be a string, NAME or NAME=STRENGTH")
        name, equals, number = text.partition("=")
        try:
            strength = float(number) if equals else None
        except ValueError as error:
            raise ValueError(
                f"part {text!r}: {number!r} is not a number; a part is NAME or NAME=STRENGTH"
            ) from error
        return cls(name, strength)  # type: ignore[arg-type]  # which is checked

    def __str__(self) -> str:
        return self.name if self.strength is None else f"{self.name}={self.strength:g}"


def resolve_parts(speed: Speed | None, parts: Sequence[str] = ()) -> tuple[Part, ...]:
    """List a preset's parts and others, in the order in which they are put in place.

    Args:
        speed: A preset; None for `parts` alone.
        parts: NAME or NAME=STRENGTH; one that excludes a part of the preset takes its place.

    Raises:
        ValueError: If a part is unknown, or two exclude each other.
    """
    if speed is not None and speed not in PRESETS:
        raise ValueError(f"speed {speed!r} must be {', '.join(PRESETS)} or None")
    chosen = [Part.parse(text) for text in parts]
    for i, part in enumerate(chosen):
        for other in chosen[:i]:
            if _exclude(part, other):
                raise ValueError(f"parts {other} and {part} cannot be combined; choose one of them")
    for text in PRESETS[speed] if speed else ():
        part = replace(Part.parse(text), is_preset=True)
        if not any(_exclude(part, other) for other in chosen):
            chosen.append(part)
    names = get_args(PartName)
    return tuple(sorted(chosen, key=lambda part: names.index(part.name)))


def leave_compiled_out(parts: Sequence[Part]) -> list[Part]:
    """Leave out compiling, and a preset's parts that gain nothing without it."""
    lost = [part for part in parts if part.is_preset and part.name in COMPILED]
    return [part for part in parts if part.name != "compile" and part not in lost]


def _exclude(one: Part, other: Part) -> bool:
    groups = [group for group in _EXCLUSIVE if one.name in group]
    return one.name == other.name or any(other.name in group for group in groups)


def find_bits(parts: Sequence[Part]) -> Bits | None:
    """Return what the weights are quantised to by one of the parts, if any does."""
    return next((bits for part in parts for bits in get_args(Bits) if part.name == bits), None)
