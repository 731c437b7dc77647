"""Several processes on one job, each with a GPU of its own, as torchrun starts them."""

import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import TypeVar

import torch
import torch.distributed as dist
from torch.distributed import DistError, ProcessGroup

from urae.backbones.devices import pick_device

T = TypeVar("T")

_NAMES = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE")  # as torchrun sets them
# of any wait for one another, which can be as long as a picture takes: whoever started the
# processes ends all of them when one is lost
_TIMEOUT = timedelta(days=1)
_LOST = (
    "Connection closed by peer",
    "Connection reset by peer",
    "Broken pipe",
    "Timed out waiting",
)


@dataclass(frozen=True)
class Ranks:
    """The processes of a job, and which of them this is."""

    device: torch.device
    """Of this process."""
    rank: int = 0
    count: int = 1

    def agree(self, value: T) -> T:
        """Return rank 0's value, which pickles."""
        if self.count == 1:
            return value
        values = [value]
        dist.broadcast_object_list(values, src=0, device=self.device)
        return values[0]

    def least(self, *values: int) -> list[int]:
        """Return the least of each value over all ranks."""
        return list(values) if self.count == 1 else find_least(values, self.device)

    def wait(self) -> None:
        """Wait until all are here."""
        self.least(0)


@contextmanager
def join_ranks(device: torch.device) -> Iterator[Ranks]:
    """Join the processes that torchrun, or a launcher like it, has started; else be alone.

    They talk through NCCL on GPUs and gloo on CPUs. A default process group that is there already
    is used and left.

    Args:
        device: Of a process that is alone; of several on a host each takes a GPU of its own.

    Raises:
        ValueError: If there are more processes on this host than GPUs.
    """
    if any(name not in os.environ for name in _NAMES) or os.environ["WORLD_SIZE"] == "1":
        yield Ranks(device)
        return
    if device.type == "cuda":
        check_gpus(int(os.environ["LOCAL_WORLD_SIZE"]))
        device = torch.device("cuda", int(os.environ["LOCAL_RANK"]))
        torch.cuda.set_device(device)
    else:
        device = torch.device("cpu")
    own = not dist.is_initialized()
    if own:
        on_gpu = device.type == "cuda"
        dist.init_process_group(
            "nccl" if on_gpu else "gloo", timeout=_TIMEOUT, device_id=device if on_gpu else None
        )
    yield Ranks(device, dist.get_rank(), dist.get_world_size())
    if own:  # after an error the others may be gone, and the process ends anyway
        dist.destroy_process_group()


def pick_own_device() -> torch.device:
    """Return the device of a process that works alone: its own of this host's GPUs.

    Of processes that torchrun has started each takes the next GPU, beginning anew where there are
    fewer; any other takes the first that it sees.
    """
    device = pick_device()
    if device.type == "cuda" and "LOCAL_RANK" in os.environ:
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]) % torch.cuda.device_count())
    return device


def check_gpus(wanted: int) -> None:
    """Check that this host has as many GPUs.

    Raises:
        ValueError: If it has fewer.
    """
    found = torch.cuda.device_count()
    if wanted > found:
        raise ValueError(
            f"{wanted} GPUs were requested, but this host has {found}; give --gpus "
            f"{max(found, 1)}, or use several hosts with torchrun"
        )


def find_least(
    values: Sequence[int], device: torch.device, group: ProcessGroup | None = None
) -> list[int]:
    """Return the least of each value over all ranks, which so wait for one another.

    Args:
        values: As many on every rank.
        device: Of this rank.
        group: The ranks; None: all.
    """
    least = torch.tensor(values, device=device)
    dist.all_reduce(least, dist.ReduceOp.MIN, group=group)
    found: list[int] = least.tolist()
    return found


@contextmanager
def explain_lost_rank(remedy: str) -> Iterator[None]:
    """Turn what a collective says of a lost process into an error that says what to do.

    Args:
        remedy: What to do once the reason is known, for "then ...".

    Raises:
        ConnectionError: In place of torch's own error.
    """
    try:
        yield
    except RuntimeError as error:
        if not isinstance(error, DistError) and not any(text in str(error) for text in _LOST):
            raise
        reason = str(error).splitlines()[0].split("] ", 1)[-1].split(". ")[0]
        raise ConnectionError(
            f"another process of this run has ended or cannot be reached ({reason}); see its last "
            f"output for the cause, then {remedy}"
        ) from error
