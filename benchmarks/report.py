"""The benchmark's figures as one page of Markdown, beside the reference's."""

import json
import statistics
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from plots import PANELS, draw_scaling

# one NVIDIA H200, torch 2.11, bf16, the same random shape, no adapter in the forwards:
# seconds by side and GiB at the largest side
REFERENCE_FORWARD = {1024: 0.196, 2048: 0.941, 4096: 7.39}
STOCK_FORWARD = {1024: 0.174, 2048: 0.866, 4096: 7.08}
REFERENCE_FORWARD_GIB, STOCK_FORWARD_GIB = 28.3, 28.7
# seconds and GiB of a training step
REFERENCE_STEP = {2048: (3.56, 30.4), 4096: (31.9, 54.1)}
STOCK_STEP = (4.41, 30.1)
# times that two GPUs are to be faster than one
TWO_GPUS = (1.8, 1.92)
# pictures of 4096 x 4096 a second that caching is to reach, and GiB
CACHE = ((0.40, 10), (0.6, 8))


def write_report(folder: Path, parts: list[str]) -> None:
    """Make `results.md` from the parts' JSON files that are there.

    Args:
        folder: Of the JSON files.
        parts: Their names, in order.
    """
    found = {
        name: json.loads(path.read_text())
        for name in parts
        if (path := folder / f"{name}.json").is_file()
    }
    origins: dict[str, list[str]] = {}
    for name, record in found.items():
        versions = ", ".join(f"{key} {value}" for key, value in record["machine"].items())
        origin = f"{versions}; commit {record['commit']}; `{record['command']}`"
        origins.setdefault(origin, []).append(f"{name} ({record['part_seconds']:.0f} s)")
    lines = ["# Benchmark", ""]
    lines += [f"- {', '.join(names)}: {origin}" for origin, names in origins.items()]
    tiny = any(record["shape"] == "tiny" for record in found.values())
    if tiny:
        lines += [
            "",
            "**A try of the script on a tiny model, at an eighth of the sizes named here: the "
            "figures mean nothing.**",
        ]
    results = {name: record["result"] for name, record in found.items()}
    if forwards := {
        f"{name} (`{part}`)": by_side
        for part in ("forward", "forward_optimized")
        for name, by_side in results.get(part, {}).items()
    }:
        lines += ["", *table_forward(tiny, forwards)]
    lines += write_scaling(found, folder)
    if "forward_two_gpus" in results:
        lines += ["", *table_two_gpus(results["forward_two_gpus"])]
    if "gradients_two_gpus" in results:
        lines += ["", *table_gradients(results["gradients_two_gpus"])]
    if "trained_two_gpus" in results:
        lines += ["", *table_trained(results["trained_two_gpus"])]
    for side, start in ((2048, ("train_stock", "train_2k")), (4096, ("train_4k",))):
        rows = {}
        for part, measured in results.items():
            if part.startswith(start):
                rows |= measured
        if rows:
            lines += ["", *table_train(tiny, side, rows)]
    several = {
        name: run
        for part in results
        if part.startswith("two_gpus")
        for name, run in results[part].items()
    }
    if several:
        lines += ["", *table_several(several)]
    pictures = [name for name in results if name.startswith("generate")]
    if pictures:
        lines += [
            "",
            *table_generate({k: v for name in pictures for k, v in results[name].items()}),
        ]
    if "cache_4k" in results:
        lines += ["", *table_cache(results["cache_4k"])]
    if "cold_start" in results:
        seconds = [
            f"{entry['steps_at'][0]:.1f} s ({name})"
            for name, entry in results["cold_start"].items()
        ]
        lines += ["", f"From the start of the process to its first step: {', '.join(seconds)}."]
    if "minor" in results:
        result = results["minor"]
        lines += [
            "",
            f"Minor components of {result['matrices']} matrices, rank 16: "
            f"{result['seconds']:.1f} s, from the cache {result['from_cache_seconds']:.1f} s, "
            f"peak {format_number(result['peak_gib'])} GiB (the transformer included).",
        ]
    (folder / "results.md").write_text("\n".join(lines) + "\n")


def table_forward(tiny: bool, result: dict[str, Any]) -> list[str]:
    """List seconds of one forward by size, beside the reference's."""
    sides = (1024, 2048, 4096)
    rows: list[list[Any]] = []
    if not tiny:
        rows = [
            ["reference, no adapter (H200)", *REFERENCE_FORWARD.values(), REFERENCE_FORWARD_GIB],
            ["stock, no adapter (H200)", *STOCK_FORWARD.values(), STOCK_FORWARD_GIB],
        ]
    for name, by_side in result.items():
        entries = [by_side.get(str(side), {}) for side in sides]
        seconds = [entry.get("seconds") for entry in entries]
        rows.append([f"here: {name}", *seconds, entries[-1].get("peak_gib")])
    header = [f"{side}^2, s" for side in sides]
    return table(["one forward", *header, "peak at 4096^2, GiB"], rows)


def write_scaling(found: dict[str, Any], folder: Path) -> list[str]:
    """List seconds and memory by size, and draw them where matplotlib is there."""
    lines = []
    for title, parts in PANELS.items():
        rows = [
            [
                *(f"{side}^2", case, entry["seconds"], len(entry["all_seconds"])),
                *(entry["peak_gib"], entry.get("attention")),
            ]
            for part in parts
            for case, by_side in found.get(part, {}).get("result", {}).items()
            for side, entry in by_side.items()
        ]
        if rows:
            lines += [
                "",
                *table([title, "", "s", "runs", "peak with weights, GiB", "attention"], rows),
            ]
    if lines and find_spec("matplotlib") is not None:
        lines += ["", *(f"![{path.stem}]({path.name})" for path in draw_scaling(found, folder))]
    return lines


def table_two_gpus(result: dict[str, Any]) -> list[str]:
    """List seconds of one forward on one GPU and on two, and how many times faster two are."""
    rows: list[list[Any]] = []
    for side, entry in result.items():
        one, two = entry["one"], entry["two"]
        differences = entry["difference"], entry.get("rounding")
        rows.append([f"{side}^2", one, two, one / two, *differences])
    header = ["one forward, 2K LoRA", "one GPU, s", "two, s", "times faster"]
    header += ["relative difference", "of one GPU, stock and exact"]
    must, target = TWO_GPUS
    return [*table(header, rows), "", f"At 4096^2 {must} times is a must, {target} the target."]


def table_gradients(result: dict[str, Any]) -> list[str]:
    """List how far the gradients of two GPUs are from one's."""
    rows = [
        [mode, entry["matrices"], f"{entry['difference']:.1e}"] for mode, entry in result.items()
    ]
    return table(
        ["gradients of two GPUs, float32", "matrices", "largest relative difference"], rows
    )


def table_trained(result: dict[str, Any]) -> list[str]:
    """List how far two GPUs are from one in bfloat16 on the miniature, by size and noise level."""
    rows = [
        [f"{side}^2", level, *(f"{entry[name]:.2%}" for name in ("difference", "rounding"))]
        for side, by_level in result.items()
        for level, entry in by_level.items()
    ]
    header = ["miniature", "noise level", "two from one, bfloat16", "bfloat16 from float32, one"]
    return table(header, rows)


def table_train(tiny: bool, side: int, runs: dict[str, Any]) -> list[str]:
    """List seconds of one training step, beside the reference's."""
    rows: list[list[Any]] = []
    if not tiny:
        rows = [["reference, cuDNN attention (H200)", *REFERENCE_STEP[side], None]]
        if side == 2048:
            rows.append(["stock, flash attention (H200)", *STOCK_STEP, None])
    for name, entry in runs.items():
        share = entry.get("loader_share")
        percent = None if share is None else 100 * share
        rows.append([f"here: {name}", entry["seconds"], entry["peak_gib"], percent])
    header = ["s", "peak, GiB", "waiting for batches, %"]
    return table([f"one training step at {side}^2, rank 16", *header], rows)


def table_several(runs: dict[str, Any]) -> list[str]:
    """List what a second GPU gains: samples a second, or time of a step."""
    rows = [
        [name, run["seconds"], run["peak_gib"], run.get("gain"), run.get("losses_off")]
        for name, run in runs.items()
    ]
    header = ["one training step", "s", "peak of the first GPU, GiB", "times one GPU"]
    return table([*header, "losses off by"], rows)


def table_generate(result: dict[str, Any]) -> list[str]:
    """List what pictures took from the command line: a process's first, and the median further."""
    rows = []
    for name, entry in result.items():
        width, height = entry["pixels"]
        seconds, peaks = entry["seconds"], entry["peaks_gib"]
        stages = [sum(seconds["load"]), seconds["sample"][0], seconds["decode"][0]]
        further = list(map(sum, zip(seconds["sample"][1:], seconds["decode"][1:], strict=True)))
        peak = [peaks.get(stage) for stage in ("sample", "decode")]
        where = f"{entry['memory']}{', compiled' if entry['compiled'] == 'true' else ''}"
        where += f", capped at {cap:g} GiB" if (cap := entry.get("cap_gib")) else ""
        label = f"{width} x {height}, {name}"
        total = entry["total_seconds"]
        median = statistics.median(further) if further else None
        rows.append([label, entry["steps"], where, total, *stages, median, *peak])
    header = ["urae generate", "steps", "memory", "total, s", "load", "sample", "decode"]
    header.append("a further picture, sample and decode")
    return table([*header, "peak sampling, GiB", "peak decoding, GiB"], rows)


def table_cache(runs: dict[str, Any]) -> list[str]:
    """List what caching took from the command line."""
    rows: list[list[Any]] = []
    for name, run in runs.items():
        peaks = [run["peaks_gib"].get(stage) for stage in ("captions", "pictures")]
        rows.append([name, run.get("pictures_per_second"), *peaks, run["total_seconds"]])
    header = ["urae cache", "pictures a second", "peak of captions, GiB", "of pictures, GiB"]
    (must, must_gib), (target, target_gib) = CACHE
    bars = f"{must} a second in {must_gib} GiB is a must, {target} in {target_gib} GiB the target."
    return [*table([*header, "total, s"], rows), "", f"Counted after the first; {bars}"]


def table(header: list[str], rows: list[list[Any]]) -> list[str]:
    """Lay out a Markdown table."""
    lines = [f"| {' | '.join(header)} |", f"|{'---|' * len(header)}"]
    return lines + [f"| {' | '.join(map(format_number, row))} |" for row in rows]


def format_number(value: Any) -> str:
    """Write a number to three digits, nothing as a dash."""
    if value is None:
        return "-"
    if not isinstance(value, float):
        return str(value)
    return f"{value:.3f}" if value < 10 else f"{value:.1f}"
