"""Run a `urae` command as it is, and note what each stage of it took.

    python benchmarks/watch.py figures.json generate "a prompt" --size 4k ...

The JSON holds, of each stage, the seconds of every call and, on a GPU, the peak of allocated
memory; the seconds from the start of the process to the end of each denoising step; and what the
compiler found in its caches. URAE_BENCHMARK_CAP_GIB caps the device memory that torch may take.
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

os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")  # as `urae` does, before torch's first tensor
STAGES = {
    "generate": {
        "check": ("urae.generate.job", "check_base"),
        "load": ("urae.generate.job", "load_pipeline"),
        "adapt": ("urae.generate.job", "adapt"),
        "encode": ("urae.generate.job", "_encode_prompts"),
        "parts": ("urae.generate.job", "apply_parts"),
        "place": ("urae.generate.job", "place"),
        "sample": ("diffusers.FluxPipeline", "__call__"),
        "decode": ("urae.generate.job", "decode"),
        "write": ("urae.generate.job", "save_picture"),
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
STEP = {"generate": ("diffusers.FlowMatchEulerDiscreteScheduler", "step")}
REST = "rest"  # before, between and after: of `train`, its steps


class Watch:
    """Seconds of every call and peak memory, by stage."""

    def __init__(self) -> None:
        import torch

        self.torch = torch
        self.on_gpu = torch.cuda.is_available()
        self.began = time.perf_counter()
        self.seconds: dict[str, list[float]] = {}
        self.peaks: dict[str, float] = {}
        self.reserved = 0.0
        self.steps_at: list[float] = []

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
                self.seconds.setdefault(stage, []).append(round(passed, 2))

        setattr(owner, name, timed)

    def note_steps(self, owner: Any, name: str) -> None:
        """Note when a method is called, and what it waits for has been made."""
        function = getattr(owner, name)

        @functools.wraps(function)
        def noted(*args: Any, **kwargs: Any) -> Any:
            if self.on_gpu:
                self.torch.cuda.synchronize()
            self.steps_at.append(round(time.time() - psutil.Process().create_time(), 2))
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
            "steps_at": self.steps_at,
            "seconds": self.seconds,
            "compiler": _count_compiled(),
            "peaks_gib": {stage: round(value, 2) for stage, value in self.peaks.items()},
            "peak_gib": round(max(self.peaks.values()), 2) if self.peaks else None,
            "reserved_gib": round(self.reserved, 2) if self.on_gpu else None,
        }


def _count_compiled() -> dict[str, int]:
    """Count graphs that were found in the compiler's caches, were not, or went past them."""
    if "torch._dynamo.utils" not in sys.modules:
        return {}
    from torch._dynamo.utils import counters

    found = {**counters["aot_autograd"], **counters["inductor"]}
    return {name: count for name, count in found.items() if "cache_" in name}


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
    if step := STEP.get(arguments[0]):
        watch.note_steps(_find(step[0]), step[1])
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
