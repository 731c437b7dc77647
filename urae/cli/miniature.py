"""`urae miniature`: the small FLUX that ships with the package, from nothing."""

import math
from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer
from rich.text import Text

from urae.cli.terminal import Verbose, console

miniature_app = typer.Typer(no_args_is_help=True)


class Stage(StrEnum):
    """Stages in the order in which they need one another."""

    vae = "vae"
    base = "base"
    dev = "dev"
    schnell = "schnell"
    teacher_512 = "teacher_512"
    teacher_1024 = "teacher_1024"


@miniature_app.callback()
def miniature() -> None:
    """The miniature: a FLUX of 5 M parameters on rendered scenes."""


@miniature_app.command("train")
def train_command(
    stage: Annotated[Stage, typer.Argument(help="What to train; earlier stages must be done.")],
    work: Annotated[Path, typer.Option(help="Folder of the stages' files.")] = Path(
        "runs/miniature"
    ),
    recipe: Annotated[Path, typer.Option(help="TOML file of all stages.")] = Path(
        "recipes/miniature/stages.toml"
    ),
    max_minutes: Annotated[
        float, typer.Option(min=0.01, help="Stop after these; the same command goes on.")
    ] = math.inf,
    verbose: Verbose = False,
) -> None:
    """Train one stage; a GPU is wanted (docs/miniature.md says how long each takes)."""
    import logging

    from urae.miniature.stages import train_stage

    logging.getLogger("urae.miniature").setLevel(logging.INFO)
    path = train_stage(stage.value, recipe, work, max_seconds=60 * max_minutes)
    if path is None:
        console.print("[yellow]stopped:[/] run the same command to go on")
    else:
        console.print("[green]done:[/]", Text(str(path)))
