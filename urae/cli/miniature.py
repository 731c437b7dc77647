"""`urae miniature`: the small FLUX that ships with the package, from nothing."""

import math
from pathlib import Path
from typing import Annotated, Literal

import typer
from rich.text import Text

from urae.adapters.packaged import BASE
from urae.choices import MiniatureStage
from urae.cli.terminal import (
    Verbose,
    build_progress,
    console,
    is_first_rank,
    quiet_progress_bars,
)

miniature_app = typer.Typer(no_args_is_help=True)


@miniature_app.callback()
def miniature() -> None:
    """The miniature: a FLUX of 5 M parameters on rendered scenes."""


Work = Annotated[Path, typer.Option(help="Folder of the stages' files.")]
_WORK = Path("runs/miniature")


@miniature_app.command("train")
def train_command(
    stage: Annotated[
        MiniatureStage, typer.Argument(help="Stage to train; earlier stages must be finished.")
    ],
    work: Work = _WORK,
    recipe: Annotated[Path, typer.Option(help="TOML recipe of all stages.")] = Path(
        "recipes/miniature/stages.toml"
    ),
    max_minutes: Annotated[
        float,
        typer.Option(min=0.01, help="Stop after this many minutes; the same command continues."),
    ] = math.inf,
    commit: Annotated[
        str | None, typer.Option(help="Commit to record in the file; asked from git by default.")
    ] = None,
    verbose: Verbose = False,
) -> None:
    """Train one stage of the miniature; use a GPU."""
    import logging

    from urae.miniature.stages import train_stage

    if is_first_rank():
        logging.getLogger("urae.miniature").setLevel(logging.INFO)
    path = train_stage(stage, recipe, work, max_seconds=60 * max_minutes, commit=commit)
    if not is_first_rank():
        return
    if path is None:
        console.print("[yellow]stopped:[/] run the same command to continue")
    else:
        console.print("[green]done:[/]", Text(str(path)))


@miniature_app.command("data")
def data_command(
    source: Annotated[
        Literal["clean", "real", "synthetic"],
        typer.Argument(help="Renders, the analogue of photographs, or the teacher's pictures."),
    ],
    output: Annotated[
        Path, typer.Argument(help="Folder for `urae cache`; existing pictures are kept.")
    ],
    side: Annotated[int, typer.Option(help="Side of the square pictures in pixels.")] = 512,
    count: Annotated[int, typer.Option(min=1, help="Number of pictures.")] = 3000,
    seed: Annotated[int, typer.Option(min=1, help="Seed of the scenes.")] = 1,
    workers: Annotated[
        int | None, typer.Option(min=1, help="Rendering processes [dim](one per CPU core)[/].")
    ] = None,
    work: Work = _WORK,
    verbose: Verbose = False,
) -> None:
    """Write captioned pictures to train an adapter on."""
    import os

    from urae.backbones.devices import pick_device, pick_dtype
    from urae.miniature.sources import write_folder
    from urae.miniature.stages import load_stage
    from urae.miniature.synthetic import write_synthetic

    if source != "synthetic":
        workers = workers or os.cpu_count() or 1
        new = write_folder(output, source, range(count), seed, side, side, workers=workers)
    else:
        quiet_progress_bars()
        stage = "teacher_512" if side <= 512 else "teacher_1024"
        device = pick_device()
        pipe = load_stage(stage, work).to(device, pick_dtype(device))
        pipe.set_progress_bar_config(disable=True)
        new = write_synthetic(output, pipe, range(count), seed=seed, side=side)
    kept = f", {count - new} of them from before" if new < count else ""
    console.print("[green]done:[/]", Text(f"{count} pictures in {output}{kept}"))


@miniature_app.command("score")
def score_command(
    stage: Annotated[
        MiniatureStage | None,
        typer.Argument(help="A trained transformer of the work folder, or none."),
    ] = None,
    work: Work = _WORK,
    model: Annotated[
        str | None,
        typer.Option(
            help="Model to score instead of a stage [dim](miniature-dev)[/]; any that `urae "
            "generate` takes."
        ),
    ] = None,
    adapter: Annotated[
        list[str] | None,
        typer.Option(help="Adapter for the model; repeat in order: 2K LoRA, then 4K."),
    ] = None,
    side: Annotated[int, typer.Option(help="Side of the square pictures in pixels.")] = 256,
    captions: Annotated[int, typer.Option(min=1, help="Number of held-out captions.")] = 500,
    first: Annotated[
        int,
        typer.Option(min=0, help="Index of the first caption; choose settings on other captions."),
    ] = 0,
    seeds: Annotated[int, typer.Option(min=1, help="Pictures per caption.")] = 3,
    steps: Annotated[
        int | None, typer.Option(min=1, help="Number of denoising steps [dim](24, schnell 4)[/].")
    ] = None,
    guidance: Annotated[
        float | None, typer.Option(min=0, help="Guidance scale [dim](3.5, schnell 0)[/].")
    ] = None,
    workers: Annotated[
        int, typer.Option(min=1, help="Number of processes that check pictures.")
    ] = 2,
    output: Annotated[Path | None, typer.Option(help="JSON file for the figures.")] = None,
    verbose: Verbose = False,
) -> None:
    """Generate pictures of held-out captions and print how many pass the scene check."""
    import json
    from dataclasses import asdict, replace

    from urae.miniature.score import (
        ScoreConfig,
        default_sampling,
        load_scored,
        score_pipeline,
        summarize,
    )
    from urae.storage import write_atomic

    config = ScoreConfig(side, captions, seeds, workers=workers, first_caption=first)
    if output:
        _make_place(output)
    quiet_progress_bars()
    adapters = adapter or []
    pipe = load_scored(model=model, stage=stage, work_dir=work, adapters=adapters)
    usual_steps, usual_guidance = default_sampling(pipe, stage)
    steps = usual_steps if steps is None else steps
    guidance = usual_guidance if guidance is None else guidance
    config = replace(config, steps=steps, guidance_scale=guidance)
    with build_progress() as bar:
        task = bar.add_task("pictures", total=captions * seeds)
        reports = score_pipeline(
            pipe, config, on_progress=lambda done, _: bar.update(task, completed=done)
        )
    found = summarize(reports, captions)
    what = {"stage": stage} if stage else {"model": model or BASE, "adapters": adapters}
    whole = f"{stage or model or BASE}{' with ' if adapters else ''}{' and '.join(adapters)}"
    interval = f"{found['low']:.1%} to {found['high']:.1%}"
    typer.echo(
        f"{whole}, {side} x {side}, {steps} steps: {found['share']:.1%} of {found['count']:.0f} "
        f"pictures match the whole caption (95%: {interval})"
    )
    parts = [part for part in found if part not in ("share", "low", "high", "count")]
    typer.echo(", ".join(f"{part} {found[part]:.1%}" for part in parts))
    if output:
        write_atomic(output, json.dumps({**what, **asdict(config), **found}, indent=1).encode())


def _make_place(output: Path) -> None:
    """Make a file's folder before the work that it is for."""
    if output.is_dir():
        raise FileExistsError(f"output {output} is a folder; name a .json file")
    output.parent.mkdir(parents=True, exist_ok=True)


@miniature_app.command("export")
def export_command(
    output: Annotated[Path, typer.Argument(help="Folder for miniature-dev and miniature-schnell.")],
    work: Work = _WORK,
    verbose: Verbose = False,
) -> None:
    """Write the trained miniatures as pipelines in diffusers layout."""
    from urae.miniature.export import export_pipelines

    for folder in export_pipelines(work, output):
        console.print("[green]done:[/]", Text(str(folder)))


@miniature_app.command("export-adapters")
def export_adapters_command(
    runs: Annotated[
        list[Path],
        typer.Argument(
            help="Folders of finished runs: that of the 2K LoRA, then the 4K one over it."
        ),
    ],
    output: Annotated[Path, typer.Option(help="Folder for the adapters and their model card.")],
    commit: Annotated[
        str | None,
        typer.Option(help="Commit of the code that trained them, if a run does not record it."),
    ] = None,
    verbose: Verbose = False,
) -> None:
    """Write trained adapters of the miniature in the form in which they ship."""
    from urae.miniature.export import export_adapters

    for path in export_adapters(runs, output, commit=commit):
        console.print("[green]done:[/]", Text(str(path)))


@miniature_app.command("unpack")
def unpack_command(work: Work = _WORK, verbose: Verbose = False) -> None:
    """Write the stage files that ship with the package, to train further stages from them."""
    from urae.miniature.export import unpack_pipelines

    quiet_progress_bars()
    for path in unpack_pipelines(work):
        console.print("[green]done:[/]", Text(str(path)))
