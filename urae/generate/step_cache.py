"""Step caching by diffusers' own hooks: a step that changes little reuses an earlier one.

Three ways. The first-block cache computes one block, and the others if its output has changed
(ParaAttention); MagCache skips where the size of what the blocks add is known to change little
(arXiv:2506.09045); TaylorSeer extrapolates the model's output from earlier steps
(arXiv:2503.06923), in its light form, which keeps nothing of the blocks.

MagCache's sizes depend on model, adapters, size and schedule. The first picture of a kind is made
whole and measures them; they are kept in the user's cache folder. All are approximations.
"""

import hashlib
import json
import logging
import sys
from collections.abc import Callable, Iterator
from typing import Any, Literal

import torch
from diffusers import (
    FirstBlockCacheConfig,
    FluxTransformer2DModel,
    MagCacheConfig,
    TaylorSeerCacheConfig,
)
from diffusers.hooks.taylorseer_cache import TaylorSeerCacheHook
from peft.tuners.lora import LoraLayer
from torch import nn

from urae.adapters.attach import active_adapters
from urae.content_cache import ContentCache, find_cache_dir
from urae.generate.schedule import Schedule
from urae.generate.speed import check_not_offloaded, has_compiled_blocks
from urae.resolution import find_policy

logger = logging.getLogger(__name__)

StepCacheKind = Literal["first-block-cache", "mag-cache", "taylorseer-cache"]

DEFAULT_STRENGTH: dict[StepCacheKind, float] = {
    "first-block-cache": FirstBlockCacheConfig.threshold,
    "mag-cache": MagCacheConfig.threshold,
    "taylorseer-cache": 3,
}
"""The libraries' own, but for TaylorSeer's, whose 5 loses too much (docs/performance.md)."""

_WARM_UP = 2  # whole steps that a first extrapolation needs
_SAMPLE = 16  # numbers of each parameter that tell models apart


class StepCache:
    """Step caching on one transformer, with a state of its own for every picture.

    Args:
        transformer: A stock FLUX transformer, adapted or not, compiled by `compile_blocks` or not.
            Blocks are offloaded afterwards, if at all.
        schedule: Follows the pipeline; attached before this.
        kind: Which.
        strength: Threshold of the first-block cache (relative change) and of MagCache (accumulated
            error), steps from one whole step to the next of TaylorSeer; higher is faster.
        variant: What else changes the transformer's outputs, in words, told apart by MagCache.
    """

    def __init__(
        self,
        transformer: FluxTransformer2DModel,
        schedule: Schedule,
        kind: StepCacheKind,
        strength: float,
        variant: str = "",
    ) -> None:
        self._transformer = transformer
        self._schedule = schedule
        self._variant = variant
        self._config = _build_config(kind, strength)
        self._sequence: tuple[int, int] | None = None
        self._key = ""
        self._measured: list[float] = []
        self._context: Any = None
        self._ratios = ContentCache(find_cache_dir("step-cache"))

    def attach(self) -> Callable[[], None]:
        """Switch it on; returns what switches it off.

        Raises:
            ValueError: If the blocks are compiled or offloaded in a way that excludes it.
        """
        _check_attachable(self._transformer)
        self._enable()
        hooks = [
            self._transformer.register_forward_pre_hook(self._enter, with_kwargs=True),
            self._transformer.register_forward_hook(self._leave),
        ]

        def detach() -> None:
            for hook in hooks:
                hook.remove()
            self._transformer.disable_cache()

        return detach

    def _enable(self) -> None:
        self._transformer.enable_cache(self._config)
        self._managers = list(dict.fromkeys(_list_managers(self._transformer)))
        self._output_layer = self._transformer.proj_out

    @torch.compiler.disable  # type: ignore[untyped-decorator]
    def _enter(self, _module: nn.Module, _args: Any, kwargs: dict[str, Any]) -> None:
        """Begin anew where the picture or its number of tokens is another than before."""
        tokens = kwargs["hidden_states"].shape[1]
        if self._sequence == (self._schedule.picture, tokens):
            return
        if self._sequence is not None and self._sequence[0] == self._schedule.picture:
            self._store()
        self._sequence = (self._schedule.picture, tokens)
        self._context = self._find_context()
        if self._output_layer is not self._transformer.proj_out:  # an adapter came to it, or went
            self._transformer.disable_cache()
            self._enable()
        for manager in self._managers:
            manager.reset()
            manager.set_context(self._context)
        left = self._schedule.num_steps - self._schedule.index
        for hook in _list_hooks(self._transformer):
            if isinstance(hook, TaylorSeerCacheHook):
                hook.disable_cache_after_step = left - 1  # the last is the longest
        self._measured = []
        if isinstance(self._config, MagCacheConfig):
            self._calibrate(self._config, kwargs["img_ids"])

    def _find_context(self) -> Any:
        """Return what the pipeline calls this forward, of which it may have two a step."""
        try:
            return self._managers[0].context
        except ValueError as error:  # which names nothing that the user called
            raise ValueError(
                "step caching only works with FluxPipeline, which labels its calls, but another "
                "pipeline runs this transformer; call urae.restore, then urae.adapt and "
                "urae.optimize with the pipeline that is to run"
            ) from error

    def _calibrate(self, config: MagCacheConfig, image_ids: torch.Tensor) -> None:
        """Take the ratios of what is to come from the cache folder, or measure them."""
        self._key = self._identify(image_ids)
        stored = self._ratios.load(self._key)
        config.calibrate = stored is None
        if stored is None:
            config.num_inference_steps = sys.maxsize  # or it prints them and forgets
            logger.info("step caching is being calibrated: all steps of this picture are computed")
        else:
            config.mag_ratios = stored["ratios"]
            config.num_inference_steps = len(stored["ratios"])

    @torch.compiler.disable  # type: ignore[untyped-decorator]
    def _leave(self, _module: nn.Module, _args: Any, _output: Any) -> None:
        first = self._managers[0].context == self._context  # of two prompts in turn
        if first and getattr(self._config, "calibrate", False):
            self._measured = [*self._managers[0].get_state().calibration_ratios]
            if self._schedule.index == self._schedule.num_steps - 1:
                self._store()

    def _store(self) -> None:
        if self._measured:
            self._ratios.store(self._key, {"ratios": torch.tensor(self._measured)})
            self._measured = []

    def _identify(self, image_ids: torch.Tensor) -> str:
        """Hash model, adapters, policy, size and the sigmas from here on."""
        positions = find_policy(self._transformer)
        corner = image_ids.reshape(-1, image_ids.shape[-1]).amax(0)
        where = {
            "size": corner.tolist(),
            "sigmas": self._schedule.sigmas[self._schedule.index :],
            "policy": None if positions is None else positions.policy.to_json(),
            "variant": self._variant,
        }
        digest = hashlib.sha256(json.dumps(where).encode())
        for text in _describe_weights(self._transformer):
            digest.update(text.encode())
        return digest.hexdigest()


def _build_config(kind: StepCacheKind, strength: float) -> Any:
    if kind == "first-block-cache":
        return FirstBlockCacheConfig(threshold=strength)
    if kind == "mag-cache":
        return MagCacheConfig(threshold=strength, calibrate=True)
    return TaylorSeerCacheConfig(
        cache_interval=round(strength),
        disable_cache_before_step=_WARM_UP,
        taylor_factors_dtype=torch.float32,
        use_lite_mode=True,
    )


def _check_attachable(transformer: FluxTransformer2DModel) -> None:
    if transformer.is_cache_enabled:
        raise ValueError(
            f"the transformer already has a step cache ({transformer._cache_config}); call "
            "transformer.disable_cache() first"
        )
    check_not_offloaded(transformer)
    if has_compiled_blocks(transformer):
        raise ValueError(
            "the blocks are compiled with all their hooks, and a step cache would have to be "
            "compiled with them; reload the pipeline, and name the part 'compile' as well"
        )


def _list_managers(transformer: nn.Module) -> Iterator[Any]:
    """Give the states that the hooks keep, some of them shared."""
    hooks = _list_hooks(transformer)
    return (hook.state_manager for hook in hooks if hasattr(hook, "state_manager"))


def _list_hooks(transformer: nn.Module) -> Iterator[Any]:
    for module in transformer.modules():
        registry = getattr(module, "_diffusers_hook", None)
        yield from () if registry is None else registry.hooks.values()


def _describe_weights(transformer: FluxTransformer2DModel) -> Iterator[str]:
    """Tell weights apart by the first numbers of each plain parameter, and adapters' strengths."""
    yield str(active_adapters(transformer))
    for name, module in transformer.named_modules():
        if isinstance(module, LoraLayer):
            yield f"{name} {module.scaling}\n"
    for name, parameter in transformer.named_parameters():
        kind = f"{type(parameter).__name__} {parameter.dtype} {tuple(parameter.shape)}"
        plain = type(parameter) is nn.Parameter
        numbers = parameter.detach().flatten()[:_SAMPLE].tolist() if plain else []
        yield f"{name} {kind} {numbers}\n"
