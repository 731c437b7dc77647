"""`urae generate`: prompts to pictures."""

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, get_args

import typer
from rich.text import Text

from urae.adapters.packaged import BASE, PACKAGED_ADAPTERS, pick_adapters
from urae.choices import Memory, Speed
from urae.cli.launch import launch, wants_launch
from urae.cli.terminal import (
    Verbose,
    build_progress,
    console,
    is_first_rank,
    quiet_progress_bars,
)

if TYPE_CHECKING:
    from rich.progress import Progress as Bar
    from rich.progress import TaskID

    from urae.generate import GenerateConfig


TIERS = f"{', '.join(get_args(Memory))}; the last two are approximate"
"""Named in the help's text: as a type, typer breaks the list anywhere in a narrow column."""

_NAMED_MODELS = ("miniature-dev", "miniature-schnell", "flux-dev", "flux-schnell", "flux-krea")
MODELS = ", ".join([*_NAMED_MODELS, "a hub id, a folder or a file"])
_ADAPTERS = ", ".join([*PACKAGED_ADAPTERS, "a file, a folder or owner/repo/file"])

_PARTS = (
    "attention-backend, joined-adapters, merged-adapters, constants, compile, striped-vae "
    "(exact); fp8, 8bit, 4bit, local-attention, progressive, first-block-cache, mag-cache, "
    "taylorseer-cache, tiled-vae (approximate); repeatable"
)


def generate_command(
    prompt: Annotated[str | None, typer.Argument(help="What to draw.")] = None,
    model: Annotated[
        str | None,
        typer.Option(
            help=f"Base model: {MODELS} [dim](miniature-dev, with its own adapters beyond its "
            "native size)[/]."
        ),
    ] = None,
    size: Annotated[
        str | None,
        typer.Option(
            help="1k, 2k, 4k (one, two or four times the model's native side), a side, or "
            "WIDTHxHEIGHT; multiples of 16 [dim](1k: FLUX.1 1024, the miniature 256)[/]."
        ),
    ] = None,
    adapter: Annotated[
        list[str] | None,
        typer.Option(
            help=f"Ultra-resolution adapter: {_ADAPTERS}; repeat in order, 2K LoRA first, then 4K "
            "minor."
        ),
    ] = None,
    lora: Annotated[
        list[str] | None, typer.Option(help="Another LoRA, FILE or FILE:WEIGHT; repeatable.")
    ] = None,
    prompts: Annotated[
        Path | None, typer.Option(help="Text file with one prompt per line, instead of PROMPT.")
    ] = None,
    steps: Annotated[
        int | None, typer.Option(help="Number of denoising steps [dim](dev 28, schnell 4)[/].")
    ] = None,
    guidance: Annotated[
        float | None, typer.Option(help="Distilled guidance [dim](dev 3.5, schnell 0)[/].")
    ] = None,
    max_sequence_length: Annotated[
        int | None, typer.Option(help="Number of text tokens [dim](dev 512, schnell 256)[/].")
    ] = None,
    seed: Annotated[int | None, typer.Option(help="Random if not given.")] = None,
    num_images: Annotated[int, typer.Option(help="Pictures per prompt.")] = 1,
    output: Annotated[Path, typer.Option(help="Folder for the PNG files.")] = Path("outputs"),
    memory: Annotated[
        Memory, typer.Option(metavar="tier", help=f"Where the weights are kept: {TIERS}.")
    ] = "auto",
    speed: Annotated[
        Speed,
        typer.Option(
            help="fast and turbo trade a little quality for speed; the loss was measured on the "
            "miniature."
        ),
    ] = "exact",
    part: Annotated[
        list[str] | None,
        typer.Option(help=f"A speed-up, NAME or NAME=STRENGTH: {_PARTS}."),
    ] = None,
    gpus: Annotated[
        int | None,
        typer.Option(
            min=1,
            help="Number of GPUs of this host to use [dim](1; under torchrun, as many as it "
            "starts)[/].",
        ),
    ] = None,
    resume: Annotated[
        bool, typer.Option("--resume", help="Keep existing pictures and make the others.")
    ] = False,
    overwrite: Annotated[
        bool, typer.Option("--overwrite", help="Replace existing pictures.")
    ] = False,
    verbose: Verbose = False,
) -> None:
    """Generate pictures; each PNG holds its prompt, seed, adapters, policy and versions."""
    texts = _read_prompts(prompt, prompts)
    if model == "":
        raise ValueError(f"--model is empty; name one, or leave it out for {BASE}")
    if gpus is not None and wants_launch(gpus):
        return launch(gpus, sys.argv[1:])
    with build_progress() as bar:
        task = bar.add_task("loading", total=None)
        # libraries take seconds to import
        from urae.backbones.flux import find_native_side
        from urae.generate import GenerateConfig
        from urae.geometry import parse_size

        native_side = find_native_side(model or BASE)
        height, width = parse_size(size or "1k", native_side)
        own = pick_adapters(height, width, native_side) if model is None and not adapter else ()
        config = GenerateConfig(
            prompts=texts,
            model=model or BASE,
            height=height,
            width=width,
            adapters=own or tuple(adapter or ()),
            loras=tuple(split_weight(text) for text in lora or ()),
            steps=steps,
            guidance_scale=guidance,
            max_sequence_length=max_sequence_length,
            seed=seed,
            num_images=num_images,
            output_dir=output,
            overwrite=overwrite,
            resume=resume,
            memory=memory,
            speed=speed,
            parts=tuple(part or ()),
        )
        if is_first_rank():
            _tell_of_the_miniature(config, own, native_side)
        paths = _run(config, bar, task)
    if not is_first_rank():
        return
    for path in paths:
        typer.echo(path)
    plural = "s" if len(paths) > 1 else ""
    console.print("[green]done:[/]", Text(f"{len(paths)} picture{plural} in {output}"))


def _run(config: "GenerateConfig", bar: "Bar", task: "TaskID") -> list[Path]:
    """Make the pictures, and show on the bar how far they are."""
    from urae.generate import Progress, generate

    quiet_progress_bars()
    finished = 0

    def show(progress: Progress) -> None:
        nonlocal finished
        finished = progress.picture - 1
        name = f"picture {progress.picture} of {progress.num_pictures}"
        if progress.step == 1:
            bar.reset(task, total=progress.num_steps)
        if progress.step == progress.num_steps:
            name += ", decoding"
        bar.update(task, description=name, completed=progress.step)

    try:
        return generate(config, on_progress=show)
    except KeyboardInterrupt:
        if is_first_rank():
            where = f"finished pictures are in {config.output_dir}"
            text = where if finished else "no picture is finished"
            if config.overwrite:
                text += "; --overwrite makes all of them again"
            elif config.seed is not None:
                text += "; --resume makes the others"
            console.print("[yellow]stopped;[/]", Text(text))
        raise


def _tell_of_the_miniature(
    config: "GenerateConfig", own: tuple[str, ...], native_side: int
) -> None:
    """Say which adapters it takes by itself, and what it cannot draw."""
    from urae.backbones.flux import PACKAGED
    from urae.miniature.grammar import foresee_another_scene

    if own:
        text = (
            f"using {' and '.join(own)} beyond {native_side} x {native_side}; to leave adapters "
            "out, give --model"
        )
        console.print(Text(f"{text} {BASE}"), soft_wrap=True)
    surprise = foresee_another_scene(config.model, config.prompts)
    if config.model in PACKAGED and surprise:
        console.print(Text(surprise, style="yellow"), soft_wrap=True)


def _read_prompts(prompt: str | None, path: Path | None) -> tuple[str, ...]:
    if (prompt is None) == (path is None):
        raise ValueError("give either a prompt or --prompts FILE")
    if path is None:
        assert prompt is not None
        return (prompt,)
    if path.is_dir() or not path.exists():
        what = "is a folder; name a text file" if path.is_dir() else "does not exist"
        raise FileNotFoundError(f"prompt file {path} {what}")
    try:
        text = path.read_text(encoding="utf-8-sig")  # some editors put a BOM first
    except UnicodeDecodeError as error:
        raise ValueError(f"prompt file {path} is not UTF-8 text ({error})") from error
    lines = tuple(line.strip() for line in text.split("\n") if line.strip())
    if not lines:
        raise ValueError(f"prompt file {path} holds no prompt; write one per line")
    return lines


def split_weight(text: str) -> tuple[str, float]:
    """Read FILE or FILE:WEIGHT of a LoRA; without a weight it is 1."""
    source, colon, weight = text.rpartition(":")
    try:
        return (source, float(weight)) if colon and not Path(text).exists() else (text, 1.0)
    except ValueError:
        if source.endswith(".safetensors"):
            raise ValueError(f"weight {weight!r} of LoRA {source} must be a number") from None
        return text, 1.0
