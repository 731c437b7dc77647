"""Optimizers by name: each goes on bitwise from a checkpoint, and gives the weights it is for."""

import csv
import math
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

from urae.train import OptimizerConfig, train
from urae.train import loop as loop_module
from urae.train.checkpoint import find_checkpoints, load_optimizer, save_checkpoint
from urae.train.optimizer import (
    PACKAGES,
    build_optimizer,
    build_schedule,
    read_lr,
    weights_to_use,
)

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


@pytest.mark.parametrize("schedule", ["constant", "cosine"])
def test_it_goes_down(optimizer, schedule):
    if optimizer.name == "schedule-free":
        schedule = "constant"
    config = replace(optimizer, schedule=schedule, warmup_steps=5)
    parameters, built = build(config)
    rule = build_schedule(built, config, num_steps=40, step=0)
    before = sum(float(p.detach().square().sum()) for p in parameters)
    for number in range(40):
        step(parameters, built, number)
        rule.step()
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


def test_eight_bit_states_that_share_tables_are_saved(tmp_path):
    pytest.importorskip("bitsandbytes")
    large = [torch.randn(64, 128, generator=torch.Generator().manual_seed(n)) for n in range(2)]
    parameters, built = build(OptimizerConfig("adamw8bit", lr=1e-2), large)
    step(parameters, built, 0)
    checkpoint = save_checkpoint(
        tmp_path, 1, write_weights=lambda _: None, optimizer=built, record={}, keep=1
    )
    again, rebuilt = build(OptimizerConfig("adamw8bit", lr=1e-2), [p.detach() for p in parameters])
    load_optimizer(checkpoint, rebuilt)
    for each, other in ((parameters, built), (again, rebuilt)):
        step(each, other, 1)
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


def fail_at_three(report):
    if report.step == 3:
        raise InterruptedError


@pytest.mark.parametrize(
    ("ema_decay", "schedule", "warmup_steps"),
    [
        (None, "constant", 0),
        pytest.param(0.9, "constant", 0, marks=pytest.mark.slow),
        pytest.param(None, "cosine", 2, marks=pytest.mark.slow),
    ],
)
def test_resume_is_bitwise(settings, tmp_path, optimizer, ema_decay, schedule, warmup_steps):
    if optimizer.name == "schedule-free":
        schedule = "constant"
    optimizer = replace(optimizer, schedule=schedule, warmup_steps=warmup_steps)
    config = settings(optimizer=optimizer, ema_decay=ema_decay)
    whole = train(replace(config, num_validation=1, validate_every=3))
    parts = replace(
        config,
        output_dir=tmp_path / "parts",
        num_validation=1,
        validate_every=1,
        checkpoint_every=1,
    )
    with pytest.raises(InterruptedError):  # before the checkpoint of step 3, as if killed
        train(parts, on_step=fail_at_three)
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
    assert rates_of(parts.output_dir) == rates_of(config.output_dir)


# --- the schedule ---------------------------------------------------------------------------------


def rates_of(output_dir: Path) -> list[float]:
    with (output_dir / "loss.csv").open() as file:
        return [float(row["lr"]) for row in csv.DictReader(file)]


def cosine(*progress: float) -> list[float]:
    return [(1 + math.cos(math.pi * each)) / 2 for each in progress]


@pytest.mark.parametrize(
    ("schedule", "warmup_steps", "shares"),
    [
        ("constant", 0, [1, 1, 1, 1, 1, 1]),
        ("constant", 2, [0, 1 / 2, 1, 1, 1, 1]),
        ("linear", 0, [1, 5 / 6, 4 / 6, 3 / 6, 2 / 6, 1 / 6]),
        ("linear", 2, [0, 1 / 2, 1, 3 / 4, 2 / 4, 1 / 4]),
        ("cosine", 0, cosine(0, 1 / 6, 2 / 6, 3 / 6, 4 / 6, 5 / 6)),
        ("cosine", 2, [0, 1 / 2, *cosine(0, 1 / 4, 2 / 4, 3 / 4)]),
        ("cosine", 8, [0, 1 / 8, 2 / 8, 3 / 8, 4 / 8, 5 / 8]),
    ],
)
def test_the_rates_are_those_of_the_schedule(schedule, warmup_steps, shares):
    """From any step on, whatever rate the state of the optimizer holds."""
    config = OptimizerConfig("adamw", lr=1e-2, schedule=schedule, warmup_steps=warmup_steps)
    for start in range(6):
        parameters, built = build(config)
        built.param_groups[0]["lr"] = 7.0
        rule = build_schedule(built, config, num_steps=6, step=start)
        rates = []
        for number in range(start, 6):
            step(parameters, built, number)
            rates.append(read_lr(built))
            rule.step()
        assert rates == pytest.approx([1e-2 * share for share in shares[start:]], abs=1e-12)


def test_a_constant_rate_is_the_recipes_to_the_bit(settings, optimizer):
    train(settings(optimizer=optimizer, steps=3))
    factor = 1e-6 if optimizer.name == "prodigy" else 1.0  # where it begins to look for it
    assert rates_of(settings().output_dir) == [factor * optimizer.lr] * 3


def test_each_optimizer_steps_at_the_rate_of_the_schedule(optimizer):
    """Steps are in proportion to the rate, so at a rate of 0 nothing moves."""
    config = replace(optimizer, warmup_steps=1)
    parameters, built = build(config)
    before = [parameter.detach().clone() for parameter in parameters]
    rule = build_schedule(built, config, num_steps=2, step=0)
    step(parameters, built, 0)
    moved = any(not torch.equal(*pair) for pair in zip(parameters, before, strict=True))
    assert moved == (optimizer.name == "schedule-free")  # whose own warm-up of 1 is none
    rule.step()
    step(parameters, built, 1)
    assert not all(torch.equal(*pair) for pair in zip(parameters, before, strict=True))
    assert read_lr(built) == optimizer.lr * built.param_groups[0].get("d", 1.0)


def test_schedule_free_warms_up_by_itself(settings, schedule_free):
    train(settings(optimizer=replace(schedule_free, warmup_steps=4), steps=6))
    rates = rates_of(settings().output_dir)
    assert rates == pytest.approx([1e-2 * share for share in (1 / 4, 2 / 4, 3 / 4, 1, 1, 1)])


def test_a_resumed_run_of_other_steps_follows_their_schedule(settings, caplog):
    """The steps that are done stay; the rate goes on where a run of as many steps would be."""
    optimizer = OptimizerConfig("adamw", lr=1e-2, schedule="linear")
    train(settings(optimizer=optimizer, steps=2))
    assert not caplog.records
    config = settings(optimizer=optimizer, steps=5, resume=True)
    train(config)
    assert rates_of(config.output_dir) == pytest.approx([1e-2, 5e-3, 6e-3, 4e-3, 2e-3])
    (warning,) = caplog.messages
    assert warning == (
        "steps was 2 and is now 5; from step 3 on, the learning rate follows the linear "
        "schedule over 5 steps instead of 2"
    )


def test_another_schedule_is_refused(settings):
    optimizer = OptimizerConfig("adamw", lr=1e-2, schedule="linear")
    train(settings(optimizer=optimizer, steps=1))
    other = replace(optimizer, schedule="cosine")
    with pytest.raises(ValueError, match=r"optimizer.schedule = linear, but the run now says cosi"):
        train(settings(optimizer=other, resume=True))


# --- weights to use -------------------------------------------------------------------------------


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
