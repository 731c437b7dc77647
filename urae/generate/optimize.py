"""Make a pipeline faster, part by part, and undo it."""

import inspect
import logging
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from typing import Any, TypeVar

import torch
from diffusers import FluxPipeline, FluxTransformer2DModel
from torch import nn

from urae.adapters.adapt import transformer_of
from urae.backbones.attention import check_active_backend, name_inexact_backend
from urae.backbones.context_parallel import find_degree
from urae.backbones.devices import pick_device
from urae.choices import Memory, PartName, Speed
from urae.generate.attention import use_fastest_attention
from urae.generate.constants import keep_constants
from urae.generate.estimate import QUANTIZED
from urae.generate.finite import check_finite
from urae.generate.joined_adapters import join_adapters, pays_to_merge
from urae.generate.local_steps import attend_locally
from urae.generate.parts import (
    BARS,
    COMPILED,
    EXACT,
    SCHEDULED,
    Part,
    resolve_parts,
)
from urae.generate.progressive import PRESET_LEVEL, Progressive
from urae.generate.quantize import check_quantization, quantize_blocks
from urae.generate.schedule import Schedule
from urae.generate.speed import (
    can_compile,
    check_compiler,
    compile_blocks,
    has_compiled_blocks,
    list_blocks,
)
from urae.generate.step_cache import StepCache, StepCacheKind
from urae.generate.vae_parts import decode_in_stripes, decode_tiled
from urae.local_attention import list_processors
from urae.resolution import find_policy
from urae.undo import keep_undo, undo

logger = logging.getLogger(__name__)

Pipe = TypeVar("Pipe")
Undo = Callable[[], None]

ONLY_4K = (
    "a 4K adapter alone has not been measured at half the side; a 2K adapter with minor "
    "components in a second file has been"
)
"""Why a preset has no step at half the side where one goes alone."""
SHARED_KEYS = "several GPUs share a picture, and each would hold only a part of the keys"
"""Why a preset has no local attention there."""
TRAINED_LOCALLY = "the adapters were trained with it, so all steps already use it"
"""Why a preset's local attention adds nothing there."""

_FORWARD = inspect.signature(FluxTransformer2DModel.forward)


def optimize(pipe: Pipe, *, speed: Speed | None = "exact", parts: Sequence[str] = ()) -> Pipe:
    """Make a pipeline faster; `urae.restore` undoes it.

    Call it after `urae.adapt` and before any offloading. A second call replaces the first.
    Whatever the parts, a first step that is not finite raises FloatingPointError, which names them.

    Args:
        pipe: A FLUX pipeline of diffusers.
        speed: A preset: `exact` changes nothing but the rounding; `fast` and `turbo` add the
            approximations that were measured inside their bars. None for `parts` alone.
        parts: More parts, each NAME or NAME=STRENGTH.

    Returns:
        The same pipe.

    Raises:
        ValueError: If a part is unknown or does not go with another, or with the pipe. Nothing is
            optimized then; a pipe whose layers were offloaded since an earlier call stays as it is.
        ModuleNotFoundError: If the package of the attention backend cannot be used here.
    """
    transformer = transformer_of(pipe)
    parts = [parts] if isinstance(parts, str) else parts
    undo(transformer)
    device: Any = transformer.device
    if device.type in ("cpu", "meta"):  # not where it will run, if there is a GPU
        device = pick_device()
    check_machine(parts, device)
    compiled = speed is not None and can_compile(device)
    positions = find_policy(transformer)
    known: dict[PartName, str] = {}
    if positions is None:
        known["local-attention"] = "the pipeline is not adapted"
    elif positions.adapted.is_only_4k:
        known["progressive"] = ONLY_4K
    if positions is not None and positions.policy.attention == "local":
        known["local-attention"] = TRAINED_LOCALLY
    elif positions is not None and (fault := _find_local_fault(transformer)):
        known["local-attention"] = fault
    if has_compiled_blocks(transformer):
        reason = "the blocks are compiled with all their hooks"
        known |= dict.fromkeys(("taylorseer-cache", "first-block-cache", "mag-cache"), reason)
    plain = isinstance(pipe, FluxPipeline)
    unfit = find_unfit(speed, transformer, device, plain=plain, compiled=compiled, known=known)
    apply_parts(pipe, choose_parts(speed, parts, compiled=compiled, unfit=unfit), device)
    return pipe


def check_machine(parts: Sequence[str], device: torch.device) -> None:
    """Refuse what this machine is not installed for; needs no weights.

    Args:
        parts: Those that are named.
        device: Where the pipe will run.

    Raises:
        ValueError: If blocks are to be compiled, and a compiler is missing.
        ModuleNotFoundError: If the package of the attention backend cannot be used here.
    """
    check_active_backend()
    if (backend := name_inexact_backend()) is not None:
        logger.warning("attention %s: the pictures are approximations", backend)
    if "compile" in parts:
        check_compiler(device)


def find_unfit(
    speed: Speed | None,
    transformer: FluxTransformer2DModel,
    device: torch.device,
    *,
    plain: bool = True,
    compiled: bool,
    known: Mapping[PartName, str],
    memory: Memory = "auto",
) -> dict[PartName, str]:
    """Say which approximations of a preset do not go here, and why.

    Args:
        speed: The preset; one that approximates nothing has none.
        transformer: On the meta device where its weights are not loaded yet.
        device: Where it will run.
        plain: Whether the pipeline is a `FluxPipeline`.
        compiled: Whether a preset's compiled blocks pay here.
        known: What else speaks against some, by part.
        memory: Where its weights will live.
    """
    if speed not in BARS:
        return {}
    has_few_steps = not transformer.config.guidance_embeds
    unfit = dict(known)
    if fault := _find_fp8_fault(transformer, device, memory):
        unfit["fp8"] = fault
    if not compiled:
        reason = "it only helps compiled blocks, and compiling is not possible or not worth it here"
        for name in COMPILED:
            unfit.setdefault(name, reason)
    if not plain:
        unfit |= dict.fromkeys(
            SCHEDULED, "it only works with FluxPipeline, and this is another pipeline"
        )
    elif has_few_steps:
        unfit |= dict.fromkeys(
            SCHEDULED, "on a base of few steps it loses too much quality or has not been measured"
        )
    if has_few_steps and speed == "fast":
        unfit.setdefault("fp8", "on a base of few steps it loses more quality than fast allows")
    return unfit


def _find_local_fault(transformer: Any) -> str | None:
    if any(each._attention_backend is not None for each in list_processors(transformer)):
        return "the transformer has an attention backend of its own"
    if len(list_processors(transformer)) < len(transformer.attn_processors):
        return (
            "the transformer has attention processors of its own, which accept no attention backend"
        )
    if find_degree(transformer) > 1:
        return SHARED_KEYS
    return None


def _find_fp8_fault(
    transformer: FluxTransformer2DModel, device: torch.device, memory: Memory
) -> str | None:
    if memory in QUANTIZED:
        return f"--memory {memory} quantises the weights"
    blocks = list_blocks(transformer)
    if any(type(each) is not nn.Parameter for block in blocks for each in block.parameters()):
        return "the weights are already quantised"
    try:
        check_quantization("fp8", device, asked="part")
    except (ModuleNotFoundError, ValueError) as lack:
        return str(lack).partition(";")[0]  # without the remedy, which this is
    return None


def choose_parts(
    speed: Speed | None,
    parts: Sequence[str],
    *,
    compiled: bool,
    unfit: Mapping[PartName, str],
) -> tuple[Part, ...]:
    """List the parts to put in place, in order.

    Args:
        speed: A preset, or None.
        parts: More parts, each NAME or NAME=STRENGTH.
        compiled: Whether a preset's compiled blocks pay here; those that are named always come.
        unfit: As `find_unfit`; parts that are named come all the same.

    Raises:
        ValueError: If a part is unknown, or two exclude each other.
    """
    named = {part.name for part in resolve_parts(None, parts)}
    chosen = []
    for part in resolve_parts(speed, parts):
        if part.name in named or (part.name not in unfit and (part.name != "compile" or compiled)):
            chosen.append(part)
        elif part.name in unfit:
            logger.warning("speed %s: %s is left out: %s", speed, part.name, unfit[part.name])
    return tuple(chosen)


def apply_parts(
    pipe: Any, parts: Sequence[Part], device: torch.device, *, keep_weights: bool = True
) -> None:
    """Put parts in place, instead of any that are.

    Args:
        pipe: A FLUX pipeline of diffusers.
        parts: Resolved, in order.
        device: Where the pipe will run.
        keep_weights: Whether weights that a part replaces stay on the host, for `urae.restore`.

    Raises:
        ValueError: As `optimize`.
    """
    transformer = transformer_of(pipe)
    if pipe.transformer is not transformer:
        raise ValueError(
            "the transformer is compiled as a whole and can no longer be changed; load it "
            "without torch.compile, since urae.optimize compiles the blocks"
        )
    undo(transformer)
    with ExitStack() as stack:
        schedule = Schedule(pipe)
        for part in parts:
            stack.callback(_apply(part, pipe, schedule, parts, device, keep_weights))
        if any(part.is_scheduled for part in parts):
            stack.callback(schedule.attach(transformer).remove)
        stack.callback(check_finite(transformer, parts))
        # first of all that are there by now, which look for inputs by name
        hook = transformer.register_forward_pre_hook(_name_inputs, prepend=True, with_kwargs=True)
        stack.callback(hook.remove)
        keep_undo(transformer, stack.pop_all())


def _name_inputs(
    module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
    """Hand a forward's inputs on by name, however they were given (a forward pre-hook)."""
    if not args:
        return None
    named = dict(_FORWARD.bind(module, *args, **kwargs).arguments)
    del named["self"]
    return (), named


def _apply(
    part: Part,
    pipe: Any,
    schedule: Schedule,
    parts: Sequence[Part],
    device: torch.device,
    keep_weights: bool,
) -> Undo:
    """Put one part in place, and return what undoes it."""
    match part.name:
        case "fp8" | "8bit" | "4bit":
            return quantize_blocks(pipe.transformer, part.name, device, keep=keep_weights)
        case "local-attention":
            assert part.strength is not None
            return attend_locally(pipe.transformer, schedule, part.strength)
        case "attention-backend":
            return use_fastest_attention(pipe.transformer)
        case "joined-adapters" | "merged-adapters":
            is_named = part.name == "merged-adapters"
            merge = is_named or (part.is_preset and pays_to_merge(pipe.transformer))
            return join_adapters(pipe.transformer, merge=merge, warn=is_named)
        case "constants":
            return keep_constants(pipe.transformer)
        case "progressive":
            assert part.strength is not None
            level = PRESET_LEVEL if part.is_preset else 0.0
            early = Progressive(pipe, schedule, part.strength, least_level=level)
            return early.attach(pipe.transformer)
        case "compile":
            return compile_blocks(pipe.transformer)
        case "striped-vae" | "tiled-vae":
            decode = decode_in_stripes if part.name == "striped-vae" else decode_tiled
            return decode(pipe.vae) if pipe.vae is not None else lambda: None
        case _:
            return _cache_steps(part.name, part, pipe, schedule, parts)


def _cache_steps(
    kind: StepCacheKind, part: Part, pipe: Any, schedule: Schedule, parts: Sequence[Part]
) -> Undo:
    if not isinstance(pipe, FluxPipeline):
        raise ValueError(
            "step caching only works with FluxPipeline, which labels its calls; this is a "
            f"{type(pipe).__name__}, so leave out {part.name}"
        )
    assert part.strength is not None
    others = " ".join(str(other) for other in parts if other.name not in (*EXACT, part.name))
    return StepCache(pipe.transformer, schedule, kind, part.strength, others).attach()
