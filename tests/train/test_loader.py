"""Batches drawn ahead are those that are drawn when they are wanted."""

import threading

import pytest
import torch

from urae.features.order import Order
from urae.train import loader as module
from urae.train.batch import sample_batch
from urae.train.inputs import check_inputs
from urae.train.loader import Loader

CPU = torch.device("cpu")


@pytest.fixture
def build(settings):
    config = settings(batch_size=2)
    inputs = check_inputs(config)

    def build(end=8, **ranks):
        return Loader(inputs.samples, inputs.draws, config, CPU, end=end, **ranks)

    return build


def test_batches_are_a_function_of_their_places(build, settings):
    config = settings(batch_size=2)
    inputs = check_inputs(config)
    order = Order(inputs.samples, 2, seed=config.seed)
    with build(rank=1, num_ranks=2) as loader:
        for first in (2, 4, 5, 6):  # 5 was not expected
            samples, batch = loader.take(first, 0)
            (chosen,) = order.share(first, 1, rank=1, num_ranks=2).batches
            assert loader.share(first).batches == (chosen,)
            assert samples == [inputs.samples[at] for at in chosen.indices]
            wanted = sample_batch(samples, chosen.counters, inputs.draws, CPU)
            for name in ("latents", "noise", "sigmas", "prompt_embeds"):
                assert torch.equal(getattr(batch, name), getattr(wanted, name))
    assert loader.waited_seconds > 0


def test_the_next_batch_is_drawn_meanwhile(build, monkeypatch):
    drawn, begun = [], threading.Event()
    draw = module.sample_batch

    def watch(samples, counters, *rest, **options):
        drawn.append(counters[0] // 2)
        if len(drawn) == 2:
            begun.set()
        return draw(samples, counters, *rest, **options)

    monkeypatch.setattr(module, "sample_batch", watch)
    with build(end=6) as loader:
        loader.take(4, 0)
        assert begun.wait(10)
        loader.take(5, 0)
    assert drawn == [4, 5]  # and none after the run's end


def test_an_error_comes_with_its_own_batch(build, monkeypatch):
    draw = module.sample_batch

    def fail(samples, counters, *rest, **options):
        if counters[0] == 2:
            raise ValueError("damaged")
        return draw(samples, counters, *rest, **options)

    monkeypatch.setattr(module, "sample_batch", fail)
    with build() as loader:
        loader.take(0, 0)
        with pytest.raises(ValueError, match="damaged"):
            loader.take(1, 0)
