"""The stages of the miniature's training by name, each from files to a file."""

import json
import math
import tomllib
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path

from diffusers import FluxPipeline

from urae import __version__
from urae.backbones.devices import pick_device
from urae.backbones.ranks import join_ranks
from urae.choices import MiniatureStage
from urae.miniature.autoencoder import train_vae
from urae.miniature.flow import train_flow, train_four_steps, train_guided
from urae.miniature.loop import StageRun, read_state
from urae.miniature.model import (
    Kind,
    build_miniature,
    build_pipeline,
    read_weights,
)
from urae.miniature.origin import check_inputs, describe_origin
from urae.miniature.recipe import FlowStage, MiniatureRecipe, load_recipe
from urae.miniature.text import TEXT_PARTS, train_text
from urae.train.record import find_commit

Train = Callable[[MiniatureRecipe, StageRun], bool]

STAGES: dict[MiniatureStage, Train] = {
    "vae": lambda recipe, run: train_vae(recipe.vae, run),
    "text": lambda recipe, run: train_text(recipe.text, run),
    "base": lambda recipe, run: train_flow(recipe.base, "dev", "base", run),
    "refined": lambda recipe, run: train_flow(recipe.refined, "dev", "refined", run, start="base"),
    "dev": lambda recipe, run: train_guided(recipe.dev, "dev", run),
    "schnell": lambda recipe, run: train_four_steps(recipe.schnell, "schnell", run),
    "teacher_256": lambda recipe, run: train_flow(
        recipe.teacher_256, "teacher", "teacher_256", run
    ),
    "teacher_512": lambda recipe, run: train_flow(
        recipe.teacher_512, "teacher", "teacher_512", run, start="teacher_256"
    ),
    "teacher_1024": lambda recipe, run: train_flow(
        recipe.teacher_1024, "teacher", "teacher_1024", run, start="teacher_512"
    ),
}

NEEDS: dict[str, tuple[str, ...]] = {
    "vae": (),
    "text": (),
    "base": ("vae", "text"),
    "refined": ("vae", "text", "base"),
    "dev": ("vae", "text", "refined"),
    "schnell": ("vae", "text", "dev"),
    "teacher_256": ("vae", "text"),
    "teacher_512": ("vae", "text", "teacher_256"),
    "teacher_1024": ("vae", "text", "teacher_512"),
}
"""The stages whose files each reads."""
_TRANSFORMERS = tuple(name for name in STAGES if name not in ("vae", "text"))
_HISTORY = "urae.history"

Record = dict[str, dict[str, str]]
"""Metadata of weights by stage, a stage after those that it comes from."""


def train_stage(
    name: str,
    recipe_path: Path,
    work_dir: Path,
    *,
    max_seconds: float = math.inf,
    commit: str | None = None,
) -> Path | None:
    """Train one stage of the miniature.

    Under torchrun the processes share each batch; on a GPU each. Once it takes steps, Ctrl-C and
    SIGTERM save what it goes on from; a later one stops at once.

    Args:
        name: One of `STAGES`.
        recipe_path: A TOML file of all stages.
        work_dir: Folder of the stages' files; those that this one needs must be there.
        max_seconds: Stop after these, what comes before the first step counted in; the same call
            goes on from there.
        commit: Of this code, for the file's metadata; None asks git.

    Returns:
        The stage's file, or None if it was stopped before its last step.

    Raises:
        ValueError: If the stage is unknown, the recipe is wrong, the processes cannot share its
            batches, or what it goes on from is damaged or was made by another recipe or from
            other files; or if an earlier stage was trained on other files than are there.
        FileNotFoundError: If an earlier stage's file is missing.
        FileExistsError: If the stage is done.
        OSError: If the disk is full; what it goes on from is whole or as it was.
    """
    if name not in STAGES:
        raise ValueError(f"stage {name!r} is unknown; choose one of {', '.join(STAGES)}")
    file = _file(name, work_dir)
    if file.exists():
        raise FileExistsError(
            f"{file} already exists and is kept; delete it to train the stage again"
        )
    recipe = load_recipe(recipe_path)
    history: Record = {}
    for needed in NEEDS[name]:
        history |= read_record(needed, work_dir)
        _check_inputs(needed, history[needed], work_dir, NEEDS[name])
    metadata = {
        **describe_origin(
            recipe.seed,
            getattr(recipe, name),
            [_file(needed, work_dir) for needed in NEEDS[name]],
        ),
        _HISTORY: json.dumps(history),
        "urae.version": __version__,
        "urae.commit": commit or find_commit() or "unknown",
        "urae.stage": name,
        "urae.recipe": recipe_path.read_text(encoding="utf-8"),
    }
    work_dir.mkdir(parents=True, exist_ok=True)
    with join_ranks(pick_device()) as ranks:
        run = StageRun(
            work_dir, recipe.seed, metadata, ranks.device, max_seconds, ranks.rank, ranks.count
        )
        read_state(name, run)  # what does not fit is said before anything is rendered
        done = STAGES[name](recipe, run)
        ranks.wait()  # the file is whole when any of them returns
        return file if done else None


def _file(name: str, work_dir: Path) -> Path:
    return work_dir / f"{name}.safetensors"


def _check_inputs(
    name: str, metadata: Mapping[str, str], work_dir: Path, beside: Iterable[str]
) -> None:
    """Refuse a stage that was trained on other files than those of the stages used beside it."""
    files = [_file(each, work_dir) for each in NEEDS[name] if each in beside]
    check_inputs(_file(name, work_dir), metadata, files)


def read_record(name: str, work_dir: Path) -> Record:
    """Read what a stage's weights and all that they come from were trained with.

    Only the stage's own file is needed: it holds the record of the others.

    Raises:
        FileNotFoundError: If it is missing.
    """
    metadata = read_weights(_file(name, work_dir), {})
    history: Record = json.loads(metadata.pop(_HISTORY, "{}"))
    return {**history, name: dict(sorted(metadata.items()))}


def write_record(record: Mapping[str, Mapping[str, str]], name: str) -> dict[str, str]:
    """Return the metadata of a stage's file from which `read_record` reads the record."""
    ancestors = [each for each in _list_ancestors(name) if each in record]
    return {**record[name], _HISTORY: json.dumps({each: record[each] for each in ancestors})}


def _list_ancestors(name: str) -> list[str]:
    found = [each for needed in NEEDS[name] for each in (*_list_ancestors(needed), needed)]
    return list(dict.fromkeys(found))


def load_stage(name: str, work_dir: Path) -> FluxPipeline:
    """Load a trained stage as a stock pipeline in float32, on the CPU.

    Args:
        name: A stage that trains a transformer. `base`, `refined` and the teachers have no guidance
            embedding: give them `true_cfg_scale` and an empty negative prompt.
        work_dir: Of the stages' files.

    Raises:
        ValueError: If the stage has no transformer, or was trained on other files than are there.
        FileNotFoundError: If a file is missing.
    """
    if name not in _TRANSFORMERS:
        choices = ", ".join(_TRANSFORMERS)
        raise ValueError(f"stage {name!r} is not a transformer; choose one of {choices}")
    kind: Kind = "teacher" if name.startswith("teacher") else "dev"
    parts = build_miniature(kind, guided=name == "dev", seed=0)
    vae = read_weights(_file("vae", work_dir), {"vae": parts["vae"]})
    read_weights(_file("text", work_dir), {part: parts[part] for part in TEXT_PARTS})
    metadata = read_weights(_file(name, work_dir), {"transformer": parts["transformer"]})
    _check_inputs(name, metadata, work_dir, ("vae", "text"))
    return build_pipeline(
        parts,
        static_shift=_read_shift(name, metadata),
        latent_mean=float(vae["latent_mean"]),
        latent_std=float(vae["latent_std"]),
    )


def _read_shift(name: str, metadata: Mapping[str, str]) -> float | None:
    """Return the static time shift that a stage was trained with; None is the dynamic one.

    Four steps have no other path than the one that they learnt. Dev's dynamic shift is made for its
    native size: at a teacher's it would leave no steps for the details.
    """
    if name != "schnell" and not name.startswith("teacher"):
        return None
    stage = tomllib.loads(metadata["urae.recipe"])[name]
    return float(stage.get("sigma_shift", FlowStage.sigma_shift))
