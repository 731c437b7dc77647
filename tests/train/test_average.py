"""The moving average of an adapter's weights."""

from dataclasses import replace

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

from urae.train import train
from urae.train.average import Average
from urae.train.checkpoint import find_checkpoints


def test_the_average_is_the_formula():
    weights = [nn.Parameter(torch.zeros(3)), nn.Parameter(torch.ones(2, 2))]
    average = Average(weights, 0.9, None)
    wanted = [weight.detach().double() for weight in weights]
    for step in range(1, 200):
        with torch.no_grad():
            for weight in weights:
                weight.add_(step)
        average.update(step)
        decay = min(0.9, (1 + step) / (10 + step))
        pairs = zip(wanted, weights, strict=True)
        wanted = [decay * old + (1 - decay) * new.detach().double() for old, new in pairs]
    for found, exact in zip(average.weights, wanted, strict=True):
        assert torch.allclose(found.double(), exact, rtol=1e-5)


def test_it_stands_in_for_a_while():
    weight = nn.Parameter(torch.zeros(3))
    average = Average([weight], 0.9, [torch.ones(3)])
    with pytest.raises(KeyError), average.in_place():
        assert weight.sum() == 3
        raise KeyError
    assert weight.sum() == 0


@pytest.mark.parametrize("kind", ["lora", "minor"])
def test_it_resumes_bitwise(settings, minor, tmp_path, kind):
    config = settings(ema_decay=0.99, checkpoint_every=1)
    config = replace(config, adapter=minor) if kind == "minor" else config
    whole = train(config)
    parts = replace(config, output_dir=tmp_path / "parts")
    train(replace(parts, steps=2))
    resumed = train(replace(parts, resume=True))
    names = ["pytorch_lora_weights.safetensors", "plain_lora_weights.safetensors"]
    folders = [find_checkpoints(each.output_dir)[-1].path for each in (config, parts)]
    pairs = [(whole.adapter_path, resumed.adapter_path)]
    pairs += [(folders[0] / name, folders[1] / name) for name in names]
    for one, other in pairs:
        first, second = load_file(one), load_file(other)
        assert all(torch.equal(first[key], second[key]) for key in first)
    averaged, plain = (load_file(folders[0] / name) for name in names)
    finished = load_file(whole.adapter_path)
    assert all(torch.equal(finished[key], averaged[key]) for key in averaged)
    assert not all(torch.equal(plain[key], averaged[key]) for key in averaged)


def test_the_trained_weights_do_not_notice(settings, tmp_path):
    train(settings(ema_decay=0.99))
    plain = train(settings(output_dir=tmp_path / "plain"))
    kept = find_checkpoints(settings().output_dir)[-1].path / "plain_lora_weights.safetensors"
    found = load_file(kept)
    assert all(torch.equal(found[key], t) for key, t in load_file(plain.adapter_path).items())
