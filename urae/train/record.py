"""`run.toml`: everything that a run was made from, and a recipe that makes it again."""

import json
import logging
import os
import platform
import re
import subprocess
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from datetime import UTC, datetime
from functools import cache
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator

import urae
from urae.backbones.devices import name_device, name_dtype, pick_dtype
from urae.backbones.flux import fingerprint_component
from urae.config import describe_fields, read_toml
from urae.generate.quantize import LIBRARIES
from urae.resolution import ResolutionPolicy
from urae.storage import write_atomic
from urae.train.config import TrainConfig
from urae.train.inputs import Inputs
from urae.train.optimizer import PACKAGES

logger = logging.getLogger(__name__)

RUN_FILE = "run.toml"
RECORD_SECTION = "record"

_BARE_KEY = re.compile(r"[A-Za-z0-9_-]+")
_OPTIONS = ("data_dir", "output_dir", "resume", "overwrite")
_PACKAGES = ("torch", "diffusers", "transformers", "peft", "accelerate", "safetensors", "numpy")
_HEADER = """\
# A recipe: `urae train` reads it like any other and ignores [record].
# Fields that are not here are absent (none).
"""
_RECORD_COMMENT = "What the run was made from; no part of the recipe."


def write_run(
    config: TrainConfig,
    inputs: Inputs,
    policy: ResolutionPolicy,
    accelerator: Accelerator,
    chosen: Mapping[str, str | bool],
) -> None:
    """Write `run.toml` into the run's folder, whole or not at all.

    A run that goes on keeps what is there of its earlier sessions.

    Args:
        config: Of the run.
        inputs: What it reads.
        policy: The one in effect, the recipe's or the base's own.
        accelerator: Knows the devices.
        chosen: What was decided where the recipe leaves it to the machine.
    """
    recipe = asdict(config)
    places = tuple(
        each.dir.resolve() if isinstance(each.dir, Path) else each.dir for each in config.sources
    )
    options = {name: recipe.pop(name) for name in _OPTIONS}
    session = {
        "started_at": datetime.now(UTC).isoformat(timespec="seconds"),
        "resumed_from_step": inputs.start.step if inputs.start.checkpoint else None,
        "chosen": chosen,
        "devices": {
            "num_ranks": accelerator.num_processes,
            "device": name_device(accelerator.device),
            "dtype": name_dtype(pick_dtype(accelerator.device)),
            "cuda": torch.version.cuda,
            # its attention has had faults
            "cudnn": torch.backends.cudnn.version(),  # type: ignore[no-untyped-call]
        },
        "versions": {
            "urae": urae.__version__,
            "commit": find_commit(),
            "python": platform.python_version(),
            **{name: _find_version(name) for name in _packages(config, chosen["memory"])},
        },
    }
    path = config.output_dir / RUN_FILE
    earlier = _read_sessions(path, list(session)) if inputs.start.checkpoint else []
    record = {
        **options,
        "base": {
            "path": inputs.model_path.resolve(),
            "revision": fingerprint_component(inputs.model_path, "transformer"),
        },
        "data": {
            "path": places if config.data else places[0],
            "hash": inputs.data_hash,
            "num_train": len(inputs.samples),
            "num_validation": len(inputs.held_out),
        },
        "policy": asdict(policy),
        **session,
        "earlier": earlier or None,
    }
    comments = {name: text for name, _, text in describe_fields(TrainConfig)}
    comments[RECORD_SECTION] = _RECORD_COMMENT
    text = _HEADER + format_toml({**recipe, RECORD_SECTION: record}, comments)
    write_atomic(path, text.encode(errors="replace"))


def _read_sessions(path: Path, fields: Sequence[str]) -> list[dict[str, Any]]:
    """Read what `run.toml` says of the sessions that a run has had, the first ones first."""
    if not path.is_file():
        return []
    try:
        record = read_toml(path)[RECORD_SECTION]
        return [
            *record.get("earlier", []),
            {name: record[name] for name in fields if name in record},
        ]
    except (KeyError, ValueError) as error:
        logger.warning("%s does not say what the run's earlier sessions were: %s", path, error)
        return []


def format_toml(settings: Mapping[str, Any], comments: Mapping[str, str], section: str = "") -> str:
    """Write nested settings as TOML; what is None is left out.

    Args:
        settings: Numbers, texts, paths, lists of these or of tables, and sections of them.
        comments: By dotted name, for the line above.
        section: Dotted name of the section that `settings` are.
    """
    prefix = f"{section}." if section else ""
    lines, sections = [], []
    for name, value in settings.items():
        key = name if _BARE_KEY.fullmatch(name) else _format_value(name)
        text = comments.get(prefix + name)
        comment = f"# {text}\n" if text else ""
        if isinstance(value, Mapping):
            inner = format_toml(value, comments, prefix + key)
            sections.append(f"\n{comment}[{prefix}{key}]\n{inner}")
        elif value is not None:
            lines.append(f"{comment}{key} = {_format_value(value)}\n")
    return "".join(lines + sections)


def _format_value(value: Any) -> str:
    if isinstance(value, Mapping):
        pairs = (f"{name} = {_format_value(each)}" for name, each in value.items())
        return f"{{{', '.join(pairs)}}}"
    if isinstance(value, list | tuple):
        return f"[{', '.join(map(_format_value, value))}]"
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, int | float):
        return repr(value)
    # a text of JSON is one of TOML, but for this control character
    return json.dumps(str(value), ensure_ascii=False).replace("\x7f", "\\u007f")


_find_version = cache(version)


def find_commit() -> str | None:
    """Return the commit of the clone that this package runs from, None if it is installed."""
    root = Path(urae.__file__).parents[1]
    if not (root / ".git").exists():
        return None
    command = [
        "git",
        "-C",
        str(root),
        "describe",
        "--always",
        "--dirty",
        "--abbrev=40",
        "--exclude=*",
    ]
    environment = {**os.environ, "GIT_OPTIONAL_LOCKS": "0"}
    try:
        done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=30)
    except (FileNotFoundError, subprocess.TimeoutExpired):  # a clone without git is as good
        return None
    return done.stdout.strip() or None


def _packages(config: TrainConfig, tier: str | bool) -> list[str]:
    """Name what the numbers depend on: of the optimizer and of quantised weights too."""
    others = (PACKAGES.get(config.optimizer.name), LIBRARIES.get(str(tier)))
    return [*dict.fromkeys((*_PACKAGES, *(name for name in others if name)))]
