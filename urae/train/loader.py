"""Batches read and drawn a step ahead, beside the device's work."""

import time
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import fields
from types import TracebackType
from typing import NamedTuple, Self

import torch
from torch import Tensor

from urae.features.dataset import Sample, batch_for_step
from urae.train.batch import Batch, Draws, sample_batch
from urae.train.config import TrainConfig

_CPU = torch.device("cpu")


class Loaded(NamedTuple):
    """A batch and what it is made of."""

    samples: list[Sample]
    batch: Batch


class Loader:
    """Draws batches by their numbers, the next one in a thread; use it as a context.

    A batch is a function of its number alone, so drawing ahead changes nothing.
    """

    def __init__(
        self,
        samples: Sequence[Sample],
        draws: Draws,
        config: TrainConfig,
        device: torch.device,
        *,
        end: int,
        stride: int = 1,
    ) -> None:
        """Begin with nothing drawn.

        Args:
            samples: To train on.
            draws: By which rules.
            config: Of the run.
            device: Where batches go.
            end: Number of the batch after the run's last one.
            stride: From one batch of this process to its next.
        """
        self.waited_seconds = 0.0
        """In all, for batches."""
        self._samples, self._draws, self._config = samples, draws, config
        self._device, self._end, self._stride = device, end, stride
        self._next: dict[int, Future[Loaded]] = {}
        self._thread = ThreadPoolExecutor(1, "urae-loader")

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._thread.shutdown(wait=True, cancel_futures=True)

    def take(self, number: int) -> Loaded:
        """Return a batch on the device, and start drawing the next one.

        Args:
            number: Of the run's batches, over all devices.
        """
        began = time.perf_counter()
        loaded = self._next.pop(number, None) or self._thread.submit(self._draw, number)
        found = loaded.result()
        if (after := number + self._stride) < self._end:
            self._next = {after: self._thread.submit(self._draw, after)}
        tensors: list[Tensor] = [getattr(found.batch, each.name) for each in fields(Batch)]
        batch = Batch(*(tensor.to(self._device) for tensor in tensors))
        self.waited_seconds += time.perf_counter() - began
        return Loaded(found.samples, batch)

    def _draw(self, number: int) -> Loaded:
        config = self._config
        chosen = batch_for_step(self._samples, config.batch_size, seed=config.seed, step=number)
        samples = [self._samples[at] for at in chosen.indices]
        return Loaded(samples, sample_batch(samples, chosen.counters, self._draws, _CPU))
