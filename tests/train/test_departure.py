"""Early warnings: a held-out loss that rises, previews that stay as they were."""

import logging
import random
import shutil
from dataclasses import replace

import numpy as np
import pytest
from PIL import Image

from urae.train import OptimizerConfig, train
from urae.train.checkpoint import find_checkpoints
from urae.train.departure import MIN_STEPS, Measurement, find_rise, measure_change

pytestmark = pytest.mark.usefixtures("few_steps")

NUM_HELD_OUT = 8


def measurements(*offsets, count=NUM_HELD_OUT, noise=0.0, seed=0):
    """Losses of samples that differ by far more than they change."""
    shuffler = random.Random(seed)
    return [
        Measurement(
            100 * index,
            tuple(sample + offset + shuffler.gauss(0, noise) for sample in range(count)),
        )
        for index, offset in enumerate(offsets)
    ]


def test_a_rise_is_found_among_samples_that_differ():
    best = find_rise(measurements(0.0, -0.3, -0.1, -0.05, noise=0.01))
    assert (best.step, round(best.mean, 1)) == (100, 3.2)


@pytest.mark.parametrize(
    "offsets",
    [
        (0.0, -0.1, -0.2, -0.3),  # falling
        (0.0, -0.3, -0.3, -0.1),  # one measurement is no rise
        (0.0, 0.1),  # too short
        (),
    ],
)
def test_no_rise(offsets):
    assert find_rise(measurements(*offsets, noise=0.01)) is None


def test_few_samples_say_nothing():
    assert find_rise(measurements(0.0, 0.1, 0.2, count=7, noise=0.01)) is None


def test_chance_is_seldom_taken_for_a_rise():
    runs = [measurements(*[0.0] * 10, noise=0.1, seed=seed) for seed in range(200)]
    warned = [any(find_rise(run[:end]) for end in range(3, 11)) for run in runs]
    assert sum(warned) < 0.1 * len(runs)


@pytest.fixture
def data_dir(settings, tmp_path):
    """Nine samples, of which eight can be held out."""
    folder = tmp_path / "data"
    folder.mkdir()
    for path in settings().data_dir.glob("image_2_*"):
        for number in range(NUM_HELD_OUT + 1):
            shutil.copy(path, folder / path.name.replace("image_2", f"copy_{number}"))
    return folder


def test_a_run_that_departs_says_so_also_when_resumed(settings, data_dir, caplog):
    config = settings(
        data_dir=data_dir,
        steps=6,
        num_validation=NUM_HELD_OUT,
        validate_every=2,
        checkpoint_every=2,
        optimizer=OptimizerConfig("adamw", lr=100.0),
    )
    with caplog.at_level(logging.WARNING):
        train(config)
    (first, *_) = texts = [each.getMessage() for each in caplog.records]
    assert "the held-out loss has risen from" in first and "the adapter is getting worse" in first
    assert "at step 0 to" in first and "at step 4:" in first
    assert "use none of this run, or try a lower learning rate" in first
    caplog.clear()
    find_checkpoints(config.output_dir)[-1].discard()
    with caplog.at_level(logging.WARNING):
        train(replace(config, resume=True))
    assert [each.getMessage() for each in caplog.records] == texts[1:]


def test_a_run_that_learns_says_nothing(settings, data_dir, caplog):
    config = settings(
        data_dir=data_dir,
        steps=12,
        num_validation=NUM_HELD_OUT,
        validate_every=4,
        preview_prompts=("a lighthouse",),
        preview_every=12,
        optimizer=OptimizerConfig("adamw", lr=1e-2),
    )
    with caplog.at_level(logging.WARNING):
        train(config)
    assert not caplog.records
    assert measure_change(config.output_dir)[:2] == (0, 12)


def test_an_adapter_that_does_nothing_is_told_of_once_it_should(settings, caplog):
    config = settings(
        steps=MIN_STEPS,
        preview_prompts=("a lighthouse",),
        preview_every=MIN_STEPS // 2,
        optimizer=OptimizerConfig("adamw", lr=1e-12),
    )
    with caplog.at_level(logging.WARNING):
        train(config)
    (record,) = caplog.records
    assert "the previews of step 20 differ from those of step 0 by 0.00 of 255" in record.message


def test_the_picture_that_changed_most_counts(tmp_path):
    def write(name, step, level):
        path = tmp_path / "previews" / name / f"step-{step:06d}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(np.full((4, 4, 3), level, np.uint8)).save(path)

    write("a", 0, 10)
    assert measure_change(tmp_path) == (0, 0, 0.0)
    for step, level in ((5, 90), (10, 12)):
        write("a", step, level)
    write("b", 5, 100)
    write("b", 10, 97)
    assert measure_change(tmp_path) == (0, 10, 3.0)
