"""What ships: the miniatures as pipelines in diffusers layout, their adapters, with model cards.

And the way back: what ships holds the files of the stages that it was made from, all but two.
"""

import json
import tomllib
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch

from urae.adapters.packaged import FILES
from urae.backbones.flux import PACKAGED, load_pipeline
from urae.miniature.model import TEXT_TOKENS, write_pipeline, write_weights
from urae.miniature.stages import load_stage, read_record, write_record
from urae.miniature.text import TEXT_PARTS
from urae.storage import write_atomic, write_tensors
from urae.train.publish import FinishedRun, format_record, read_finished
from urae.train.record import RECORD_SECTION

_CARD = """\
---
license: apache-2.0
library_name: diffusers
pipeline_tag: text-to-image
---

# {name}

A FLUX of 5 M parameters on rendered scenes: its 256 x 256 plays FLUX.1's 1024 x 1024, so that
ultra-resolution adaptation can be tried and measured on a laptop. {kind}

It draws what the grammar of its captions says and nothing else: "a large red circle left of a small
blue square on a striped green background, lit from the left". Trained on renders alone, which are
deterministic from a seed (that of the weights is {seed}); no pictures of others are in it.
It learnt with {tokens} text tokens, where a pipeline's own default is 512: pass
`max_sequence_length={tokens}`.
`recipe.json` has the recipe and the commit of each stage. Its scores, and what it fails at, are in
the project's docs/miniature.md.
"""
_ADAPTERS_CARD = """\
---
license: apache-2.0
library_name: diffusers
pipeline_tag: text-to-image
---

# The adapters of miniature-dev

They make a FLUX of 5 M parameters draw its rendered scenes beyond its native 256 x 256, each at the
size that it was trained at: 512 x 512 plays FLUX.1's 2048 x 2048, 1024 x 1024 its 4096 x 4096.
Their scores are in the project's docs/miniature.md. The resolution policy of each is in its
metadata, which `urae.adapt(pipe, "miniature-2k")` follows. All are under Apache 2.0, as their base.
"""
_ADAPTER_SECTION = """
## {name}

`{file}`: {kind} of rank {rank}{over}, trained at {side} x {side} for {steps:,} steps, seed {seed},
commit {commit}. The recipe, every field resolved, and what the run was made from:

```toml
{record}```
"""
_ADAPTER_KINDS = {"lora": "a LoRA", "minor": "minor components"}
_KINDS = {
    "dev": "Guidance is distilled, as in FLUX.1-dev: 24 steps, guidance 3.5.",
    "schnell": "Distilled to four steps without guidance, as FLUX.1-schnell is.",
}


def export_pipelines(work_dir: Path, output_dir: Path) -> list[Path]:
    """Write `miniature-dev`, and `miniature-schnell` once it is trained, in float16.

    Each folder's `recipe.json` says what its weights come from.

    Raises:
        FileNotFoundError: If a stage's file is missing.
        ValueError: If a stage was trained on other files than are there; nothing is written.
    """
    has_schnell = (work_dir / "schnell.safetensors").is_file()
    pipes = {name: load_stage(name, work_dir) for name in _KINDS if has_schnell or name == "dev"}
    folders = []
    for name, pipe in pipes.items():
        record = read_record(name, work_dir)
        folder = output_dir / f"miniature-{name}"
        write_pipeline(folder, pipe)
        write_atomic(folder / "recipe.json", json.dumps(record, indent=1).encode())
        seed = tomllib.loads(record[name]["urae.recipe"]).get("seed", 0)
        card = _CARD.format(name=folder.name, kind=_KINDS[name], seed=seed, tokens=TEXT_TOKENS)
        write_atomic(folder / "README.md", card.encode())
        folders.append(folder)
    return folders


def export_adapters(
    run_dirs: Sequence[Path], output_dir: Path, *, commit: str | None = None
) -> list[Path]:
    """Write the adapters of finished runs under the names that they ship by, and a model card.

    They ship in float16, as the bases do. A 4K adapter's B0 and A0 are those of base
    and 2K LoRA as its run had them: train it over the 2K LoRA that this wrote, or loading finds
    another LoRA and computes them anew.

    Args:
        run_dirs: Of the 2K LoRA, then of the minor components over it, if they are to ship.
        output_dir: Folder for the files.
        commit: Of the code that trained them, where the runs do not know it.

    Returns:
        The adapters' files.

    Raises:
        ValueError: If a run is not finished, trained something else, or its commit is not known.
        FileNotFoundError: If there is none.
    """
    runs = [read_finished(folder) for folder in run_dirs]
    kinds = [run.config.adapter.kind for run in runs]
    if kinds not in (["lora"], ["lora", "minor"]):
        raise ValueError(
            f"the runs trained {' and '.join(kinds)}, but only a LoRA, or a LoRA and minor "
            "components over it, can be exported; name their runs in that order"
        )
    commits = [_find_commit(*each, commit) for each in zip(runs, run_dirs, strict=True)]
    ships = list(FILES.items())[: len(runs)]
    card = _ADAPTERS_CARD
    for run, commit, (name, file) in zip(runs, commits, ships, strict=True):
        metadata = {**run.metadata, "urae.commit": commit}
        if run.config.adapter.over:
            metadata["urae.over"] = ships[0][0]
        tensors = {key: tensor.to(torch.float16) for key, tensor in run.tensors.items()}
        write_tensors(output_dir / file, tensors, metadata)
        card += _describe_adapter(run, metadata, name, file)
    write_atomic(output_dir / "README.md", card.encode())
    return [output_dir / file for _, file in ships]


def _describe_adapter(run: FinishedRun, metadata: Mapping[str, str], name: str, file: str) -> str:
    adapter, over = run.config.adapter, metadata.get("urae.over")
    return _ADAPTER_SECTION.format(
        name=name,
        file=file,
        kind=_ADAPTER_KINDS[adapter.kind],
        rank=adapter.rank,
        over=f" over {over}" if over else "",
        side=run.config.resolution,
        steps=int(metadata["urae.step"]),
        seed=run.config.seed,
        commit=metadata["urae.commit"],
        record=format_record(run.settings),
    )


def _find_commit(run: FinishedRun, folder: Path, given: str | None) -> str:
    commit = run.settings[RECORD_SECTION]["versions"].get("commit", given)
    if commit is None:
        raise ValueError(f"{folder} does not say which commit trained it; give it with --commit")
    return str(commit)


def unpack_pipelines(work_dir: Path) -> list[Path]:
    """Write the stages' files that the packaged pipelines hold, to go on from them.

    `base`, `refined` and the teachers do not ship. Files that are there are kept.

    Returns:
        The files written.
    """
    written = []
    for name, folder in PACKAGED.items():
        kind = name.removeprefix("miniature-")
        record = json.loads((folder / "recipe.json").read_text(encoding="utf-8"))
        pipe = load_pipeline(name, dtype=torch.float32)
        stages = {"vae": ("vae",), "text": TEXT_PARTS, kind: ("transformer",)}
        for stage, parts in stages.items():
            path = work_dir / f"{stage}.safetensors"
            if not path.exists():
                models = {part: getattr(pipe, part) for part in parts}
                write_weights(path, models, write_record(record, stage))
                written.append(path)
    return written
