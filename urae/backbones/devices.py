"""The device that this machine computes on, in which precision, and what records call them."""

import torch


def pick_device() -> torch.device:
    """Return the best device of this machine: CUDA, Apple's GPU, else the CPU."""
    if torch.cuda.is_available():
        return torch.device("cuda")
    return torch.device("mps" if torch.backends.mps.is_available() else "cpu")


def pick_dtype(device: torch.device) -> torch.dtype:
    """Return the dtype that weights are loaded in: bfloat16 on a GPU, float32 on the CPU."""
    return torch.float32 if device.type == "cpu" else torch.bfloat16


def name_device(device: torch.device) -> str:
    """Spell a device for records: `NVIDIA H200`, `cpu`."""
    return torch.cuda.get_device_name(device) if device.type == "cuda" else device.type


def name_dtype(dtype: torch.dtype) -> str:
    """Spell a dtype for records: `float32`."""
    return str(dtype).removeprefix("torch.")


def check_gpu_is_known(gpu_bytes: int | None, device: torch.device) -> None:
    """Refuse to plan for the GPU of a machine that has none.

    Args:
        gpu_bytes: Memory of the GPU to plan for; None is this machine's.
        device: Of this machine.

    Raises:
        ValueError: If it is this machine's and there is none.
    """
    if gpu_bytes is None and device.type != "cuda":
        raise ValueError(
            "this machine has no CUDA device; give the memory of the GPU to plan for, as in "
            "--gpu 24GiB"
        )
