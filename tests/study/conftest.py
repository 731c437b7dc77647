import json
import shutil
from functools import cache
from pathlib import Path

import pytest
import torch
from diffusers import FluxTransformer2DModel

from urae.backbones.flux import PACKAGED
from urae.study import StudyConfig
from urae.study.metrics import METRICS, PARTS
from urae.study.results import Row, find_result
from urae.study.run import list_cells

TINY = {
    "side_2k": 192,
    "side_4k": 192,
    "num_samples": 4,
    "num_samples_4k": 4,
    "num_validation": 1,
    "num_held_out": 1,
    "num_captions": 1,
    "num_captions_4k": 1,
    "steps": 1,
    "steps_4k": 1,
    "batch_size": 2,
    "batch_size_4k": 2,
    "sampling_steps": 1,
    "num_seeds": 1,
}


@pytest.fixture
def study(tmp_path):
    """A tiny study, clean renders in the teacher's place."""

    def build(question="a", **changes) -> StudyConfig:
        paths = {"work_dir": tmp_path / "work", "output_dir": tmp_path / "docs" / "study"}
        return StudyConfig(question, **{**paths, **TINY, "stand_in": True, **changes})

    return build


@pytest.fixture
def finish():
    """Leave in the work folder what finished cells do, each measured on some device."""

    def write(config, cells, device="cpu", dtype="float32", score=0.5) -> list[Path]:
        figures = dict.fromkeys((*METRICS, *PARTS), score)
        record = {"figures": figures, "device": device, "dtype": dtype, "torch": "2", "commit": "a"}
        folder = config.work_dir / "study" / "results"
        folder.mkdir(parents=True, exist_ok=True)
        paths = [find_result(folder, cell) for cell in cells]
        for path in paths:
            path.write_text(json.dumps(record))
        return paths

    return write


@pytest.fixture
def rows(study):
    """Results of question a: guidance 1 scores 0.2 more, give or take, whatever the rest."""

    def build(gain=0.2, seeds=3):
        found = []
        for cell in list_cells(study("a", num_seeds=seeds)):
            helped = gain * (cell.factors["guidance"] == 1.0)
            score = 0.3 + helped + 0.01 * cell.seed * (1 + (cell.factors["guidance"] == 1.0))
            figures = {**dict.fromkeys(PARTS, 1.0), "objects": 0.55}
            figures |= {"score": score, "held_out_loss": 0.5 - helped, "spectrum": 1.0}
            record = {
                "figures": {**figures, "wasserstein": 0.1, "data_score": 0.9},
                **{"device": "H200", "dtype": "bfloat16", "torch": "2", "commit": "abc"},
            }
            found.append(Row(cell, record))
        return found

    return build


@pytest.fixture(scope="session")
def write_stages():
    """Write files by the names of the teacher's stages into a folder."""

    def write(work: Path) -> Path:
        for stage in ("vae", "text", "teacher_512"):
            (work / f"{stage}.safetensors").write_bytes(stage.encode())
        return work

    return write


@pytest.fixture(scope="session")
def schnell(tmp_path_factory) -> str:
    """The miniature without its guidance embedding: schnell's shape."""
    dev = PACKAGED["miniature-dev"]
    folder = tmp_path_factory.mktemp("models") / "miniature-schnell"
    shutil.copytree(dev, folder, ignore=shutil.ignore_patterns("transformer"))
    transformer = FluxTransformer2DModel.from_pretrained(dev / "transformer")
    config = dict(transformer.config) | {"guidance_embeds": False}
    bare = FluxTransformer2DModel.from_config(config)
    state = {k: v for k, v in transformer.state_dict().items() if "guidance_embedder" not in k}
    bare.load_state_dict(state)
    bare.to(torch.float16).save_pretrained(folder / "transformer")
    return str(folder)


@pytest.fixture(scope="session")
def lora_2k(tmp_path_factory) -> str:
    """A LoRA of the miniature."""
    from urae.adapters.files import LowRank, write_lora
    from urae.backbones.flux import build_meta_transformer
    from urae.backbones.weights import find_attention_linears, linear_shape

    meta = build_meta_transformer(PACKAGED["miniature-dev"])
    generator = torch.Generator().manual_seed(0)
    layers = {}
    for name in find_attention_linears(meta):
        out_features, in_features = linear_shape(meta, name)
        down = torch.randn(4, in_features, generator=generator) / 20
        layers[name] = LowRank(down, torch.randn(out_features, 4, generator=generator) / 20)
    path = tmp_path_factory.mktemp("adapters") / "lora.safetensors"
    write_lora(path, layers)
    return str(path)


@pytest.fixture(scope="session")
def all_cells(schnell, lora_2k, write_stages, tmp_path_factory):
    """The cells of each question at their full size."""
    work = write_stages(tmp_path_factory.mktemp("work"))

    @cache
    def build(question):
        config = StudyConfig(question, work, work, schnell=schnell, adapter_2k=lora_2k)
        return list_cells(config)

    return build
