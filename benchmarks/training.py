"""The parts of the GPU benchmark that train."""

import csv
import gc
import json
import shutil
import statistics
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from bench import RANK, ROOT, Bench, random_inputs, run_urae
from measure import describe_machine, find_commit, peak_gib, reset_peak, synchronize
from safetensors.torch import save_file

STEPS = {2048: 6, 4096: 4}  # the first is not counted, as the second of a compiled run
ADAPTERS = {"lora": "2K LoRA", "minor": "4K minor"}


@dataclass(frozen=True)
class Way:
    """How a row trains."""

    title: str
    memory: str = "resident"
    checkpointing: str = "full"
    compiled: bool = True
    attention: str = "full"
    cap_gib: int | None = None
    """Hard limit on the GPU's memory."""


WAYS = {
    "eager": Way("eager", compiled=False),
    "compiled": Way("compiled"),
    "selective": Way("compiled, attention kept", checkpointing="selective"),
    "offload": Way("compiled, kept on the host", "offload"),
    "offload_selective": Way("compiled, attention kept, on the host", "offload", "selective"),
}
"""At both sizes."""
BARS = {
    "train_2k_lora_8bit": (2048, "lora", Way("8-bit base", "8bit", cap_gib=22)),
    "train_2k_lora_4bit": (2048, "lora", Way("4-bit base", "4bit", compiled=False, cap_gib=18)),
    "train_2k_minor_streamed": (2048, "minor", Way("compiled, streamed", "streamed", cap_gib=10)),
    "train_4k_streamed": (4096, "minor", Way("compiled, streamed", "streamed", cap_gib=16)),
    "train_4k_streamed_selective": (
        4096,
        "minor",
        Way("streamed, attention kept", "streamed", "selective", compiled=False, cap_gib=16),
    ),
    "train_4k_local": (4096, "minor", Way("compiled, local attention", attention="local")),
    "train_4k_local_selective": (
        4096,
        "minor",
        Way("compiled, local attention kept", checkpointing="selective", attention="local"),
    ),
    "train_4k_local_streamed": (
        4096,
        "minor",
        Way("compiled, local attention, streamed", "streamed", attention="local", cap_gib=16),
    ),
}
"""One size and adapter each: the rows that have bars of their own."""


def measure_train(bench: Bench, side: int, adapter: str, way: Way) -> dict[str, Any]:
    """Run training steps of one adapter in one way from the command line."""
    name, options = ADAPTERS[adapter], list_options(bench, way)
    title = f"{name}, {way.title}" + (f", cap {way.cap_gib} GiB" if way.cap_gib else "")
    return {title: train(bench, name, side, STEPS[side], options, cap_gib=way.cap_gib)}


def list_options(bench: Bench, way: Way) -> list[str]:
    """Return the options of the command line; a try on a CPU does not compile."""
    compile = str(way.compiled and bench.device.type == "cuda").lower()
    options = ["--memory", way.memory, "--gradient-checkpointing", way.checkpointing]
    options += ["--compile", compile]
    if way.attention == "local":
        options += ["--policy.attention", "local"]
        if bench.tiny:  # whose pictures are within FLUX.1's native side
            options += ["--policy.native_sequence_length", "64"]
    return options


def measure_two_data(bench: Bench) -> dict[str, Any]:
    """Train on two GPUs, each with samples of its own, and on one: samples a second."""
    way = WAYS["compiled"]
    title, one = train_alone(bench, "train_2k_lora_compiled", 2048, "lora", way)
    two = train(bench, "2K LoRA", 2048, STEPS[2048], list_options(bench, way), gpus=2)
    gain = 2 * one["seconds"] / two["seconds"]
    return {title: one, "2K LoRA, two GPUs, data parallel": {**two, "gain": gain}}


def measure_two_context(bench: Bench, *, side: int, shard: bool = False) -> dict[str, Any]:
    """Train on two GPUs that share each picture, and on one: seconds a step, and the losses."""
    kind = "eager" if shard else "compiled"
    title, one = train_alone(bench, f"train_4k_{kind}", side, "minor", WAYS[kind])
    options = [*list_options(bench, WAYS[kind]), "--context-parallel", "2"]
    if shard:
        options += ["--shard", "true"]
    two = train(bench, "4K minor", side, STEPS[side], options, gpus=2)
    off = max(abs(a / b - 1) for a, b in zip(two["losses"], one["losses"], strict=True))
    gain = one["seconds"] / two["seconds"]
    how = "4K minor, two GPUs, context parallel" + (", base in shards" if shard else "")
    return {title: one, how: {**two, "gain": gain, "losses_off": off}}


def train_alone(
    bench: Bench, part: str, side: int, adapter: str, way: Way
) -> tuple[str, dict[str, Any]]:
    """Return a row's title and figures: what its part has measured here already, or measure."""
    path = bench.output / f"{part}.json"
    record = json.loads(path.read_text()) if path.exists() else {}
    if (record.get("machine"), record.get("commit")) == (describe_machine(), find_commit()):
        result = record["result"]
    else:
        result = measure_train(bench, side, adapter, way)
    ((title, row),) = result.items()
    return title, row


def train(
    bench: Bench,
    name: str,
    side: int,
    steps: int,
    options: list[str],
    *,
    cap_gib: int | None = None,
    gpus: int = 1,
) -> dict[str, Any]:
    """Run some steps of one adapter's recipe, with options, in so much of the GPU's memory."""
    recipe = {"2K LoRA": "flux_dev_2k_lora.toml", "4K minor": "flux_dev_4k_minor.toml"}[name]
    if name == "4K minor":
        options = [*options, "--adapter.over", json.dumps([str(bench.lora)])]
    data, output = bench.work / f"features-{bench.shape}-{side}", bench.work / "train"
    if not data.exists():
        write_features(bench.base, data, bench.side(side) // 8)
    shutil.rmtree(output, ignore_errors=True)
    figures = run_urae(
        bench,
        *("train", str(ROOT / "recipes" / recipe), "--data", str(data), "--output", str(output)),
        *("--model", str(bench.base), "--resolution", str(bench.side(side))),
        *("--steps", str(steps), *options),
        cap_gib=cap_gib,
        gpus=gpus,
    )
    with (output / "loss.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    seconds = [float(row["seconds"]) for row in rows]
    return {
        "seconds": statistics.median(seconds[2:]),
        "all_seconds": seconds,
        "losses": [float(row["loss"]) for row in rows],
        "loader_share": statistics.median(
            float(row["loader_seconds"]) / float(row["seconds"]) for row in rows[2:]
        ),
        "peak_gib": figures["peaks_gib"].get("rest"),
        **{key: figures[key] for key in ("total_seconds", "peaks_gib", "command")},
    }


def write_features(base: Path, folder: Path, cells: int) -> None:
    """Write random features in the reference's format: two pictures with two captions each."""
    from urae.backbones.flux import build_meta_transformer

    config = build_meta_transformer(base).config
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    generator = torch.Generator().manual_seed(3)
    for index in range(2):
        mean = torch.randn(16, cells, cells, generator=generator)
        latents = {"mean": mean, "std": torch.full_like(mean, 0.01)}
        save_file(latents, folder / f"image_{index}_latent_code.safetensors")
        for column in ("prompt", "generated_prompt"):
            embeds = {
                "caption_feature_t5": torch.randn(
                    512, config.joint_attention_dim, generator=generator
                ),
                "caption_feature_clip": torch.randn(
                    config.pooled_projection_dim, generator=generator
                ),
            }
            save_file(embeds, folder / f"image_{index}_{column}_embed.safetensors")


def measure_train_stock(bench: Bench) -> dict[str, Any]:
    """Run the same steps with stock diffusers and peft alone, LoRA weights in both precisions."""
    return {
        f"stock, LoRA in {str(dtype).removeprefix('torch.')}": train_stock(bench, dtype)
        for dtype in (torch.float32, torch.bfloat16)
    }


def train_stock(bench: Bench, lora_dtype: torch.dtype) -> dict[str, Any]:
    """Train a LoRA as diffusers' own scripts do: flash attention, gradient checkpointing."""
    from peft import LoraConfig

    from urae.backbones.flux import load_transformer, predict_velocity
    from urae.backbones.weights import find_attention_linears
    from urae.train.config import OptimizerConfig
    from urae.train.optimizer import build_optimizer

    torch.backends.cuda.enable_cudnn_sdp(False)  # its backward gives NaN on stock FLUX
    transformer = load_transformer(bench.base, dtype=bench.dtype).to(bench.device)
    transformer.requires_grad_(False).train()
    targets = find_attention_linears(transformer)
    transformer.add_adapter(
        LoraConfig(r=RANK, lora_alpha=RANK, init_lora_weights="gaussian", target_modules=targets)
    )
    transformer.enable_gradient_checkpointing()
    parameters = [p for p in transformer.parameters() if p.requires_grad]
    for parameter in parameters:
        parameter.data = parameter.data.to(lora_dtype)
    optimizer = build_optimizer(parameters, OptimizerConfig())
    inputs = random_inputs(transformer, bench, 2048)
    target = torch.randn_like(inputs[0])
    reset_peak()
    seconds, losses = [], []
    for _ in range(STEPS[2048]):
        synchronize()
        began = time.perf_counter()
        velocity = predict_velocity(transformer, *inputs, 1.0)
        loss = (velocity.float() - target.float()).square().mean()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        losses.append(loss.item())
        synchronize()
        seconds.append(time.perf_counter() - began)
    result = {
        "seconds": statistics.median(seconds[1:]),
        "all_seconds": [round(value, 4) for value in seconds],
        "losses": losses,
        "peak_gib": peak_gib(),
    }
    del transformer, optimizer, parameters, loss, velocity
    gc.collect()
    return result
