"""What a run reads, found and checked before any weights load."""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

from diffusers import FlowMatchEulerDiscreteScheduler

from urae.adapters.files import AdapterFile, check_fits, read_adapter
from urae.backbones.flux import (
    build_meta_models,
    build_meta_transformer,
    fetch_model,
    find_local,
    read_latent_scale,
)
from urae.features.captions import check_weights
from urae.features.dataset import Sample, check_cache
from urae.features.location import Features, open_features
from urae.features.store import FeatureFile, fingerprint_encoders, fingerprint_file
from urae.geometry import PATCH
from urae.train.adapter import check_rank, read_adapters
from urae.train.batch import Draws
from urae.train.config import TrainConfig
from urae.train.output import Start, find_start
from urae.train.validate import hold_out


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

    @property
    def adapters(self) -> list[AdapterFile]:
        """Those under the one that trains, and the one that it starts from."""
        return [*self.over, *([self.initial] if self.initial else [])]


def check_inputs(config: TrainConfig) -> Inputs:
    """Find and check everything that a run reads, before any weights load.

    Raises:
        ValueError, FileNotFoundError, FileExistsError, PermissionError: Says what does not fit.
    """
    start = find_start(config)
    sources = open_sources(config)
    samples = [sample for source in sources for sample in source.samples]
    train_samples, held_out = hold_out(samples, config.num_validation, config.seed)
    if find_local(config.model) is None:  # what does not fit is said before gigabytes come
        check_features(config, sources, build_meta_models(config.model)["transformer"])
    model_path = fetch_model(config.model)  # encoders too: their fingerprints are checked
    meta = build_meta_transformer(model_path)
    empty_prompt = check_features(config, sources, meta, model_path)
    data_hash = fingerprint_features(samples, empty_prompt)
    check_rank(config.adapter, meta)
    over, initial = read_adapters(
        config.adapter, start.checkpoint.trained_path if start.checkpoint else None
    )
    average = None
    if start.checkpoint:
        _check_same_data(start, config, data_hash)
        average = read_adapter(start.checkpoint.adapter_path) if config.ema_decay else None
    for file in [*over, *([initial] if initial else [])]:
        check_fits(file, meta)
    return Inputs(
        model_path,
        repeat_by_weight(train_samples),
        held_out,
        data_hash,
        _read_draws(config, model_path, empty_prompt),
        over,
        initial,
        average,
        start,
    )


def check_features(
    config: TrainConfig,
    sources: Sequence[Features],
    transformer: Any,
    model_path: Path | None = None,
) -> FeatureFile | None:
    """Check, by headers alone, that features are what a run wants.

    Args:
        config: Of the run.
        sources: Its features, as `open_sources` found them.
        transformer: That they are for, a FLUX one; its shape counts.
        model_path: The whole model, whose encoders they should be from; None to take any.

    Returns:
        The empty prompt's embeddings, if the run draws them.

    Raises:
        ValueError: If a file or a caption column does not fit, or the empty prompt is missing.
    """
    samples = [sample for source in sources for sample in source.samples]
    if config.caption_weights is not None:
        check_weights(samples, config.caption_weights)
    empty_prompt = sources[0].empty_prompt if config.caption_dropout else None
    if config.caption_dropout and empty_prompt is None:
        raise ValueError(
            "caption_dropout needs the empty prompt's embeddings, which are not in "
            f"{config.sources[0].dir}; run `urae cache` on the folder again, then `urae pack` if "
            "it is packed"
        )
    check = partial(
        check_cache,
        latent_channels=transformer.config.in_channels // PATCH**2,
        t5_dim=transformer.config.joint_attention_dim,
        clip_dim=transformer.config.pooled_projection_dim,
        fingerprints=None if model_path is None else fingerprint_encoders(model_path),
        empty_prompt=empty_prompt,
    )
    for source, part in zip(config.sources, sources, strict=True):
        check(part.samples, resolution=source.resolution)
    if len(config.sources) > 1:
        check(samples)  # text of one length in all
    return empty_prompt


def open_sources(config: TrainConfig) -> list[Features]:
    """Open the features of a run, as they are named; each sample comes once, with its weight.

    Raises:
        ValueError: If some have none, or come twice.
        FileNotFoundError, ConnectionError, ImportError: As `open_features`.
    """
    locations = [source.dir for source in config.sources]
    for twice in {each for each in locations if locations.count(each) > 1}:
        raise ValueError(f"data folder {twice} is named twice; give it a weight of 2")
    found = [open_features(each, config.remote_cache_gib) for each in locations]
    return [
        Features([replace(each, weight=source.weight) for each in part.samples], part.empty_prompt)
        for source, part in zip(config.sources, found, strict=True)
    ]


def repeat_by_weight(samples: Sequence[Sample]) -> list[Sample]:
    """List each sample as often as an epoch has it."""
    return [sample for sample in samples for _ in range(sample.weight)]


def _read_draws(config: TrainConfig, model_path: Path, empty_prompt: FeatureFile | None) -> Draws:
    scheduler = FlowMatchEulerDiscreteScheduler()  # its defaults are FLUX.1's
    if model_path.is_dir():
        scheduler = FlowMatchEulerDiscreteScheduler.from_pretrained(model_path / "scheduler")
    return Draws(
        seed=config.seed,
        scale=read_latent_scale(model_path),
        original_caption_share=config.original_caption_share,
        caption_weights=config.caption_weights,
        caption_dropout=config.caption_dropout,
        empty_prompt=empty_prompt,
        timestep_sampling=config.timestep_sampling,
        timestep_shift=config.timestep_shift,
        scheduler=scheduler.config,
    )


def fingerprint_features(samples: Sequence[Sample], empty_prompt: FeatureFile | None) -> str:
    """Identify the features of a run without reading them whole, the same loose or packed.

    Args:
        samples: All of the run.
        empty_prompt: The empty prompt's embeddings, if the run draws them.

    Returns:
        SHA-256 over the name and fingerprint of each file, 64 hex digits.
    """
    digest = hashlib.sha256()
    files = [file for sample in samples for file in sample.files]
    for file in [*files, *([empty_prompt] if empty_prompt else [])]:
        digest.update(f"{file.name}:{fingerprint_file(file)}\n".encode())
    return digest.hexdigest()


def _check_same_data(start: Start, config: TrainConfig, data_hash: str) -> None:
    assert start.checkpoint is not None
    folders = ", ".join(str(source.dir) for source in config.sources)
    if start.record["data_hash"] != data_hash:
        raise ValueError(
            f"the features in {folders} are not those that {start.checkpoint.path} was made with, "
            "and they determine the order of samples; restore those, or start another --output "
            f"from its weights: --adapter.init {start.checkpoint.path}"
        )
