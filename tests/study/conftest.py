import shutil
from functools import cache
from pathlib import Path

import pytest
import torch
from diffusers import FluxTransformer2DModel

from urae.backbones.flux import PACKAGED
from urae.study import StudyConfig
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
