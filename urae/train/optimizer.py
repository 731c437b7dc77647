"""Optimizers by name, from kept libraries."""

import contextlib
import io

import torch
from torch import nn

from urae.train.config import OptimizerConfig


def build_optimizer(
    parameters: list[nn.Parameter], config: OptimizerConfig
) -> torch.optim.Optimizer:
    """Build the optimizer of a recipe.

    Raises:
        ModuleNotFoundError: If its package is not installed.
    """
    betas = (config.beta1, config.beta2)
    if config.name == "adamw":
        return torch.optim.AdamW(
            parameters, lr=config.lr, betas=betas, weight_decay=config.weight_decay
        )
    from prodigyopt import Prodigy  # an extra: only training needs it

    with contextlib.redirect_stdout(io.StringIO()):  # it prints that weight decay is decoupled
        optimizer: torch.optim.Optimizer = Prodigy(
            parameters,
            lr=config.lr,
            betas=betas,
            weight_decay=config.weight_decay,
            decouple=True,
            use_bias_correction=True,
            safeguard_warmup=True,
        )
    return optimizer
