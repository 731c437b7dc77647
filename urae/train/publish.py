"""A finished run onto the hub: a folder with its adapter and a model card, and the upload."""

import json
import shutil
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

from huggingface_hub import HfApi, get_token
from huggingface_hub.errors import HfHubHTTPError
from huggingface_hub.utils._validators import validate_repo_id
from PIL import Image
from torch import Tensor

from urae.adapters.convert import ConvertConfig, convert
from urae.adapters.sources import LORA_FILE_NAME
from urae.config import build_config, check_types, flatten, read_toml
from urae.generate.picture import save_picture
from urae.hub import HTTP_ERROR
from urae.storage import read_tensors, write_atomic, write_tensors
from urae.train.card import CURVES_FILE, CardInputs, find_license, format_card
from urae.train.chart import Curve, draw_curves, smooth
from urae.train.checkpoint import find_checkpoints
from urae.train.config import TrainConfig
from urae.train.output import VALIDATION_FILE, find_previews, read_losses, read_validation
from urae.train.preview import Preview, list_previews
from urae.train.record import RECORD_SECTION, RUN_FILE, format_toml

PUBLISH_DIR = "hub"
"""Folder in a run's own for what goes to the hub."""
CONVERTED_FILE = "converted_lora.safetensors"
"""The adapter and those under it as one plain LoRA."""

_IMAGE_DIR = "images"


@dataclass(frozen=True)
class PushConfig:
    """What to publish, and where."""

    run_dir: Path
    """Of a finished run."""
    repo: str
    """owner/name on the hub."""
    license: str | None = None
    """Of the base, as the hub spells it; only where it is not known."""
    private: bool = False
    """Make a repository that only its owner sees."""
    overwrite: bool = False
    """Upload into a repository that exists."""
    dry_run: bool = False
    """Write the folder and upload nothing."""

    def __post_init__(self) -> None:
        check_types(self)


@dataclass(frozen=True)
class Pushed:
    """What came of it."""

    folder: Path
    url: str | None
    """None after a dry run."""


class FinishedRun(NamedTuple):
    """What is in the folder of a run."""

    config: TrainConfig
    settings: dict[str, Any]
    """All of `run.toml`."""
    tensors: dict[str, Tensor]
    """Of the adapter."""
    metadata: dict[str, str]
    """Of the adapter's file, without the folders that things lay in."""


def push(config: PushConfig) -> Pushed:
    """Publish a finished run on the Hugging Face hub, with a model card.

    Args:
        config: What and where. The user is the one that `hf auth login` logged in.

    Returns:
        The folder that was uploaded, and its page.

    Raises:
        ValueError: If the run is not finished, the name is no owner/name, or the licence is open.
        FileNotFoundError: If there is no run, or an adapter under it is missing.
        FileExistsError: If the repository exists and `overwrite` is off.
        PermissionError: If nobody is logged in, or the hub refuses.
        ConnectionError: If the hub cannot be reached, or fails.
    """
    validate_repo_id(config.repo)
    if config.repo.count("/") != 1:
        raise ValueError(f"repository {config.repo} has no owner; name it as owner/name")
    if not config.dry_run and get_token() is None:
        raise PermissionError(
            "you are not logged in to the hub; run `hf auth login`, or inspect the folder first "
            "with --dry-run"
        )
    folder = write_folder(config)
    if config.dry_run:
        return Pushed(folder, None)
    return Pushed(folder, _upload(config, folder))


def write_folder(config: PushConfig) -> Path:
    """Write what goes to the hub into the run's folder, replacing what an earlier call wrote.

    Raises:
        ValueError, FileNotFoundError: As in `push`.
    """
    run, settings, tensors, metadata = read_finished(config.run_dir)
    license = find_license(run.model, config.license)
    folder = config.run_dir / PUBLISH_DIR
    shutil.rmtree(folder, ignore_errors=True)
    (folder / _IMAGE_DIR).mkdir(parents=True)
    write_tensors(folder / LORA_FILE_NAME, tensors, metadata)
    adapter_file = LORA_FILE_NAME
    if run.adapter.over:
        adapters = (*run.adapter.over, str(folder / LORA_FILE_NAME))
        convert(ConvertConfig(adapters, folder / CONVERTED_FILE))
        adapter_file = CONVERTED_FILE
    record = format_record(settings)
    write_atomic(folder / RUN_FILE, record.encode())
    _draw(config.run_dir, folder / CURVES_FILE)
    inputs = CardInputs(
        repo=config.repo,
        license=license,
        adapter_file=adapter_file,
        is_stock=run.adapter.kind not in ("lokr", "oft"),
        step=int(metadata["urae.step"]),
        previews=_copy_previews(run, folder),
        record=record,
    )
    card = format_card(replace(run, model=_without_folders(run.model)), inputs)
    write_atomic(folder / "README.md", card.encode())
    return folder


def read_finished(run_dir: Path) -> FinishedRun:
    """Read a finished run, to publish it.

    Raises:
        ValueError: If it is not finished.
        FileNotFoundError: If there is none.
    """
    settings, config = _read_run(run_dir)
    tensors, metadata = read_tensors(run_dir / LORA_FILE_NAME)
    step = int(metadata["urae.step"])
    if step < config.steps:
        steps = [checkpoint.step for checkpoint in find_checkpoints(run_dir)]
        raise _unfinished(run_dir, max([step, *steps]), config.steps)
    metadata["urae.config"] = json.dumps(flatten(_without_folders(asdict(config))))
    return FinishedRun(config, settings, tensors, _without_folders(metadata))


def format_record(settings: Mapping[str, Any]) -> str:
    """Write a run's `run.toml` without comments, nor the folders that things lay in."""
    return format_toml(_without_folders(settings), {})


def _read_run(run_dir: Path) -> tuple[dict[str, Any], TrainConfig]:
    if not (run_dir / RUN_FILE).is_file():
        raise FileNotFoundError(f"{run_dir} is not the folder of a run: it holds no {RUN_FILE}")
    settings = read_toml(run_dir / RUN_FILE)
    recipe = {name: value for name, value in settings.items() if name != RECORD_SECTION}
    data_dir = settings[RECORD_SECTION].get("data_dir")
    run = build_config(
        TrainConfig,
        {**recipe, "data_dir": data_dir, "output_dir": run_dir},
        str(run_dir / RUN_FILE),
    )
    if not (run_dir / LORA_FILE_NAME).is_file():
        checkpoints = find_checkpoints(run_dir)
        raise _unfinished(run_dir, checkpoints[-1].step if checkpoints else 0, run.steps)
    return settings, run


def _unfinished(run_dir: Path, step: int, steps: int) -> ValueError:
    return ValueError(
        f"{run_dir} is at step {step} of {steps}; continue with --resume until it is finished, or "
        "with --steps set to a checkpoint that is good enough"
    )


def _without_folders(value: Any) -> Any:
    """Leave the last name of each absolute path: where things lay is nobody's business."""
    if isinstance(value, Mapping):
        return {
            name: each if "prompt" in name else _without_folders(each)
            for name, each in value.items()
        }
    if isinstance(value, list | tuple):
        return tuple(_without_folders(each) for each in value)
    if isinstance(value, str | Path) and Path(value).is_absolute():
        return Path(value).name
    return value


def _draw(run_dir: Path, path: Path) -> None:
    curves = [smooth("training loss", read_losses(run_dir))]
    if (run_dir / VALIDATION_FILE).exists():
        means = [(step, sum(each) / len(each)) for step, each in read_validation(run_dir)]
        curves.append(Curve("held-out loss", means))
    draw_curves(curves, path)


def _copy_previews(run: TrainConfig, folder: Path) -> list[tuple[Preview, str]]:
    """Copy the last picture of each prompt and seed, its recipe inside."""
    last = {path.parent.name: path for path in find_previews(run.output_dir)}
    copied = []
    for preview in list_previews(run):
        if preview.name in last:
            file = f"{_IMAGE_DIR}/{preview.name}.png"
            with Image.open(last[preview.name]) as image:
                save_picture(folder / file, image, _without_folders(image.info))
            copied.append((preview, file))
    return copied


def _upload(config: PushConfig, folder: Path) -> str:
    api = HfApi()
    try:
        if api.repo_exists(config.repo) and not config.overwrite:
            raise FileExistsError(
                f"{config.repo} exists on the hub and is kept; choose another name, or upload into "
                "it with --overwrite"
            )
        api.create_repo(config.repo, private=config.private, exist_ok=config.overwrite)
        api.upload_folder(
            repo_id=config.repo, folder_path=folder, commit_message="Upload an adapter with urae"
        )
    except HTTP_ERROR as error:
        status = error.response.status_code if isinstance(error, HfHubHTTPError) else None
        kind = PermissionError if status in (401, 403) else ConnectionError
        raise kind(
            f"{config.repo} could not be uploaded ({status or error}); check the name, the "
            "connection and your login (`hf auth whoami`). Everything to be uploaded is in "
            f"{folder}"
        ) from error
    return f"https://huggingface.co/{config.repo}"
