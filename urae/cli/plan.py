"""`urae plan`: what a job will take, before it is started."""

from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from urae.cli.generate import MODELS, Memory, split_weight
from urae.cli.terminal import Verbose, console, quiet_progress_bars
from urae.cli.train import Data, format_seconds, read_recipe

if TYPE_CHECKING:
    from urae.generate.estimate import Stage
    from urae.generate.plan import Plan
    from urae.train.plan import TrainPlan
    from urae.train.probe import Probe


class Bits(StrEnum):
    """What quantises weights in place."""

    fp8 = "fp8"
    eight_bit = "8bit"
    four_bit = "4bit"


Gpu = Annotated[
    str | None, typer.Option(help="Memory of the GPU, as 24GiB [dim](this machine's)[/].")
]

plan_app = typer.Typer(no_args_is_help=True)


@plan_app.callback()
def plan() -> None:
    """What a job will take, before it is started; no weights are loaded."""


@plan_app.command("generate")
def generate_command(
    model: Annotated[str, typer.Option(help=f"{MODELS}.")] = "flux-dev",
    size: Annotated[
        str, typer.Option(help="1k, 2k, 4k, a side, or WIDTHxHEIGHT; multiples of 16.")
    ] = "1k",
    gpu: Gpu = None,
    adapter: Annotated[
        list[str] | None, typer.Option(help="Ultra-resolution adapter; repeatable.")
    ] = None,
    lora: Annotated[
        list[str] | None, typer.Option(help="Another LoRA, FILE or FILE:WEIGHT; repeatable.")
    ] = None,
    memory: Annotated[
        Memory, typer.Option(help="One tier, or all that auto chooses from.")
    ] = Memory.auto,
    steps: Annotated[
        int | None, typer.Option(help="Denoising steps [dim](dev 28, schnell 4)[/].")
    ] = None,
    max_sequence_length: Annotated[
        int | None, typer.Option(help="Text tokens [dim](dev 512, schnell 256)[/].")
    ] = None,
    num_images: Annotated[int, typer.Option(min=1, help="Pictures in all.")] = 1,
    part: Annotated[
        Bits | None, typer.Option(help="What quantises the weights in place, if anything does.")
    ] = None,
    gpus: Annotated[int, typer.Option(min=1, help="GPUs that make the pictures together.")] = 1,
    verbose: Verbose = False,
) -> None:
    """Print what `urae generate` would take in GPU and host memory and time, tier by tier."""
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
            loras=tuple(split_weight(text) for text in lora or ()),
            max_sequence_length=max_sequence_length,
            num_images=num_images,
            part=None if part is None else part.value,
        )
    )
    where = "a GPU" if gpus == 1 else f"each of {gpus} GPUs"
    _show(found, f"{width} x {height} on {where} of {_gib(found.gpu_bytes)} GiB")


def _show(plan: "Plan", title: str) -> None:
    from rich.console import Console
    from rich.table import Table

    output = Console(highlight=False)
    table = Table(title=f"{title}: GiB at the peak, time on an H200")
    table.add_column("--memory")
    for name in ("encode", "weights", "activations", "sample", "decode", "host"):
        table.add_column(name, justify="right")
    table.add_column("fits")
    table.add_column("time", justify="right")
    for each in plan.estimates:
        working = each.sample.working or 0
        time = plan.seconds.get(each.tier)
        table.add_row(
            each.tier,
            _peak(each.encode),
            _gib(each.sample.weights),
            _gib(working),
            _peak(each.sample),
            _peak(each.decode),
            _gib(each.host_bytes),
            _say_fits(plan.fits(each)),
            "-" if time is None else format_seconds(time.total(plan.steps, plan.num_images)),
        )
    output.print(table)
    output.print(f"operations by count: {plan.steps} steps of {plan.operations / 1e12:,.0f} TFLOP")
    for tier, time in plan.seconds.items():
        output.print(
            f"on an H200, {tier}, by rates that were measured there: {time.first:.0f} s before the "
            f"first step, {time.step:.2f} s a step, {time.decode:.1f} s to decode; loading and "
            "encoding the prompt are not counted"
        )
    if plan.compiled:
        console.print("blocks compiled, where Triton and a C compiler are there")
    if plan.chosen is None:
        console.print("[yellow]nothing fits:[/] choose a smaller --size")


@plan_app.command(
    "train", context_settings={"allow_extra_args": True, "ignore_unknown_options": True}
)
def train_command(
    context: typer.Context,
    recipe: Annotated[Path, typer.Argument(help="TOML recipe, as recipes/flux_dev_2k_lora.toml.")],
    data: Data = None,
    gpu: Gpu = None,
    probe: Annotated[
        bool, typer.Option("--probe", help="Then take three steps of the largest batch.")
    ] = False,
    verbose: Verbose = False,
) -> None:
    """Print what `urae train` would take; fields of the recipe are overridden in the same way."""
    config = read_recipe(recipe, context.args, {"data_dir": data, "output_dir": Path("plan")})
    from urae.generate.plan import parse_bytes
    from urae.train import plan as planning
    from urae.train import probe as probing

    found = planning.plan_training(config, None if gpu is None else parse_bytes(gpu))
    _show_training(found, config.steps)
    if probe:
        quiet_progress_bars()
        _show_probe(probing.probe(config), config.steps)


def _show_training(plan: "TrainPlan", steps: int) -> None:
    from rich.console import Console
    from rich.table import Table

    from urae.train.estimate import TERMS

    output = Console(highlight=False)
    if plan.num_pictures is not None:
        output.print(
            f"planned from {plan.num_pictures:,} pictures and their captions: not all are cached "
            f"yet; {plan.num_left_out:,} are left out, too small, unreadable or without a caption"
        )
    table = Table(title="pictures, an epoch")
    for name in ("size", "tokens", "samples", "batches", "TFLOP a batch, counted"):
        table.add_column(name, justify="right")
    for each in plan.buckets:
        table.add_row(
            f"{each.width} x {each.height}",
            f"{each.tokens:,}",
            f"{each.num_samples:,}",
            f"{each.num_batches:,}",
            f"{each.operations / 1e12:,.3g}",
        )
    output.print(table)
    output.print(
        f"no sample is dropped, {plan.num_held_out} are held out; {steps:,} steps train on each "
        f"{plan.num_epochs:.1f} times, {plan.operations / 1e15:,.3g} PFLOP in all by count"
    )
    output.print(
        f"disk: {_gib(plan.cache_bytes)} GiB of features, {_gib(plan.checkpoint_bytes)} of "
        "checkpoints"
    )
    table = Table(title=f"a GPU of {_gib(plan.gpu_bytes)} GiB: GiB at the peak, estimated")
    table.add_column("--memory", no_wrap=True)
    for name in (*TERMS, "sum", "host", "fits"):
        table.add_column(name, justify="right")
    for way in plan.estimates:
        table.add_row(
            f"{way.way.tier}, {way.way.checkpointing}",
            *(_gib(getattr(way, term)) for term in TERMS),
            _gib(way.peak),
            _gib(way.host_bytes),
            _say_fits(plan.fits(way)),
        )
    output.print(table)
    table = Table(title="time on an H200, estimated")
    for name in ("--memory", "s a step", "in all"):
        table.add_column(name, justify="right", no_wrap=True)
    for way in plan.estimates:
        time = plan.seconds.get(way.way)
        cells = ("-", "-") if time is None else (f"{time.step:.3g}", format_seconds(time.total))
        table.add_row(f"{way.way.tier}, {way.way.checkpointing}", *cells)
    output.print(table)
    if plan.chosen is None:
        console.print("[yellow]nothing fits:[/] use --batch-size 1, or a lower resolution")


def _show_probe(probe: "Probe", steps: int) -> None:
    from rich.console import Console

    first, last, output = probe.reports[0], probe.reports[-1], Console(highlight=False)
    measured = "not measured without a GPU"
    if last.memory_gib is not None:
        measured = f"{last.memory_gib:.1f} GiB at the peak"
    output.print(
        f"measured at {last.width} x {last.height}, {probe.estimate.way}: {last.seconds:.2f} s a "
        f"step (the first {first.seconds:.2f}); memory: {measured}, {_gib(probe.estimate.peak)} "
        "estimated"
    )
    output.print(
        f"{steps:,} steps at that pace, by the operations of all sizes: "
        f"{format_seconds(probe.seconds)}"
    )


def _peak(stage: "Stage") -> str:
    return "no way" if stage.working is None else _gib(stage.peak)


def _say_fits(fits: bool) -> str:
    return "[green]yes[/]" if fits else "[red]no[/]"


def _gib(num_bytes: int) -> str:
    return f"{num_bytes / 2**30:.1f}"
