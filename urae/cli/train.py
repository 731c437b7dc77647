"""`urae train`: a recipe and a folder of features to an adapter."""

import os
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.table import Table
from rich.text import Text

from urae.cli.terminal import Verbose, build_progress, console, quiet_progress_bars, set_up_logging
from urae.config import build_config, describe_fields, override, read_toml

_OWN_OPTIONS = {"data_dir", "output_dir", "resume", "overwrite"}


def _list_fields(wanted: bool) -> None:
    if not wanted:
        return
    set_up_logging(False)
    from urae.train.config import TrainConfig

    table = Table("option", "default", "what it does")
    for name, default, description in describe_fields(TrainConfig):
        if name not in _OWN_OPTIONS:
            table.add_row(f"--{name.replace('_', '-')}", default, description)
    console.print(table)
    raise typer.Exit


def train_command(
    context: typer.Context,
    recipe: Annotated[Path, typer.Argument(help="TOML recipe, as recipes/flux_dev_2k_lora.toml.")],
    data: Annotated[Path, typer.Option(help="Folder with the features of `urae cache`.")],
    output: Annotated[Path, typer.Option(help="Folder for checkpoints, loss and adapter.")],
    resume: Annotated[
        bool, typer.Option("--resume", help="Continue from the newest checkpoint.")
    ] = False,
    overwrite: Annotated[
        bool, typer.Option("--overwrite", help="Start anew in a folder that holds a run.")
    ] = False,
    fields: Annotated[
        bool,
        typer.Option("--fields", callback=_list_fields, is_eager=True, help="List all fields."),
    ] = False,
    verbose: Verbose = False,
) -> None:
    """Train an adapter; any field of the recipe can be overridden: --optimizer.lr 0.5 --steps 100.

    Ctrl-C saves a checkpoint first. On several GPUs: accelerate launch -m urae train ...
    """
    if str(recipe).startswith("-"):
        raise ValueError(f"the recipe comes first: urae train RECIPE {recipe} ...")
    settings: dict[str, Any] = read_toml(recipe)
    override(settings, context.args)
    for name in sorted(_OWN_OPTIONS & settings.keys()):
        option = name.removesuffix("_dir").replace("_", "-")
        raise ValueError(f"{name} is no field to override; it is given as --{option}")
    settings |= {"data_dir": data, "output_dir": output, "resume": resume, "overwrite": overwrite}
    from urae.train import StepReport, TrainConfig, train

    config = build_config(TrainConfig, settings, str(recipe))
    quiet_progress_bars()
    with build_progress("loss", "pace") as bar:
        task = bar.add_task("loading", total=config.steps, loss="", pace="")
        last = ""

        def show(report: StepReport) -> None:
            nonlocal last
            loss, pace = f"loss {report.loss:.4f}", f"{report.seconds:.2f} s/step"
            bar.update(task, description="train", completed=report.step, loss=loss, pace=pace)
            last = f"({loss}, {pace})"

        result = train(config, on_step=show)
    if os.environ.get("RANK", "0") != "0":
        return  # one process speaks for all
    if result.finished:
        text = f"{result.step} steps, adapter {result.adapter_path} {last}"
        console.print("[green]done:[/]", Text(text))
    else:
        text = f"at step {result.step} of {config.steps}, saved in {result.adapter_path.parent}"
        console.print("[yellow]stopped[/]", Text(f"{text}; go on with --resume"))
