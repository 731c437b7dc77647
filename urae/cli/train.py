"""`urae train`: a recipe and a folder of features to an adapter."""

import shlex
import time
from collections import deque
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console, Group
from rich.live import Live
from rich.panel import Panel
from rich.progress_bar import ProgressBar
from rich.spinner import Spinner
from rich.table import Table
from rich.text import Text

from urae.adapters.packaged import BASE
from urae.cli.terminal import (
    SECONDS_BETWEEN_LINES,
    Verbose,
    can_redraw,
    console,
    format_seconds,
    is_first_rank,
    quiet_progress_bars,
    set_up_logging,
)
from urae.config import build_config, describe_fields, override, read_toml

if TYPE_CHECKING:
    from urae.train import StepReport, TrainConfig, TrainResult

_OWN_OPTIONS = {"data_dir", "output_dir", "resume", "overwrite"}
_RECORD_SECTION = "record"  # of a run.toml: what the run was made from, no part of the recipe
_STEPS_IN_MEAN = 50
_PANEL_WIDTH = 80

Data = Annotated[
    str | None,
    typer.Option(
        help="Features from `urae cache`: a folder, or a folder or URL of shards; leave it out "
        "if the recipe names some."
    ),
]


class Display:
    """What a run shows: a live panel on a terminal, else a plain line a minute."""

    def __init__(self, num_steps: int) -> None:
        self.num_steps = num_steps
        self._recent: deque[StepReport] = deque(maxlen=_STEPS_IN_MEAN)
        self._num_taken, self._seconds = 0, 0.0  # of this session; seconds without its first step
        self._last_line = time.monotonic()
        self._live = Live(Spinner("dots", "loading"), console=console, transient=True)
        if can_redraw(console):
            self._live.start()

    def close(self) -> None:
        self._live.stop()

    def show(self, report: "StepReport") -> None:
        """Take in a step; called after each."""
        self._recent.append(report)
        if self._num_taken:  # the first one may compile
            self._seconds += report.seconds
        self._num_taken += 1
        if self._live.is_started:
            self._live.update(self._build_panel(report))
        elif (now := time.monotonic()) - self._last_line >= SECONDS_BETWEEN_LINES:
            self._last_line = now
            figures = ", ".join(f"{name} {value}" for name, value in self.describe(report))
            console.print(f"step {report.step} of {self.num_steps}: {figures}", soft_wrap=True)

    def describe(self, report: "StepReport") -> list[tuple[str, str]]:
        """Name the figures of a step; loss and pace are means over the last steps.

        What is left is by all steps so far, since batches of one size come together.
        """
        count = len(self._recent)
        loss = sum(each.loss for each in self._recent) / count
        pace = sum(each.seconds for each in self._recent) / count
        usual = self._seconds / (self._num_taken - 1) if self._num_taken > 1 else pace
        figures = [
            ("loss", f"{loss:.4f}"),
            ("lr", f"{report.lr:.3g}"),
            ("s/step", f"{pace:.2f}"),
            ("ETA", format_seconds(usual * (self.num_steps - report.step))),
        ]
        if report.held_out_loss is not None:
            figures.insert(1, ("held-out", f"{report.held_out_loss:.4f}"))
        if report.memory_gib is not None:
            figures.append(("GPU", f"{report.memory_gib:.1f} GiB"))
        return [*figures, ("size", f"{report.width} x {report.height}")]

    def summarize(self, result: "TrainResult") -> str:
        """Say the last figures in brackets; losses are the whole run's, however often it stopped.

        Nothing if there are none.
        """
        figures = []
        if losses := result.losses[-_STEPS_IN_MEAN:]:
            span = f"the last {len(losses)} steps" if len(losses) > 1 else "one step"
            figures.append(f"mean loss of {span} {sum(losses) / len(losses):.4f}")
        if result.held_out_losses:
            first, last = result.held_out_losses[0], result.held_out_losses[-1]
            figures.append(f"held-out {first:.4f} -> {last:.4f}")
        if self._recent:
            figures.append(f"{dict(self.describe(self._recent[-1]))['s/step']} s/step")
        return f" ({', '.join(figures)})" if figures else ""

    def _build_panel(self, report: "StepReport") -> Panel:
        table = Table.grid(expand=True)
        figures = dict(self.describe(report))
        held_out = figures.pop("held-out", None)  # on the border: there is no room in the table
        cells = [("step", f"{report.step} of {self.num_steps}"), *figures.items()]
        table.add_row(*[Text(name, style="dim") for name, _ in cells])
        table.add_row(*[Text(value) for _, value in cells])
        bar = ProgressBar(total=self.num_steps, completed=report.step)
        width = min(_PANEL_WIDTH, console.width)
        return Panel(
            Group(table, bar),
            title="train",
            title_align="left",
            subtitle=held_out and f"held-out {held_out}",
            subtitle_align="left",
            width=width,
        )


def read_recipe(recipe: Path, overrides: list[str], own: dict[str, Any]) -> "TrainConfig":
    """Build a run from a recipe, what overrides it, and the options that are no part of recipes.

    Raises:
        ValueError: Says which field is wrong.
    """
    if str(recipe).startswith("-"):
        raise ValueError(f"the recipe comes first: urae train RECIPE {recipe} ...")
    settings: dict[str, Any] = read_toml(recipe)
    settings.pop(_RECORD_SECTION, None)
    typed = override(settings, overrides)
    for name in sorted(_OWN_OPTIONS & settings.keys()):
        option = name.removesuffix("_dir").replace("_", "-")
        raise ValueError(f"{name} is not a field to override; give it as --{option}")
    from urae.train import TrainConfig

    return build_config(TrainConfig, settings | own, str(recipe), typed)


def _list_fields(wanted: bool) -> None:
    if not wanted:
        return
    set_up_logging(False)
    from urae.train.config import TrainConfig

    table = Table("option", "default", "what it does")
    for name, default, description in describe_fields(TrainConfig):
        if name not in {*_OWN_OPTIONS, "data"}:  # several folders stand in recipes alone
            table.add_row(f"--{name.replace('_', '-')}", default, description)
    Console(highlight=False).print(table)
    raise typer.Exit


def train_command(
    context: typer.Context,
    recipe: Annotated[
        Path, typer.Argument(help="TOML recipe, such as recipes/flux_dev_2k_lora.toml.")
    ],
    output: Annotated[Path, typer.Option(help="Folder for checkpoints, loss and adapter.")],
    data: Data = None,
    resume: Annotated[
        bool, typer.Option("--resume", help="Continue from the last complete checkpoint.")
    ] = False,
    overwrite: Annotated[
        bool, typer.Option("--overwrite", help="Start over in a folder that holds a run.")
    ] = False,
    fields: Annotated[
        bool,
        typer.Option(
            "--fields", callback=_list_fields, is_eager=True, help="List all recipe fields."
        ),
    ] = False,
    verbose: Verbose = False,
) -> None:
    """Train an adapter; any field of the recipe can be overridden: --optimizer.lr 0.5 --steps 100.

    Ctrl-C saves a checkpoint first. On several GPUs: accelerate launch -m urae train ...
    """
    own = {"data_dir": data, "output_dir": output, "resume": resume, "overwrite": overwrite}
    try:
        config, display, result = _run(recipe, context.args, own)
    except KeyboardInterrupt:
        if is_first_rank():
            text = "without saving; --resume continues from the last checkpoint, if there is one"
            console.print("[yellow]stopped at once[/]", Text(text), soft_wrap=True)
        raise
    if not is_first_rank():
        return  # one process speaks for all
    if result.finished:
        steps = f"{result.step} step{'s' if result.step != 1 else ''}"
        text = f"{steps}, adapter {result.adapter_path}{display.summarize(result)}"
        head = "finished already:" if result.num_steps == 0 else "done:"
        console.print(f"[green]{head}[/]", Text(text), soft_wrap=True)
        console.print(Text(f"next: {_suggest_next(config)}", style="dim"), soft_wrap=True)
    else:
        text = f"at step {result.step} of {config.steps}, saved in {result.adapter_path.parent}"
        console.print("[yellow]stopped[/]", Text(f"{text}; continue with --resume"), soft_wrap=True)
        if _holds_adapter(config.output_dir):
            text = (
                f"{config.output_dir} itself still holds the adapter from when the run was "
                "finished before"
            )
            console.print(Text(text, style="dim"), soft_wrap=True)


def _holds_adapter(folder: Path) -> bool:
    from urae.adapters.sources import LORA_FILE_NAME

    return (folder / LORA_FILE_NAME).is_file()


def _run(
    recipe: Path, overrides: list[str], own: dict[str, Any]
) -> "tuple[TrainConfig, Display, TrainResult]":
    config = read_recipe(recipe, overrides, own)
    from urae.train import train

    quiet_progress_bars()
    display = Display(config.steps)
    try:
        return config, display, train(config, on_step=display.show)
    finally:
        display.close()


def _suggest_next(config: "TrainConfig") -> str:
    """Write the command that generates with a finished run's adapter."""
    words = [] if config.model == BASE else ["--model", config.model]
    for adapter in (*config.adapter.over, str(config.output_dir)):
        words += ["--adapter", adapter]
    return f'urae generate "..." {shlex.join([*words, "--size", str(config.resolution)])}'
