"""`adapt` a stock FLUX pipeline to ultra resolution, and `restore` it."""

import logging
import os
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, TypeVar
from weakref import WeakKeyDictionary, ref

from diffusers import FluxTransformer2DModel
from torch import nn

from urae.adapters.attach import Activity, Update, attach, detach, read_update
from urae.adapters.files import AdapterFile, check_fits, read_adapter
from urae.adapters.initial import check_order, compute_updates
from urae.backbones.devices import pick_device
from urae.backbones.weights import open_original_weights
from urae.resolution import (
    Adaptation,
    ResolutionPolicy,
    apply_policy,
    find_policy,
    peft_configs,
    read_base_policy,
    remove_policy,
    shift_scheduler,
)
from urae.undo import is_optimized, undo

logger = logging.getLogger(__name__)

Source = str | os.PathLike[str]
Pipe = TypeVar("Pipe")

_ORIGINAL = "_urae_original"  # where an adapted scheduler keeps the one it was made from
_SHIFT = ("shift", "use_dynamic_shifting")
_shifted: WeakKeyDictionary[Any, Any] = WeakKeyDictionary()
"""The scheduler that each pipe was given."""
_owners: WeakKeyDictionary[nn.Module, "ref[Any]"] = WeakKeyDictionary()
"""The pipe that each transformer was adapted through; others that share it inherit."""


def adapt(
    pipe: Pipe,
    adapters: Source | Sequence[Source] = (),
    *,
    adapter_names: str | Sequence[str] | None = None,
    policy: ResolutionPolicy | None = None,
) -> Pipe:
    """Make a stock FLUX pipeline generate at 2K and 4K (arXiv:2503.16322).

    Adapters become ordinary named peft adapters; the base's weights are never changed. A second
    call replaces the first. On a pipe that shares an already adapted transformer only the
    scheduler is set.

    Args:
        pipe: Any stock FLUX pipeline of diffusers, offloaded, quantised or neither.
        adapters: One adapter or several, applied in order: local files or folders, names of those
            that come with this package (`miniature-2k`), or `[hf://]owner/repo[@revision]/file` on
            the hub. A minor-component adapter comes after the 2K LoRA that it was trained over.
        adapter_names: A name each; `urae_2k` and `urae_4k` unless given.
        policy: Positions, attention and time shift; by default what the last adapter's metadata
            says, else what the base's folder says, else `ResolutionPolicy()`.

    Returns:
        The same pipe.

    Raises:
        ValueError: If an adapter is damaged or for another base, or a name is taken. The pipe is
            left as it was.
        FileNotFoundError: If an adapter is missing, or the original weights that a minor adapter
            needs.
    """
    if policy is not None and not isinstance(policy, ResolutionPolicy):
        raise ValueError(f"policy {policy!r} must be a urae.ResolutionPolicy, or None")
    transformer, sources = transformer_of(pipe), as_sources(adapters)
    if (inherited := _find_inherited(pipe, transformer, sources, policy)) is not None:
        _set_policy(pipe, inherited)
        return pipe
    _check_attachable(transformer)
    files = [read_adapter(source) for source in sources]
    names = _name_adapters(files, adapter_names)
    _check_files(files, names, transformer)
    policy = choose_policy(policy, files, path_of(pipe))
    shift_scheduler(pipe.scheduler, policy)  # type: ignore[attr-defined]  # fails before changes
    updates: list[Update] = [file.variant for file in files if file.variant is not None]
    updates += compute_updates(
        [file for file in files if file.variant is None],
        lambda layers: open_original_weights(transformer, layers),
        device=pick_device(),
    )
    _replace_adapters(pipe, transformer, dict(zip(names, updates, strict=True)))
    beneath = choose_policy(None, [file for file in files if not is_4k(file)], path_of(pipe))
    adapted = Adaptation(
        policy,
        tuple(names),
        tuple(name for name, file in zip(names, files, strict=True) if is_4k(file)),
        tuple(map(str, sources)),
        is_full_beneath=beneath.attention == "full",
    )
    apply_policy(transformer, policy, adapted)
    _set_policy(pipe, policy)
    _owners[transformer] = ref(pipe)
    logger.info("adapted with %s, %s", names or "no adapter", policy)
    return pipe


def choose_policy(
    policy: ResolutionPolicy | None,
    adapters: Sequence[AdapterFile],
    model_path: str | os.PathLike[str] | None,
) -> ResolutionPolicy:
    """Return a policy that was asked for, else the last adapter's, else the base's.

    Args:
        policy: What was asked for.
        adapters: In order.
        model_path: Of the base; as in `read_base_policy`.
    """
    if policy is not None:
        return policy
    policies = [file.policy for file in adapters if file.policy is not None]
    return policies[-1] if policies else read_base_policy(model_path)


def restore(pipe: Pipe) -> Pipe:
    """Undo `adapt` and `optimize`: the pipe's outputs are bitwise what they were before.

    Other adapters stay as they are. Nothing happens to a pipe that is neither. Pipes that share
    a transformer share its adapters; each has a scheduler of its own to restore.

    Returns:
        The same pipe.

    Raises:
        ValueError: If adapters are fused into the base, or layers were offloaded since `optimize`;
            nothing is undone then.
    """
    transformer = transformer_of(pipe)
    undo(transformer)
    if (positions := find_policy(transformer)) is not None:
        _check_attachable(transformer)
        detach(transformer, positions.adapted.names)
        remove_policy(transformer)
        _owners.pop(transformer, None)
    for controlnet in _controlnets_of(pipe):
        remove_policy(controlnet)
    _restore_scheduler(pipe)
    return pipe


def as_sources(adapters: Source | Sequence[Source]) -> list[Source]:
    """Take one adapter or several as a list."""
    return [adapters] if isinstance(adapters, str | os.PathLike) else list(adapters)


def _name_adapters(files: Sequence[AdapterFile], given: str | Sequence[str] | None) -> list[str]:
    if given is not None:
        names = [given] if isinstance(given, str) else list(given)
        if len(names) != len(files):
            raise ValueError(
                f"adapter_names {names} has {len(names)} names for {len(files)} adapters; give "
                "one for each"
            )
        if len(set(names)) != len(names):
            raise ValueError(f"adapter_names {names} must differ from one another")
        if not all(name and "." not in name for name in names):
            raise ValueError(f"adapter_names {names} must each be non-empty and contain no dot")
        return names
    names = []
    for file in files:
        name, count = "urae_4k" if is_4k(file) else "urae_2k", 2
        while name in names:
            name, count = f"{name.split('-')[0]}-{count}", count + 1
        names.append(name)
    return names


def is_4k(file: AdapterFile) -> bool:
    """Tell whether an adapter is for 4K, by its kind or its name."""
    return file.kind == "minor" or "4k" in file.name.lower()


def _find_inherited(
    pipe: Any,
    transformer: nn.Module,
    sources: Sequence[Source],
    policy: ResolutionPolicy | None,
) -> ResolutionPolicy | None:
    """Return the policy of a transformer that another pipe adapted to just what is asked for.

    Raises:
        ValueError: If it was, and something else is asked for.
    """
    positions, owner = find_policy(transformer), _owners.get(transformer, lambda: None)()
    if positions is None or owner is pipe:
        return None
    adapted = positions.adapted
    same_sources = not sources or tuple(map(str, sources)) == adapted.sources
    if same_sources and policy in (None, adapted.policy):
        return adapted.policy
    if owner is not None:
        raise ValueError(
            "this pipe's transformer is already adapted differently through another pipe "
            f"({list(adapted.sources) or 'no adapters'}, {adapted.policy}); "
            "call urae.restore(pipe) first"
        )
    return None


def _replace_adapters(pipe: Any, transformer: nn.Module, updates: Mapping[str, Update]) -> None:
    """Attach updates by name in the place of those of an earlier call, or leave these."""
    earlier = {name: read_update(transformer, name) for name in _own_names(transformer)}
    activity = Activity(transformer)
    detach(transformer, list(earlier))
    try:
        for name, update in updates.items():
            attach(transformer, name, update, pipe=pipe)
    except BaseException:
        detach(transformer, list(updates))
        for name, update in earlier.items():
            attach(transformer, name, update, pipe=pipe)
        activity.put_back(transformer)
        raise


def _own_names(transformer: nn.Module) -> tuple[str, ...]:
    positions = find_policy(transformer)
    present = peft_configs(transformer)
    return () if positions is None else tuple(n for n in positions.adapted.names if n in present)


def _check_files(
    files: Sequence[AdapterFile], names: Sequence[str], transformer: nn.Module
) -> None:
    """Refuse adapters for another base, in a wrong order, or beside what they cannot be with."""
    for file in files:
        check_fits(file, transformer)
    others = set(peft_configs(transformer)) - set(_own_names(transformer))
    for name in names:
        if name in others:
            raise ValueError(
                f"adapter name {name!r} is in use on this pipeline; pass other adapter_names, or "
                f"delete that adapter first: pipe.delete_adapters({name!r})"
            )
    check_order(files)
    for file in files:
        if file.variant is not None and others:
            raise ValueError(
                f"{file.path} is a {file.kind} adapter, which cannot be combined with other "
                f"adapters, but the pipeline has {sorted(others)}; delete these first: "
                f"pipe.delete_adapters({sorted(others)})"
            )


def _check_attachable(transformer: nn.Module) -> None:
    if is_optimized(transformer):
        raise ValueError(
            "the transformer is already optimized for its current adapters; call "
            "urae.restore(pipe), then urae.adapt, then urae.optimize"
        )
    for module in transformer.modules():
        if getattr(module, "merged", False) is True:
            raise ValueError(
                "a LoRA is fused into the base's weights; call pipe.unfuse_lora() first, or "
                "reload the pipeline (fusing and unfusing does not restore the weights bitwise)"
            )
        if getattr(module, "fused_projections", False) is True:
            raise ValueError(
                "the transformer's q, k and v are fused into one matrix, where adapters have no "
                "effect; call pipe.transformer.unfuse_qkv_projections() first"
            )


def transformer_of(pipe: Any) -> FluxTransformer2DModel:
    """Return a pipeline's transformer, without the wrapper of `torch.compile`.

    Raises:
        ValueError: If it has none of FLUX.
    """
    transformer: Any = unwrap(getattr(pipe, "transformer", None))
    if not isinstance(transformer, FluxTransformer2DModel):
        raise ValueError(
            f"{type(pipe).__name__} is not a FLUX.1 pipeline with a transformer; load one with "
            "diffusers.FluxPipeline.from_pretrained"
        )
    return transformer


def unwrap(module: Any) -> Any:
    """Look through `torch.compile(module)`."""
    return getattr(module, "_orig_mod", module)


def _controlnets_of(pipe: Any) -> Iterable[nn.Module]:
    controlnet = unwrap(getattr(pipe, "controlnet", None))
    if controlnet is None:
        return []
    return [unwrap(net) for net in getattr(controlnet, "nets", [controlnet])]


def _set_policy(pipe: Any, policy: ResolutionPolicy) -> None:
    """Follow it outside of the transformer: in ControlNets and scheduler."""
    _restore_scheduler(pipe)
    original = pipe.scheduler
    pipe.scheduler = shift_scheduler(original, policy)  # first: it may refuse
    setattr(pipe.scheduler, _ORIGINAL, original)
    _shifted[pipe] = pipe.scheduler
    for controlnet in _controlnets_of(pipe):
        apply_policy(controlnet, policy)


def _restore_scheduler(pipe: Any) -> None:
    """Put back the scheduler from before, or its time shift into one that was made of ours."""
    scheduler, ours = pipe.scheduler, _shifted.pop(pipe, None)
    if hasattr(scheduler, _ORIGINAL):
        pipe.scheduler = getattr(scheduler, _ORIGINAL)
    elif ours is not None and all(
        scheduler.config.get(name) == ours.config[name] for name in _SHIFT
    ):
        before = getattr(ours, _ORIGINAL).config
        changes = {name: before[name] for name in _SHIFT}
        pipe.scheduler = type(scheduler).from_config(scheduler.config, **changes)


def path_of(pipe: Any) -> str | None:
    """Return where a pipeline was loaded from: a folder or a hub id."""
    path: str | None = pipe.config.get("_name_or_path")
    return path
