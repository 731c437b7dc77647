"""Run a `urae` command as it is, and note what each stage of it took.

    python benchmarks/watch.py figures.json generate "a prompt" --size 4k ...

The JSON holds seconds and, on a GPU, the peak of allocated memory of each stage, and the seconds
from the start of the process to the end of the first denoising step. URAE_BENCHMARK_CAP_GIB caps
the device memory that torch may take.
"""

import functools
import json
import os
import runpy
import sys
import time
from pathlib import Path
from typing import Any

import psutil

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
    "cache": {  # the first of each with loading
        "captions": ("urae.features.encoders.Encoders", "encode_caption"),
        "pictures": ("urae.features.encoders.Encoders", "encode_image"),
    },
}
FIRST = {"generate": ("diffusers.FlowMatchEulerDiscreteScheduler", "step")}
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
        self.reserved = 0.0
        self.first_step_seconds: float | None = None

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

    def wait_for_first(self, owner: Any, name: str) -> None:
        """Note when a method is called for the first time, and what it waits for has been made."""
        function = getattr(owner, name)

        @functools.wraps(function)
        def noted(*args: Any, **kwargs: Any) -> Any:
            if self.first_step_seconds is None:
                if self.on_gpu:
                    self.torch.cuda.synchronize()
                self.first_step_seconds = time.time() - psutil.Process().create_time()
            return function(*args, **kwargs)

        setattr(owner, name, noted)

    def cap(self, gib: float) -> None:
        """Let torch take no more device memory than that."""
        if self.on_gpu:
            share = gib * 2**30 / self.torch.cuda.get_device_properties(0).total_memory
            self.torch.cuda.set_per_process_memory_fraction(share)

    def _take_peak(self, stage: str) -> None:
        if self.on_gpu:
            self.torch.cuda.synchronize()
            peak = self.torch.cuda.max_memory_allocated() / 2**30
            self.peaks[stage] = max(self.peaks.get(stage, 0.0), peak)
            reserved = self.torch.cuda.max_memory_reserved() / 2**30
            self.reserved = max(self.reserved, reserved)
            self.torch.cuda.reset_peak_memory_stats()

    def report(self) -> dict[str, Any]:
        """Return the figures so far."""
        self._take_peak(REST)
        return {
            "total_seconds": round(time.perf_counter() - self.began, 2),
            "first_step_seconds": self.first_step_seconds and round(self.first_step_seconds, 2),
            "seconds": {stage: round(value, 2) for stage, value in self.seconds.items()},
            "peaks_gib": {stage: round(value, 2) for stage, value in self.peaks.items()},
            "peak_gib": round(max(self.peaks.values()), 2) if self.peaks else None,
            "reserved_gib": round(self.reserved, 2) if self.on_gpu else None,
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
    if first := FIRST.get(arguments[0]):
        watch.wait_for_first(_find(first[0]), first[1])
    if cap := os.environ.get("URAE_BENCHMARK_CAP_GIB"):
        watch.cap(float(cap))
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
