"""Captions in training: columns by weight, and samples without any."""

import shutil
from dataclasses import replace

import pytest
import torch
from safetensors.torch import load_file

from urae.config import override
from urae.features.cache import CacheConfig, cache
from urae.features.dataset import load_embeds
from urae.features.store import empty_prompt_path
from urae.train import loop as loop_module
from urae.train import train
from urae.train.batch import sample_batch
from urae.train.inputs import check_inputs

CPU = torch.device("cpu")


@pytest.fixture
def data_dir(settings, tmp_path):
    """The reference's features, with the empty prompt's beside them."""
    folder = shutil.copytree(settings().data_dir, tmp_path / "data")
    cache(CacheConfig(folder, settings().model, 256, 48))
    return folder


def draw(inputs, count=300, **changes):
    draws = replace(inputs.draws, **changes)
    return sample_batch(inputs.samples[:1] * count, range(count), draws, CPU)


def test_dropped_captions_are_the_empty_prompt(settings, data_dir):
    inputs = check_inputs(settings(data_dir=data_dir, caption_dropout=0.3))
    empty, pooled = load_embeds(empty_prompt_path(data_dir))
    plain, dropped = draw(inputs, caption_dropout=0.0), draw(inputs)
    is_empty = (dropped.prompt_embeds == empty).flatten(1).all(1)
    assert torch.equal(is_empty, (dropped.pooled_prompt_embeds == pooled).all(1))
    assert abs(is_empty.sum() - 90) < 40  # five standard deviations of the binomial
    # all else is drawn as without it
    assert torch.equal(plain.prompt_embeds[~is_empty], dropped.prompt_embeds[~is_empty])
    for name in ("latents", "noise", "sigmas"):
        assert torch.equal(getattr(plain, name), getattr(dropped, name))


def test_a_run_without_captions_is_another(settings, data_dir, tmp_path):
    config = settings(data_dir=data_dir, num_validation=1)
    runs = [
        train(replace(config, caption_dropout=share, output_dir=tmp_path / str(share)))
        for share in (0.0, 1.0)
    ]
    weights = [load_file(run.adapter_path) for run in runs]
    assert not all(torch.equal(weights[0][key], weights[1][key]) for key in weights[0])
    first_rows = [
        (run.adapter_path.parent / "validation.csv").read_text().splitlines()[1] for run in runs
    ]
    assert first_rows[0] == first_rows[1]  # held-out samples keep their captions


def test_a_cache_without_the_empty_prompt(settings, monkeypatch):
    monkeypatch.setattr(loop_module, "load_transformer", None)
    message = (
        r"needs the empty prompt's embeddings, .* in .*train_data; run `urae cache` on the folder"
    )
    with pytest.raises(ValueError, match=message):
        train(settings(caption_dropout=0.1))


def test_an_empty_prompt_of_another_length(settings, data_dir):
    cache(CacheConfig(data_dir, settings().model, 256, 32))
    with pytest.raises(ValueError, match=r"empty_prompt_.*max_sequence_length is 32, but this run"):
        check_inputs(settings(data_dir=data_dir, caption_dropout=0.1))
    check_inputs(settings(data_dir=data_dir))  # who does not need it does not mind


def test_another_empty_prompt_is_other_data(settings, data_dir):
    config = settings(data_dir=data_dir, caption_dropout=0.5)
    before = check_inputs(config).data_hash
    path = empty_prompt_path(data_dir)
    source = next(data_dir.glob("*_prompt_embed.safetensors"))
    shutil.copy(source, path)
    assert check_inputs(config).data_hash != before


def test_weights_of_columns(settings):
    inputs = check_inputs(settings(caption_weights={"prompt": 1.0}))
    embeds, _ = load_embeds(inputs.samples[0].embed_files["prompt"])
    assert (draw(inputs, 50).prompt_embeds == embeds).all()
    with pytest.raises(ValueError, match=r"caption_weights has a column 'promt', which no picture"):
        check_inputs(settings(caption_weights={"promt": 1.0}))


def test_weights_on_the_command_line():
    settings = {}
    override(settings, ["--caption-weights.prompt", "0.3", "--caption-weights.long", "1"])
    assert settings == {"caption_weights": {"prompt": 0.3, "long": 1}}
    settings = {}
    override(settings, ["--caption-weights", '{"a-b" = 2}'])
    assert settings == {"caption_weights": {"a-b": 2}}
