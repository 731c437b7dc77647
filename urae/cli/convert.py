"""`urae convert`: adapters to one plain LoRA."""

from pathlib import Path
from typing import Annotated

import typer
from rich.text import Text

from urae.choices import LoraFormat
from urae.cli.terminal import Verbose, build_progress, console


def convert_command(
    adapters: Annotated[
        list[str],
        typer.Argument(help="Adapters in order; a raw minor adapter comes after its 2K LoRA."),
    ],
    output: Annotated[Path, typer.Option(help="The .safetensors file to write.")],
    model: Annotated[
        str | None,
        typer.Option(
            help="Base model; needed for a minor adapter of the reference or of another base."
        ),
    ] = None,
    format: Annotated[
        LoraFormat, typer.Option(help="Key format: diffusers, or kohya for kohya and ComfyUI.")
    ] = "diffusers",
    overwrite: Annotated[
        bool, typer.Option("--overwrite", help="Replace an existing output.")
    ] = False,
    verbose: Verbose = False,
) -> None:
    """Write one plain LoRA that does what the given adapters do together."""
    from urae.adapters.convert import ConvertConfig, convert

    config = ConvertConfig(tuple(adapters), output, model, format, overwrite)
    with build_progress() as bar:
        task = bar.add_task("minor components", total=None, visible=False)

        def show(done: int, total: int) -> None:
            bar.update(task, completed=done, total=total, visible=True)

        path = convert(config, progress=show)
    console.print("[green]done:[/]", Text(str(path)))
