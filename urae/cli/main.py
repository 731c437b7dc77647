"""The `urae` command: one subcommand a job."""

import logging
import os
import sys
import traceback
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.text import Text

from urae import __version__
from urae.cli.cache import cache_command
from urae.cli.convert import convert_command
from urae.cli.generate import generate_command
from urae.cli.launch import hand_over, is_launched
from urae.cli.miniature import miniature_app
from urae.cli.pack import pack_command
from urae.cli.plan import plan_app
from urae.cli.push import push_command
from urae.cli.study import study_command
from urae.cli.train import train_command
from urae.cli.web import web_command

USER_ERROR, FAILURE = 2, 1

app = typer.Typer(
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode="rich",
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)


def _show_version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"urae {__version__}")
        raise typer.Exit


@app.callback()
def root(
    _: Annotated[
        bool,
        typer.Option("--version", callback=_show_version, is_eager=True, help="Show the version."),
    ] = False,
) -> None:
    """Ultra-resolution FLUX: adapt it to 2K and 4K, and generate with it.

    [bold]cache[/] a folder of captioned pictures, [bold]train[/] an adapter on it,
    [bold]convert[/] it for other tools, [bold]generate[/] with it, [bold]push[/] it to the hub.
    """


app.command("cache")(cache_command)
app.command("pack")(pack_command)
_FIELDS_TOO = {"allow_extra_args": True, "ignore_unknown_options": True}
app.command("train", context_settings=_FIELDS_TOO)(train_command)
app.command("convert")(convert_command)
app.command("generate")(generate_command)
app.command("push")(push_command)
app.command("web")(web_command)
app.add_typer(plan_app, name="plan")
app.add_typer(miniature_app, name="miniature")
app.command("study", context_settings=_FIELDS_TOO)(study_command)


_USER_ERRORS = (
    ValueError, FileNotFoundError, FileExistsError, PermissionError, ImportError, MemoryError,
)  # fmt: skip


def main() -> None:
    """Run the command line; errors are one line, and exit code 2 is for what the user got wrong."""
    # torch reads it at its first tensor: with small pages a VAE on a CPU takes up to twice the time
    os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")
    sys.argv[1:] = map(_expand_home, sys.argv[1:])
    try:
        app()
    except _USER_ERRORS as error:
        _fail(error, USER_ERROR)
    except (OSError, ArithmeticError) as error:
        _fail(error, FAILURE)
    except RuntimeError as error:
        if "AttentionBackendName" not in str(error):  # diffusers reads the variable as it loads
            raise
        backend = os.environ.get("DIFFUSERS_ATTN_BACKEND")
        reason = ValueError(
            f"DIFFUSERS_ATTN_BACKEND={backend} is not an attention backend of diffusers; unset "
            "it, or set it to one, such as _native_flash or _native_math"
        )
        _fail(reason, USER_ERROR)


def _expand_home(argument: str) -> str:
    """Write `--option=~/folder` out, as shells do after a space only."""
    option, _, value = argument.partition("=")
    is_path = option.startswith("--") and value.startswith("~/")
    return f"{option}={Path(value).expanduser()}" if is_path else argument


def _fail(error: BaseException, code: int) -> None:
    if logging.getLogger("urae").isEnabledFor(logging.INFO):
        traceback.print_exception(error)
    message = str(error)
    if isinstance(error, OSError) and error.strerror:
        message = f"{error.strerror}: {error.filename}" if error.filename else error.strerror
    if is_launched():
        hand_over(error, message, code)
    console = Console(stderr=True, highlight=False, soft_wrap=True)
    console.print(f"[bold red]{_say_where()}:[/]", Text(message))
    sys.exit(code)


def _say_where() -> str:
    """Name the process of those that torchrun has started: each tells its own error."""
    alone = int(os.environ.get("WORLD_SIZE", "1")) == 1
    return "error" if alone else f"error in process {os.environ.get('RANK', '?')}"
