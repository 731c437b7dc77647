"""Where a guided sampler comes by: states of its own paths to train on, beside noised renders."""

import torch
from torch import Tensor

from urae.flow import shift_sigmas
from urae.miniature.pool import Pool

_FEWEST_STEPS, _MOST_STEPS = 16, 32


class GuidedPaths:
    """Captions on their way from noise to picture, each a step further at every call.

    A teacher's guided velocity, which a training step computes anyway, moves them on. When one
    arrives, another caption starts from noise. What they are is not saved: a stopped stage starts
    them anew.

    Args:
        pool: Where captions come from.
        size: How many at a time.
        guidance: Each has a scale drawn between these.
        sigma_shift: Time shift of their 16 to 32 steps.
    """

    def __init__(
        self, pool: Pool, size: int, guidance: tuple[float, float], sigma_shift: float
    ) -> None:
        device = pool.latents.device
        self._pool, self._range, self._shift = pool, guidance, sigma_shift
        self.latents = torch.zeros(size, *pool.latents.shape[1:], device=device)
        self.guidance = torch.zeros(size, device=device)
        self._scenes = torch.zeros(size, dtype=torch.long, device=device)
        self._done, self._steps = torch.zeros(2, size, device=device)

    @property
    def sigmas(self) -> Tensor:
        """Of each, from 1 to 0."""
        return shift_sigmas(1 - self._done / self._steps, self._shift)

    @property
    def t5_ids(self) -> Tensor:
        return self._pool.t5_ids[self._scenes]

    @property
    def clip_ids(self) -> Tensor:
        return self._pool.clip_ids[self._scenes]

    def restart(self, generator: torch.Generator) -> None:
        """Let others start in the place of those that have arrived."""
        arrived = self._done >= self._steps
        size, device = (len(arrived),), arrived.device
        noise = torch.randn(self.latents.shape, generator=generator, device=device)
        scenes = self._pool.draw(len(arrived), generator)
        low, high = self._range
        guidance = low + (high - low) * torch.rand(size, generator=generator, device=device)
        steps = torch.randint(
            _FEWEST_STEPS, _MOST_STEPS + 1, size, generator=generator, device=device
        )
        self.latents = torch.where(arrived[:, None, None, None], noise, self.latents)
        self._scenes = torch.where(arrived, scenes, self._scenes)
        self.guidance = torch.where(arrived, guidance, self.guidance)
        self._steps = torch.where(arrived, steps.to(self._steps), self._steps)
        self._done = torch.where(arrived, torch.zeros_like(self._done), self._done)

    def advance(self, velocity: Tensor) -> None:
        """Take a step of Euler's along `velocity`, of the shape of `latents`."""
        before = self.sigmas
        self._done = self._done + 1
        self.latents = self.latents + (self.sigmas - before)[:, None, None, None] * velocity
