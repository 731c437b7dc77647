"""Checkpoints: a folder that is there whole or not at all, and resumes bitwise.

`checkpoint-000200/` holds the adapter as a loadable LoRA file, the optimizer's state, both as
safetensors, and the run's record. Noise and order follow from the seed and the step alone, so
there is no random state to save.
"""

import json
import re
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from urae.adapters.files import LORA_FILE_NAME, read_adapter
from urae.storage import read_tensors, write_atomic, write_tensors

OPTIMIZER_FILE = "optimizer.safetensors"
STATE_FILE = "state.json"
PARTIAL_PATTERN = ".checkpoint-*.partial"
_NAME = re.compile(r"^checkpoint-(\d+)$")


@dataclass(frozen=True)
class Checkpoint:
    """A saved step of a run."""

    path: Path
    step: int

    @property
    def adapter_path(self) -> Path:
        return self.path / LORA_FILE_NAME

    def discard(self) -> None:
        """Delete the checkpoint; a kill on the way leaves what does not count as one."""
        (self.path / STATE_FILE).unlink()
        shutil.rmtree(self.path)


def find_checkpoints(output_dir: Path) -> list[Checkpoint]:
    """List a run's whole checkpoints, oldest first."""
    found = []
    for path in output_dir.glob("checkpoint-*") if output_dir.is_dir() else []:
        match = _NAME.match(path.name)
        if match and (path / STATE_FILE).is_file():
            found.append(Checkpoint(path, int(match[1])))
    return sorted(found, key=lambda checkpoint: checkpoint.step)


def save_checkpoint(
    output_dir: Path,
    step: int,
    *,
    write_adapter: Callable[[Path], None],
    optimizer: torch.optim.Optimizer,
    record: dict[str, Any],
) -> Checkpoint:
    """Write a checkpoint beside its place, then move it there; one that is there stays.

    Args:
        output_dir: The run's folder.
        step: Optimizer steps done.
        write_adapter: Called with the path of the adapter file to write.
        optimizer: Its state is saved with full precision.
        record: The run's config and what else must fit on resuming; JSON.

    Raises:
        OSError: If the disk is full or not writable; earlier checkpoints stay as they are.
    """
    final = output_dir / f"checkpoint-{step:06d}"
    partial = output_dir / PARTIAL_PATTERN.replace("*", f"{step:06d}")
    if (final / STATE_FILE).is_file():
        return Checkpoint(final, step)
    shutil.rmtree(partial, ignore_errors=True)
    try:
        partial.mkdir(parents=True)
        write_adapter(partial / LORA_FILE_NAME)
        tensors, plain = _flatten(optimizer.state_dict())
        write_tensors(partial / OPTIMIZER_FILE, tensors, {"urae.optimizer": json.dumps(plain)})
        state = json.dumps({"step": step, **record}, indent=1)
        write_atomic(partial / STATE_FILE, state.encode())
        shutil.rmtree(final, ignore_errors=True)  # without its state file it is none
        partial.rename(final)
    except OSError as error:
        shutil.rmtree(partial, ignore_errors=True)
        raise OSError(
            error.errno,
            f"checkpoint of step {step} could not be written ({error.strerror}); earlier "
            "checkpoints are whole: free some space, then go on with --resume",
            str(final),
        ) from error
    return Checkpoint(final, step)


def load_record(checkpoint: Checkpoint) -> dict[str, Any]:
    """Read the record that was saved with a checkpoint.

    Raises:
        ValueError: If it is damaged.
    """
    try:
        record: dict[str, Any] = json.loads((checkpoint.path / STATE_FILE).read_text())
    except ValueError as error:
        raise ValueError(
            f"checkpoint {checkpoint.path} is damaged ({error}); delete that folder to resume from "
            "the one before"
        ) from error
    return record


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
            "names; resume with those it began with"
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
        index, name = key.split(".", 1)
        state.setdefault(int(index), {})[name] = tensor
    optimizer.load_state_dict({"state": state, "param_groups": plain["param_groups"]})


def _flatten(state_dict: dict[str, Any]) -> tuple[dict[str, Tensor], dict[str, Any]]:
    tensors: dict[str, Tensor] = {}
    plain: dict[str, dict[str, Any]] = {}
    for index, values in state_dict["state"].items():
        plain[str(index)] = {}
        for name, value in values.items():
            if isinstance(value, Tensor):
                tensors[f"{index}.{name}"] = value
            else:
                plain[str(index)][name] = value
    groups = [
        {name: _as_number(value) for name, value in group.items()}
        for group in state_dict["param_groups"]
    ]
    return tensors, {"state": plain, "param_groups": groups}


def _as_number(value: Any) -> Any:
    return value.item() if isinstance(value, Tensor) else value
