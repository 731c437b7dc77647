"""Run the whole chain on a tiny FLUX model of random weights: `make demo`.

Every step is a command that you could type yourself, on a FLUX model as on this one.
"""

import csv
import os
import shlex
import shutil
import subprocess
import sys
import time
from pathlib import Path

from PIL import Image
from rich.console import Console
from shapes import write_pictures
from sheets import draw_comparison, draw_losses

ROOT = Path(__file__).resolve().parents[1]
OUTPUT = Path("runs/demo")
BASE, DATA, PICTURES = OUTPUT / "base", OUTPUT / "data", OUTPUT / "pictures"
LORA_2K, MINOR_4K = OUTPUT / "lora_2k", OUTPUT / "minor_4k"
CONVERTED = OUTPUT / "minor_4k_as_lora.safetensors"

# an eighth of the real sizes a side: 128 is what 1024 is to FLUX.1, 256 its 2K, 512 its 4K
NATIVE, SIZE_2K, SIZE_4K = 128, 256, 512
TEXT_TOKENS = 64
NATIVE_TOKENS = TEXT_TOKENS + (NATIVE // 16) ** 2
PROMPT = "a large red circle above a small blue square on a striped green background"

console = Console(highlight=False, soft_wrap=True)


def main() -> None:
    """Make a base and pictures, then cache, train, convert, generate, and show it all."""
    os.chdir(ROOT)
    began = time.perf_counter()
    shutil.rmtree(OUTPUT, ignore_errors=True)
    tell("A tiny FLUX model with random weights, and 12 captioned pictures")
    make_base()
    write_pictures(DATA)

    model = ("--model", BASE)
    length = ("--max-sequence-length", TEXT_TOKENS)
    # the recipes' Prodigy takes hundreds of steps to find its pace
    recipe = ("--optimizer.name", "adamw")
    tell("Adapt it to 2K, at an eighth of its real size: a LoRA")
    urae("cache", DATA, *model, "--resolution", SIZE_2K, *length)
    urae(
        *("train", "recipes/flux_dev_2k_lora.toml", "--data", DATA, "--output", LORA_2K, *model),
        *("--resolution", SIZE_2K, "--steps", 60, "--batch-size", 2),
        *(*recipe, "--optimizer.lr", 0.005),
    )
    tell("Then to 4K: the minor components of the base with that LoRA")
    urae("cache", DATA, *model, "--resolution", SIZE_4K, *length)
    urae(
        *("train", "recipes/flux_dev_4k_minor.toml", "--data", DATA, "--output", MINOR_4K, *model),
        *("--resolution", SIZE_4K, "--steps", 40, "--adapter.over", f'["{LORA_2K}"]'),
        *(*recipe, "--optimizer.lr", 0.002),
    )
    tell("One plain LoRA of both, for stock diffusers")
    urae("convert", LORA_2K, MINOR_4K, "--output", CONVERTED)

    tell("Generate with each")
    both = ("--adapter", LORA_2K, "--adapter", MINOR_4K)
    columns = {
        "base alone": generate("base_2k", SIZE_2K),
        "2K LoRA": generate("lora_2k", SIZE_2K, "--adapter", LORA_2K),
        "base alone ": generate("base_4k", SIZE_4K),
        "2K LoRA + 4K minor": generate("minor_4k", SIZE_4K, *both),
        "the two converted": generate("converted_4k", SIZE_4K, "--adapter", CONVERTED),
    }
    draw_comparison(columns, OUTPUT / "comparison.png")
    losses = {
        f"2K LoRA, {SIZE_2K} pixels": read_losses(LORA_2K),
        f"4K minor components, {SIZE_4K} pixels": read_losses(MINOR_4K),
    }
    draw_losses(losses, OUTPUT / "loss.png")
    explain(time.perf_counter() - began)


def make_base() -> None:
    """Write the base model and what its native size is."""
    # imported here because it takes seconds, and after the libraries are told to be quiet
    from urae.cli.terminal import quiet_progress_bars, set_up_logging

    set_up_logging(verbose=False)
    from urae.backbones.random_flux import write_random_flux
    from urae.resolution import BASE_POLICY_FILE, ResolutionPolicy

    quiet_progress_bars()
    write_random_flux(BASE, "tiny", seed=0)
    policy = ResolutionPolicy(native_sequence_length=NATIVE_TOKENS)
    (BASE / BASE_POLICY_FILE).write_text(policy.to_json())


def urae(*arguments: object) -> None:
    """Show a command and run it."""
    words = [str(argument) for argument in arguments]
    console.print(f"[dim]$[/] urae {shlex.join(words)}", style="cyan")
    # what is computed from the base stays in this folder too
    environment = {**os.environ, "URAE_CACHE_DIR": str(OUTPUT / "cache")}
    command = [sys.executable, "-m", "urae", *words]
    done = subprocess.run(command, env=environment, check=False)
    if done.returncode:
        console.print(f"[bold red]the demo stops here:[/] urae {words[0]} failed, see above")
        sys.exit(done.returncode)


def generate(name: str, size: int, *adapters: object) -> Image.Image:
    """Generate the demo's picture at a size with some adapters."""
    urae(
        *("generate", PROMPT, "--model", BASE, "--size", size, *adapters, "--steps", 8),
        *("--seed", 7, "--max-sequence-length", TEXT_TOKENS, "--output", PICTURES / name),
    )
    (path,) = (PICTURES / name).glob("*.png")
    return Image.open(path)


def read_losses(run_dir: Path) -> list[float]:
    """Read a run's loss at each step."""
    with (run_dir / "loss.csv").open(newline="") as file:
        return [float(row["loss"]) for row in csv.DictReader(file)]


def tell(heading: str) -> None:
    """Print what comes next."""
    console.print(f"\n[bold]{heading}[/]")


def explain(seconds: float) -> None:
    """Print what is where, and what it shows."""
    tell(f"Done in {seconds:.0f} s. What you have now, in {OUTPUT}:")
    rows = {
        "comparison.png": "the pictures side by side",
        "loss.png": "both loss curves",
        "pictures/": "each picture whole; its PNG holds prompt, seed, adapters and policy",
        f"{LORA_2K.name}/": "the 2K LoRA, its checkpoints and loss.csv",
        f"{MINOR_4K.name}/": "the 4K minor-component adapter, likewise",
        CONVERTED.name: "both as one LoRA, which stock diffusers loads",
        "data/": "the training pictures with captions, and the features cached beside them",
        "base/": "the tiny FLUX model, in diffusers layout",
    }
    width = max(len(name) for name in rows)
    for name, meaning in rows.items():
        console.print(f"  [cyan]{name:{width}}[/]  {meaning}")
    console.print(
        "\n[yellow]The base's weights are random, so the pictures mean nothing yet:[/] noise in, "
        "noise out.\nWhat this shows is that every step runs on this machine. For real pictures "
        "name a real\nmodel, --model flux-dev, and real sizes, --size 2k and 4k."
    )


if __name__ == "__main__":
    main()
