"""`urae plan`: what a job will take, before it is started."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

from urae.choices import Bits, Memory
from urae.cli.generate import MODELS, TIERS, split_weight
from urae.cli.terminal import Verbose, format_seconds, format_size, quiet_progress_bars
from urae.cli.train import Data, read_recipe

if TYPE_CHECKING:
    from urae.generate.estimate import Stage
    from urae.generate.plan import Plan
    from urae.train.config import TrainConfig
    from urae.train.plan import TrainPlan
    from urae.train.probe import Probe


Gpu = Annotated[
    str | None, typer.Option(help="Memory of the GPU, such as 24GiB [dim](this machine's)[/].")
]

_UNKNOWN = "-"

_PARTS = {
    "weights": "the base's weights",
    "adapter": "adapters and the optimizer's state",
    "gradients": "gradients",
    "kept": "kept for the backward pass",
    "block": "the block in the backward pass",
    "loss": "inputs, output and loss",
}
"""What the terms of a training step's peak are, in words."""

plan_app = typer.Typer(no_args_is_help=True)


@plan_app.callback()
def plan() -> None:
    """Estimate what a job takes before it starts, without loading weights."""


@plan_app.command("generate")
def generate_command(
    model: Annotated[str, typer.Option(help=f"Base model: {MODELS}.")] = "flux-dev",
    size: Annotated[
        str, typer.Option(help="1k (the model's native side), 2k, 4k, a side, or WIDTHxHEIGHT.")
    ] = "1k",
    gpu: Gpu = None,
    adapter: Annotated[
        list[str] | None, typer.Option(help="Ultra-resolution adapter; repeatable.")
    ] = None,
    lora: Annotated[
        list[str] | None, typer.Option(help="Another LoRA, FILE or FILE:WEIGHT; repeatable.")
    ] = None,
    memory: Annotated[
        Memory, typer.Option(metavar="tier", help=f"{TIERS}; auto shows all it chooses from.")
    ] = "auto",
    steps: Annotated[
        int | None, typer.Option(help="Number of denoising steps [dim](dev 28, schnell 4)[/].")
    ] = None,
    max_sequence_length: Annotated[
        int | None, typer.Option(help="Number of text tokens [dim](dev 512, schnell 256)[/].")
    ] = None,
    num_images: Annotated[int, typer.Option(min=1, help="Number of pictures in all.")] = 1,
    part: Annotated[
        Bits | None, typer.Option(help="Part that quantises the weights in place, if any.")
    ] = None,
    gpus: Annotated[
        int, typer.Option(min=1, help="Number of GPUs that make the pictures together.")
    ] = 1,
    verbose: Verbose = False,
) -> None:
    """Print what `urae generate` would take in GPU and host memory and time, tier by tier."""
    from urae.backbones.flux import find_native_side
    from urae.generate.plan import PlanConfig, parse_bytes, plan
    from urae.geometry import parse_size

    height, width = parse_size(size, find_native_side(model))
    found = plan(
        PlanConfig(
            model=model,
            height=height,
            width=width,
            adapters=tuple(adapter or ()),
            steps=steps,
            memory=memory,
            gpu_bytes=None if gpu is None else parse_bytes(gpu),
            gpus=gpus,
            loras=tuple(split_weight(text) for text in lora or ()),
            max_sequence_length=max_sequence_length,
            num_images=num_images,
            part=part,
        )
    )
    title = f"{width} x {height}" + (f", each of {gpus} GPUs" if gpus > 1 else "")
    _show(found, title)
    if found.chosen is not None:
        chosen = found.chosen
        if found.host_bytes is None and chosen.host_bytes:
            each = f", {format_size(chosen.host_bytes)} for each GPU" if gpus > 1 else ""
            wanted = format_size(gpus * chosen.host_bytes)
            typer.echo(f"{chosen.tier} needs {wanted} free on the host{each}")
        typer.echo(_say_choice(memory, chosen.tier))
    else:
        room = _say_room(found.gpu_bytes, found.host_bytes)
        raise MemoryError(f"nothing fits with --memory {memory}: {room}; choose a smaller --size")


def _show(plan: "Plan", title: str) -> None:
    output = Console(highlight=False)
    output.print(_say_room(plan.gpu_bytes, plan.host_bytes))
    times = [plan.seconds.get(each.tier) for each in plan.estimates]
    columns: dict[str, list[str]] = {
        "--memory": [each.tier for each in plan.estimates],
        "encode": [_peak(each.encode) for each in plan.estimates],
        "sample": [_peak(each.sample) for each in plan.estimates],
        "decode": [_peak(each.decode) for each in plan.estimates],
        "host": [format_size(each.host_bytes) for each in plan.estimates],
        "fits": [_say_fits(plan.fits(each)) for each in plan.estimates],
        "H200": [
            format_seconds(time.total(plan.steps, plan.num_images)) if time else _UNKNOWN
            for time in times
        ],
    }
    clock = ", time on an H200" if plan.seconds else ""
    output.print(_build_table(f"{title}: the peak of each stage{clock}", columns))
    if plan.chosen is not None:
        sample = plan.chosen.sample
        output.print(
            f"sampling with {plan.chosen.tier}: {format_size(sample.weights)} of weights, "
            f"{format_size(sample.working or 0)} of activations"
        )
    output.print(f"operations by count: {plan.steps} steps of {_flop(plan.operations)}")
    if plan.seconds:
        output.print("on an H200, by rates measured there, without loading and encoding:")
    for tier, time in plan.seconds.items():
        output.print(
            f"  {tier}: {time.first:.0f} s before the first step, {time.step:.2f} s a step, "
            f"{time.decode:.1f} s to decode"
        )
    if plan.compiled:
        output.print("with compiled blocks, if Triton and a C compiler are installed")


@plan_app.command(
    "train", context_settings={"allow_extra_args": True, "ignore_unknown_options": True}
)
def train_command(
    context: typer.Context,
    recipe: Annotated[
        Path, typer.Argument(help="TOML recipe, such as recipes/flux_dev_2k_lora.toml.")
    ],
    data: Data = None,
    gpu: Gpu = None,
    probe: Annotated[
        bool, typer.Option("--probe", help="Also run three steps with the largest batch.")
    ] = False,
    verbose: Verbose = False,
) -> None:
    """Print what `urae train` would take; fields of the recipe are overridden in the same way."""
    config = read_recipe(recipe, context.args, {"data_dir": data, "output_dir": Path("plan")})
    from urae.generate.plan import parse_bytes
    from urae.train import plan as planning
    from urae.train import probe as probing

    found = planning.plan_training(config, None if gpu is None else parse_bytes(gpu))
    _show_training(found, config)
    if probe:
        quiet_progress_bars()
        _show_probe(probing.probe(config), config.steps)


def _show_training(plan: "TrainPlan", config: "TrainConfig") -> None:
    output = Console(highlight=False)
    if plan.num_pictures is not None:
        output.print(
            f"planned from {plan.num_pictures:,} pictures and their captions: not all are cached "
            "yet"
        )
    if plan.num_left_out:
        output.print(
            f"left out as too small, unreadable or without a caption: {plan.num_left_out:,}"
        )
    columns = {
        "size": [f"{each.width} x {each.height}" for each in plan.buckets],
        "tokens": [f"{each.tokens:,}" for each in plan.buckets],
        "samples": [f"{each.num_samples:,}" for each in plan.buckets],
        "batches": [f"{each.num_batches:,}" for each in plan.buckets],
        "a batch": [_flop(each.operations) for each in plan.buckets],
    }
    output.print(_build_table("pictures of an epoch, operations by count", columns))
    held_out = f", {plan.num_held_out:,} held out" if plan.num_held_out else ""
    output.print(
        f"no sample is dropped{held_out}; {config.steps:,} steps train on each "
        f"{_say_times(plan.num_epochs)} (one process), {_flop(plan.operations)} in all"
    )
    output.print(
        f"disk: {format_size(plan.cache_bytes)} of features, "
        f"{format_size(plan.checkpoint_bytes)} of checkpoints"
    )
    output.print()
    _show_ways(plan, config)


def _show_ways(plan: "TrainPlan", config: "TrainConfig") -> None:
    from urae.train.estimate import TERMS
    from urae.train.memory import name_remedies

    output = Console(highlight=False)
    room = _say_room(plan.gpu_bytes, plan.host_bytes)
    output.print(room)
    ways = [each.way for each in plan.estimates]
    times = [plan.seconds.get(way) for way in ways]
    columns = {
        "--memory": [f"{way.tier}, {way.checkpointing}" for way in ways],
        "GPU": [format_size(each.peak) for each in plan.estimates],
        "host": [format_size(each.host_bytes) for each in plan.estimates],
        "fits": [_say_fits(plan.fits(each)) for each in plan.estimates],
        "a step": [f"{time.step:.3g} s" if time else _UNKNOWN for time in times],
        "in all": [format_seconds(time.total) if time else _UNKNOWN for time in times],
    }
    clock = ", time on an H200" if plan.seconds else ""
    output.print(_build_table(f"the peak, by --memory and checkpointing{clock}", columns))
    if plan.chosen is None:
        raise MemoryError(
            f"nothing fits with --memory {config.memory}: {room}; {name_remedies(config)} a lower "
            "resolution"
        )
    tier, checkpointing = plan.chosen.way
    columns = {
        f"{tier}, {checkpointing}": [_PARTS[term] for term in TERMS],
        "GPU": [format_size(getattr(plan.chosen, term)) for term in TERMS],
    }
    output.print()
    output.print(_build_table("the peak, by component", columns))
    output.print()
    output.print(f"{_say_choice(config.memory, tier)}, gradient checkpointing {checkpointing}")


def _show_probe(probe: "Probe", steps: int) -> None:
    first, last, output = probe.reports[0], probe.reports[-1], Console(highlight=False)
    measured = "not measured without a GPU"
    if last.memory_gib is not None:
        measured = f"{last.memory_gib:.1f} GiB at the peak"
    output.print(
        f"measured at {last.width} x {last.height}, {probe.estimate.way}: {last.seconds:.2f} s a "
        f"step (the first {first.seconds:.2f}); memory: {measured}, "
        f"{format_size(probe.estimate.peak)} estimated"
    )
    output.print(
        f"{steps:,} steps at that pace, by the operations of all sizes: "
        f"{format_seconds(probe.seconds)}"
    )


def _build_table(title: str, columns: Mapping[str, Sequence[str]]) -> Table:
    """Build a table of short cells that 80 columns hold; what is unknown throughout is left out."""
    known = {
        name: cells for name, cells in columns.items() if any(cell != _UNKNOWN for cell in cells)
    }
    table = Table(
        title=title, title_justify="left", box=box.SIMPLE_HEAD, show_edge=False, pad_edge=False,
        padding=(0, 1, 0, 0),
    )  # fmt: skip
    for number, (name, cells) in enumerate(known.items()):
        words = Text.from_markup(" ".join([name, *cells])).plain.split()
        table.add_column(
            name, justify="right" if number else "left", min_width=max(map(len, words))
        )
    for row in zip(*known.values(), strict=True):
        table.add_row(*row)
    return table


def _say_room(gpu_bytes: int, host_bytes: int | None) -> str:
    """Say what a plan is for, and how much of it a job takes at most."""
    from urae.backbones.free_memory import USABLE

    room = {"GPU": gpu_bytes} if host_bytes is None else {"GPU": gpu_bytes, "host": host_bytes}
    return "; ".join(
        f"{format_size(size)} {name}, {format_size(int(USABLE * size))} of it usable"
        for name, size in room.items()
    )


def _say_choice(memory: str, tier: str) -> str:
    return f"--memory {memory} " + (f"would take {tier}" if memory == "auto" else "fits")


def _peak(stage: "Stage") -> str:
    return _UNKNOWN if stage.working is None else format_size(stage.peak)


def _say_fits(fits: bool) -> str:
    return "[green]yes[/]" if fits else "[red]no[/]"


def _say_times(count: float) -> str:
    text = f"{count:,.0f}" if count >= 10 else f"{count:.2g}"
    return "once" if text == "1" else f"{text} times"


def _flop(count: float) -> str:
    """Write operations, from 10 PFLOP on in PFLOP, below 0.1 TFLOP in GFLOP."""
    unit, scale = ("GFLOP", 1e9) if count < 1e11 else ("TFLOP", 1e12)
    if count >= 1e16:
        unit, scale = "PFLOP", 1e15
    amount = count / scale
    return f"{amount:,.0f} {unit}" if amount >= 100 else f"{amount:.3g} {unit}"
