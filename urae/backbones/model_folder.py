"""What a model's folder or single file must be before anything loads from it."""

import json
from collections.abc import Collection
from pathlib import Path
from typing import Any

from urae.storage import read_keys

_WEIGHED = ("transformer", "vae", "text_encoder", "text_encoder_2")
_COMPONENTS = (*_WEIGHED, "tokenizer", "tokenizer_2", "scheduler")


def check_model(path: Path, *, without: Collection[str] = (), configs_only: bool = False) -> None:
    """Refuse what is no FLUX model, or not whole; of weights the headers are read.

    Args:
        path: A folder in diffusers layout, or a single .safetensors file.
        without: Components of the folder that nobody needs.
        configs_only: Whether nobody needs weights.

    Raises:
        ValueError: Says what is wrong, or what is missing.
    """
    if path.is_file():
        if path.suffix != ".safetensors":
            raise _foreign_format(path)
        return
    index = path / "model_index.json"
    if not index.is_file():
        raise ValueError(
            f"model folder {path} has no model_index.json, so it is not in diffusers layout"
        )
    name = _read_json(index).get("_class_name", "")
    if not name.startswith("Flux") or name.startswith("Flux2"):
        raise ValueError(f"model folder {path} holds a {name or 'nameless pipeline'}, not FLUX.1")
    for component in sorted(each for each in path.iterdir() if each.is_dir()):
        _check_weights(component)
    for component in (path / name for name in _COMPONENTS if name not in without):
        needs_weights = component.name in _WEIGHED and not configs_only
        for each in (component, *(_name_weights(component) if needs_weights else ())):
            if not each.exists():
                raise ValueError(
                    f"model folder {path} is incomplete: {each.relative_to(path)} is missing; "
                    "copy or download the folder again"
                )


def _check_weights(component: Path) -> None:
    weights = sorted(component.glob("*.safetensors"))
    for file in weights:
        if any(".base_layer." in key for key in read_keys(file)):
            raise ValueError(
                f"model folder {component.parent}: {component.name} was saved with adapters "
                "attached; load the original, or call urae.restore(pipe) and save that pipe again"
            )
    if not weights:
        for file in component.glob("*.bin"):
            raise _foreign_format(file)


def _name_weights(component: Path) -> list[Path]:
    """Name the files that must be there: those of the index, else any."""
    indices = sorted(component.glob("*.safetensors.index.json"))
    if indices:
        names = _read_json(indices[0]).get("weight_map", {}).values()
        return sorted({component / name for name in names})
    return sorted(component.glob("*.safetensors")) or [component / "*.safetensors"]


def _read_json(file: Path) -> dict[str, Any]:
    try:
        return dict(json.loads(file.read_text(encoding="utf-8")))
    except (TypeError, ValueError) as error:
        raise ValueError(f"model folder {file.parent}: {file.name} is damaged ({error})") from error


def _foreign_format(file: Path) -> ValueError:
    return ValueError(f"model file {file} is not a .safetensors file; only those are loaded")
