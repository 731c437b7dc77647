"""Run a `urae` command as it is, and note what each stage of it took.

    python benchmarks/watch.py figures.json generate "a prompt" --size 4k ...

The JSON holds seconds and, on a GPU, the peak of allocated memory of each stage.
"""

import functools
import json
import os
import runpy
import sys
import time
from pathlib import Path
from typing import Any

STAGES = {
    "generate": {
        "load": ("urae.generate.job", "load_pipeline"),
        "adapt": ("urae.generate.job", "adapt"),
        "encode": ("urae.generate.job", "_encode_prompts"),
        "place": ("urae.generate.job", "place"),
        "sample": ("diffusers.FluxPipeline", "__call__"),
        "decode": ("urae.generate.job", "decode"),
    },
    "train": {
        "load": ("urae.train.loop", "load_transformer"),
        "attach": ("urae.train.loop", "attach_for_training"),
    },
}
REST = "rest"  # before, between and after: of `train`, its steps


class Watch:
    """Seconds and peak memory by stage; a stage that comes twice adds up."""

    def __init__(self) -> None:
        import torch

        self.torch = torch
        self.on_gpu = torch.cuda.is_available()
        self.began = time.perf_counter()
        self.seconds: dict[str, float] = {}
        self.peaks: dict[str, float] = {}

    def wrap(self, owner: Any, name: str, stage: str) -> None:
        """Time every call of a function of a module or class."""
        function = getattr(owner, name)

        @functools.wraps(function)
        def timed(*args: Any, **kwargs: Any) -> Any:
            self._take_peak(REST)
            began = time.perf_counter()
            try:
                return function(*args, **kwargs)
            finally:
                self._take_peak(stage)
                passed = time.perf_counter() - began
                self.seconds[stage] = self.seconds.get(stage, 0.0) + passed

        setattr(owner, name, timed)

    def _take_peak(self, stage: str) -> None:
        if self.on_gpu:
            self.torch.cuda.synchronize()
            peak = self.torch.cuda.max_memory_allocated() / 2**30
            self.peaks[stage] = max(self.peaks.get(stage, 0.0), peak)
            self.torch.cuda.reset_peak_memory_stats()

    def report(self) -> dict[str, Any]:
        """Return the figures so far."""
        self._take_peak(REST)
        return {
            "total_seconds": round(time.perf_counter() - self.began, 2),
            "seconds": {stage: round(value, 2) for stage, value in self.seconds.items()},
            "peaks_gib": {stage: round(value, 2) for stage, value in self.peaks.items()},
            "peak_gib": round(max(self.peaks.values()), 2) if self.peaks else None,
            "reserved_gib": round(self.torch.cuda.max_memory_reserved() / 2**30, 2)
            if self.on_gpu
            else None,
        }


def main() -> None:
    """Run the command of the arguments and write its figures, whether it succeeds or not."""
    path, arguments = Path(sys.argv[1]), sys.argv[2:]
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
    os.environ.setdefault("TORCH_LOGS", "-all")
    from urae.cli.terminal import set_up_logging

    set_up_logging(verbose=False)
    watch = Watch()
    for stage, (owner, name) in STAGES.get(arguments[0], {}).items():
        watch.wrap(_find(owner), name, stage)
    sys.argv = ["urae", *arguments]
    try:
        runpy.run_module("urae", run_name="__main__")
    finally:
        if os.environ.get("RANK", "0") == "0":  # of several on one job, the first
            path.write_text(json.dumps(watch.report(), indent=1))


def _find(dotted: str) -> Any:
    import pkgutil

    return pkgutil.resolve_name(dotted)


if __name__ == "__main__":
    main()
