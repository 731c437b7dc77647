"""The stages of the miniature's training by name, each from files to a file."""

import json
import math
import tomllib
from collections.abc import Callable, Mapping
from pathlib import Path

from diffusers import FluxPipeline

from urae import __version__
from urae.backbones.devices import pick_device
from urae.backbones.ranks import join_ranks
from urae.miniature.autoencoder import train_vae
from urae.miniature.flow import train_flow, train_four_steps, train_guided
from urae.miniature.loop import StageRun
from urae.miniature.model import (
    Kind,
    build_miniature,
    build_pipeline,
    read_weights,
)
from urae.miniature.recipe import FlowStage, MiniatureRecipe, load_recipe
from urae.miniature.text import TEXT_PARTS, train_text
from urae.train.record import find_commit

Train = Callable[[MiniatureRecipe, StageRun], bool]

STAGES: dict[str, Train] = {
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
        ValueError: If the stage is unknown, the recipe is wrong, or the processes cannot share
            its batches.
        FileNotFoundError: If an earlier stage's file is missing.
    """
    if name not in STAGES:
        raise ValueError(f"stage {name!r} is unknown; choose one of {', '.join(STAGES)}")
    recipe = load_recipe(recipe_path)
    history: Record = {}
    for needed in NEEDS[name]:
        history |= read_record(needed, work_dir)
    metadata = {
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
        done = STAGES[name](recipe, run)
        ranks.wait()  # the file is whole when any of them returns
        return run.file(name) if done else None


def read_record(name: str, work_dir: Path) -> Record:
    """Read what a stage's weights and all that they come from were trained with.

    Only the stage's own file is needed: it holds the record of the others.

    Raises:
        FileNotFoundError: If it is missing.
    """
    metadata = read_weights(work_dir / f"{name}.safetensors", {})
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
        ValueError: If the stage has no transformer.
        FileNotFoundError: If a file is missing.
    """
    if name not in STAGES or name in ("vae", "text"):
        raise ValueError(f"stage {name!r} is no transformer; choose one of {', '.join(STAGES)}")
    kind: Kind = "teacher" if name.startswith("teacher") else "dev"
    parts = build_miniature(kind, guided=name == "dev", seed=0)
    vae = read_weights(work_dir / "vae.safetensors", {"vae": parts["vae"]})
    read_weights(work_dir / "text.safetensors", {part: parts[part] for part in TEXT_PARTS})
    transformer = {"transformer": parts["transformer"]}
    metadata = read_weights(work_dir / f"{name}.safetensors", transformer)
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
