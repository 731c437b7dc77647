"""What is typed into the page, as the job that it stands for."""

import random
import shlex
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

from urae.adapters.packaged import BASE, pick_adapters
from urae.backbones.flux import find_native_side
from urae.generate import GenerateConfig
from urae.geometry import parse_size
from urae.web.config import WebConfig

AUTOMATIC = "automatic"
"""In place of adapters: those that come with the model, for the size."""
OWN_SIZE = "the model's own"

Number = TypeVar("Number", int, float)


@dataclass(frozen=True)
class Form:
    """The fields of the page; what is left empty is the model's own choice."""

    prompt: str
    model: str | None
    size: str | None
    """As `--size`, or `OWN_SIZE`."""
    adapters: tuple[str, ...]
    """In order, or `AUTOMATIC` alone."""
    seed: int | None = None
    num_images: int | None = None
    steps: int | None = None
    guidance_scale: float | None = None


def read_number(name: str, text: str | None, kind: type[Number]) -> Number | None:
    """Read a number that was typed; None where nothing was.

    Raises:
        ValueError: If it is no number of this kind.
    """
    if not text or not text.strip():
        return None
    try:
        return kind(text)
    except ValueError:
        what = "a whole number" if kind is int else "a number"
        raise ValueError(f"{name} {text!r} must be {what}, or left empty") from None


def read_form(form: Form, config: WebConfig, output_dir: Path) -> GenerateConfig:
    """Turn what was typed into a job.

    Args:
        form: As it was typed.
        config: Of the page.
        output_dir: For the pictures.

    Raises:
        ValueError: As `GenerateConfig`, if no model is chosen, and if `AUTOMATIC` stands beside
            other adapters.
        FileNotFoundError: If the model cannot be found.
    """
    if not form.model:
        raise ValueError("no model is chosen; choose one, or type a hub id or a folder")
    native_side = find_native_side(form.model)
    own_size = not form.size or form.size == OWN_SIZE
    height, width = parse_size("1k" if own_size else str(form.size), native_side)
    adapters = form.adapters
    if AUTOMATIC in adapters:
        if len(adapters) > 1:
            raise ValueError(
                f"adapters {', '.join(adapters)}: {AUTOMATIC} cannot be combined with other "
                "adapters; remove it or the others"
            )
        ships = form.model == BASE
        adapters = pick_adapters(height, width, native_side) if ships else ()
    return GenerateConfig(
        prompts=(form.prompt,),
        model=form.model,
        height=height,
        width=width,
        adapters=adapters,
        steps=form.steps,
        guidance_scale=form.guidance_scale,
        seed=random.SystemRandom().randrange(2**32) if form.seed is None else form.seed,
        num_images=1 if form.num_images is None else form.num_images,
        output_dir=output_dir,
        memory=config.memory,
        speed=config.speed,
    )


def spell_command(config: GenerateConfig) -> str:
    """Spell the command that makes the same pictures, in its own folder."""
    default = GenerateConfig(config.prompts)
    words = ["--model", config.model, "--size", f"{config.width}x{config.height}"]
    words += [word for adapter in config.adapters for word in ("--adapter", adapter)]
    options = {
        "--steps": "steps",
        "--guidance": "guidance_scale",
        "--seed": "seed",
        "--num-images": "num_images",
        "--memory": "memory",
        "--speed": "speed",
    }
    for option, field in options.items():
        value = getattr(config, field)
        if value != getattr(default, field):
            words += [option, str(value)]
    (prompt,) = config.prompts
    is_option = prompt.startswith("-")
    words = [*words, "--", prompt] if is_option else [prompt, *words]
    return shlex.join(["urae", "generate", *words])
