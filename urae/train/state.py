"""What a run changes as it goes: weights, their average, optimizer and counters."""

from collections.abc import Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from threading import Event
from typing import Any

import torch
from torch.optim.lr_scheduler import LambdaLR

from urae.adapters.sources import LORA_FILE_NAME
from urae.train.adapter import TrainingAdapter
from urae.train.average import Average
from urae.train.checkpoint import PLAIN_FILE, load_optimizer, save_checkpoint
from urae.train.config import TrainConfig
from urae.train.inputs import Inputs
from urae.train.optimizer import (
    build_optimizer,
    build_schedule,
    keeps_average,
    read_lr,
    weights_to_use,
)
from urae.train.output import check_same_base, find_best_step


@dataclass
class TrainingState:
    """All that goes on from step to step; a checkpoint holds the whole of it."""

    adapter: TrainingAdapter
    optimizer: torch.optim.Optimizer
    schedule: LambdaLR
    """Sets the optimizer's learning rate; follows from the recipe and the step."""
    average: Average | None
    """Of the adapter's weights, where the recipe wants one."""
    step: int
    """Optimizer steps done."""
    num_batches: int
    """Batches that the run, on all devices, has trained on: its place in the order of samples."""

    def advance(self, num_batches: int) -> float:
        """Take the step whose gradients are there, from so many batches over all devices.

        Returns:
            The learning rate of the step.
        """
        self.optimizer.step()
        lr = read_lr(self.optimizer)
        self.schedule.step()
        self.optimizer.zero_grad(set_to_none=True)
        self.step += 1
        self.num_batches += num_batches
        if self.average is not None:
            with weights_to_use(self.optimizer):
                self.average.update(self.step)
        return lr

    def averaged(self) -> AbstractContextManager[None]:
        """Put the weights that the run is for in place: the average, where there is one."""
        if self.average is not None:
            return self.average.in_place()
        return weights_to_use(self.optimizer)

    def write_adapter(self, folder: Path, metadata: Mapping[str, str]) -> Path:
        """Write the adapter that the run is for into a folder."""
        path = folder / LORA_FILE_NAME
        with self.averaged():
            self.adapter.write(path, {**metadata, "urae.step": str(self.step)})
        return path

    def save(
        self,
        config: TrainConfig,
        metadata: Mapping[str, str],
        record: dict[str, Any],
        stop: Event | None = None,
    ) -> None:
        """Save a checkpoint, unless that of this step is there.

        The one of the lowest held-out loss is kept beside the last ones.

        Args:
            config: Says where, and how many are kept.
            metadata: Of the adapter's files.
            record: What else must fit on resuming.
            stop: Ends the pause that the run makes while the disk is full; None: it makes none.

        Raises:
            FloatingPointError, OSError: As `save_checkpoint`.
        """

        def write_weights(folder: Path) -> None:
            self.write_adapter(folder, metadata)
            if self.average is not None or keeps_average(self.optimizer):
                plain = {**metadata, "urae.step": str(self.step)}
                self.adapter.write(folder / PLAIN_FILE, plain)

        save_checkpoint(
            config.output_dir,
            self.step,
            write_weights=write_weights,
            optimizer=self.optimizer,
            record={
                "num_batches": self.num_batches,
                "base_hashes": self.adapter.base_hashes,
                **record,
            },
            keep=config.keep_checkpoints,
            best=find_best_step(config.output_dir),
            stop=stop,
        )


def build_state(adapter: TrainingAdapter, config: TrainConfig, inputs: Inputs) -> TrainingState:
    """Build the state that a run starts with, fresh or from its checkpoint.

    Raises:
        ValueError: If the checkpoint was made on a base of other weights, or is damaged.
    """
    check_same_base(inputs.start, adapter.base_hashes)
    optimizer = build_optimizer(adapter.parameters, config.optimizer)
    start = inputs.start
    if start.checkpoint is not None:
        load_optimizer(start.checkpoint, optimizer)
    schedule = build_schedule(optimizer, config.optimizer, num_steps=config.steps, step=start.step)
    average = None
    if config.ema_decay is not None:
        weights = None
        if inputs.average is not None:
            weights = adapter.pick_weights(inputs.average)
        average = Average(adapter.parameters, config.ema_decay, weights)
    return TrainingState(adapter, optimizer, schedule, average, start.step, start.num_batches)
