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
        typer.Option(
            help="Licence of the base model as the hub spells it; needed only if it is unknown."
        ),
    ] = None,
    private: Annotated[
        bool, typer.Option("--private", help="Make the repository visible only to its owner.")
    ] = False,
    overwrite: Annotated[
        bool, typer.Option("--overwrite", help="Upload into an existing repository.")
    ] = False,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Write the folder without uploading it.")
    ] = False,
    verbose: Verbose = False,
) -> None:
    """Publish a finished run on the hub, with a model card; log in with `hf auth login` first."""
    from urae.train import PushConfig, push

    pushed = push(PushConfig(run, repo, license, private, overwrite, dry_run))
    console.print("[green]done:[/]", Text(pushed.url or str(pushed.folder)), soft_wrap=True)
