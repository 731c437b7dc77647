"""What a run reads, found and checked before any weights load."""

import hashlib
import os
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

from diffusers import FlowMatchEulerDiscreteScheduler

from urae.adapters.files import AdapterFile, check_fits, read_adapter
from urae.backbones.flux import (
    build_meta_transformer,
    fetch_model,
    read_latent_scale,
)
from urae.features.captions import check_weights
from urae.features.dataset import Sample, check_cache, list_samples
from urae.features.store import empty_prompt_path, fingerprint_encoders
from urae.geometry import PATCH
from urae.train.adapter import check_rank, read_adapters
from urae.train.batch import Draws
from urae.train.config import TrainConfig
from urae.train.output import Start, find_start
from urae.train.validate import hold_out

_EDGE_BYTES = 4096


@dataclass(frozen=True)
class Inputs:
    """What a run reads, checked."""

    model_path: Path
    samples: list[Sample]
    """To train on, each as often as an epoch has it."""
    held_out: list[Sample]
    """To validate with."""
    data_hash: str
    draws: Draws
    """By which rules batches are drawn."""
    over: list[AdapterFile]
    initial: AdapterFile | None
    """The adapter's weights to go on from, None for fresh ones."""
    average: AdapterFile | None
    """Its averaged weights to go on from, where the resumed run averages."""
    start: Start


def check_inputs(config: TrainConfig) -> Inputs:
    """Find and check everything that a run reads, before any weights load.

    Raises:
        ValueError, FileNotFoundError, FileExistsError, PermissionError: Says what does not fit.
    """
    start = find_start(config)
    samples = read_samples(config)
    train_samples, held_out = hold_out(samples, config.num_validation, config.seed)
    model_path = fetch_model(config.model)  # encoders too: their fingerprints are checked
    meta = build_meta_transformer(model_path)
    if config.caption_weights is not None:
        check_weights(samples, config.caption_weights)
    empty_prompt = find_empty_prompt(config) if config.caption_dropout else None
    check = partial(
        check_cache,
        latent_channels=meta.config.in_channels // PATCH**2,
        t5_dim=meta.config.joint_attention_dim,
        clip_dim=meta.config.pooled_projection_dim,
        fingerprints=fingerprint_encoders(model_path),
        empty_prompt=empty_prompt,
    )
    for source in config.sources:
        check(
            [sample for sample in samples if sample.latent_path.parent == source.dir],
            resolution=source.resolution,
        )
    if len(config.sources) > 1:
        check(samples)  # text of one length in all
    data_hash = fingerprint_features(samples, empty_prompt)
    check_rank(config.adapter, meta)
    over, initial = read_adapters(config.adapter)
    average = None
    if checkpoint := start.checkpoint:
        _check_same_data(start, config, data_hash)
        initial = read_adapter(checkpoint.trained_path)
        average = read_adapter(checkpoint.adapter_path) if config.ema_decay else None
    for file in [*over, *([initial] if initial else [])]:
        check_fits(file, meta)
    return Inputs(
        model_path,
        repeat_by_weight(train_samples),
        held_out,
        data_hash,
        _read_draws(config, model_path),
        over,
        initial,
        average,
        start,
    )


def read_samples(config: TrainConfig) -> list[Sample]:
    """List the samples of a run, folder by folder, each once with its weight.

    Raises:
        ValueError: If a folder has none, or comes twice.
    """
    dirs = [source.dir for source in config.sources]
    for twice in {each for each in dirs if dirs.count(each) > 1}:
        raise ValueError(f"data folder {twice} is named twice; give it a weight of 2")
    return [
        replace(sample, weight=source.weight)
        for source in config.sources
        for sample in list_samples(source.dir)
    ]


def repeat_by_weight(samples: Sequence[Sample]) -> list[Sample]:
    """List each sample as often as an epoch has it."""
    return [sample for sample in samples for _ in range(sample.weight)]


def find_empty_prompt(config: TrainConfig) -> Path:
    """Name the file of the empty prompt's embeddings."""
    return empty_prompt_path(config.sources[0].dir)  # the same in each folder


def _read_draws(config: TrainConfig, model_path: Path) -> Draws:
    scheduler = FlowMatchEulerDiscreteScheduler()  # its defaults are FLUX.1's
    if model_path.is_dir():
        scheduler = FlowMatchEulerDiscreteScheduler.from_pretrained(model_path / "scheduler")
    return Draws(
        seed=config.seed,
        scale=read_latent_scale(model_path),
        original_caption_share=config.original_caption_share,
        caption_weights=config.caption_weights,
        caption_dropout=config.caption_dropout,
        empty_prompt=find_empty_prompt(config),
        timestep_sampling=config.timestep_sampling,
        timestep_shift=config.timestep_shift,
        scheduler=scheduler.config,
    )


def fingerprint_features(samples: Sequence[Sample], empty_prompt: Path | None) -> str:
    """Identify the features of a run without reading them whole.

    Args:
        samples: All of the run.
        empty_prompt: File of the empty prompt's embeddings, if the run draws it.

    Returns:
        SHA-256 over the name, size, beginning (which holds what `urae cache` says of the file's
        origin) and end of each file, 64 hex digits.
    """
    digest = hashlib.sha256()
    paths = [path for s in samples for path in (s.latent_path, *s.embed_paths.values())]
    for path in [*paths, *([empty_prompt] if empty_prompt else [])]:
        with path.open("rb") as stream:
            size = stream.seek(0, os.SEEK_END)
            digest.update(f"{path.name}:{size}\n".encode())
            for begin in (0, max(0, size - _EDGE_BYTES)):
                stream.seek(begin)
                digest.update(stream.read(_EDGE_BYTES))
    return digest.hexdigest()


def _check_same_data(start: Start, config: TrainConfig, data_hash: str) -> None:
    assert start.checkpoint is not None
    folders = ", ".join(str(source.dir) for source in config.sources)
    if start.record["data_hash"] != data_hash:
        raise ValueError(
            f"the features in {folders} are not those that {start.checkpoint.path} was "
            "made with, and the order of samples follows from them; bring those back, or begin "
            f"another --output from its weights: --adapter.init {start.checkpoint.path}"
        )
