"""Where in its schedule a pipeline is, as its transformer sees it."""

from typing import Any
from weakref import ref

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

# pipelines hand the timestep over in the dtype of the latents, rounded twice
_ROUNDING = 0.01


class Schedule:
    """Follows a pipeline through its sigmas, one forward of its transformer after the other.

    The scheduler knows the step without asking the device, and makes new sigmas for every picture,
    so a picture that was broken off is told from the next one. Reading numbers waits for the
    device: that is done once a picture, where a step comes that does not follow the last one, and
    in the second forward of a step that has two (true guidance).
    """

    def __init__(self, pipe: Any) -> None:
        """Follow a pipeline.

        Args:
            pipe: Of diffusers, with a flow-matching scheduler and a transformer.
        """
        self._pipe = ref(pipe)
        self.picture = 0
        """Which picture this is, counted from 1."""
        self.index = 0
        """Of the step, from 0."""
        self.sigmas: list[float] = []
        """Of the whole schedule; the last is 0."""
        self._read_from: Tensor | None = None

    @property
    def sigma(self) -> float:
        """The noise level of this forward."""
        return self.sigmas[self.index]

    @property
    def num_steps(self) -> int:
        """Steps of the whole schedule."""
        return len(self.sigmas) - 1

    def attach(self, transformer: nn.Module) -> RemovableHandle:
        """Follow the transformer's forwards, before any hook that is there now."""
        return transformer.register_forward_pre_hook(self._enter, prepend=True, with_kwargs=True)

    @torch.compiler.disable  # type: ignore[untyped-decorator]
    def _enter(self, _module: nn.Module, _args: Any, kwargs: dict[str, Any]) -> None:
        pipe = self._pipe()
        before = self.picture, self.index
        if pipe is not None:
            self._read(pipe.scheduler)
        if self.picture != before[0] or self.index <= before[1]:
            self._check(float(kwargs["timestep"].flatten()[0]), pipe)

    def _check(self, found: float, pipe: Any) -> None:
        if pipe is None or abs(found - self.sigma) > _ROUNDING * self.sigma:
            raise ValueError(
                "the transformer is optimized for one pipeline, but was called at noise level "
                f"{found:.3f}, which is not in that pipeline's schedule: something else runs it; "
                "call urae.restore, then urae.optimize with the pipeline that is to run"
            )

    def _read(self, scheduler: Any) -> None:
        if scheduler.sigmas is not self._read_from:
            self._read_from = scheduler.sigmas
            self.sigmas = scheduler.sigmas.tolist()
            self.picture += 1
        step = scheduler.step_index
        if step is None:  # before the first step of a picture
            step = scheduler.begin_index or 0
        self.index = min(step, self.num_steps - 1)
