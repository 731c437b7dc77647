"""The trained miniatures as they ship: pipelines in diffusers layout, each with its model card.

And the way back: what ships holds the files of the stages that it was made from, all but two.
"""

import json
import tomllib
from pathlib import Path

import torch

from urae.backbones.flux import PACKAGED, load_pipeline
from urae.miniature.model import write_pipeline, write_weights
from urae.miniature.stages import load_stage
from urae.miniature.text import TEXT_PARTS
from urae.storage import read_tensors, write_atomic

_NEEDS = {
    "dev": ("vae", "text", "base", "dev"),
    "schnell": ("vae", "text", "base", "dev", "schnell"),
}
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
`recipe.json` has the recipe and the commit of each stage. Its scores, and what it fails at, are in
the project's docs/miniature.md.
"""
_KINDS = {
    "dev": "Guidance is distilled, as in FLUX.1-dev: 24 steps, guidance 3.5.",
    "schnell": "Distilled to four steps without guidance, as FLUX.1-schnell is.",
}


def export_pipelines(work_dir: Path, output_dir: Path) -> list[Path]:
    """Write `miniature-dev`, and `miniature-schnell` once it is trained, in float16.

    Each folder's `recipe.json` says what its weights come from.

    Raises:
        FileNotFoundError: If a stage's file is missing.
    """
    folders = []
    for name, stages in _NEEDS.items():
        if name == "schnell" and not (work_dir / "schnell.safetensors").is_file():
            continue
        folder = output_dir / f"miniature-{name}"
        write_pipeline(folder, load_stage(name, work_dir))
        record = {stage: read_tensors(work_dir / f"{stage}.safetensors")[1] for stage in stages}
        write_atomic(folder / "recipe.json", json.dumps(record, indent=1).encode())
        seed = tomllib.loads(record["dev"]["urae.recipe"]).get("seed", 0)
        card = _CARD.format(name=folder.name, kind=_KINDS[name], seed=seed)
        write_atomic(folder / "README.md", card.encode())
        folders.append(folder)
    return folders


def unpack_pipelines(work_dir: Path) -> list[Path]:
    """Write the stages' files that the packaged pipelines hold, to go on from them.

    `base` and the teachers do not ship. Files that are there are kept.

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
                write_weights(path, {part: getattr(pipe, part) for part in parts}, record[stage])
                written.append(path)
    return written
