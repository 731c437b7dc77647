"""`urae web`: the page in the browser."""

from pathlib import Path
from typing import Annotated

import typer
from rich.text import Text

from urae.adapters.packaged import BASE
from urae.choices import Memory, Speed
from urae.cli.generate import MODELS, TIERS
from urae.cli.terminal import Verbose, console, quiet_progress_bars


def web_command(
    model: Annotated[
        str, typer.Option(help=f"Model selected when the page opens: {MODELS}.")
    ] = BASE,
    output: Annotated[Path, typer.Option(help="Folder for the pictures.")] = Path("outputs"),
    host: Annotated[
        str, typer.Option(help="Address to listen on; 0.0.0.0 lets other machines in.")
    ] = "127.0.0.1",
    port: Annotated[int, typer.Option(help="Port to listen on.")] = 7860,
    browser: Annotated[
        bool, typer.Option(help="Open the page in a browser when it is ready.")
    ] = True,
    memory: Annotated[
        Memory, typer.Option(metavar="tier", help=f"Where the weights are kept: {TIERS}.")
    ] = "auto",
    speed: Annotated[Speed, typer.Option(help="Same as in `urae generate`.")] = "exact",
    verbose: Verbose = False,
) -> None:
    """Serve a local web page that generates pictures; Ctrl-C stops it."""
    from urae.web import WebConfig, serve

    config = WebConfig(model, output, host, port, browser, memory, speed)
    quiet_progress_bars()
    serve(config, on_ready=lambda url: console.print("[green]the page is at[/]", Text(url)))
