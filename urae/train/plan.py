"""What a training run will take: from the recipe and the features' headers, no weights loaded.

`probe` then takes real steps of the largest bucket, to put beside the estimate.
"""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from urae.backbones.flux import PACKAGED, build_meta_models, pick_device
from urae.backbones.free_memory import free_bytes
from urae.features.dataset import Sample
from urae.features.order import build_batches
from urae.features.store import count_bytes, empty_prompt_path
from urae.geometry import TOKEN_PIXELS, num_image_tokens
from urae.local_attention import build_local_attention
from urae.resolution import ResolutionPolicy, read_base_policy
from urae.train.config import TrainConfig
from urae.train.estimate import (
    STATES,
    Estimate,
    count_adapter,
    count_operations,
    estimate,
    list_ways,
)
from urae.train.inputs import open_sources, repeat_by_weight
from urae.train.loop import train
from urae.train.memory import fits
from urae.train.output import StepReport
from urae.train.recompute import count_tokens
from urae.train.validate import hold_out

_PROBE_STEPS = 3  # compiling comes in the first


@dataclass(frozen=True)
class Bucket:
    """Samples of one size."""

    height: int
    """Pixels."""
    width: int
    """Pixels."""
    tokens: int
    """Text and image, of one sample."""
    num_samples: int
    num_batches: int
    """An epoch; the last one may be smaller."""
    operations: float
    """Of a batch: multiplications and additions, counted."""


@dataclass(frozen=True)
class TrainPlan:
    """What a run takes."""

    buckets: tuple[Bucket, ...]
    """The largest first."""
    num_held_out: int
    """Samples that do not train."""
    num_epochs: float
    """How often each sample is trained on."""
    operations: float
    """Of the whole run, counted."""
    estimates: tuple[Estimate, ...]
    """Of the ways that the recipe allows, in the order in which `auto` tries them."""
    gpu_bytes: int
    cache_bytes: int
    """Of the features on the disk."""
    checkpoint_bytes: int
    """Of the checkpoints that are kept."""

    @property
    def chosen(self) -> Estimate | None:
        """The first that fits; None if none does. The host's memory is not looked at."""
        return next((each for each in self.estimates if fits(each, self.gpu_bytes)), None)


def plan_training(config: TrainConfig, gpu_bytes: int | None = None) -> TrainPlan:
    """Say what a run takes on one device.

    Args:
        config: Of the run.
        gpu_bytes: Of the GPU to plan for; by default what is free on this machine's.

    Raises:
        ValueError: If the features do not suffice, or there is no GPU to plan for.
        FileNotFoundError: If the model is missing.
    """
    device = pick_device()
    if gpu_bytes is None and device.type != "cuda":
        raise ValueError(
            "this machine has no CUDA device; name the memory of the one to plan for: --gpu 24GiB"
        )
    everything = [sample for part in open_sources(config) for sample in part.samples]
    samples, held_out = hold_out(everything, config.num_validation, config.seed)
    transformer: Any = build_meta_models(config.model)["transformer"]
    ways = list_ways(config.memory, config.gradient_checkpointing)
    tokens = count_tokens(samples)
    estimates = tuple(estimate(transformer, config, tokens, way) for way in ways)
    checkpointing = ways[0].checkpointing
    buckets = _list_buckets(config, repeat_by_weight(samples), transformer, checkpointing)
    num_batches = sum(bucket.num_batches for bucket in buckets)
    num_taken = config.steps * config.gradient_accumulation
    epoch = sum(bucket.operations * bucket.num_batches for bucket in buckets)
    has_plain = config.ema_decay is not None or config.optimizer.name == "schedule-free"
    factors = 2 if config.adapter.kind == "minor" else 1  # B0 and A0 beside B and A
    copies = factors * (1 + has_plain) + STATES[config.optimizer.name]
    trained = 4 * count_adapter(transformer, config.adapter)
    return TrainPlan(
        buckets,
        len(held_out),
        num_taken / num_batches,
        epoch * num_taken / num_batches,
        estimates,
        free_bytes(device) if gpu_bytes is None else gpu_bytes,
        sum(count_bytes(file) for sample in everything for file in sample.files),
        int(config.keep_checkpoints * copies * trained),
    )


def probe(config: TrainConfig) -> list[StepReport]:
    """Take three steps on the largest pictures, in a folder that is deleted again.

    Args:
        config: Of the run; what it measures and shows on the way is left out.

    Returns:
        What each step did; the first compiles, where blocks are compiled.

    Raises:
        As `train`.
    """
    sources = open_sources(config)
    everything = [sample for part in sources for sample in part.samples]
    samples, _ = hold_out(everything, config.num_validation, config.seed)
    largest = max(samples, key=lambda each: each.height * each.width)
    number = next(n for n, part in enumerate(sources) if largest in part.samples)
    alike = [
        sample
        for sample in samples
        if (sample.height, sample.width) == (largest.height, largest.width)
        and sample in sources[number].samples
    ]
    reports: list[StepReport] = []
    with TemporaryDirectory() as folder:
        data = Path(folder) / "data"
        empty_prompt_path(data).parent.mkdir(parents=True)
        tried = alike[: config.batch_size]
        columns = {column for sample in tried for column in sample.embed_files}
        weights = {
            column: weight
            for column, weight in (config.caption_weights or {}).items()
            if column in columns
        }
        for sample in tried:
            for file in sample.files:
                (data / file.name).write_bytes(file.read_bytes())
        if (empty_prompt := sources[0].empty_prompt) is not None:
            empty_prompt_path(data).write_bytes(empty_prompt.read_bytes())
        trial = replace(
            config,
            data_dir=data,
            data=(),
            resolution=config.sources[number].resolution,
            caption_weights=weights if any(weights.values()) else None,
            output_dir=Path(folder) / "run",
            steps=_PROBE_STEPS,
            num_validation=0,
            preview_prompts=(),
            tracker=None,
            resume=False,
            overwrite=False,
        )
        train(trial, on_step=reports.append)
    return reports


def _list_buckets(
    config: TrainConfig, samples: Sequence[Sample], transformer: Any, checkpointing: Any
) -> tuple[Bucket, ...]:
    sizes = [(sample.height, sample.width) for sample in samples]
    batches = build_batches(sizes, config.batch_size, seed=config.seed, epoch=0)
    num_batches = Counter(_size(samples[batch[0]]) for batch in batches)
    num_samples = Counter(map(_size, samples))
    policy = config.policy or read_base_policy(PACKAGED.get(config.model, config.model))
    text_tokens = samples[0].text_tokens
    buckets = []
    for (height, width), count in num_samples.items():
        tokens = text_tokens + num_image_tokens(height, width)
        keys = _count_keys(policy, text_tokens, height, width)
        one = count_operations(transformer, tokens, checkpointing, keys=keys)
        batch = one * count / num_batches[height, width]
        buckets.append(Bucket(height, width, tokens, count, num_batches[height, width], batch))
    return tuple(sorted(buckets, key=lambda bucket: -bucket.tokens))


def _size(sample: Sample) -> tuple[int, int]:
    return sample.height, sample.width


def _count_keys(
    policy: ResolutionPolicy, text_tokens: int, height: int, width: int
) -> float | None:
    """Return the keys that an image token sees, None for all."""
    rows, columns = height // TOKEN_PIXELS, width // TOKEN_PIXELS
    if policy.attention != "local" or rows * columns <= policy.native_side**2:
        return None
    device = pick_device()
    return build_local_attention(rows, columns, text_tokens, policy.native_side, device).num_keys
