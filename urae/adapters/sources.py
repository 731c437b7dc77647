"""Where an adapter file is: on this machine, in the package or on the hub."""

import os
from contextlib import suppress
from pathlib import Path

from huggingface_hub import hf_hub_download
from huggingface_hub.errors import EntryNotFoundError

from urae.adapters.packaged import PACKAGED_ADAPTERS
from urae.adapters.settings import PEFT_CONFIG_NAME
from urae.hub import FETCH_ERRORS, tell_reason

LORA_FILE_NAME = "pytorch_lora_weights.safetensors"
"""The name that stock `load_lora_weights(folder)` looks for."""
FOLDER_NAMES = (LORA_FILE_NAME, "adapter_weights.safetensors")
"""Which file of a folder is its adapter, first choice first."""

_PICKLES = {".bin", ".pt", ".pth", ".ckpt", ".pkl"}


def resolve_adapter(source: str | os.PathLike[str]) -> Path:
    """Find an adapter file, on this machine or on the hub.

    Args:
        source: A file or folder (an existing path wins), the name of an adapter that comes with
            this package (`miniature-2k`), or `[hf://]owner/repo[@revision]/file`.

    Raises:
        ValueError: If the name is empty, the file a pickle, or a folder holds no single adapter.
        FileNotFoundError: If nothing is found.
    """
    if (path := find_local_adapter(source)) is not None:
        return path
    name = os.fspath(source).removeprefix("hf://")
    parts = name.split("/")
    if len(parts) < 3 or any(part in ("", ".", "..", "~") for part in parts):
        raise FileNotFoundError(
            f"adapter {os.fspath(source)!r} is neither an existing file or folder nor a file on "
            "the hub, [hf://]owner/repo[@revision]/file; known names: "
            f"{', '.join(PACKAGED_ADAPTERS)}"
        )
    repo, _, revision = parts[1].partition("@")

    def download(*path: str) -> Path:
        return Path(
            hf_hub_download(f"{parts[0]}/{repo}", "/".join(path), revision=revision or None)
        )

    try:
        found = download(*parts[2:])
        if found.suffix == ".safetensors":
            with suppress(EntryNotFoundError):  # only peft's own files have it
                download(*parts[2:-1], PEFT_CONFIG_NAME)
        return found
    except FETCH_ERRORS as error:
        reason = tell_reason(error).split(". ")[0]
        raise FileNotFoundError(
            f"adapter {name} was not found locally and could not be fetched from the hub "
            f"({reason}); check the name and the connection, or give a local file"
        ) from error


def find_local_adapter(source: str | os.PathLike[str]) -> Path | None:
    """Find an adapter file on this machine; None if there is none.

    Args:
        source: As in `resolve_adapter`.

    Raises:
        ValueError: If the name is empty, the file a pickle, or a folder holds no single adapter.
        FileNotFoundError: If it is in the home folder of a user who has none.
    """
    if not os.fspath(source):
        raise ValueError(
            "the name of an adapter is empty; give a file, a folder or owner/repo/file"
        )
    try:
        path = Path(source).expanduser()
    except RuntimeError as error:
        raise FileNotFoundError(
            f"adapter {source} was not found, since there is no such home folder; write its path "
            "in full"
        ) from error
    if path.is_dir():
        path = _find_in_folder(path)
    if path.suffix.lower() in _PICKLES:
        raise ValueError(
            f"adapter {path} is a pickle ({path.suffix}), which can run code when loaded; only "
            ".safetensors files are read"
        )
    return path if path.is_file() else PACKAGED_ADAPTERS.get(os.fspath(source))


def _find_in_folder(folder: Path) -> Path:
    for name in FOLDER_NAMES:
        if (folder / name).is_file():
            return folder / name
    files = sorted(folder.glob("*.safetensors"))
    if len(files) == 1:
        return files[0]
    found = ", ".join(file.name for file in files) or "none"
    raise ValueError(
        f"adapter folder {folder} must hold {' or '.join(FOLDER_NAMES)} or a single "
        f".safetensors file; found: {found}"
    )
