"""Checkpoints: a folder that is there whole or not at all, and resumes bitwise.

`checkpoint-000200/` holds the adapter as a loadable LoRA file, the optimizer's state, both as
safetensors, and the run's record with the SHA-256 of each file. Noise and order follow from the
seed and the number of batches alone, so there is no random state to save.
"""

import errno
import hashlib
import json
import logging
import math
import os
import re
import shutil
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from threading import Event
from typing import Any

import torch
from torch import Tensor
from torch import distributed as dist

from urae.adapters.files import read_adapter
from urae.adapters.sources import LORA_FILE_NAME
from urae.storage import digest_file, read_tensors, write_atomic, write_tensors

logger = logging.getLogger(__name__)

RETRY_SECONDS = 30.0
"""How long after it was found full a disk is tried again."""
MAX_PAUSE_SECONDS = 300.0
"""For how long if the run has several processes: half of what the others wait for this one."""

OPTIMIZER_FILE = "optimizer.safetensors"
PLAIN_FILE = "plain_lora_weights.safetensors"
STATE_FILE = "state.json"
_PARTIAL = ".{}.partial"
_NAME = re.compile(r"^checkpoint-(\d+)$")


@dataclass(frozen=True)
class Checkpoint:
    """A saved step of a run."""

    path: Path
    step: int

    @property
    def adapter_path(self) -> Path:
        """The adapter to use: averaged, where the run averages."""
        return self.path / LORA_FILE_NAME

    @property
    def trained_path(self) -> Path:
        """The weights that training goes on from."""
        plain = self.path / PLAIN_FILE
        return plain if plain.exists() else self.adapter_path

    def discard(self) -> None:
        """Delete the checkpoint; a kill on the way leaves what does not count as one."""
        partial = self.path.with_name(_PARTIAL.format(self.path.name))
        shutil.rmtree(partial, ignore_errors=True)
        try:
            self.path.rename(partial)
        except OSError as error:
            _warn_of_remains(self.path, error)
        else:
            _delete(partial)

    def set_aside(self) -> Path:
        """Rename a damaged checkpoint, so that it is kept but counts no more."""
        path = self.path.with_name(f"damaged-{self.path.name}")
        number = 2
        while path.exists():
            path = self.path.with_name(f"damaged-{self.path.name}-{number}")
            number += 1
        return self.path.rename(path)


def checkpoint_path(output_dir: Path, step: int) -> Path:
    """Say where the checkpoint of a step lies."""
    return output_dir / f"checkpoint-{step:06d}"


def find_checkpoints(output_dir: Path) -> list[Checkpoint]:
    """List a run's checkpoints, oldest first; whether they are whole is not looked at."""
    found = []
    for path in output_dir.glob("checkpoint-*") if output_dir.is_dir() else []:
        if (match := _NAME.match(path.name)) and path.is_dir():
            found.append(Checkpoint(path, int(match[1])))
    return sorted(found, key=lambda checkpoint: checkpoint.step)


def clear_partial(output_dir: Path) -> None:
    """Delete what a killed run left of a checkpoint that it was writing or deleting."""
    for path in output_dir.glob(_PARTIAL.format("checkpoint-*")):
        _delete(path)


def _delete(folder: Path) -> None:
    """Delete a folder, or say what is left: a run does not end for what it needs no more."""
    try:
        shutil.rmtree(folder)
    except OSError as error:  # a network's file system keeps files that someone has open
        _warn_of_remains(folder, error)


def _warn_of_remains(folder: Path, error: OSError) -> None:
    logger.warning(
        f"{folder} could not be deleted ({error.strerror or error}); the run goes on, delete it "
        "by hand"
    )


def save_checkpoint(
    output_dir: Path,
    step: int,
    *,
    write_weights: Callable[[Path], None],
    optimizer: torch.optim.Optimizer,
    record: dict[str, Any],
    keep: int,
    best: int | None = None,
    stop: Event | None = None,
) -> Checkpoint:
    """Write a checkpoint beside its place, move it there, then delete the oldest beyond `keep`.

    One that is there stays as it is.

    Args:
        output_dir: The run's folder.
        step: Optimizer steps done.
        write_weights: Called with the folder to write the adapter's files into.
        optimizer: Its state is saved with full precision.
        record: The run's config and what else must fit on resuming; JSON.
        keep: Checkpoints to keep, this one included.
        best: Step of one that is kept beyond them.
        stop: While the disk is full the run pauses, until this is set. None: it does not pause.

    Raises:
        FloatingPointError: If weights or optimizer hold NaN or infinity; earlier checkpoints stay.
        OSError: If the disk is full or not writable; earlier checkpoints stay as they are.
    """
    final = checkpoint_path(output_dir, step)
    partial = output_dir / _PARTIAL.format(final.name)
    if final.is_dir():
        return Checkpoint(final, step)

    def fill() -> None:
        partial.mkdir(parents=True)
        write_weights(partial)
        tensors, plain = _flatten(optimizer.state_dict())
        write_tensors(partial / OPTIMIZER_FILE, tensors, {"urae.optimizer": json.dumps(plain)})
        _check_finite(partial, output_dir, step)
        files = {path.name: digest_file(path) for path in sorted(partial.iterdir())}
        state = {"step": step, "files": files, **record}
        state["sha256"] = _digest_record(state)
        write_atomic(partial / STATE_FILE, json.dumps(state, indent=1).encode())
        _sync_folder(partial)

    def write() -> None:
        shutil.rmtree(partial, ignore_errors=True)
        try:
            if not final.is_dir():  # as it is after a try that failed in the very last flush
                fill()
                partial.rename(final)
            _sync_folder(output_dir)
        except OSError as error:
            reason = os.strerror(error.errno) if error.errno else str(error)
            raise OSError(
                error.errno,
                f"checkpoint of step {step} could not be written ({reason}); {_remedy(output_dir)}",
                str(final),
            ) from error
        finally:
            shutil.rmtree(partial, ignore_errors=True)

    write_once_there_is_room(write, f"checkpoint of step {step}", output_dir, stop)
    for checkpoint in find_checkpoints(output_dir)[:-keep]:
        if checkpoint.step != best:
            checkpoint.discard()
    return Checkpoint(final, step)


def write_once_there_is_room(
    write: Callable[[], None], what: str, output_dir: Path, stop: Event | None
) -> None:
    """Try to write, on a full disk again and again; say so once.

    Args:
        write: Leaves nothing behind where it fails.
        what: It writes, for the warning.
        output_dir: Where.
        stop: Ends the pause; None: there is none.

    Raises:
        OSError: If it fails otherwise, or the pause ends.
    """
    several = dist.is_initialized() and dist.get_world_size() > 1
    deadline = time.monotonic() + (MAX_PAUSE_SECONDS if several else math.inf)
    paused = False
    while True:
        try:
            return write()
        except OSError as error:
            is_full = error.errno in (errno.ENOSPC, errno.EDQUOT)
            if not is_full or stop is None or time.monotonic() > deadline:
                raise
            if not (paused or stop.is_set()):
                limit = f", within {MAX_PAUSE_SECONDS / 60:g} minutes" if several else ""
                logger.warning(
                    f"{what}: no space left in {output_dir}; the run is paused: free some{limit} "
                    "and it continues by itself, or stop it with Ctrl-C"
                )
            paused = True
            _sleep(RETRY_SECONDS, stop)
            if stop.is_set():
                raise


def _sleep(seconds: float, stop: Event) -> None:
    """Wait; not by `stop.wait`, which a signal that sets it at the wrong moment would block."""
    end = time.monotonic() + seconds
    while not stop.is_set() and (left := end - time.monotonic()) > 0:
        time.sleep(min(left, 0.5))


def _remedy(output_dir: Path) -> str:
    if before := find_checkpoints(output_dir):
        return (
            f"the one of step {before[-1].step} is complete: free some space, then continue with "
            "--resume"
        )
    return "there is none before it: free some space, then start again"


def _check_finite(folder: Path, output_dir: Path, step: int) -> None:
    name = _find_not_finite(folder)
    if name is None:
        return
    whole = (each for each in reversed(find_checkpoints(output_dir)) if find_damage(each) is None)
    remedy = "there is none before it: start again with a lower --optimizer.lr"
    if (good := next(whole, None)) is not None:
        remedy = (
            f"the one of step {good.step} is the last good one: start another --output from it "
            f"with a lower --optimizer.lr (--adapter.init {good.path}), or use --resume if the "
            "machine was at fault"
        )
    raise FloatingPointError(
        f"checkpoint of step {step} would hold NaN or infinity ({name}) and is not saved; {remedy}"
    )


def _find_not_finite(folder: Path) -> str | None:
    """Name the first file in a folder that holds NaN or infinity."""
    for path in sorted(folder.glob("*.safetensors")):
        try:
            read_tensors(path)
        except ValueError:
            return path.name
    return None


def load_record(checkpoint: Checkpoint) -> dict[str, Any]:
    """Read the record that was saved with a checkpoint.

    Raises:
        ValueError: If it is damaged.
        OSError: If it cannot be read.
    """
    record: dict[str, Any] = json.loads((checkpoint.path / STATE_FILE).read_text(encoding="utf-8"))
    if not isinstance(record, dict) or record.pop("sha256", None) != _digest_record(record):
        raise ValueError("checksum differs")
    return record


def find_damage(checkpoint: Checkpoint) -> str | None:
    """Compare each file of a checkpoint with its checksum, and look for NaN and infinity.

    Returns:
        The first file that is not as it was written, or of no use, and why; None if all are good.
    """
    try:
        record = load_record(checkpoint)
    except (OSError, ValueError) as error:
        reason = error.strerror if isinstance(error, OSError) else error
        return f"{STATE_FILE}: {reason}"
    if record["step"] != checkpoint.step:
        return f"{STATE_FILE}: it is of step {record['step']}"
    for name, wanted in record["files"].items():
        try:
            found = digest_file(checkpoint.path / name)
        except OSError as error:
            return f"{name}: {error.strerror}"
        if found != wanted:
            return f"{name}: checksum differs"
    if (useless := _find_not_finite(checkpoint.path)) is not None:
        return f"{useless}: it holds NaN or infinity"
    return None


def check_same_origin(checkpoint: Checkpoint | None, origin_hash: str) -> None:
    """Refuse to resume over another base, or over other adapters, than a checkpoint began with.

    Raises:
        ValueError: If their numbers differ.
    """
    if checkpoint is None:
        return
    if read_adapter(checkpoint.adapter_path).origin_hash != origin_hash:
        raise ValueError(
            f"{checkpoint.path} was made on another base or over other adapters than the run now "
            "names; resume with the original ones"
        )


def load_optimizer(checkpoint: Checkpoint, optimizer: torch.optim.Optimizer) -> None:
    """Give an optimizer the state it had.

    Raises:
        ValueError: If the file is damaged or for another set of parameters.
    """
    tensors, metadata = read_tensors(checkpoint.path / OPTIMIZER_FILE)
    plain = json.loads(metadata["urae.optimizer"])
    state: dict[int, dict[str, Any]] = {int(key): values for key, values in plain["state"].items()}
    for key, tensor in tensors.items():
        index, *sections, name = key.split(".")
        values = state.setdefault(int(index), {})
        for section in sections:
            values = values.setdefault(section, {})
        values[name] = tensor
    optimizer.load_state_dict({"state": state, "param_groups": plain["param_groups"]})


def _flatten(state_dict: dict[str, Any]) -> tuple[dict[str, Tensor], dict[str, Any]]:
    tensors: dict[str, Tensor] = {}
    plain = {
        str(index): _split_off_tensors(values, str(index), tensors)
        for index, values in state_dict["state"].items()
    }
    groups = [
        {name: _as_number(value) for name, value in group.items()}
        for group in state_dict["param_groups"]
    ]
    return tensors, {"state": plain, "param_groups": groups}


def _split_off_tensors(
    values: dict[str, Any], prefix: str, tensors: dict[str, Tensor]
) -> dict[str, Any]:
    """Put the tensors of nested values among `tensors` by dotted names, and return the rest."""
    plain = {}
    for name, value in values.items():
        if isinstance(value, Tensor):
            tensors[f"{prefix}.{name}"] = value.clone()  # bitsandbytes' tables are shared
        elif isinstance(value, dict):
            plain[name] = _split_off_tensors(value, f"{prefix}.{name}", tensors)
        else:
            plain[name] = value
    return plain


def _as_number(value: Any) -> Any:
    return value.item() if isinstance(value, Tensor) else value


def _digest_record(record: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(record, sort_keys=True).encode()).hexdigest()


def _sync_folder(path: Path) -> None:
    """Flush the names in a folder to the disk, before anything is deleted that they replace."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError as error:
        if error.errno != errno.EINVAL:  # some network file systems have no such thing
            raise
    finally:
        os.close(descriptor)
