"""What memory is free, what the VAE may take of it, and what to say when it runs out."""

import gc
import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import psutil
import torch

USABLE = 0.9
"""Of what is free, for what allocators lose between blocks."""
_GROUPS, _OWN_GROUP = Path("/sys/fs/cgroup"), Path("/proc/self/cgroup")
_VAE_BYTES, _VAE_PIXELS = 7 * 2**30, 4096**2
_SHORTAGES = (  # of what torch raises as a plain RuntimeError
    "out of memory",  # cudaHostAlloc too, which pins
    "CUDNN_STATUS_ALLOC_FAILED",
    "CUBLAS_STATUS_ALLOC_FAILED",
    "DefaultCPUAllocator",
)


def free_bytes(device: torch.device) -> int:
    """Return the memory that this process can have on a device, the host's for the CPU.

    A cap (`torch.cuda.set_per_process_memory_fraction`) counts.
    """
    if device.type != "cuda":
        return free_host_bytes()
    if device == torch.device("cuda"):  # which names none; the cap wants a number
        device = torch.device("cuda", torch.cuda.current_device())
    free, total = torch.cuda.mem_get_info(device)
    allocated = torch.cuda.memory_allocated(device)
    unused = torch.cuda.memory_reserved(device) - allocated
    cap = torch.cuda.get_per_process_memory_fraction(device) * total
    return min(free + unused, int(cap) - allocated)


def free_host_bytes() -> int:
    """Return the host's free memory, or the container's where it is less.

    Where torchrun has started several processes it is their share.
    """
    free = [int(psutil.virtual_memory().available), *_list_container_bytes()]
    return min(free) // int(os.environ.get("LOCAL_WORLD_SIZE", "1"))


def _list_container_bytes() -> Iterator[int]:
    """List what is free below each limit of this process's control groups (Linux, version 2).

    Files in the page cache count as free where the kernel may drop them: weights that were read.
    """
    try:
        lines = _OWN_GROUP.read_text().splitlines()
    except OSError:  # no Linux
        return
    place = next((line[3:] for line in lines if line.startswith("0::")), "")
    group = _GROUPS / place.lstrip("/")
    for folder in (group, *group.parents):
        try:
            limit = (folder / "memory.max").read_text().strip()
            used = int((folder / "memory.current").read_text())
            stat = (folder / "memory.stat").read_text()
        except OSError:  # the root has no limit; version 1 has other files
            continue
        if limit != "max":
            counts = dict(line.split() for line in stat.splitlines())
            files = sum(int(counts.get(f"{kind}_file", 0)) for kind in ("inactive", "active"))
            yield max(0, int(limit) - used + files)


def vae_bytes(device: torch.device, free: int, pixels: int) -> int:
    """Return what the VAE may take beside its weights: of a GPU no more than pays.

    Decoding 4096 x 4096 whole takes 38 GiB on a GPU; within 7 it is 1.4 times the work, in less
    time, and within 6 it is 2.4 times (docs/performance.md). More pixels may take more
    in proportion, as the steps before did: 8192 x 8192 within 7 GiB is 3.8 times the work.

    Args:
        device: Where it runs.
        free: Bytes that are free there.
        pixels: Of all pictures of the batch.
    """
    usable = int(USABLE * free)
    if device.type != "cuda":
        return usable
    return min(usable, max(_VAE_BYTES, _VAE_BYTES * pixels // _VAE_PIXELS))


def release_memory(device: torch.device) -> None:
    """Give back what nothing refers to any more."""
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()


def is_out_of_memory(error: BaseException) -> bool:
    """Tell whether an error says that memory, a device's or the host's, has run out."""
    if isinstance(error, (torch.OutOfMemoryError, MemoryError)):
        return True
    return isinstance(error, RuntimeError) and any(text in str(error) for text in _SHORTAGES)


def name_shortage(error: BaseException) -> str:
    """Return the part of an error's text that says what memory was too short for."""
    parts = re.split(r"; |\. |\n", str(error) or type(error).__name__)
    return next((part for part in parts if any(text in part for text in _SHORTAGES)), parts[0])


@contextmanager
def explain_memory(what: str, remedy: str) -> Iterator[None]:
    """Turn running out of memory, a GPU's or the host's, into an error that says what to do.

    Args:
        what: What needs the memory, for "does not suffice for ...".
        remedy: What to do, for "try ...".

    Raises:
        MemoryError: In place of torch's own error.
    """
    try:
        yield
    except RuntimeError as error:
        if not is_out_of_memory(error):
            raise
        shortage = name_shortage(error)
        raise MemoryError(f"not enough memory for {what} ({shortage}); try {remedy}") from error
