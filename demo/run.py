"""Adapt the miniature that ships to 2K, its own, and show what came of it: `make demo`.

Every step is a command that you could type yourself, on FLUX.1 as on this model.
"""

import os
import shlex
import shutil
import sys
import time
import tomllib
from collections.abc import Sequence
from pathlib import Path
from statistics import fmean

from PIL import Image
from rich.console import Console

from urae.cli.main import main as run_command_line
from urae.cli.terminal import set_up_logging

ROOT = Path(__file__).resolve().parents[1]
OUTPUT = Path("runs/demo")
DATA, PICTURES, LORA = OUTPUT / "data", OUTPUT / "pictures", OUTPUT / "lora_2k"
MODEL, SHIPPED = "miniature-dev", "miniature-2k"
NATIVE, SIZE_2K = 256, 512
SAMPLES = 64
RECIPE = Path("demo/lora_2k.toml")
_SETTINGS = tomllib.loads((ROOT / RECIPE).read_text())
HELD_OUT, STEPS = _SETTINGS["num_validation"], _SETTINGS["steps"]
GPU_RECIPE = Path("recipes/miniature_2k_lora.toml")
PROMPTS = (
    "a large red circle left of a small blue square on a striped green background",
    "a medium yellow ring above a large purple cross on a dotted blue background",
    "a large teal triangle on a checked pink background, in even light",
)

console = Console(highlight=False, soft_wrap=True)


def main() -> None:
    """Render scenes, cache, train and generate, then show it all."""
    os.chdir(ROOT)
    set_up_logging(verbose=False)
    began = time.perf_counter()
    shutil.rmtree(OUTPUT, ignore_errors=True)

    tell("Captioned pictures at twice the miniature's native side, and their features")
    urae("miniature", "data", "clean", DATA, "--side", SIZE_2K, "--count", SAMPLES)
    urae("cache", DATA, "--model", MODEL, "--resolution", SIZE_2K)
    tell("Adapt it to 2K, its own: a LoRA")
    urae("train", RECIPE, "--data", DATA, "--output", LORA)
    tell("Generate the same prompts with the same seed")
    prompts = OUTPUT / "prompts.txt"
    prompts.write_text("\n".join(PROMPTS) + "\n")
    columns = {
        "native size": generate(prompts, "native", NATIVE),
        "2K, no adapter": generate(prompts, "direct_2k", SIZE_2K),
        f"2K, this LoRA ({STEPS} steps)": generate(prompts, "lora_2k", SIZE_2K, "--adapter", LORA),
        "2K, the adapter that ships": generate(
            prompts, "shipped_2k", SIZE_2K, "--adapter", SHIPPED
        ),
    }

    tell("Check the pictures against their captions")
    # torch comes with these, and takes seconds
    from page import write_page
    from sheets import draw_comparison

    from urae.train.chart import Curve, draw_curves, smooth
    from urae.train.output import read_losses, read_validation

    draw_comparison(PROMPTS, columns, OUTPUT / "comparison.png")
    losses = smooth(f"LoRA at {SIZE_2K} x {SIZE_2K}, each step", read_losses(LORA))
    validation = read_validation(LORA)
    means = [(step, fmean(each)) for step, each in validation]
    draw_curves([losses, Curve("Held-out pictures, the same noises", means)], OUTPUT / "loss.png")
    improvement = describe_held_out(validation)
    write_page(OUTPUT / "index.html", PROMPTS, columns, improvement, STEPS)
    explain(improvement, time.perf_counter() - began)


def urae(*arguments: object) -> None:
    """Show a command and run it, in this process: each of its own would import for seconds."""
    words = [str(argument) for argument in arguments]
    console.print(f"[dim]$[/] urae {shlex.join(words)}", style="cyan")
    sys.argv = ["urae", *words]
    try:
        run_command_line()
    except SystemExit as end:
        if end.code:
            console.print(f"[bold red]the demo stops here:[/] urae {words[0]} failed, see above")
            raise


def generate(prompts: Path, name: str, size: int, *adapters: object) -> list[Image.Image]:
    """Generate the demo's pictures at a size with some adapters."""
    urae(
        *("generate", "--prompts", prompts, "--model", MODEL, "--size", size, *adapters),
        *("--steps", 24, "--seed", 0, "--output", PICTURES / name),
    )
    return [Image.open(path) for path in sorted((PICTURES / name).glob("*.png"))]


def describe_held_out(validation: Sequence[tuple[int, Sequence[float]]]) -> str:
    """Say how the loss on the same held-out samples and noises went, with its interval."""
    from urae.study.statistics import compare

    (_, first), *_, (_, last) = validation
    change = compare(last, first)
    return (
        f"{fmean(first):.3f} before, {fmean(last):.3f} after: {change.mean:+.3f} "
        f"({change.low:+.3f} to {change.high:+.3f})"
    )


def tell(heading: str) -> None:
    """Print what comes next."""
    console.print(f"\n[bold]{heading}[/]")


def explain(improvement: str, seconds: float) -> None:
    """Print what is where, and what it shows."""
    tell(f"Done in {seconds:.0f} s. Open {OUTPUT / 'index.html'}, or look at:")
    rows = {
        "comparison.png": "the pictures side by side",
        "loss.png": "the loss of each step, and that of held-out pictures",
        "pictures/": "each picture whole; its PNG holds prompt, seed, adapters and policy",
        "lora_2k/": "the LoRA, its checkpoints, loss.csv and validation.csv",
        "data/": "the training pictures with captions, and the features cached beside them",
    }
    width = max(len(name) for name in rows)
    for name, meaning in rows.items():
        console.print(f"  [cyan]{name:{width}}[/]  {meaning}")
    whole = tomllib.loads((ROOT / GPU_RECIPE).read_text())
    console.print(
        f"\nLoss on {HELD_OUT} held-out pictures: {improvement} (95% interval).\n"
        f"{STEPS} steps of one picture are a beginning: {GPU_RECIPE}, for a GPU, has "
        f"{whole['steps']:,} of {whole['batch_size']}."
    )


if __name__ == "__main__":
    main()
