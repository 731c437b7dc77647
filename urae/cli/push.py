"""`urae push`: a finished run onto the hub."""

from pathlib import Path
from typing import Annotated

import typer
from rich.text import Text

from urae.cli.terminal import Verbose, console


def push_command(
    run: Annotated[Path, typer.Argument(help="Folder of a finished run.")],
    repo: Annotated[str, typer.Argument(help="owner/name on the hub.")],
    license: Annotated[
        str | None,
        typer.Option(help="Of the base, as the hub spells it, where it is not known."),
    ] = None,
    private: Annotated[bool, typer.Option("--private", help="Only its owner sees it.")] = False,
    overwrite: Annotated[
        bool, typer.Option("--overwrite", help="Upload into a repository that exists.")
    ] = False,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Write the folder, upload nothing.")
    ] = False,
    verbose: Verbose = False,
) -> None:
    """Publish a finished run on the hub, with a model card; log in with `hf auth login` first."""
    from urae.train import PushConfig, push

    pushed = push(PushConfig(run, repo, license, private, overwrite, dry_run))
    console.print("[green]done:[/]", Text(pushed.url or str(pushed.folder)), soft_wrap=True)
