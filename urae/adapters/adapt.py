"""`adapt` a stock FLUX pipeline to ultra resolution, and `restore` it."""

import logging
import os
from collections.abc import Iterable, Sequence
from typing import Any, TypeVar
from weakref import WeakKeyDictionary, WeakSet

import torch
from torch import nn

from urae.adapters.attach import attach, detach
from urae.adapters.files import AdapterFile, check_fits, read_adapter
from urae.adapters.initial import compute_updates
from urae.backbones.weights import open_original_weights
from urae.resolution import (
    ResolutionPolicy,
    apply_policy,
    build_scheduler,
    find_policy,
    read_base_policy,
    remove_policy,
)

logger = logging.getLogger(__name__)

Source = str | os.PathLike[str]
Pipe = TypeVar("Pipe")

_original_schedulers: WeakKeyDictionary[Any, Any] = WeakKeyDictionary()
_adapted_pipes: WeakSet[Any] = WeakSet()
_attached_sources: WeakKeyDictionary[Any, list[str]] = WeakKeyDictionary()  # by transformer


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
        adapters: One adapter or several, applied in order: local files or folders, or
            `[hf://]owner/repo[@revision]/file` on the hub. A minor-component adapter comes after
            the 2K LoRA that it was trained over.
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
    transformer = _transformer_of(pipe)
    shared = find_policy(transformer)
    sources = as_sources(adapters)
    if shared is not None and pipe not in _adapted_pipes:
        attached = _attached_sources.get(transformer, [])
        if policy not in (None, shared.policy) or [str(s) for s in sources] not in ([], attached):
            raise ValueError(
                "this pipe's transformer is adapted already, through another pipe and differently "
                f"({attached or 'no adapters'}, {shared.policy}); urae.restore(pipe) first"
            )
        _set_scheduler(pipe, shared.policy)
        _adapt_controlnets(pipe, shared.policy)
        _adapted_pipes.add(pipe)
        return pipe
    files = [read_adapter(source) for source in sources]
    for file in files:
        check_fits(file, transformer)
    names = _name_adapters(files, adapter_names)
    _check_names_free(transformer, names)
    if policy is None:
        policies = [file.policy for file in files if file.policy is not None]
        policy = policies[-1] if policies else read_base_policy(_path_of(pipe))
    build_scheduler(pipe.scheduler, policy)  # type: ignore[attr-defined]  # fails before changes
    updates = compute_updates(
        files,
        lambda layers: open_original_weights(transformer, layers),
        device=_solve_device(transformer),
    )
    restore(pipe)
    try:
        for name, layers in zip(names, updates, strict=True):
            attach(transformer, name, layers, pipe=pipe)
    except BaseException:
        detach(transformer, names)
        raise
    apply_policy(transformer, policy, tuple(names))
    _adapt_controlnets(pipe, policy)
    _set_scheduler(pipe, policy)
    _adapted_pipes.add(pipe)
    _attached_sources[transformer] = [str(source) for source in sources]
    logger.info("adapted with %s, %s", names or "no adapter", policy)
    return pipe


def restore(pipe: Pipe) -> Pipe:
    """Undo `adapt`: the pipe's outputs are bitwise what they were before.

    Other adapters stay as they are. Nothing happens to a pipe that is not adapted.

    Returns:
        The same pipe.
    """
    transformer = _transformer_of(pipe)
    if (positions := find_policy(transformer)) is not None:
        detach(transformer, positions.adapter_names)
        remove_policy(transformer)
    for controlnet in _controlnets_of(pipe):
        remove_policy(controlnet)
    scheduler = pipe.scheduler  # type: ignore[attr-defined]
    pipe.scheduler = _original_schedulers.get(scheduler, scheduler)  # type: ignore[attr-defined]
    _adapted_pipes.discard(pipe)
    return pipe


def as_sources(adapters: Source | Sequence[Source]) -> list[Source]:
    """Take one adapter or several as a list."""
    return [adapters] if isinstance(adapters, str | os.PathLike) else list(adapters)


def _name_adapters(files: Sequence[AdapterFile], given: str | Sequence[str] | None) -> list[str]:
    if given is not None:
        names = [given] if isinstance(given, str) else list(given)
        if len(names) != len(files):
            raise ValueError(f"{len(names)} adapter_names {names} for {len(files)} adapters")
        if len(set(names)) != len(names):
            raise ValueError(f"adapter_names {names} must differ from one another")
        return names
    names = []
    for file in files:
        is_4k = file.kind == "minor" or "4k" in file.path.name.lower()
        name, count = "urae_4k" if is_4k else "urae_2k", 2
        while name in names:
            name, count = f"{name.split('-')[0]}-{count}", count + 1
        names.append(name)
    return names


def _check_names_free(transformer: nn.Module, names: Sequence[str]) -> None:
    own = positions.adapter_names if (positions := find_policy(transformer)) else ()
    taken = set(getattr(transformer, "peft_config", None) or {}) - set(own)
    for name in names:
        if name in taken:
            raise ValueError(
                f"adapter name {name!r} is in use on this pipeline; pass other adapter_names, or "
                f"delete that adapter first: pipe.delete_adapters({name!r})"
            )


def _transformer_of(pipe: Any) -> nn.Module:
    transformer = getattr(pipe, "transformer", None)
    if transformer is None or not hasattr(transformer, "pos_embed"):
        raise ValueError(
            f"{type(pipe).__name__} is no FLUX pipeline with a transformer; load one with "
            "diffusers.FluxPipeline.from_pretrained"
        )
    module: nn.Module = transformer
    return module


def _solve_device(transformer: nn.Module) -> torch.device:
    device = next(transformer.parameters()).device
    return torch.device("cpu") if device.type == "meta" else device  # sequentially offloaded


def _controlnets_of(pipe: Any) -> Iterable[nn.Module]:
    controlnet = getattr(pipe, "controlnet", None)
    if controlnet is None:
        return []
    return list(getattr(controlnet, "nets", [controlnet]))


def _adapt_controlnets(pipe: Any, policy: ResolutionPolicy) -> None:
    for controlnet in _controlnets_of(pipe):
        apply_policy(controlnet, policy)


def _set_scheduler(pipe: Any, policy: ResolutionPolicy) -> None:
    original = _original_schedulers.get(pipe.scheduler, pipe.scheduler)
    pipe.scheduler = build_scheduler(original, policy)
    _original_schedulers[pipe.scheduler] = original


def _path_of(pipe: Any) -> str | None:
    path: str | None = pipe.config.get("_name_or_path")
    return path
