"""Early steps at half the side, a quarter of the tokens: an approximation.

The pipeline stays stock and its latents x keep their size. In an early step the transformer sees
them pooled, and what comes back is a velocity for x itself. With x = (1 - s) x0 + s e at noise
level s, e white, and P the mean of 2 x 2 latents:

- P x = (1 - s) P x0 + s P e, and P e is white of deviation 1/2: averaging has halved the noise.
  The same at unit scale is a point of the small picture's own path, y = (1 - t) P x0 + t (2 P e),
  with y = 2 P x / (2 - s) and t = s / (2 - s). So the transformer is asked at t, not at s: each
  frequency that the small picture has keeps its ratio of signal to noise (as in the shift by
  resolution of arXiv:2403.03206, section 5.3.2, for a quarter of the tokens).
- It answers w = 2 P e - P x0, so P x0 is y - t w.
- U enlarges that, smoothly and such that P U z = z. With x0 = U (y - t w) the noise in x is
  (x - (1 - s) x0) / s, and the velocity, noise minus x0, is v = (x - x0) / s.

An Euler step with v is x' = (s'/s) x + (1 - s'/s) x0. Pooled, that is the small picture's own
probability-flow ODE in other units. What pooling does not see starts as s e at s = 1 and stays the
noise of level s around U of the small picture. So when the full size takes over, x is that picture
enlarged and noised to the level at hand, by the very noise that the pipeline drew: nothing is drawn
anew, and one seed gives one picture. Finer detail is left to the full-size steps, which is why the
share of early ones matters.

A picture within the base's native size is made whole, as half of it would be smaller than the base
knows; so is one that has no half or begins at latents that hold a picture, with a warning.

Early steps run uncompiled at first: another size takes seconds to compile, which pays from as many
of them on as make a long job.

Adapters for larger pictures than the small one rest in early steps, as in the reference's
coarse-to-fine pipelines, which load the 4K adapter when the high stage begins: 4K adapters beside
others, and all that `urae.adapt` attached where the small picture is within the base's native size.
"""

import logging
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from diffusers import FluxPipeline
from jaxtyping import Float
from torch import Tensor, nn

from urae.adapters.adapt import path_of
from urae.adapters.attach import Rest
from urae.generate.schedule import Schedule
from urae.generate.speed import PAYS_FROM_TOKEN_STEPS, switch_compiled
from urae.geometry import TOKEN_PIXELS, build_image_ids, pack, unpack, widen_ids
from urae.local_attention import find_grid
from urae.resolution import find_policy, read_base_policy

logger = logging.getLogger(__name__)


PRESET_LEVEL = 0.95
"""Noise level down to which a preset may stay at half the side. On the miniature textures of the
small picture show from 0.92 on, whatever share of the steps that is (docs/performance.md)."""


class Progressive:
    """Early steps at half the side, on one transformer.

    Args:
        pipe: That will run; only `FluxPipeline` starts at noise and has no second picture.
        schedule: Follows it; attached before this.
        share: Of the steps that are early, 0 to 1; the last step never is.
        least_level: Noise level, 0 to 1, below which no whole step may be the first.

    Raises:
        ValueError: If the pipe is another one.
    """

    def __init__(
        self, pipe: Any, schedule: Schedule, share: float, *, least_level: float = 0.0
    ) -> None:
        if not isinstance(pipe, FluxPipeline):
            raise ValueError(
                f"progressive resolution only works with FluxPipeline; a {type(pipe).__name__} "
                "starts from a picture or follows one, whose detail the early steps would lose: "
                "leave it out"
            )
        self._schedule = schedule
        self._share = share
        self._least_level = least_level
        self._base_policy = read_base_policy(path_of(pipe))
        self._token_steps = 0  # that were early
        self._decided = 0  # for which picture
        self._is_whole = False
        self._early: tuple[Tensor, Tensor] | None = None  # full latents, what the transformer sees
        self._ids = torch.empty(0)
        self._small_ids = torch.empty(0)
        self._grid = (0, 0)
        self._rest: Rest | None = None  # during an early forward
        self._has_warned = False

    def attach(self, transformer: nn.Module) -> Callable[[], None]:
        """Switch it on; returns what switches it off."""
        hooks = [
            # before the policy's hook, which counts the tokens
            transformer.register_forward_pre_hook(self._enter, prepend=True, with_kwargs=True),
            transformer.register_forward_hook(self._leave),
            transformer.register_forward_hook(self._wake, always_call=True),
        ]

        def detach() -> None:
            self._end_rest(transformer)
            for hook in hooks:
                hook.remove()
            switch_compiled(transformer, True)

        return detach

    @property
    def _num_early(self) -> int:
        steps = self._schedule.num_steps
        high = sum(sigma >= self._least_level for sigma in self._schedule.sigmas)
        return min(round(self._share * steps), steps - 1, max(high - 1, 0))

    @torch.compiler.disable  # type: ignore[untyped-decorator]
    def _enter(
        self, module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
        """Show the transformer the small picture at its own noise level."""
        self._early = None
        self._end_rest(module)  # of a forward that Ctrl-C ended, after which torch calls no hook
        if self._decided != self._schedule.picture:
            self._decided = self._schedule.picture
            self._is_whole = self._must_be_whole(module, kwargs)
        is_late = self._is_whole or self._schedule.index >= self._num_early
        switch_compiled(module, is_late or self._token_steps >= PAYS_FROM_TOKEN_STEPS)
        if is_late:
            return None
        self._follow_size(kwargs["img_ids"])
        self._token_steps += len(self._small_ids)
        self._let_rest(module, kwargs["encoder_hidden_states"].shape[1] + len(self._small_ids))
        tokens, timestep, sigma = kwargs["hidden_states"], kwargs["timestep"], self._schedule.sigma
        rows, columns = self._grid
        latents = unpack(tokens.float(), 2 * rows, 2 * columns)
        small = shrink(latents) * (2 / (2 - sigma))
        self._early = latents, small
        changes = {
            "hidden_states": pack(small).to(tokens.dtype),
            "timestep": torch.full_like(timestep, small_noise_level(sigma)),
            "img_ids": self._small_ids,
        }
        return args, {**kwargs, **changes}

    @torch.compiler.disable  # type: ignore[untyped-decorator]
    def _leave(self, _module: nn.Module, _args: Any, output: Any) -> Any:
        """Hand back a velocity for the full latents."""
        if self._early is None:
            return output
        latents, small = self._early
        self._early = None
        sigma = self._schedule.sigma
        small_velocity = unpack(output[0].float(), *small.shape[-2:])
        picture = enlarge(small - small_noise_level(sigma) * small_velocity)
        velocity = pack((latents - picture) / sigma).to(output[0].dtype)
        if isinstance(output, tuple):
            return (velocity, *output[1:])
        return type(output)(sample=velocity)

    def _let_rest(self, transformer: nn.Module, tokens: int) -> None:
        """Leave adapters for larger pictures than one of so many tokens out of this forward."""
        positions = find_policy(transformer)
        if positions is None:
            return
        names, larger = positions.adapted.names, positions.adapted.names_4k
        if tokens <= positions.policy.native_sequence_length:
            larger = names
        elif positions.adapted.is_only_4k:
            larger = ()
        self._rest = Rest(transformer, larger)
        positions.rest(bool(larger), is_fused=self._rest.has_fused)
        if self._rest.has_fused and not self._has_warned:
            self._has_warned = True
            logger.warning(
                "adapters are fused into the base, so %s cannot be switched off in early steps, "
                "which changes the picture; unfuse them, or leave progressive out",
                ", ".join(larger),
            )

    @torch.compiler.disable  # type: ignore[untyped-decorator]
    def _wake(self, transformer: nn.Module, _args: Any, _output: Any) -> None:
        """End the rest with the forward, also with one that fails."""
        self._end_rest(transformer)

    def _end_rest(self, transformer: nn.Module) -> None:
        if self._rest is not None:
            self._rest.end()
            self._rest = None
            if (positions := find_policy(transformer)) is not None:
                positions.rest(False)

    def _must_be_whole(self, transformer: nn.Module, inputs: dict[str, Any]) -> bool:
        """Tell whether a picture has no early steps, and say why where it might have."""
        positions = find_policy(transformer)
        policy = self._base_policy if positions is None else positions.policy
        tokens = sum(inputs[name].shape[1] for name in ("hidden_states", "encoder_hidden_states"))
        if tokens <= policy.native_sequence_length:
            return True
        height, width = (TOKEN_PIXELS * n for n in find_grid(widen_ids(inputs["img_ids"])))
        if (level := self._schedule.sigma) < 1:  # of its first step
            reason = f"it starts at noise level {level:.3f}, from latents that hold a picture"
        elif not can_halve(height, width):
            reason = f"{width} x {height} pixels are not multiples of {2 * TOKEN_PIXELS}"
        else:
            return False
        logger.warning("progressive is left out for a picture: %s", reason)
        return True

    def _follow_size(self, image_ids: Tensor) -> None:
        """Make position ids of the small picture, once a picture."""
        if image_ids is self._ids:
            return
        rows, columns = find_grid(widen_ids(image_ids))
        self._ids, self._grid = image_ids, (rows, columns)
        self._small_ids = build_image_ids(rows // 2, columns // 2, image_ids.device)


def can_halve(*sides: int) -> bool:
    """Tell whether half of each side in pixels is a whole number of tokens."""
    return all(side % (2 * TOKEN_PIXELS) == 0 for side in sides)


def check_halves(height: int, width: int) -> None:
    """Refuse a picture that has no whole number of tokens at half the side.

    Raises:
        ValueError: If a side is no multiple of 32 pixels.
    """
    for name, pixels in (("height", height), ("width", width)):
        if not can_halve(pixels):
            raise ValueError(
                f"{name} {pixels} must be a multiple of {2 * TOKEN_PIXELS} pixels for progressive "
                "resolution, which halves it; choose another size, or leave progressive out"
            )


def small_noise_level(sigma: float) -> float:
    """Return t, where a picture of half the side has the signal and noise of one at `sigma`."""
    return sigma / (2 - sigma)


def shrink(latents: Float[Tensor, "b c h w"]) -> Float[Tensor, "b c _h _w"]:
    """Halve the sides: P, the mean of each 2 x 2."""
    return F.avg_pool2d(latents, 2)


def enlarge(latents: Float[Tensor, "b c h w"]) -> Float[Tensor, "b c _h _w"]:
    """Double the sides: U, bicubic, then moved so that shrinking gives the same again."""
    smooth = F.interpolate(latents, scale_factor=2, mode="bicubic")
    return smooth + F.interpolate(latents - shrink(smooth), scale_factor=2, mode="nearest")
