"""Optimizers by name: each goes on bitwise from a checkpoint, and gives the weights it is for."""

from dataclasses import replace

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

from urae.train import OptimizerConfig, train
from urae.train import loop as loop_module
from urae.train.checkpoint import find_checkpoints, load_optimizer, save_checkpoint
from urae.train.optimizer import PACKAGES, build_optimizer, weights_to_use

NAMES = ["adamw", "adamw8bit", "muon", "prodigy", "schedule-free"]


@pytest.fixture(params=NAMES)
def optimizer(request) -> OptimizerConfig:
    if request.param in PACKAGES:
        pytest.importorskip(PACKAGES[request.param])
    return OptimizerConfig(request.param, lr=1.0 if request.param == "prodigy" else 1e-2)


@pytest.fixture
def schedule_free() -> OptimizerConfig:
    pytest.importorskip("schedulefree")
    return OptimizerConfig("schedule-free", lr=1e-2)


def build(config, weights=None):
    if weights is None:  # above the 4,096 numbers under which the 8-bit optimizer keeps 32 bits
        weights = [torch.randn(shape, generator=seeded(0)) for shape in ((8, 640), (64, 16))]
    parameters = [nn.Parameter(weight.clone()) for weight in weights]
    return parameters, build_optimizer(parameters, config)


def seeded(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def step(parameters, optimizer, number):
    """Step towards zero, with some noise."""
    generator = seeded(number)
    for parameter in parameters:
        noise = torch.randn(parameter.shape, generator=generator)
        parameter.grad = parameter.detach() + 0.1 * noise
    optimizer.step()


def same(one, other) -> bool:
    first, second = load_file(one), load_file(other)
    return first.keys() == second.keys() and all(torch.equal(first[k], second[k]) for k in first)


def test_it_goes_down(optimizer):
    parameters, built = build(optimizer)
    before = sum(float(p.detach().square().sum()) for p in parameters)
    for number in range(40):
        step(parameters, built, number)
    with weights_to_use(built):
        assert sum(float(p.detach().square().sum()) for p in parameters) < before


def test_its_state_comes_back_to_the_bit(optimizer, tmp_path):
    parameters, built = build(optimizer)
    for number in range(3):
        step(parameters, built, number)
    checkpoint = save_checkpoint(
        tmp_path, 3, write_weights=lambda _: None, optimizer=built, record={}, keep=1
    )
    again, rebuilt = build(optimizer, [p.detach() for p in parameters])
    load_optimizer(checkpoint, rebuilt)
    for number in range(3, 6):
        step(parameters, built, number)
        step(again, rebuilt, number)
    assert all(torch.equal(one, other) for one, other in zip(parameters, again, strict=True))


def test_the_eight_bit_state_is_of_eight_bits(tmp_path):
    pytest.importorskip("bitsandbytes")
    parameters, built = build(OptimizerConfig("adamw8bit", lr=1e-2))
    step(parameters, built, 0)
    checkpoint = save_checkpoint(
        tmp_path, 1, write_weights=lambda _: None, optimizer=built, record={}, keep=1
    )
    state = load_file(checkpoint.path / "optimizer.safetensors")
    assert sum(t.dtype == torch.uint8 for t in state.values()) == 2  # of the larger matrix


@pytest.mark.parametrize("ema_decay", [None, 0.9])
def test_resume_is_bitwise(settings, tmp_path, optimizer, ema_decay):
    config = settings(optimizer=optimizer, ema_decay=ema_decay)
    whole = train(replace(config, num_validation=1, validate_every=3))
    parts = replace(
        config,
        output_dir=tmp_path / "parts",
        num_validation=1,
        validate_every=1,
        checkpoint_every=1,
    )
    train(replace(parts, steps=3))
    find_checkpoints(parts.output_dir)[-1].discard()  # as in a run that was killed
    resumed = train(replace(parts, resume=True))
    assert same(whole.adapter_path, resumed.adapter_path)
    folders = [find_checkpoints(each.output_dir)[-1].path for each in (config, parts)]
    for name in ("optimizer.safetensors", "pytorch_lora_weights.safetensors"):
        assert same(folders[0] / name, folders[1] / name)
    plain = [folder / "plain_lora_weights.safetensors" for folder in folders]
    averaged = ema_decay is not None or optimizer.name == "schedule-free"
    assert [path.exists() for path in plain] == [averaged] * 2
    if averaged:
        assert same(*plain)
        assert not same(plain[0], folders[0] / "pytorch_lora_weights.safetensors")


def test_schedule_free_weights_are_the_average_of_its_steps(schedule_free):
    """Each step's z weighs the same at a constant learning rate."""
    (weight,), built = build(schedule_free, [torch.ones(4, 8)])
    points = []
    for number in range(5):
        step([weight], built, number)
        points.append(built.state[weight]["z"].clone())
    trained = weight.detach().clone()
    with weights_to_use(built):
        assert torch.allclose(weight, torch.stack(points).mean(0), atol=1e-6)
    assert torch.equal(weight, trained)
    assert built.param_groups[0]["train_mode"]


def test_a_failure_while_they_are_in_place_leaves_the_trained_weights(schedule_free):
    (weight,), built = build(schedule_free, [torch.ones(4, 8)])
    for number in range(3):
        step([weight], built, number)
    trained = weight.detach().clone()
    with pytest.raises(KeyError), weights_to_use(built):
        raise KeyError
    assert torch.equal(weight, trained)


def test_a_missing_package_is_named_before_weights_load(settings, monkeypatch):
    monkeypatch.setattr(loop_module, "load_transformer", None)
    monkeypatch.setattr(loop_module, "find_spec", lambda name: None)
    for name, package in PACKAGES.items():
        message = f"{name} needs the package {package}: pip install {package}"
        with pytest.raises(ModuleNotFoundError, match=message):
            train(settings(optimizer=OptimizerConfig(name)))
