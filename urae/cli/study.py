"""`urae study`: the paper's claims on the miniature, one question a command."""

import math
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.text import Text

from urae.choices import Question
from urae.cli.terminal import Verbose, build_progress, console, quiet_progress_bars
from urae.config import build_config, override


def study_command(
    context: typer.Context,
    question: Annotated[
        Question,
        typer.Argument(
            help="a: adapter, data, guidance; b: share of synthetic data; c: components and rank; "
            "d: resolution policy; e: bf16 residual; f: transfer to schnell."
        ),
    ],
    work: Annotated[
        Path, typer.Option(help="Folder of the stages' files; results go into study/ there.")
    ] = Path("runs/miniature"),
    output: Annotated[Path, typer.Option(help="Folder for table, plot and text.")] = Path(
        "docs/study"
    ),
    model: Annotated[str, typer.Option(help="Guided base model.")] = "miniature-dev",
    schnell: Annotated[
        str, typer.Option(help="Four-step base of question f.")
    ] = "miniature-schnell",
    adapter: Annotated[
        str, typer.Option(help="2K LoRA under the 4K stage of question c.")
    ] = "miniature-2k",
    workers: Annotated[
        int, typer.Option(min=1, help="Number of processes; several can share a GPU.")
    ] = 1,
    max_minutes: Annotated[
        float,
        typer.Option(
            min=0.01, help="Start nothing new after this many minutes; the same command continues."
        ),
    ] = math.inf,
    verbose: Verbose = False,
) -> None:
    """Train and score the cells of a question that are not done yet, and report the results.

    Sizes are fields of StudyConfig: --num-seeds 5 --steps 1000 --num-captions 200.
    """
    settings: dict[str, Any] = {
        "question": question,
        "work_dir": work,
        "output_dir": output,
        "model": model,
        "schnell": schnell,
        "adapter_2k": adapter,
        "workers": workers,
        "max_minutes": max_minutes,
    }
    override(settings, context.args)
    from urae.study import StudyConfig, run_study

    config = build_config(StudyConfig, settings, "urae study")
    quiet_progress_bars()
    with build_progress() as bar:
        task = bar.add_task(f"question {question}", total=None)
        result = run_study(
            config, on_progress=lambda done, total: bar.update(task, completed=done, total=total)
        )
    written = str(result.text_path)
    if result.text_path is None:
        why = "the table there holds other runs of it" if result.done else "no run is done yet"
        written = f"nothing written to {config.output_dir}: {why}"
    text = f"{result.done} of {result.total} runs, {written}"
    if result.done == result.total:
        console.print("[green]done:[/]", Text(text), soft_wrap=True)
    else:
        console.print("[yellow]stopped:[/]", Text(f"{text}; the same command continues"))
