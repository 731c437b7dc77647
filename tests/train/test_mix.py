"""Several folders, each of its own resolution and weight, in one run."""

import shutil
from collections import Counter
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from urae.cli.main import main
from urae.config import build_config, read_toml
from urae.features.cache import CacheConfig, cache
from urae.features.order import Order
from urae.resolution import ResolutionPositions, read_base_policy
from urae.train import DataConfig, TrainConfig, train
from urae.train.inputs import check_inputs, open_sources
from urae.train.plan import plan_training
from urae.train.probe import probe

GOLDEN = Path(__file__).parents[1] / "golden"


@pytest.fixture(scope="module")
def small(tmp_path_factory) -> Path:
    """Two of the pictures, cached at half the side."""
    folder = tmp_path_factory.mktemp("small")
    for path in (GOLDEN / "train_data").glob("image_[01].*"):
        shutil.copy(path, folder)
    cache(CacheConfig(folder, str(GOLDEN / "base_dev"), 128, 48))
    return folder


@pytest.fixture
def mix(settings, small):
    """A run on both: four pictures at 256 x 256, and two at 128 x 128, each of them three times."""

    def build(**changes):
        data = (DataConfig(GOLDEN / "train_data", 256), DataConfig(small, 128, weight=3))
        return settings(**{"data_dir": None, "data": data, **changes})

    return build


def weights(config: TrainConfig) -> dict[str, torch.Tensor]:
    return load_file(config.output_dir / "pytorch_lora_weights.safetensors")


def test_an_epoch_has_each_picture_by_its_weight(mix, small):
    config = mix(batch_size=2)
    samples = check_inputs(config).samples
    order = Order(samples, config.batch_size, seed=config.seed)
    again = Order(samples, config.batch_size, seed=config.seed)
    trained, counters, place = [], [], 0
    while len(trained) < 10:
        (batch,) = order.share(place, 1).batches
        assert again.share(place, 1).batches == (batch,)
        assert len({(samples[at].height, samples[at].width) for at in batch.indices}) == 1
        trained += [samples[at].latent_file for at in batch.indices]
        counters += batch.counters
        place += 1
    assert Counter(path.parent for path in trained) == {GOLDEN / "train_data": 4, small: 6}
    assert sorted(Counter(trained).values()) == [1, 1, 1, 1, 3, 3]
    assert len(set(counters)) == 10  # no two share their noise


def test_the_policy_acts_by_each_pictures_tokens(mix, monkeypatch):
    scales, forward = {}, ResolutionPositions.forward

    def record(self, ids):
        cos, sin = forward(self, ids)
        scales[ids.shape[0]] = float(cos[0, 0] ** 2 + sin[0, 0] ** 2)
        return cos, sin

    monkeypatch.setattr(ResolutionPositions, "forward", record)
    config = mix(steps=10)
    train(config)
    policy = read_base_policy(config.model)
    assert len(scales) > 3  # of four shapes at one resolution, and of the other
    for tokens, scale in scales.items():
        assert scale == pytest.approx(policy.attention_scale(tokens), rel=1e-5)


def test_resumed_equals_uninterrupted(mix, tmp_path, small):
    whole = mix(steps=5, batch_size=2)
    train(whole)
    parts = mix(steps=2, batch_size=2, output_dir=tmp_path / "parts")
    train(parts)
    moved = shutil.copytree(small, tmp_path / "moved")
    data = (parts.data[0], replace(parts.data[1], dir=moved))
    train(replace(parts, steps=5, resume=True, data=data))
    first, second = weights(whole), weights(parts)
    assert all(torch.equal(first[key], second[key]) for key in first)
    other = (parts.data[0], replace(parts.data[1], weight=2))
    with pytest.raises(
        ValueError, match=r"was made with data\.1\.weight = 3, but the run now says 2"
    ):
        train(replace(parts, steps=6, resume=True, data=other))


def test_the_record_is_a_recipe(mix):
    config = mix(steps=1)
    train(config)
    recipe = read_toml(config.output_dir / "run.toml")
    record = recipe.pop("record")
    again = build_config(TrainConfig, {**recipe, "data_dir": None, "output_dir": "x"}, "run.toml")
    assert again == replace(config, output_dir=Path("x"))
    assert record["data"]["path"] == [str(source.dir) for source in config.data]
    assert record["data"]["num_train"] == 10


def test_one_folder_is_a_mix_of_one(settings):
    config = settings()
    one = replace(config, data_dir=None, data=(DataConfig(config.data_dir, 256),))
    assert open_sources(config) == open_sources(one)
    assert check_inputs(config).data_hash == check_inputs(one).data_hash


def test_on_the_command_line(small, tmp_path, monkeypatch, capsys):
    recipe = tmp_path / "mix.toml"
    text = f"""
        model = "{GOLDEN / "base_dev"}"
        steps = 1
        gradient_checkpointing = "off"
        adapter = {{rank = 4}}
        optimizer = {{name = "adamw", lr = 1e-3}}
        [[data]]
        dir = "{GOLDEN / "train_data"}"
        resolution = 256
        [[data]]
        dir = "{small}"
        resolution = 128
        weight = 2
    """
    recipe.write_text("\n".join(line.strip() for line in text.splitlines()))
    arguments = ["urae", "train", str(recipe), "--output", str(tmp_path / "run")]
    monkeypatch.setattr("sys.argv", arguments)
    with pytest.raises(SystemExit) as stop:
        main()
    assert stop.value.code == 0
    assert (tmp_path / "run" / "pytorch_lora_weights.safetensors").exists()
    monkeypatch.setattr("sys.argv", [*arguments, "--data", str(small), "--overwrite"])
    with pytest.raises(SystemExit) as stop:
        main()
    assert stop.value.code == 2
    assert "name the data once" in capsys.readouterr().err


def test_a_plan_counts_every_folder(mix):
    plan = plan_training(mix(steps=20), gpu_bytes=24 * 2**30)
    assert sum(bucket.num_samples for bucket in plan.buckets) == 10
    assert plan.num_epochs == 2


def test_a_probe_takes_the_largest(mix):
    reports = probe(mix()).reports
    assert {(report.height, report.width) for report in reports} == {(256, 256)}


def test_folders_that_do_not_go_together(mix, small):
    twice = (DataConfig(small, 128), DataConfig(small, 128))
    with pytest.raises(ValueError, match="is named twice; give it a weight of 2"):
        train(mix(data=twice))
    with pytest.raises(ValueError, match="resolution is 128, but this run needs 256"):
        train(mix(data=(DataConfig(small, 256),)))
    with pytest.raises(ValueError, match="weight 0 must be a whole number of at least 1"):
        DataConfig(small, 128, weight=0)
    with pytest.raises(ValueError, match="name the data once"):
        mix(data=())
