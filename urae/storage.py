"""Files read whole and checked, written whole or not at all."""

import errno
import hashlib
import json
import os
import secrets
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, BinaryIO

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
    with _open_whole(path) as file:
        tensors = {key: file.get_tensor(key) for key in file.keys()}
        metadata = dict(file.metadata() or {})
    for key, tensor in tensors.items():
        values = tensor.float() if tensor.dtype.itemsize == 1 else tensor  # fp8 has no isfinite
        if not torch.isfinite(values).all():
            raise ValueError(
                f"{path}: {key} holds NaN or infinity; the file is unusable; download or create "
                "it again"
            )
    return tensors, metadata


def read_keys(path: Path) -> list[str]:
    """Read the names of a safetensors file's tensors, from its header alone.

    Raises:
        ValueError: If the file is corrupt or truncated.
    """
    with _open_whole(path) as file:
        return list(file.keys())


def read_shapes(path: Path) -> dict[str, tuple[int, ...]]:
    """Read the shapes of a safetensors file's tensors, from its header alone.

    Raises:
        ValueError: If the file is corrupt or truncated.
    """
    with _open_whole(path) as file:
        return {key: tuple(file.get_slice(key).get_shape()) for key in file.keys()}


@contextmanager
def _open_whole(path: Path) -> Iterator[Any]:
    try:
        with safe_open(path, framework="pt") as file:
            yield file
    except SafetensorError as error:
        raise ValueError(
            f"{path} is not a complete safetensors file ({error}); copy or download it again"
        ) from error


def digest_file(path: Path) -> str:
    """Return the SHA-256 of a file, 64 hex digits."""
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def check_folder(folder: Path) -> None:
    """Refuse a place for files that is no folder, nor can become one.

    Raises:
        FileExistsError: If a file or a broken link is in its place, or above it.
        PermissionError: If it cannot be written or made.
        OSError: If its name is too long.
    """
    with suppress(FileNotFoundError, NotADirectoryError, PermissionError):
        folder.lstat()  # raises for a name that is too long
    place = next(each for each in (folder, *folder.parents) if os.path.lexists(each))
    if not place.is_dir():
        what = "a file" if place.exists() else "a link to nothing"
        raise FileExistsError(
            f"output {folder} cannot be a folder: {place} is {what}; choose another with --output"
        )
    if not os.access(place, os.W_OK | os.X_OK):
        raise PermissionError(
            f"output {folder} cannot be written to: no permission in {place}; choose another "
            "folder with --output"
        )


def write_tensors(
    path: Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str] | None = None
) -> None:
    """Write a safetensors file that is there whole or not at all.

    Tensors may share memory, as the layers that kohya joins in one matrix share a factor.

    Raises:
        OSError: If it cannot be written, no space being left for one.
    """
    cpu: dict[str, Tensor] = {}
    written: set[int] = set()
    for key, tensor in tensors.items():
        cpu[key] = tensor.detach().cpu().contiguous()
        if (storage := cpu[key].untyped_storage().data_ptr()) in written:
            cpu[key] = cpu[key].clone()
        written.add(storage)
    path.parent.mkdir(parents=True, exist_ok=True)
    write_atomic(path, serialize(cpu, {"format": "pt", **(metadata or {})}))


def serialize(tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> bytes:
    """Return the bytes of a safetensors file: the same for the same content.

    The library alone writes metadata in another order in each process.
    """
    data: bytes = save(dict(tensors), dict(metadata))
    end = 8 + int.from_bytes(data[:8], "little")
    header = json.loads(data[8:end])
    header["__metadata__"] = dict(sorted(header["__metadata__"].items()))
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text + data[end:]


def write_atomic(path: Path, data: bytes) -> None:
    """Write a file whole or not at all, as `open_atomic` does."""
    with open_atomic(path, len(data)) as stream:
        stream.write(data)


@contextmanager
def open_atomic(path: Path, num_bytes: int) -> Iterator[BinaryIO]:
    """Open a file beside its place to write; at the end, flush it to the disk and move it there.

    The temporary name is fixed, so the next writer overwrites what a killed one left; only one
    process at a time may write a path.

    Args:
        path: The file's place.
        num_bytes: About how many it will have, for the error.

    Raises:
        OSError: If it cannot be written, no space being left for one; its place is as before.
    """
    temporary = path.with_name(f".{path.name}.tmp")
    try:
        with temporary.open("wb") as stream:
            yield stream
            stream.flush()
            os.fsync(stream.fileno())
        temporary.replace(path)
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT):
            raise
        raise OSError(
            error.errno,
            f"no space left for {num_bytes / 2**20:.1f} MiB; files written earlier are complete: "
            "free some space and continue (with --resume if the command has it)",
            str(path),
        ) from error
    finally:
        temporary.unlink(missing_ok=True)


def write_shared(path: Path, data: bytes) -> None:
    """Write a file of a cache, whole or not at all, where other processes may write the same.

    It is not flushed to the disk: what a crash takes from a cache is made again.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f"{path.stem}.{secrets.token_hex(8)}.tmp")
    try:
        with temporary.open("xb") as file:  # readable for whom the umask lets read
            file.write(data)
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)
