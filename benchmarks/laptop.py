"""Time pictures of the miniature as `urae generate` makes them, once it is loaded.

    python benchmarks/laptop.py

One caption at native, twice and four times the side, with the adapters that each size takes; of
the pictures of one process the first is not counted. It is meant for a machine without a GPU.
"""

import argparse
import shutil
import statistics
import tempfile
from pathlib import Path

from bench import Bench, run_urae
from measure import describe_run
from report import table

from urae.adapters.packaged import pick_adapters

NATIVE = 256  # pixels, the miniature's own side
STEPS = 24  # of dev, as its scores are told by
CAPTION = "a large red circle left of a small blue square on a striped green background"


def measure(bench: Bench, model: str, side: int, count: int) -> list[str | float]:
    """Make pictures in one process; return the row of their medians in seconds."""
    folder = bench.work / "pictures"
    options = () if "schnell" in model else ("--steps", str(STEPS))
    shutil.rmtree(folder, ignore_errors=True)
    figures = run_urae(
        bench,
        *("generate", CAPTION, "--model", model, "--size", str(side)),
        *(word for name in pick_adapters(side, side, NATIVE) for word in ("--adapter", name)),
        *("--num-images", str(1 + count), "--output", str(folder), *options),
    )
    stages = figures["seconds"]
    sampling, decoding = (statistics.median(stages[name][1:]) for name in ("sample", "decode"))
    both = zip(stages["sample"][1:], stages["decode"][1:], strict=True)
    each = [round(sum(pair), 2) for pair in both]
    steps = len(figures["steps_at"]) // (1 + count)
    total = statistics.median(each)
    return [f"{side} x {side}", model, steps, total, sampling, decoding, max(each)]


def main() -> None:
    """Time all sizes and print the table."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--sides", type=int, nargs="+", default=[256, 512, 1024])
    parser.add_argument("--models", nargs="+", default=["miniature-dev", "miniature-schnell"])
    parser.add_argument("--count", type=int, default=3, help="pictures of each that are counted")
    arguments = parser.parse_args()
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        bench = Bench("tiny", Path(folder), Path(folder))
        for model in arguments.models:
            for side in arguments.sides:
                rows.append(measure(bench, model, side, arguments.count))
                print(*rows[-1], flush=True)
    header = ["picture", "model", "steps", "s", "sampling, s", "decoding, s", "longest, s"]
    print("\n".join(table(header, rows)))
    print(f"\n{describe_run()}")


if __name__ == "__main__":
    main()
