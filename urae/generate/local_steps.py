"""Local attention in the later steps: an approximation for adapters that never saw it.

What a picture shows and where is settled at high noise, by attention across the whole of it; what
follows is detail, which has its causes nearby.
"""

import logging
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import replace
from typing import Any

import torch
from diffusers import FluxTransformer2DModel
from torch import nn

from urae.generate.schedule import Schedule
from urae.resolution import change_policy, find_policy

logger = logging.getLogger(__name__)


def attend_locally(
    transformer: FluxTransformer2DModel, schedule: Schedule, level: float
) -> Callable[[], None]:
    """Let the policy of an adapted transformer say `local`, from a noise level on.

    Where it says so already, nothing changes: its adapters were trained that way.

    Args:
        transformer: Adapted or not.
        schedule: Follows the pipeline, if `level` is below 1; attached before this.
        level: Noise level, 0 to 1, above which attention stays full.

    Returns:
        What undoes it.
    """
    positions = find_policy(transformer)
    if positions is None:
        logger.warning(
            "local attention only changes pictures beyond the native size of an adapted "
            "pipeline; this pipeline is not adapted, so nothing changes"
        )
        return lambda: None
    before = positions.policy
    if before.attention == "local":
        if level < 1:
            logger.warning(
                "local-attention=%s has no effect: the adapters were trained with local "
                "attention, which is on wherever they act",
                level,
            )
        return lambda: None
    local = change_policy(transformer, replace(before, attention="local")).local
    assert local is not None

    @torch.compiler.disable  # type: ignore[untyped-decorator]
    def enter(_module: nn.Module, _args: Any, _kwargs: dict[str, Any]) -> None:
        local.is_on = schedule.sigma <= level

    with ExitStack() as stack:
        stack.callback(change_policy, transformer, before)
        if level < 1:  # before the policy's hook, which asks
            hook = transformer.register_forward_pre_hook(enter, prepend=True, with_kwargs=True)
            stack.callback(hook.remove)
        return stack.pop_all().close
