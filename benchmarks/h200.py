"""Measure generation, training, caching on one GPU with random weights of FLUX.1-dev's full size.

    python benchmarks/h200.py --output results --work /tmp/urae-benchmark

Needs a CUDA device with 80 GB or more, two of them for the parts `two_gpus_...`, 100 GB of host
memory and 40 GB of disk. Each part writes its own JSON at once and runs alone with --parts;
`results.md` and its plots are made anew from what is there.
--shape tiny goes through everything on a CPU, an eighth as large; its figures say nothing.
"""

import argparse
import json
import os
import shlex
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from bench import RANK, ROOT, Bench
from caching import measure_cache
from forward import (
    SCALING,
    measure_forward,
    measure_forward_optimized,
    measure_scaling,
    measure_scaling_vae,
)
from generation import GENERATION, measure_generate_2k
from gradients import measure_gradients
from measure import describe_machine, find_commit, peak_gib, reset_peak, synchronize
from report import write_report
from training import (
    ADAPTERS,
    BARS,
    WAYS,
    measure_train,
    measure_train_stock,
    measure_two_context,
    measure_two_data,
)
from two_gpus import measure_forward_two_gpus, measure_trained

sys.path.insert(0, str(ROOT))


def measure_base(bench: Bench) -> dict[str, Any]:
    """Write the base model and a random 2K LoRA over it."""
    from urae.adapters.files import LowRank, write_lora
    from urae.backbones.flux import build_meta_transformer
    from urae.backbones.random_flux import write_random_flux
    from urae.backbones.weights import find_attention_linears, linear_shape

    shutil.rmtree(bench.base, ignore_errors=True)
    began = time.perf_counter()
    write_random_flux(bench.base, bench.shape, seed=0, dtype=bench.dtype, device=bench.device)
    seconds = time.perf_counter() - began
    meta = build_meta_transformer(bench.base)
    generator = torch.Generator().manual_seed(1)
    layers = {}
    for name in find_attention_linears(meta):
        rows, columns = linear_shape(meta, name) or (0, 0)
        down = torch.randn(RANK, columns, generator=generator) / columns**0.5
        up = torch.randn(rows, RANK, generator=generator) * 0.01
        layers[name] = LowRank(down, up)
    write_lora(bench.lora, layers)
    size = sum(file.stat().st_size for file in bench.base.rglob("*") if file.is_file())
    return {
        "seconds": seconds,
        "gib_on_disk": size / 2**30,
        "parameters": sum(parameter.numel() for parameter in meta.parameters()),
        "peak_gib": peak_gib(),
    }


def measure_minor(bench: Bench) -> dict[str, Any]:
    """Find the minor components of base + 2K LoRA, twice, and write an adapter of them."""
    from urae.adapters.files import LowRank, merge_minor, read_adapter, write_lora
    from urae.adapters.initial import compute_initial, fingerprint_origin
    from urae.backbones.flux import load_transformer
    from urae.backbones.weights import find_attention_linears, open_original_weights

    shutil.rmtree(os.environ["URAE_CACHE_DIR"], ignore_errors=True)
    transformer = load_transformer(bench.base, dtype=bench.dtype).to(bench.device)
    weights = open_original_weights(transformer, find_attention_linears(transformer))
    over = [read_adapter(bench.lora).layers]
    seconds = []
    reset_peak()
    for _ in ("solved", "from cache"):
        began = time.perf_counter()
        initial = compute_initial(weights, over, RANK, device=bench.device)
        synchronize()
        seconds.append(time.perf_counter() - began)
    peak = peak_gib()
    generator = torch.Generator().manual_seed(2)
    layers = {}
    for name, pair in initial.items():
        noise = [torch.randn(t.shape, generator=generator) * t.std() * 0.1 for t in pair]
        layers[name] = merge_minor(LowRank(pair.down + noise[0], pair.up + noise[1]), pair)
    metadata = {
        "urae.format": "1",
        "urae.kind": "minor",
        "urae.rank": str(RANK),
        "urae.origin_hash": fingerprint_origin(weights, over),
        "urae.over": str(bench.lora),
    }
    write_lora(bench.minor, layers, metadata)
    return {
        "matrices": len(initial),
        "seconds": seconds[0],
        "from_cache_seconds": seconds[1],
        "peak_gib": peak,
    }


PARTS: dict[str, Callable[[Bench], dict[str, Any]]] = {
    "base": measure_base,  # the others need it
    "minor": measure_minor,  # `forward` and `generate_4k` need its adapter
    "generate_2k": measure_generate_2k,
    **{
        f"train_2k_{adapter}_{name}": partial(measure_train, side=2048, adapter=adapter, way=way)
        for adapter in ADAPTERS
        for name, way in WAYS.items()
    },
    "forward": measure_forward,
    "forward_optimized": measure_forward_optimized,
    **{
        name: partial(measure_scaling, case=case, sides=sides)
        for name, (case, sides) in SCALING.items()
    },
    "scaling_vae": measure_scaling_vae,
    "train_stock": measure_train_stock,
    **{
        f"train_4k_{name}": partial(measure_train, side=4096, adapter="minor", way=way)
        for name, way in WAYS.items()
        if name != "eager"
    },
    **{
        name: partial(measure_train, side=side, adapter=adapter, way=way)
        for name, (side, adapter, way) in BARS.items()
    },
    **GENERATION,
    "cache_4k": partial(measure_cache, side=4096),
    "two_gpus_data_2k": measure_two_data,
    "two_gpus_context_4k": partial(measure_two_context, side=4096),
    "two_gpus_context_shard_4k": partial(measure_two_context, side=4096, shard=True),
    "forward_two_gpus": measure_forward_two_gpus,
    "gradients_two_gpus": measure_gradients,
    "trained_two_gpus": measure_trained,
}
TWO_GPUS = (
    "forward_two_gpus",
    "generate_4k_two_gpus",
    "gradients_two_gpus",
    "trained_two_gpus",
    "two_gpus_data_2k",
    "two_gpus_context_4k",
    "two_gpus_context_shard_4k",
)
ON_CUDA = ("train_2k_lora_4bit", "generate_4k_4bit_16gib", "generate_2k_4bit_12gib")
"""Whose weights are quantised there, of the tiny shape too."""


def run_part(bench: Bench, name: str, command: str) -> None:
    """Measure one part and write it down."""
    print(f"== {name}", flush=True)
    began = time.perf_counter()
    result = PARTS[name](bench)
    seconds = round(time.perf_counter() - began, 1)
    record = {
        "part": name,
        "shape": bench.shape,
        "machine": describe_machine(),
        "commit": find_commit(),
        "command": command,
        "part_seconds": seconds,
        "result": result,
    }
    (bench.output / f"{name}.json").write_text(json.dumps(record, indent=1) + "\n")
    write_report(bench.output, list(PARTS))
    print(f"== {name} done in {seconds} s", flush=True)


def main() -> None:
    """Run the parts asked for, several of them each in a process of its own."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--shape", choices=("flux-dev", "tiny"), default="flux-dev")
    parser.add_argument("--parts", nargs="+", choices=list(PARTS), help="default: all that can run")
    parser.add_argument("--output", type=Path, default=ROOT / "runs" / "benchmark")
    parser.add_argument("--work", type=Path, default=ROOT / "runs" / "benchmark-work")
    parser.add_argument("--commit", help="name it where there is no git checkout to ask")
    arguments = parser.parse_args()
    bench = Bench(arguments.shape, arguments.output.resolve(), arguments.work.resolve())
    if not bench.tiny and bench.device.type != "cuda":
        parser.error("the full shape needs a CUDA device; try --shape tiny")
    if arguments.parts is None:
        can_share = bench.tiny or torch.cuda.device_count() >= 2
        left_out = (() if can_share else TWO_GPUS) + (() if torch.cuda.is_available() else ON_CUDA)
        arguments.parts = [name for name in PARTS if name not in left_out]
    for folder in (bench.output, bench.work):
        folder.mkdir(parents=True, exist_ok=True)
    # minor components are found once, by this benchmark and not by an earlier run of something
    os.environ["URAE_CACHE_DIR"] = str(bench.work / "cache")
    command = shlex.join(["python", *sys.argv])
    if arguments.commit:
        os.environ["URAE_BENCHMARK_COMMIT"] = arguments.commit
    if len(arguments.parts) == 1:
        run_part(bench, arguments.parts[0], os.environ.get("URAE_BENCHMARK_COMMAND", command))
        return
    environment = {**os.environ, "URAE_BENCHMARK_COMMAND": command}
    options = ["--shape", bench.shape, "--output", str(bench.output), "--work", str(bench.work)]
    failed = []
    for name in arguments.parts:
        run = [sys.executable, __file__, *options, "--parts", name]
        if subprocess.run(run, env=environment, check=False).returncode:
            failed.append(name)
    print((bench.output / "results.md").read_text() if len(failed) < len(arguments.parts) else "")
    if failed:
        sys.exit(f"failed: {', '.join(failed)}; what was measured is in {bench.output}")


if __name__ == "__main__":
    main()
