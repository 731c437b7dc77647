"""Batches read and drawn a step ahead, their samples side by side, beside the device's work."""

import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import fields
from types import TracebackType
from typing import NamedTuple, Self

import torch
from torch import Tensor

from urae.features.dataset import Sample
from urae.features.order import Order, StepBatch, StepShare
from urae.train.batch import Batch, Draws, sample_batch
from urae.train.config import TrainConfig

_CPU = torch.device("cpu")
_MOST_READERS = 8


class Loaded(NamedTuple):
    """A batch and what it is made of."""

    samples: list[Sample]
    batch: Batch


class Loader:
    """Draws a rank's batches, the next one in a thread; use it as a context.

    A batch is a function of its place alone, so drawing ahead changes nothing.
    """

    def __init__(
        self,
        samples: Sequence[Sample],
        draws: Draws,
        config: TrainConfig,
        device: torch.device,
        *,
        end: int,
        rank: int = 0,
        num_ranks: int = 1,
    ) -> None:
        """Begin with nothing drawn.

        Args:
            samples: To train on.
            draws: By which rules.
            config: Of the run.
            device: Where batches go.
            end: Batches of the whole run, on all ranks.
            rank: Of those that have batches of their own, from 0.
            num_ranks: How many these are.
        """
        self.waited_seconds = 0.0
        """In all, for batches."""
        self._samples, self._draws, self._device = samples, draws, device
        self._pinned = device.type == "cuda"  # memory that a GPU copies from beside its work
        self._order = Order(samples, config.batch_size, seed=config.seed)
        self._turns, self._rank, self._num_ranks = config.gradient_accumulation, rank, num_ranks
        self._end = end
        self._next: dict[tuple[int, int], Future[Loaded]] = {}
        self._thread = ThreadPoolExecutor(1, "urae-loader")
        self._readers = ThreadPoolExecutor(min(config.batch_size, _MOST_READERS), "urae-reader")

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        for threads in (self._thread, self._readers):
            threads.shutdown(wait=True, cancel_futures=True)

    def share(self, first: int) -> StepShare:
        """Say what this rank trains on in a step.

        Args:
            first: Batches that the run, on all ranks, has trained on before.
        """
        return self._order.share(first, self._turns, rank=self._rank, num_ranks=self._num_ranks)

    def take(self, first: int, index: int) -> Loaded:
        """Return a batch on the device, and start drawing the next one.

        Args:
            first: As in `share`.
            index: Of the batch in the share.
        """
        began = time.perf_counter()
        place = (first, index)
        found = (self._next.pop(place, None) or self._submit(place)).result()
        self._next.clear()
        after = (first, index + 1)
        if after[1] == self._turns:
            after = (first + self._turns * self._num_ranks, 0)
        if after[0] < self._end:
            self._next[after] = self._submit(after)
        batch = _move(
            found.batch, lambda tensor: tensor.to(self._device, non_blocking=self._pinned)
        )
        self.waited_seconds += time.perf_counter() - began
        return Loaded(found.samples, batch)

    def _submit(self, place: tuple[int, int]) -> Future[Loaded]:
        first, index = place
        return self._thread.submit(self._draw, self.share(first).batches[index])

    def _draw(self, chosen: StepBatch) -> Loaded:
        samples = [self._samples[at] for at in chosen.indices]
        drawn = sample_batch(samples, chosen.counters, self._draws, _CPU, readers=self._readers)
        if self._pinned:
            drawn = _move(drawn, Tensor.pin_memory)
        return Loaded(samples, drawn)


def _move(batch: Batch, move: Callable[[Tensor], Tensor]) -> Batch:
    return Batch(*(move(getattr(batch, each.name)) for each in fields(Batch)))
