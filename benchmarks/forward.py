"""The parts of the GPU benchmark that time a transformer forward and the VAE, by size."""

import statistics
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from bench import Bench, find_attention, time_forwards
from measure import peak_gib, reset_peak, stopwatch

Times = dict[str, dict[str, dict[str, Any]]]
"""Seconds and GiB by case and by side in pixels."""

SIDES = (1024, 2048, 3072, 4096, 6144, 8192)
"""Of square pictures. A full forward at the last has 16 times the attention of one at 4096."""
WHOLE_VAE_SIDES = SIDES[:4]
"""Those that the VAE decodes whole in 80 GB."""
EXACT, LOCAL, STOCK = "urae, exact, compiled", "urae, local attention, compiled", "stock diffusers"
SCALING: dict[str, tuple[str, Sequence[int]]] = {
    "scaling_local": (LOCAL, SIDES[1:]),
    "scaling_exact": (EXACT, SIDES[:5]),
    "scaling_stock": (STOCK, SIDES[:4]),
    "scaling_exact_8k": (EXACT, SIDES[5:]),
    "scaling_stock_8k": (STOCK, SIDES[4:]),
}
"""Parts: what each times, at which sides; those of minutes a forward are apart."""


def load(bench: Bench) -> Any:
    """Load the base on the device, without VAE and text encoders."""
    from urae.backbones.flux import TEXT_COMPONENTS, load_pipeline

    pipe = load_pipeline(str(bench.base), dtype=bench.dtype, without=("vae", *TEXT_COMPONENTS))
    pipe.transformer.to(bench.device)
    return pipe


@contextmanager
def bare(_pipe: Any) -> Iterator[None]:
    """Leave the base as it is."""
    yield


@contextmanager
def stock_lora(pipe: Any, bench: Bench) -> Iterator[None]:
    """Load the 2K LoRA as stock diffusers does."""
    pipe.load_lora_weights(bench.lora.parent, weight_name=bench.lora.name, adapter_name="x")
    yield
    pipe.unload_lora_weights()


@contextmanager
def adapted(pipe: Any, *adapters: Any, policy: Any = None) -> Iterator[None]:
    """Adapt, by the adapters' own policy if none is given."""
    import urae

    urae.adapt(pipe, adapters, policy=policy)
    yield
    urae.restore(pipe)


@contextmanager
def optimized(pipe: Any, *adapters: Any, policy: Any = None) -> Iterator[None]:
    """Adapt, and make it as fast as is exact, compiled for the size that comes first."""
    import urae

    torch.compiler.reset()
    urae.optimize(urae.adapt(pipe, adapters, policy=policy))
    yield
    urae.restore(pipe)


def measure_forward(bench: Bench) -> Times:
    """Time one transformer forward, stock and adapted in turn, with the same LoRA attached."""
    pipe = load(bench)
    sizes = [(1024, 10), (2048, 5), (4096, 1)]
    lora, both = (bench.lora,), (bench.lora, bench.minor)
    cases: dict[str, tuple[Callable[[Any], AbstractContextManager[None]], Any]] = {
        "stock, no adapter": (bare, sizes),
        "stock, 2K LoRA": (partial(stock_lora, bench=bench), sizes),
        "urae, 2K LoRA": (lambda pipe: adapted(pipe, *lora), sizes),
        "urae, 2K LoRA + 4K minor": (lambda pipe: adapted(pipe, *both), [(4096, 1)]),
    }
    found: dict[str, dict[str, list[float]]] = {}
    peaks: dict[tuple[str, str], float | None] = {}

    def time_case(name: str, attached: AbstractContextManager[None], sides: Any) -> None:
        with attached:
            for side, count in sides:
                reset_peak()
                seconds = time_forwards(pipe.transformer, bench, side, count)
                found.setdefault(name, {}).setdefault(str(side), []).extend(seconds)
                peaks[name, str(side)] = peak_gib()

    for _ in range(2):  # in turn twice, so that a warming GPU favours none
        for name, (attach, sides) in cases.items():
            time_case(name, attach(pipe), sides)
    return {
        name: {side: describe(seconds, peaks[name, side]) for side, seconds in by_side.items()}
        for name, by_side in found.items()
    }


def measure_forward_optimized(bench: Bench) -> Times:
    """Time one transformer forward made as fast as is exact, after stock with the same LoRA."""
    pipe = load(bench)
    found: Times = {}
    with stock_lora(pipe, bench):
        found["stock, 2K LoRA"] = time_sides(pipe, bench, (2048, 4096))
    with optimized(pipe, bench.lora):
        found["urae, 2K LoRA, optimized"] = time_sides(pipe, bench, (1024, 2048))
    with optimized(pipe, bench.lora, bench.minor):
        found["urae, 2K LoRA + 4K minor, optimized"] = time_sides(pipe, bench, (4096,), count=3)
    return found


def measure_scaling(bench: Bench, *, case: str, sides: Sequence[int]) -> Times:
    """Time one forward with the 2K LoRA by size: stock, exact, or with local attention."""
    from urae.resolution import ResolutionPolicy

    pipe = load(bench)
    if case == STOCK:
        with stock_lora(pipe, bench):
            return {case: time_sides(pipe, bench, sides)}
    policy = ResolutionPolicy()
    if bench.tiny:  # whose pictures are within FLUX.1's native side
        policy = replace(policy, native_sequence_length=64)
    if case == EXACT:
        return {case: time_exact(pipe, bench, sides, policy)}
    compile_blocks(pipe, bench)
    with adapted(pipe, bench.lora, policy=replace(policy, attention="local")):
        return {case: time_sides(pipe, bench, sides)}


def time_exact(
    pipe: Any, bench: Bench, sides: Sequence[int], policy: Any = None
) -> dict[str, dict[str, Any]]:
    """Time what `--speed exact` does at each size, compiled for it."""
    found = {}
    for side in sides:
        with optimized(pipe, bench.lora, policy=policy):
            found |= time_sides(pipe, bench, (side,))
    return found


def compile_blocks(pipe: Any, bench: Bench) -> None:
    """Compile the blocks anew; a try on a CPU leaves it."""
    if bench.device.type == "cuda":
        torch.compiler.reset()
        torch._dynamo.config.recompile_limit = 64  # beyond it blocks would run uncompiled
        pipe.transformer.compile_repeated_blocks()


def time_sides(
    pipe: Any, bench: Bench, sides: Sequence[int], *, count: int | None = None
) -> dict[str, dict[str, Any]]:
    """Time `count` forwards at each size, after one that is not counted: it may compile."""
    found = {}
    for side in sides:
        reset_peak()
        times = count or (3 if side <= 2048 else 1)
        seconds = time_forwards(pipe.transformer, bench, side, times)
        chosen = find_attention(pipe.transformer)
        found[str(side)] = {**describe(seconds, peak_gib()), "attention": chosen}
        print(
            f"{side} x {side}: {statistics.median(seconds):.3f} s, attention {chosen}", flush=True
        )
    return found


@torch.no_grad()
def measure_scaling_vae(bench: Bench) -> Times:
    """Time decoding by size: with stock diffusers, and in stripes as `urae generate` does."""
    from diffusers import AutoencoderKL

    from urae.backbones.free_memory import free_bytes, vae_bytes
    from urae.backbones.vae import decode

    vae = AutoencoderKL.from_pretrained(bench.base, subfolder="vae", torch_dtype=bench.dtype)
    vae.to(bench.device).requires_grad_(False)

    def decode_stripes(latents: torch.Tensor) -> torch.Tensor:
        pixels = 64 * latents.shape[-2] * latents.shape[-1]
        limit = vae_bytes(torch.device("cuda"), free_bytes(bench.device), pixels)
        return decode(vae, latents, max_bytes=limit)

    cases: dict[str, tuple[Callable[[torch.Tensor], torch.Tensor], Sequence[int]]] = {
        STOCK: (lambda latents: vae.decode(latents).sample, WHOLE_VAE_SIDES),
        "urae, as `urae generate`": (decode_stripes, SIDES),
    }
    found: Times = {}
    for name, (run, sides) in cases.items():
        for side in sides:
            cells = bench.side(side) // 8
            shape = (1, vae.config.latent_channels, cells, cells)
            latents = torch.randn(shape, generator=torch.Generator().manual_seed(0))
            latents = latents.to(bench.device, bench.dtype)
            reset_peak()
            for _ in range(2):  # the first is not counted
                with stopwatch() as seconds:
                    run(latents)
            found.setdefault(name, {})[str(side)] = describe([seconds()], peak_gib())
            print(f"{side} x {side}: {seconds():.2f} s, {name}", flush=True)
    return found


def describe(seconds: list[float], peak: float | None) -> dict[str, Any]:
    """Return what a report wants of some runs."""
    return {
        "seconds": statistics.median(seconds),
        "all_seconds": [round(value, 5) for value in seconds],
        "peak_gib": peak,
    }
