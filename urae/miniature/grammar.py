"""The captions of the miniature's world: what can be said, saying it, and reading it back.

    a large red circle left of a small blue square on a striped green background, lit from the left

Sizes, texture, light and relations may be left out: what a caption does not say, it leaves open.
"""

from collections.abc import Sequence
from dataclasses import dataclass

SIZES = ("small", "medium", "large")
COLOURS = ("red", "orange", "yellow", "green", "teal", "blue", "purple", "pink")
SHAPES = ("circle", "square", "triangle", "diamond", "cross", "ring")
RELATIONS = ("left of", "right of", "above", "below")
TEXTURES = ("plain", "striped", "checked", "dotted", "grainy")
BACKGROUNDS = ("grey", "green", "blue", "pink", "yellow", "purple")
LIGHTS = ("even", "left", "right", "top", "bottom")
MAX_OBJECTS = 3

VOCABULARY: tuple[str, ...] = tuple(
    sorted(
        {
            *"a an and which is on background in even light lit from the".split(),
            *(word for words in RELATIONS for word in words.split()),
            *(SIZES + COLOURS + SHAPES + TEXTURES + BACKGROUNDS + LIGHTS),
        }
    )
)
"""Every word of the grammar; the only other sign is the comma."""


@dataclass(frozen=True)
class ObjectWords:
    """What a caption says of one object."""

    size: str | None
    """One of `SIZES`, or None: not said."""
    colour: str | None
    """One of `COLOURS`, or None."""
    shape: str
    """One of `SHAPES`."""


@dataclass(frozen=True)
class Description:
    """What a caption says of a scene."""

    objects: tuple[ObjectWords, ...]
    """One to three."""
    relations: tuple[str | None, ...]
    """One of `RELATIONS` for each object but the last: where it is, seen from the next one."""
    texture: str | None
    """One of `TEXTURES`."""
    background: str | None
    """One of `BACKGROUNDS`."""
    light: str | None
    """One of `LIGHTS`: the side that it comes from, or even."""


def write_caption(described: Description) -> str:
    """Say a description in words that `parse_caption` reads back to the same."""
    first, *others = described.objects
    text = _phrase(first.size, first.colour, first.shape)
    for n, (relation, each) in enumerate(zip(described.relations, others, strict=True)):
        link = relation or "and"
        text += f", which is {link}" if n and relation else f" {link}"
        text += f" {_phrase(each.size, each.colour, each.shape)}"
    if described.background or described.texture:
        text += f" on {_phrase(described.texture, described.background, 'background')}"
    if described.light:
        side = described.light
        text += ", in even light" if side == "even" else f", lit from the {side}"
    return text


def _phrase(*words: str | None) -> str:
    text = " ".join(word for word in words if word)
    return f"{'an' if text[0] in 'aeiou' else 'a'} {text}"


def foresee_another_scene(model: str, prompts: Sequence[str]) -> str | None:
    """Say of which prompt a miniature draws something else, and why; None if of none."""
    for prompt in prompts:
        try:
            parse_caption(prompt)
        except ValueError as reason:
            return (
                f"{model} only knows scenes of its grammar and will draw a different one: {reason}"
            )
    return None


def parse_caption(text: str) -> Description:
    """Read a caption of the grammar; capitals, commas and a full stop at the end do not matter.

    Args:
        text: One to three objects with a relation or `and` between each and the next, then, each
            optional, the background and the light. Of an object only the shape is required.

    Raises:
        ValueError: At the first word that does not fit.
    """
    words = _Words(text)
    objects, relations = [_read_object(words)], []
    while words.peek() in _LINKS:
        relations.append(_read_relation(words))
        objects.append(_read_object(words))
    if len(objects) > MAX_OBJECTS:
        raise ValueError(
            f"caption {text!r} names {len(objects)} objects, but a scene has at most "
            f"{MAX_OBJECTS}; leave some out"
        )
    texture, background = _read_background(words)
    light = _read_light(words)
    if words.peek():
        more = [*RELATIONS, "and", "on"] if texture is background is light is None else []
        raise words.misfit("the end", more + ([] if light else ["lit from the", "in even light"]))
    return Description(tuple(objects), tuple(relations), texture, background, light)


_LINKS = {"and", "which", *(relation.split()[0] for relation in RELATIONS)}


class _Words:
    """The words of a caption, taken from the front."""

    def __init__(self, text: str) -> None:
        self.text = text
        self.words = text.lower().replace(",", " ").rstrip(". ").split()
        self.at = 0

    def peek(self) -> str:
        return self.words[self.at] if self.at < len(self.words) else ""

    def skip(self, phrase: str) -> bool:
        """Take a phrase if it comes next."""
        parts = phrase.split()
        if self.words[self.at : self.at + len(parts)] != parts:
            return False
        self.at += len(parts)
        return True

    def choose(self, options: Sequence[str]) -> str | None:
        """Take whichever of the options comes next."""
        return next((option for option in options if self.skip(option)), None)

    def take(self, rule: str, options: Sequence[str]) -> str:
        """Take whichever of the options comes next; there must be one."""
        if (found := self.choose(options)) is None:
            raise self.misfit(rule, options)
        return found

    def misfit(self, rule: str, options: Sequence[str]) -> ValueError:
        word = repr(self.peek()) if self.peek() else "its end"
        return ValueError(
            f"caption {self.text!r} has {word} where {rule} is "
            f"expected{'; allowed: ' if options else ''}{', '.join(options)}"
        )


def _read_object(words: _Words) -> ObjectWords:
    words.take("an object", ("a", "an"))
    size, colour = words.choose(SIZES), words.choose(COLOURS)
    # what could still have been said is named in the error only: here it would have been chosen
    unsaid = (() if size or colour else SIZES) + (() if colour else COLOURS)
    return ObjectWords(size, colour, words.take("an object", unsaid + SHAPES))


def _read_relation(words: _Words) -> str | None:
    if words.skip("and"):
        return None
    words.skip("which is")
    return words.take("a relation", RELATIONS)


def _read_background(words: _Words) -> tuple[str | None, str | None]:
    if not words.skip("on"):
        return None, None
    words.take("a background", ("a", "an"))
    texture, colour = words.choose(TEXTURES), words.choose(BACKGROUNDS)
    unsaid = (() if texture or colour else TEXTURES) + (() if colour else BACKGROUNDS)
    words.take("a background", (*unsaid, "background"))
    return texture, colour


def _read_light(words: _Words) -> str | None:
    if words.skip("in even light"):
        return "even"
    return words.take("a light", LIGHTS[1:]) if words.skip("lit from the") else None
