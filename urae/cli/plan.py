"""`urae plan`: what a job will take, before it is started."""

from typing import TYPE_CHECKING, Annotated

import typer

from urae.cli.generate import Memory, Model
from urae.cli.terminal import Verbose, console

if TYPE_CHECKING:
    from urae.generate.estimate import Stage
    from urae.generate.plan import Plan

plan_app = typer.Typer(no_args_is_help=True)


@plan_app.callback()
def plan() -> None:
    """What a job will take, before it is started; no weights are loaded."""


@plan_app.command("generate")
def generate_command(
    model: Model = "flux-dev",
    size: Annotated[
        str, typer.Option(help="1k, 2k, 4k, a side, or WIDTHxHEIGHT; multiples of 16.")
    ] = "1k",
    gpu: Annotated[
        str | None, typer.Option(help="Memory of the GPU, as 24GiB [dim](this machine's)[/].")
    ] = None,
    adapter: Annotated[
        list[str] | None, typer.Option(help="Ultra-resolution adapter; repeatable.")
    ] = None,
    memory: Annotated[
        Memory, typer.Option(help="One tier, or all that auto chooses from.")
    ] = Memory.auto,
    steps: Annotated[
        int | None, typer.Option(help="Denoising steps [dim](dev 28, schnell 4)[/].")
    ] = None,
    gpus: Annotated[int, typer.Option(min=1, help="That make the picture together.")] = 1,
    verbose: Verbose = False,
) -> None:
    """Print what `urae generate` would take in GPU and host memory, by where weights live."""
    from urae.generate.plan import PlanConfig, parse_bytes, plan
    from urae.geometry import parse_size

    height, width = parse_size(size)
    found = plan(
        PlanConfig(
            model=model,
            height=height,
            width=width,
            adapters=tuple(adapter or ()),
            steps=steps,
            memory=memory.value,
            gpu_bytes=None if gpu is None else parse_bytes(gpu),
            gpus=gpus,
        )
    )
    where = "a GPU" if gpus == 1 else f"each of {gpus} GPUs"
    _show(found, f"{width} x {height} on {where} of {_gib(found.gpu_bytes)} GiB")


def _show(plan: "Plan", title: str) -> None:
    from rich.console import Console
    from rich.table import Table

    table = Table(title=f"{title}: GiB at the peak")
    table.add_column("--memory")
    for name in ("encode", "weights", "activations", "sample", "decode", "host"):
        table.add_column(name, justify="right")
    table.add_column("fits")
    for each in plan.estimates:
        working = each.sample.working or 0
        table.add_row(
            each.way.tier + (", in chunks" if each.way.chunked else ""),
            _peak(each.encode),
            _gib(each.sample.weights),
            _gib(working),
            _peak(each.sample),
            _peak(each.decode),
            _gib(each.host_bytes),
            "[green]yes[/]" if each.fits(plan.gpu_bytes) else "[red]no[/]",
        )
    Console(highlight=False).print(table)
    if plan.compiled:
        console.print("blocks compiled, where Triton and a C compiler are there")
    if plan.chosen is None:
        console.print("[yellow]nothing fits:[/] choose a smaller --size")


def _peak(stage: "Stage") -> str:
    return "no way" if stage.working is None else _gib(stage.peak)


def _gib(num_bytes: int) -> str:
    return f"{num_bytes / 2**30:.1f}"
