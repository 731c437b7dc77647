"""An exponential moving average of the weights that train (EMA)."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from torch.optim.swa_utils import get_ema_multi_avg_fn


class Average:
    """Averaged weights beside the trained ones.

    After step t the average moves towards the weights by 1 - min(decay, (1 + t) / (10 + t)): early
    on it forgets faster, so that the weights that the run began with do not linger.
    """

    def __init__(
        self, parameters: Sequence[nn.Parameter], decay: float, start: Sequence[Tensor] | None
    ) -> None:
        """Average from the parameters as they are, or from `start`, the average saved before."""
        self.parameters = parameters
        self.decay = decay
        begin = [parameter.detach() for parameter in parameters] if start is None else start
        self.weights = [
            tensor.to(parameter.device, parameter.dtype, copy=True)
            for tensor, parameter in zip(begin, parameters, strict=True)
        ]

    def update(self, step: int) -> None:
        """Take in the parameters as they are after `step`, counted from 1."""
        decay = min(self.decay, (1 + step) / (10 + step))
        update = get_ema_multi_avg_fn(decay)  # type: ignore[no-untyped-call]
        update(self.weights, list(self.parameters), step)

    @contextmanager
    def in_place(self) -> Iterator[None]:
        """Put the averaged weights in the parameters' place for a while."""
        trained = [parameter.data for parameter in self.parameters]
        self._set(self.weights)
        try:
            yield
        finally:
            self._set(trained)

    def _set(self, tensors: Sequence[Tensor]) -> None:
        with torch.no_grad():
            for parameter, tensor in zip(self.parameters, tensors, strict=True):
                parameter.data = tensor
