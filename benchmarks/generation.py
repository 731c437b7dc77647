"""Parts of the GPU benchmark that make whole pictures from the command line."""

import json
import os
import shutil
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from bench import Bench, run_urae

PROMPT = "a lighthouse on a cliff above a stormy sea at dusk, waves breaking on the rocks"
APPROXIMATE = ("local-attention", "progressive=0.5", "taylorseer-cache=3")
"""As far as the parts go together; how good the pictures are is measured elsewhere."""


def generate(
    bench: Bench,
    side: int,
    adapters: Sequence[Path],
    *,
    steps: int,
    options: Sequence[str] = (),
    base: Path | None = None,
    cap_gib: float | None = None,
    guidance: float = 3.5,
    gpus: int = 1,
    num_pictures: int = 1,
) -> dict[str, Any]:
    """Generate pictures one after the other, and describe the first and what they took.

    Args:
        bench: Where.
        side: Of the picture in pixels at full size.
        adapters: In order.
        steps: Of denoising, at most 4 of the tiny shape.
        options: More of the command line.
        base: By default the one of FLUX.1-dev's shape.
        cap_gib: Device memory that the process may take, by default all.
        guidance: Distilled.
        gpus: That share it.
        num_pictures: Of one prompt. What is compiled or timed once is compiled for the first.
    """
    steps = min(steps, 4) if bench.tiny else steps
    folder = bench.work / "pictures"
    shutil.rmtree(folder, ignore_errors=True)
    figures = run_urae(
        bench,
        *("generate", PROMPT, "--model", str(base or bench.base)),
        *("--size", str(bench.side(side)), "--steps", str(steps), "--seed", "0"),
        *(word for path in adapters for word in ("--adapter", str(path))),
        *("--num-images", str(num_pictures)),
        *("--guidance", str(guidance), *options, "--output", str(folder)),
        cap_gib=cap_gib,
        gpus=gpus,
    )
    description = describe_picture(sorted(folder.glob("*.png"))[0])
    cap = {} if cap_gib is None else {"cap_gib": cap_gib}
    return {"steps": steps, **description, **cap, **figures}


def describe_picture(path: Path) -> dict[str, Any]:
    """Read a picture's size, contrast and what its PNG says about memory and speed."""
    from PIL import Image, ImageStat

    Image.MAX_IMAGE_PIXELS = None
    with Image.open(path) as image:
        contrast = sum(ImageStat.Stat(image.resize((256, 256))).stddev) / 3
        text = {key: str(image.info.get(key)) for key in ("memory", "compiled", "parts", "gpus")}
        return {"pixels": list(image.size), "contrast": round(contrast, 1), **text}


def measure_dev(
    bench: Bench,
    *,
    name: str,
    side: int,
    options: Sequence[str] = (),
    local: bool = False,
    **settings: Any,
) -> dict[str, Any]:
    """Generate with FLUX.1-dev's shape and the adapters of the stage, 28 steps by default.

    Args:
        bench: Where.
        name: Of the row.
        side: Of the picture in pixels at full size.
        options: More of the command line.
        local: Whether the last adapter counts as trained with local attention.
        settings: Of `generate`.
    """
    adapters = [bench.lora, bench.minor] if side == 4096 else [bench.lora]
    if local:
        adapters[-1] = copy_local(bench, adapters[-1])
    label = f"{'2K LoRA + 4K minor' if side == 4096 else '2K LoRA'}{name and f', {name}'}"
    settings = {"steps": 28, **settings}
    return {label: generate(bench, side, adapters, options=options, **settings)}


def copy_local(bench: Bench, adapter: Path) -> Path:
    """Copy an adapter as one that was trained with local attention: its metadata say so."""
    from urae.resolution import ResolutionPolicy
    from urae.storage import read_tensors, write_tensors

    tensors, metadata = read_tensors(adapter)
    policy = ResolutionPolicy(attention="local").to_json()
    path = bench.work / f"local-{adapter.name}"
    write_tensors(path, tensors, {**metadata, "urae.policy": policy})
    return path


def measure_schnell(bench: Bench, *, speed: str, local: bool = False) -> dict[str, Any]:
    """Generate 4096 x 4096 in four steps with FLUX.1-schnell's shape and a 2K LoRA.

    Compiled by name, which pays from seven pictures on; the second says what they take then.
    """
    adapter = copy_local(bench, bench.lora) if local else bench.lora
    base = link_schnell(bench)
    options = ("--speed", speed, *(() if bench.tiny else ("--part", "compile")))
    settings = {
        "steps": 4, "guidance": 0.0, "base": base, "options": options, "num_pictures": 2,
    }  # fmt: skip
    name = f"schnell, 2K LoRA{', trained locally' if local else ''}, {speed}"
    return {name: generate(bench, 4096, [adapter], **settings)}


def link_schnell(bench: Bench) -> Path:
    """Make a base of schnell's shape out of links to dev's weights: guidance is left out."""
    folder = bench.work / f"schnell-{bench.shape}"
    shutil.rmtree(folder, ignore_errors=True)
    for file in (each for each in bench.base.rglob("*") if each.is_file()):
        link = folder / file.relative_to(bench.base)
        link.parent.mkdir(parents=True, exist_ok=True)
        link.symlink_to(file)
    changes = {
        "transformer/config.json": {"guidance_embeds": False},
        "scheduler/scheduler_config.json": {"shift": 1.0},
    }
    for name, change in changes.items():
        settings = json.loads((bench.base / name).read_text())
        (folder / name).unlink()
        (folder / name).write_text(json.dumps({**settings, **change}))
    return folder


def measure_cold_start(bench: Bench) -> dict[str, Any]:
    """Time a new process to its first step at 4096 x 4096, without and with the compile cache.

    The weights come from the file system's cache, which the first of both fills.
    """
    shutil.rmtree(Path(os.environ["URAE_CACHE_DIR"]) / "compiled", ignore_errors=True)
    options = () if bench.tiny else ("--part", "compile")  # which two steps alone do not pay for
    run = partial(generate, bench, 4096, [bench.lora], steps=2, options=options)
    return {"compile cache empty": run(), "compile cache warm": run()}


def _streamed(side: int, cap_gib: float) -> Callable[[Bench], dict[str, Any]]:
    name = f"under {cap_gib:g} GiB"
    options = ("--memory", "streamed")
    return partial(measure_dev, name=name, side=side, options=options, cap_gib=cap_gib)


def _quantized(side: int, memory: str, cap_gib: float) -> Callable[[Bench], dict[str, Any]]:
    """Make a picture in four steps with weights in fewer bits, as a smaller card would."""
    name = f"{memory}, under {cap_gib:g} GiB"
    options = ("--memory", memory)
    return partial(measure_dev, name=name, side=side, steps=4, options=options, cap_gib=cap_gib)


def _fast(
    side: int, speed: str, num_pictures: int = 2, *, local: bool = False
) -> Callable[[Bench], dict[str, Any]]:
    """Make pictures in one process: what is compiled or loaded once is so for the first.

    Below 4096 x 4096 compiling pays from several on, which is where it is done.
    """
    options = ("--speed", speed)
    settings = {"num_pictures": num_pictures, "local": local}
    name = f"{'trained locally, ' if local else ''}{speed}"
    return partial(measure_dev, name=name, side=side, options=options, **settings)


GENERATION: dict[str, Callable[[Bench], dict[str, Any]]] = {
    "generate_4k": partial(measure_dev, name="", side=4096),
    "generate_4k_offload": partial(
        measure_dev, name="offloaded", side=4096, steps=2, options=("--memory", "offload")
    ),
    "generate_4k_streamed_10gib": _streamed(4096, 10),
    "generate_4k_streamed_7gib": _streamed(4096, 7),
    "generate_2k_streamed_8gib": _streamed(2048, 8),
    "generate_2k_streamed_6gib": _streamed(2048, 6),
    "generate_4k_8bit_24gib": _quantized(4096, "8bit", 24),
    "generate_4k_4bit_16gib": _quantized(4096, "4bit", 16),
    "generate_2k_4bit_12gib": _quantized(2048, "4bit", 12),
    "generate_4k_fast": _fast(4096, "fast"),
    "generate_4k_turbo": _fast(4096, "turbo"),
    "generate_4k_turbo_24gib": partial(
        measure_dev, name="turbo, under 24 GiB", side=4096, options=("--speed", "turbo"), cap_gib=24
    ),
    "generate_4k_turbo_local": _fast(4096, "turbo", local=True),
    "generate_2k_turbo": _fast(2048, "turbo", num_pictures=4),
    "generate_2k_turbo_alone": _fast(2048, "turbo", num_pictures=1),
    "generate_4k_approximate": partial(
        measure_dev,
        name=" + ".join(APPROXIMATE),
        side=4096,
        options=[word for part in APPROXIMATE for word in ("--part", part)],
    ),
    "generate_4k_schnell": partial(measure_schnell, speed="exact"),
    "generate_4k_schnell_turbo": partial(measure_schnell, speed="turbo"),
    "generate_4k_schnell_turbo_local": partial(measure_schnell, speed="turbo", local=True),
    "cold_start": measure_cold_start,
    "generate_4k_two_gpus": partial(measure_dev, name="two GPUs", side=4096, gpus=2),
}
"""By name; `generate_2k` comes earlier, beside the base that it needs."""
measure_generate_2k = partial(measure_dev, name="", side=2048)
