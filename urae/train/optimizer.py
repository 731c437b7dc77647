"""Optimizers and schedules of the learning rate by name, from kept libraries."""

import io
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stdout
from typing import Any

import torch
from diffusers.optimization import get_scheduler
from torch import nn
from torch.optim.lr_scheduler import LambdaLR

from urae.train.config import OptimizerConfig

PACKAGES = {"prodigy": "prodigyopt", "adamw8bit": "bitsandbytes", "schedule-free": "schedulefree"}
"""What optimizers need beside torch; a package is imported only if its optimizer is asked for."""


def build_optimizer(
    parameters: list[nn.Parameter], config: OptimizerConfig
) -> torch.optim.Optimizer:
    """Build the optimizer of a recipe.

    Args:
        parameters: Matrices, the factors of an adapter.
        config: Which, and how it learns.

    Raises:
        ModuleNotFoundError: If its package is not installed.
    """
    optimizer: torch.optim.Optimizer
    options: dict[str, Any] = {"lr": config.lr, "weight_decay": config.weight_decay}
    if config.name == "muon":
        return torch.optim.Muon(
            parameters, momentum=config.beta1, adjust_lr_fn="match_rms_adamw", **options
        )
    options["betas"] = (config.beta1, config.beta2)
    if config.name == "adamw":
        return torch.optim.AdamW(parameters, **options)
    if config.name == "adamw8bit":
        from bitsandbytes.optim import AdamW8bit

        optimizer = AdamW8bit(parameters, **options)
    elif config.name == "schedule-free":
        from schedulefree import AdamWScheduleFree

        options["warmup_steps"] = config.warmup_steps  # it weighs its steps by their rates
        optimizer = AdamWScheduleFree(parameters, **options)
        optimizer.train()  # type: ignore[attr-defined]
    else:
        from prodigyopt import Prodigy

        options |= {"decouple": True, "use_bias_correction": True, "safeguard_warmup": True}
        with redirect_stdout(io.StringIO()):  # it prints that weight decay is decoupled
            optimizer = Prodigy(parameters, **options)
    return optimizer


def build_schedule(
    optimizer: torch.optim.Optimizer, config: OptimizerConfig, *, num_steps: int, step: int
) -> LambdaLR:
    """Set the learning rate of the next step, and build what sets those after it.

    A rate follows from the recipe and the step alone, so a checkpoint need not hold any.

    Args:
        optimizer: In the state that it has after `step`.
        config: Of the optimizer.
        num_steps: Steps of the whole run.
        step: Steps done.
    """
    for group in optimizer.param_groups:
        group["initial_lr"] = config.lr
    is_constant = config.schedule == "constant"
    schedule: LambdaLR = get_scheduler(
        "constant_with_warmup" if is_constant else config.schedule,
        optimizer,
        num_warmup_steps=0 if config.name == "schedule-free" else config.warmup_steps,
        num_training_steps=num_steps,
        last_epoch=step - 1,
    )
    return schedule


def read_lr(optimizer: torch.optim.Optimizer) -> float:
    """Return the learning rate that an optimizer just stepped with.

    Its own warm-up is included, and the factor that Prodigy finds.
    """
    group = optimizer.param_groups[0]
    return float(group.get("scheduled_lr", group["lr"]) * group.get("d", 1.0))


def keeps_average(optimizer: torch.optim.Optimizer) -> bool:
    """Tell whether an optimizer trains at other weights than those to use: schedule-free ones."""
    return "train_mode" in optimizer.param_groups[0]


@contextmanager
def weights_to_use(optimizer: Any) -> Iterator[None]:
    """Put the weights that an optimizer has found in place for a while.

    Schedule-free optimizers take gradients between their average, which is what they find, and
    where they are. Their own way there and back rounds, so the trained weights are set aside.

    Args:
        optimizer: In training, as it is again afterwards, to the bit.
    """
    if not keeps_average(optimizer):
        yield
        return
    parameters = [each for group in optimizer.param_groups for each in group["params"]]
    trained = [parameter.data for parameter in parameters]
    for parameter in parameters:
        parameter.data = parameter.data.clone()
    optimizer.eval()
    try:
        yield
    finally:
        optimizer.train()
        for parameter, data in zip(parameters, trained, strict=True):
            parameter.data = data
