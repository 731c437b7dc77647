"""Draw time and memory against pixels, from the JSON of the benchmark's `scaling` parts.

    python benchmarks/plots.py runs/benchmark --output docs

writes `scaling_seconds` and `scaling_gib`, each as PNG and SVG. Needs matplotlib, no GPU.
"""

import argparse
import json
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

PANELS = {
    "one transformer forward, 2K LoRA": (
        "scaling_exact",
        "scaling_local",
        "scaling_stock",
        "scaling_exact_8k",
        "scaling_stock_8k",
    ),
    "VAE decode": ("scaling_vae",),
}
"""Titles, and the benchmark's parts that each shows."""
PLOTS = {
    "scaling_seconds": ("seconds", "seconds", "log"),
    "scaling_gib": ("peak_gib", "peak with weights, GiB", "linear"),
}
"""Files, the figure of each run that they show, its label and its scale."""
STYLES = (("#2660be", "o"), ("#d1495b", "s"))
"""Colour and marker of each case of ours, in turn."""
STOCK_STYLE = ("#2a9d6f", "^")


def draw_scaling(records: Mapping[str, Any], folder: Path) -> list[Path]:
    """Draw each plot that there are figures for.

    Args:
        records: What the benchmark wrote, by part.
        folder: To write into.

    Returns:
        The PNGs.
    """
    from matplotlib import rc_context

    shown = {title: join_cases(records, parts) for title, parts in PANELS.items()}
    shown = {title: cases for title, cases in shown.items() if cases}
    written = []
    for name, (key, label, scale) in PLOTS.items():
        points = [
            entry[key]
            for cases in shown.values()
            for by_side in cases.values()
            for entry in by_side.values()
        ]
        if not points or None in points:  # without a GPU no memory is measured
            continue
        figure = draw(shown, key, label, scale)
        origins = {describe_origin(records[part]) for part in records if part.startswith("scaling")}
        figure.supxlabel("; ".join(sorted(origins)), fontsize=7, color="#5c6470")
        folder.mkdir(parents=True, exist_ok=True)
        figure.savefig(folder / f"{name}.png", dpi=150, metadata={"Software": None})
        with rc_context({"svg.hashsalt": name}):  # the same figures, the same bytes
            figure.savefig(folder / f"{name}.svg", metadata={"Date": None})
        written.append(folder / f"{name}.png")
    return written


def join_cases(records: Mapping[str, Any], parts: tuple[str, ...]) -> dict[str, dict[int, Any]]:
    """Put the parts' figures together: by case, by side in pixels."""
    cases: dict[str, dict[int, Any]] = {}
    for part in parts:
        for case, by_side in records.get(part, {}).get("result", {}).items():
            cases.setdefault(case, {}).update({int(side): each for side, each in by_side.items()})
    return cases


def draw(shown: Mapping[str, Any], key: str, label: str, scale: str) -> Any:
    """Draw a panel for each title, a line for each case; pixels are logarithmic."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(4.6 * len(shown), 3.8), layout="constrained")
    for axes, (title, cases) in zip(
        figure.subplots(1, len(shown), squeeze=False)[0], shown.items(), strict=True
    ):
        ours = iter(STYLES)
        for case, by_side in cases.items():
            colour, marker = STOCK_STYLE if case.startswith("stock") else next(ours)
            sides = sorted(by_side)
            axes.plot(
                [side**2 for side in sides],
                [by_side[side][key] for side in sides],
                marker=marker,
                markersize=4,
                color=colour,
                label=case.replace("`", ""),
            )
        ticks = sorted({side for by_side in cases.values() for side in by_side})
        axes.set_xscale("log")
        axes.set_yscale(scale)
        if scale == "linear":
            axes.set_ylim(bottom=0)
        axes.set_xticks([side**2 for side in ticks], [f"{side}²" for side in ticks])
        axes.minorticks_off()
        axes.tick_params(axis="x", labelsize=8)
        axes.yaxis.set_major_formatter("{x:g}")
        axes.grid(color="#e2e4e8")
        axes.spines[["top", "right"]].set_visible(False)
        axes.set_title(title, fontsize=10)
        axes.set_xlabel("pixels")
        axes.set_ylabel(label)
        axes.legend(frameon=False, fontsize=8)
    return figure


def describe_origin(record: Mapping[str, Any]) -> str:
    """Name what the figures belong to."""
    machine = record["machine"]
    versions = f"torch {machine['torch']}, diffusers {machine['diffusers']}"
    origin = f"{machine['machine']}, {versions}, commit {record['commit'][:7]}"
    return f"{origin}, a tiny model: means nothing" if record["shape"] == "tiny" else origin


def main() -> None:
    """Draw the plots of a benchmark's folder."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("folder", type=Path, help="with scaling_exact.json and its like")
    parser.add_argument("--output", type=Path, required=True)
    arguments = parser.parse_args()
    parts = [part for parts in PANELS.values() for part in parts]
    paths = [arguments.folder / f"{part}.json" for part in parts]
    records = {path.stem: json.loads(path.read_text()) for path in paths if path.is_file()}
    if not records:
        parser.error(f"{arguments.folder} has none of {', '.join(path.name for path in paths)}")
    if any(record["shape"] == "tiny" for record in records.values()):
        parser.error("these are figures of the tiny shape, which mean nothing")
    sys.stdout.write("".join(f"{path}\n" for path in draw_scaling(records, arguments.output)))


if __name__ == "__main__":
    main()
