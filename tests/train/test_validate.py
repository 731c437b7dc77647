"""Held-out samples, the loss on them, and the loss at each noise level."""

import csv
from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from urae.features.dataset import list_samples
from urae.resolution import ResolutionPolicy
from urae.train import loader as loader_module
from urae.train import loop as loop_module
from urae.train import monitor as monitor_module
from urae.train import train
from urae.train.checkpoint import find_checkpoints
from urae.train.loss import mean_levels, sum_levels
from urae.train.output import read_validation
from urae.train.validate import hold_out


def rows(path: Path) -> list[dict[str, str]]:
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


def same(one: Path, other: Path) -> bool:
    first, second = load_file(one), load_file(other)
    return first.keys() == second.keys() and all(torch.equal(first[k], second[k]) for k in first)


def test_held_out_samples_do_not_train(settings, monkeypatch):
    trained, draw = set(), loader_module.sample_batch

    def record(samples, *others, **options):
        trained.update(sample.stem for sample in samples)
        return draw(samples, *others, **options)

    monkeypatch.setattr(loader_module, "sample_batch", record)
    config = settings(steps=6, num_validation=1)
    train(config)
    samples = list_samples(config.data_dir)
    _, held_out = hold_out(samples, 1, config.seed)
    assert trained == {sample.stem for sample in samples} - {held_out[0].stem}


def test_all_held_out_is_refused(settings):
    with pytest.raises(ValueError, match="num_validation 4 must be below 4, the number of samples"):
        train(settings(num_validation=4))


def test_a_picture_is_held_out_in_all_its_sizes(settings):
    samples = list_samples(settings().data_dir)
    larger = [replace(sample, height=2 * sample.height) for sample in samples]
    train_samples, held_out = hold_out([*samples, *larger], 1, 0)
    assert len(held_out) == 2 and len(train_samples) == 2 * len(samples) - 2
    assert len({sample.stem for sample in held_out}) == 1


def test_measuring_changes_nothing_and_repeats(settings, tmp_path):
    often = settings(num_validation=2, validate_every=1)
    seldom = replace(often, validate_every=100, output_dir=tmp_path / "seldom")
    assert same(train(often).adapter_path, train(seldom).adapter_path)
    dense, sparse = (rows(c.output_dir / "validation.csv") for c in (often, seldom))
    assert [row["step"] for row in dense] == ["0", "1", "2", "3", "4"]
    assert [row["step"] for row in sparse] == ["0", "4"]
    assert [dense[0], dense[4]] == sparse  # to the last digit
    assert float(dense[0]["loss"]) == pytest.approx(
        sum(float(dense[0][f"loss_q{number}"]) for number in range(1, 5)) / 4
    )
    of_samples = [float(dense[0][f"sample_{number}"]) for number in (1, 2)]
    assert of_samples[0] != of_samples[1]
    assert float(dense[0]["loss"]) == pytest.approx(sum(of_samples) / 2)


def test_the_curve_resumes(settings, tmp_path):
    config = settings(num_validation=1, validate_every=1, checkpoint_every=2, ema_decay=0.9)
    whole = replace(config, output_dir=tmp_path / "whole")
    train(whole)
    train(replace(config, steps=3))
    find_checkpoints(config.output_dir)[-1].discard()
    train(replace(config, resume=True))
    resumed = rows(config.output_dir / "validation.csv")
    assert resumed == rows(whole.output_dir / "validation.csv")
    assert len(resumed) == 5


def test_a_run_reports_its_held_out_losses_and_all_steps_after_a_resume(settings):
    reports = []
    run = partial(settings, num_validation=1, validate_every=2, checkpoint_every=2)
    first = train(run(steps=2), on_step=reports.append)
    again = train(run(steps=4, resume=True), on_step=reports.append)
    measured = [sum(each) / len(each) for _, each in read_validation(settings().output_dir)]
    assert list(again.held_out_losses) == pytest.approx(measured)
    assert again.losses == tuple(report.loss for report in reports)
    assert (first.num_steps, again.num_steps) == (2, 2)
    assert [report.held_out_loss for report in reports] == [
        again.held_out_losses[at] for at in (0, 0, 1, 1)
    ]
    done = train(run(steps=4, resume=True))
    assert (done.num_steps, done.losses) == (0, again.losses)
    assert done.held_out_losses == again.held_out_losses


def test_what_failed_to_be_measured_is_made_up_for(settings, monkeypatch):
    measure, calls = monitor_module.measure_loss, []

    def fail(*arguments):
        calls.append(arguments)
        if len(calls) == 2:
            raise MemoryError("full")
        return measure(*arguments)

    monkeypatch.setattr(monitor_module, "measure_loss", fail)
    run = partial(settings, num_validation=1, validate_every=2, steps=4)
    with pytest.raises(MemoryError, match="full"):
        train(run())
    for _ in range(2):  # the second finds all measured
        train(run(resume=True))
        assert [step for step, _ in read_validation(settings().output_dir)] == [0, 2, 4]
    assert len(calls) == 4


def test_a_changed_policy_of_the_base_is_no_way_to_go_on(settings, monkeypatch):
    train(settings(steps=1))
    other = ResolutionPolicy(ntk_factor=3.0)
    # the checkpoint's adapter, from which it goes on, would say what it was
    monkeypatch.setattr(loop_module, "choose_policy", lambda *_: other)
    with pytest.raises(
        ValueError, match=r"the run started with ResolutionPolicy.* which its base or"
    ):
        train(settings(steps=2, resume=True))


def test_the_loss_of_each_noise_level(settings):
    losses, sigmas = torch.tensor([1.0, 2.0, 4.0, 8.0]), torch.tensor([0.25, 0.251, 0.001, 1.0])
    sums = sum_levels(losses, sigmas)
    assert mean_levels(sums.flatten().tolist()) == (2.5, 2.0, None, 8.0)
    config = settings(gradient_accumulation=3)
    train(config)
    for row in rows(config.output_dir / "loss.csv"):
        found = [float(row[f"loss_q{number}"]) for number in range(1, 5) if row[f"loss_q{number}"]]
        assert 1 <= len(found) <= 3
        assert min(found) <= float(row["loss"]) <= max(found)
