"""What every command shares: logging, quiet libraries, progress bars."""

import logging
import os
from typing import Annotated

import typer
from rich.console import Console
from rich.logging import RichHandler
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)

console = Console(stderr=True, highlight=False)

SECONDS_BETWEEN_LINES = 60.0
"""Where progress is told in lines, without a terminal."""


def is_first_rank() -> bool:
    """Tell whether this process speaks for all: of several on one job, the first."""
    return os.environ.get("RANK", "0") == "0"


def can_redraw(shown_on: Console) -> bool:
    """Tell whether this process shows what moves: the first, on a terminal that is not dumb."""
    return shown_on.is_terminal and not shown_on.is_dumb_terminal and is_first_rank()


def set_up_logging(verbose: bool) -> None:
    """Show this project's warnings, or everything with --verbose; libraries stay quiet."""
    handler = RichHandler(console=console, show_time=verbose, show_path=False, show_level=True)
    logging.basicConfig(level=logging.ERROR, handlers=[handler], format="%(message)s", force=True)
    logging.captureWarnings(True)
    quiet = logging.WARNING if is_first_rank() else logging.ERROR
    logging.getLogger("urae").setLevel(logging.INFO if verbose else quiet)
    # what a process waits for from afar, the others wait for too
    logging.getLogger("urae.features.shard_folder").setLevel(logging.WARNING)
    if is_first_rank():
        logging.getLogger("urae.adapters.minor").setLevel(logging.INFO)  # it can take minutes
    logging.getLogger("py.warnings").setLevel(logging.WARNING if verbose else logging.ERROR)
    if not verbose:
        # read when the libraries are first imported, which no command has done yet
        for name in ("TRANSFORMERS_VERBOSITY", "DIFFUSERS_VERBOSITY", "HF_HUB_VERBOSITY"):
            os.environ.setdefault(name, "error")
        os.environ.setdefault("TORCH_LOGS", "-all")


def quiet_progress_bars() -> None:
    """Keep diffusers' and transformers' own bars out of ours."""
    import diffusers
    import transformers

    diffusers.utils.logging.disable_progress_bar()
    transformers.utils.logging.disable_progress_bar()


Verbose = Annotated[
    bool,
    typer.Option(
        "--verbose", "-v", callback=set_up_logging, help="Show more messages and tracebacks."
    ),
]


def build_progress(*fields: str) -> Progress:
    """Build a bar with elapsed time and ETA, and extra columns from task fields.

    It vanishes when it is done or something fails: commands end with a line of their own.
    """
    return Progress(
        TextColumn("[bold]{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        *[TextColumn(f"{{task.fields[{name}]}}") for name in fields],
        TimeElapsedColumn(),
        TextColumn("ETA"),
        TimeRemainingColumn(),
        console=console,
        transient=True,
        disable=not can_redraw(console),
    )


def format_size(num_bytes: int) -> str:
    """Write bytes in GiB, small numbers in MiB or KiB."""
    for unit, size in (("GiB", 2**30), ("MiB", 2**20)):
        if num_bytes >= size / 10:
            return f"{num_bytes / size:.1f} {unit}"
    return f"{num_bytes / 2**10:.1f} KiB" if num_bytes else "0"


def format_seconds(seconds: float) -> str:
    """Write a duration as 1:02:03, or 2:03 below an hour."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"
