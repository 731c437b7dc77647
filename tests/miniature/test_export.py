"""Runs' adapters as they ship; the pipelines' export is tested with the stages."""

import json

import pytest
import torch

from urae.adapters.files import read_adapter
from urae.adapters.initial import find_initial
from urae.adapters.packaged import FILES
from urae.backbones.flux import PACKAGED, load_transformer
from urae.backbones.weights import open_original_weights
from urae.features.cache import CacheConfig, cache
from urae.miniature.export import export_adapters, export_pipelines, unpack_pipelines
from urae.miniature.sources import write_folder
from urae.train import AdapterConfig, OptimizerConfig, TrainConfig, train

COMMIT = "0123456789abcdef"
FILE_2K, FILE_4K = FILES.values()


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """Finished runs of both stages, a step each."""
    folder = tmp_path_factory.mktemp("runs")
    write_folder(folder / "data", "clean", range(2), 1, 256, 256)
    cache(CacheConfig(folder / "data", "miniature-dev", 256))

    def run(name, adapter):
        config = TrainConfig(
            model="miniature-dev",
            data_dir=folder / "data",
            output_dir=folder / name,
            resolution=256,
            steps=1,
            seed=3,
            gradient_checkpointing="off",
            adapter=adapter,
            optimizer=OptimizerConfig(name="adamw", lr=1e-3),
        )
        train(config)
        return config.output_dir

    lora = run("lora", AdapterConfig(rank=2))
    (ships,) = export_adapters([lora], folder / "ships")
    return lora, run("minor", AdapterConfig("minor", rank=2, over=(str(ships),)))


@pytest.fixture
def no_commit(runs, tmp_path):
    """The same runs, from code that is no clone."""
    copies = [tmp_path / run.name for run in runs]
    for run, copy in zip(runs, copies, strict=True):
        copy.mkdir()
        for name in ("run.toml", "pytorch_lora_weights.safetensors"):
            (copy / name).write_bytes((run / name).read_bytes())
        lines = (run / "run.toml").read_text().splitlines(keepends=True)
        kept = [line for line in lines if not line.startswith("commit = ")]
        (copy / "run.toml").write_text("".join(kept))
    return copies


def test_adapters_ship_as_they_were_trained(runs, no_commit, tmp_path):
    paths = export_adapters(no_commit, tmp_path / "ships", commit=COMMIT)
    assert paths == [tmp_path / "ships" / FILE_2K, tmp_path / "ships" / FILE_4K]
    lora, minor = (read_adapter(path) for path in paths)
    for shipped, run in ((lora, runs[0]), (minor, runs[1])):
        trained = read_adapter(run)
        for name, pair in trained.layers.items():
            assert torch.equal(shipped.layers[name].down, pair.down.half())
            assert torch.equal(shipped.layers[name].up, pair.up.half())
        assert shipped.policy == trained.policy
        assert shipped.metadata["urae.commit"] == COMMIT
        assert json.loads(shipped.metadata["urae.config"])["seed"] == 3
    assert minor.metadata["urae.over"] == "miniature-2k"
    transformer = load_transformer(PACKAGED["miniature-dev"], dtype=torch.bfloat16)
    initial = find_initial(minor, [lora.layers], lambda n: open_original_weights(transformer, n))
    assert initial is minor.initial  # trained over the LoRA that ships, on the same base


def test_the_card_of_adapters_says_what_they_come_from(runs, no_commit, tmp_path):
    export_adapters(no_commit, tmp_path / "ships", commit=COMMIT)
    card = (tmp_path / "ships" / "README.md").read_text()
    assert card.startswith("---\nlicense: apache-2.0\n")
    for phrase in ("## miniature-2k", "## miniature-4k", FILE_2K, FILE_4K, "rank 2 over mini"):
        assert phrase in card
    assert card.count(f"seed 3,\ncommit {COMMIT}.") == 2
    assert card.count("num_train = 2") == 2  # the record
    for path in (tmp_path / "ships").iterdir():  # where things lay is nobody's business
        assert str(runs[0].parent).encode() not in path.read_bytes()


def test_what_does_not_ship(runs, no_commit, tmp_path):
    with pytest.raises(ValueError, match="trained minor, but only a LoRA, or a LoRA and mi"):
        export_adapters(no_commit[1:], tmp_path, commit=COMMIT)
    with pytest.raises(ValueError, match=r"lora does not say which commit .* give it with --com"):
        export_adapters(no_commit[:1], tmp_path)
    with pytest.raises(FileNotFoundError, match=r"holds no run\.toml"):
        export_adapters([tmp_path], tmp_path, commit=COMMIT)
    assert not list(tmp_path.glob("*.safetensors"))


def test_what_ships_unpacks_and_ships_again_as_it_was(tmp_path):
    """From the stages' files alone: those that it comes from, `base` and `refined`, are gone."""
    unpack_pipelines(tmp_path / "work")
    folders = export_pipelines(tmp_path / "work", tmp_path / "models")
    assert [folder.name for folder in folders] == list(PACKAGED)
    for folder in folders:
        for name in ("recipe.json", "transformer/config.json", "vae/config.json"):
            there, here = ((each / name).read_text() for each in (PACKAGED[folder.name], folder))
            assert json.loads(here) == json.loads(there)
        for part in ("transformer", "vae"):
            file = f"{part}/diffusion_pytorch_model.safetensors"
            assert (folder / file).read_bytes() == (PACKAGED[folder.name] / file).read_bytes()
