"""Seconds, memory, machine and versions, with or without a GPU."""

import os
import platform
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from importlib.metadata import PackageNotFoundError, version

import torch


def synchronize() -> None:
    """Wait for the GPU, if there is one."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def reset_peak() -> None:
    """Forget the peak of allocated memory, and give back what is cached."""
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()


def peak_gib() -> float | None:
    """Return the peak of memory allocated on the GPU; None without one."""
    return torch.cuda.max_memory_allocated() / 2**30 if torch.cuda.is_available() else None


@contextmanager
def stopwatch() -> Iterator[Callable[[], float]]:
    """Time a block, by CUDA events where there is a GPU; call the result afterwards."""
    if not torch.cuda.is_available():
        began = time.perf_counter()
        ended = [began]
        yield lambda: ended[0] - began
        ended[0] = time.perf_counter()
        return
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    start.record()
    yield lambda: start.elapsed_time(end) / 1000
    end.record()
    end.synchronize()


def describe_machine() -> dict[str, str]:
    """Name the machine and the versions that the figures belong to."""
    on_gpu = torch.cuda.is_available()
    machine = torch.cuda.get_device_name() if on_gpu else f"CPU, {os.cpu_count()} cores"
    names = ("torch", "diffusers", "peft", "transformers", "accelerate")
    return {
        "machine": machine,
        "python": platform.python_version(),
        "cuda": str(torch.version.cuda),
        "cudnn": str(torch.backends.cudnn.version()) if on_gpu else "none",
        **{name: find_version(name) for name in names},
    }


def find_version(package: str) -> str:
    """Return an installed package's version."""
    try:
        return version(package)
    except PackageNotFoundError:
        return "not installed"


def find_commit() -> str:
    """Return the commit that urae runs from, marked if files differ from it.

    The environment variable URAE_BENCHMARK_COMMIT names it where there is no checkout to ask.
    """
    from urae.train.record import find_commit as find_of_clone

    return os.environ.get("URAE_BENCHMARK_COMMIT") or find_of_clone() or "unknown"


def describe_run() -> str:
    """Write machine, versions and commit on a line."""
    versions = ", ".join(f"{key} {value}" for key, value in describe_machine().items())
    return f"{versions}; commit {find_commit()}"
