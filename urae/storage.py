"""Files read whole and checked, written whole or not at all."""

import errno
import os
from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor


def read_tensors(path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Read a safetensors file whole, and refuse it if any value is not finite.

    Returns:
        Its tensors on the CPU, and its metadata.

    Raises:
        ValueError: If the file is corrupt, truncated or holds NaN or infinity.
    """
    try:
        with safe_open(path, framework="pt") as file:
            tensors = {key: file.get_tensor(key) for key in file.keys()}
            metadata = dict(file.metadata() or {})
    except SafetensorError as error:
        raise ValueError(
            f"{path} is not a whole safetensors file ({error}); copy or download it again"
        ) from error
    for key, tensor in tensors.items():
        values = tensor.float() if tensor.dtype.itemsize == 1 else tensor  # fp8 has no isfinite
        if not torch.isfinite(values).all():
            raise ValueError(f"{path}: {key} holds NaN or infinity; the file is of no use")
    return tensors, metadata


def write_tensors(
    path: Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str] | None = None
) -> None:
    """Write a safetensors file that is there whole or not at all.

    Raises:
        OSError: If it cannot be written, no space being left for one.
    """
    cpu = {key: tensor.detach().cpu().contiguous() for key, tensor in tensors.items()}
    path.parent.mkdir(parents=True, exist_ok=True)
    write_atomic(path, save(cpu, {"format": "pt", **(metadata or {})}))


def write_atomic(path: Path, data: bytes) -> None:
    """Write a file beside its place, flush it to the disk, then move it there.

    The temporary name is fixed, so the next writer overwrites what a killed one left; only one
    process at a time may write a path.
    """
    temporary = path.with_name(f".{path.name}.tmp")
    try:
        with temporary.open("wb") as stream:
            stream.write(data)
            stream.flush()
            os.fsync(stream.fileno())
        temporary.replace(path)
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT):
            raise
        raise OSError(
            error.errno,
            f"no space left for {len(data) / 2**20:.1f} MiB; what was written before is whole: "
            "free some space and run again to go on",
            str(path),
        ) from error
    finally:
        temporary.unlink(missing_ok=True)
