"""What a training run will take: from the recipe and the features' headers, no weights loaded.

Where nothing is cached yet it is planned from the pictures.
"""

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

from urae.adapters.adapt import choose_policy
from urae.adapters.files import read_adapter
from urae.adapters.sources import find_local_adapter
from urae.backbones.devices import check_gpu_is_known, pick_device
from urae.backbones.flux import build_meta_models, find_local
from urae.backbones.free_memory import free_bytes, free_host_bytes
from urae.features.buckets import covers, pick_bucket
from urae.features.dataset import Sample
from urae.features.images import ImageError, read_size
from urae.features.location import is_url
from urae.features.order import build_batches
from urae.features.shards import INDEX_NAME
from urae.features.sources import NO_CAPTION, find_sources
from urae.features.store import LATENT_SUFFIX, FeatureFile, count_bytes
from urae.generate.estimate import NUMBER_BYTES
from urae.generate.inputs import default_sampling
from urae.geometry import PATCH, TOKEN_PIXELS, VAE_FACTOR, num_image_tokens
from urae.local_attention import build_local_attention
from urae.resolution import ResolutionPolicy
from urae.train.config import DataConfig, TrainConfig
from urae.train.estimate import (
    COMPILING_SECONDS,
    STATES,
    Estimate,
    RunSeconds,
    Way,
    count_adapter,
    count_fewest_ranks,
    count_operations,
    estimate_seconds,
    list_ways,
)
from urae.train.inputs import check_features, open_sources, repeat_by_weight
from urae.train.memory import estimate_ways
from urae.train.recompute import wants_compiled
from urae.train.validate import hold_out


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
    keys: float | None = None
    """That an image token sees where attention is local."""


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
    """Of the whole run, counted, in the way that was chosen."""
    estimates: tuple[Estimate, ...]
    """Of the ways that the recipe allows, in the order in which `auto` tries them."""
    gpu_bytes: int
    cache_bytes: int
    """Of the features on the disk."""
    checkpoint_bytes: int
    """Of the checkpoints that are kept."""

    host_bytes: int | None = None
    """Free on the host, where the GPU is this machine's; None where it is not known."""
    seconds: Mapping[Way, RunSeconds] = field(default_factory=dict)
    """On one H200, of the ways whose time was measured there."""
    num_pictures: int | None = None
    """That this is planned from, where nothing is cached yet."""
    num_left_out: int = 0
    """Pictures that would not be cached: too small, or not to be read."""

    @property
    def chosen(self) -> Estimate | None:
        """The first that fits; None if none does."""
        return next((each for each in self.estimates if self.fits(each)), None)

    def fits(self, estimate: Estimate) -> bool:
        """Tell whether there is room for a way."""
        return estimate.fits(self.gpu_bytes, self.host_bytes)


class _Data(NamedTuple):
    """What a run would train on."""

    samples: list[Sample]
    text_tokens: int
    num_bytes: int
    """Of the features on the disk."""
    num_pictures: int | None = None
    """That are not cached yet; None where features are."""
    num_left_out: int = 0
    """Pictures that would not be cached."""


def plan_training(config: TrainConfig, gpu_bytes: int | None = None) -> TrainPlan:
    """Say what a run takes on each of its devices.

    Args:
        config: Of the run.
        gpu_bytes: Of the GPU to plan for; by default what is free on this machine's.

    Raises:
        ValueError: If the features do not fit the run, they or the pictures do not suffice, such a
            run cannot be, or there is no GPU to plan for.
        FileNotFoundError: If the model is missing.
    """
    device = pick_device()
    check_gpu_is_known(gpu_bytes, device)
    gpu, host = gpu_bytes, None
    if gpu is None:
        gpu, host = free_bytes(device), free_host_bytes()
    num_ranks = count_fewest_ranks(config)
    ways = list_ways(config, num_ranks)
    transformer: Any = build_meta_models(config.model)["transformer"]
    data = _read_data(config, transformer)
    samples, held_out = hold_out(data.samples, config.num_validation, config.seed)
    tokens = data.text_tokens + max(num_image_tokens(*size_of(sample)) for sample in samples)
    estimates = estimate_ways(transformer, config, tokens, ways, num_ranks=num_ranks)
    chosen = next((each for each in estimates if each.fits(gpu, host)), estimates[0])
    buckets = list_buckets(
        config, repeat_by_weight(samples), data.text_tokens, transformer, chosen.way
    )
    num_epochs = _count_epochs(config, buckets)
    seconds = {
        way: _estimate_run(config, transformer, buckets, way, wants_compiled(config, way, samples))
        for way in ways
    }
    return TrainPlan(
        buckets,
        len(held_out),
        num_epochs,
        count_run(config, buckets),
        tuple(estimates),
        gpu,
        data.num_bytes,
        _count_checkpoints(config, transformer),
        host,
        {way: found for way, found in seconds.items() if found is not None},
        data.num_pictures,
        data.num_left_out,
    )


def _read_data(config: TrainConfig, transformer: Any) -> _Data:
    """List what a run trains on: features, or where a folder has none yet, what they would be."""
    if all(_is_cached(source.dir) for source in config.sources):
        sources = open_sources(config)
        check_features(config, sources, transformer, find_local(config.model))
        samples = [sample for part in sources for sample in part.samples]
        size = sum(count_bytes(file) for sample in samples for file in sample.files)
        return _Data(samples, samples[0].text_tokens, size)
    found = [_list_pictures(source) for source in config.sources]
    samples = [sample for part, _ in found for sample in part]
    path = find_local(config.model) or Path(config.model)
    text_tokens = default_sampling(transformer, path).max_sequence_length
    channels = 2 * transformer.config.in_channels // PATCH**2  # mean and standard deviation
    latents = sum(channels * each.height * each.width // VAE_FACTOR**2 for each in samples)
    embeds = sum(len(each.embed_files) for each in samples) * (
        text_tokens * transformer.config.joint_attention_dim
        + transformer.config.pooled_projection_dim
    )
    num_bytes = NUMBER_BYTES * (latents + embeds)
    return _Data(samples, text_tokens, num_bytes, len(samples), sum(count for _, count in found))


def _is_cached(location: Path | str) -> bool:
    if is_url(location) or (Path(location) / INDEX_NAME).exists():
        return True
    return next(Path(location).glob(f"[!.]*{LATENT_SUFFIX}"), None) is not None


def _list_pictures(source: DataConfig) -> tuple[list[Sample], int]:
    """List the samples that `urae cache` would make, and count the pictures that it would not."""
    samples = []
    sources, skips = find_sources(Path(source.dir))
    for each in sources:
        try:
            height, width = read_size(each.image)
        except ImageError:
            continue
        bucket = pick_bucket(height, width, source.resolution)
        if covers(height, width, bucket):
            files: dict[str, FeatureFile] = {
                column: each.embed_path(column) for column in each.captions
            }
            samples.append(Sample(each.stem, each.latent_path, files, *bucket, source.weight))
    if not samples:
        raise ValueError(
            f"none of the {len(sources)} captioned pictures in {source.dir} is large enough for "
            f"resolution {source.resolution}, and pictures are not enlarged; use larger ones, or "
            "a lower resolution"
        )
    uncaptioned = {Path(skip.file).stem for skip in skips if skip.reason == NO_CAPTION}
    return samples, len(uncaptioned) + len(sources) - len(samples)


def list_buckets(
    config: TrainConfig, samples: Sequence[Sample], text_tokens: int, transformer: Any, way: Way
) -> tuple[Bucket, ...]:
    """List the sizes of an epoch's samples, the largest first."""
    sizes = list(map(size_of, samples))
    batches = build_batches(sizes, config.batch_size, seed=config.seed, epoch=0)
    num_batches = Counter(sizes[batch[0]] for batch in batches)
    sources = [*config.adapter.over, *([config.adapter.init] if config.adapter.init else [])]
    here = [path for source in sources if (path := find_local_adapter(source)) is not None]
    policy = choose_policy(config.policy, list(map(read_adapter, here)), find_local(config.model))
    buckets = []
    for size, count in Counter(sizes).items():
        tokens = text_tokens + num_image_tokens(*size)
        keys = _count_keys(policy, text_tokens, *size)
        one = count_operations(transformer, tokens, way.checkpointing, keys=keys)
        batch = one * count / num_batches[size]
        buckets.append(Bucket(*size, tokens, count, num_batches[size], batch, keys))
    return tuple(sorted(buckets, key=lambda bucket: -bucket.tokens))


def _count_epochs(config: TrainConfig, buckets: Sequence[Bucket]) -> float:
    num_batches = sum(bucket.num_batches for bucket in buckets)
    return config.steps * config.gradient_accumulation / num_batches


def count_run(config: TrainConfig, buckets: Sequence[Bucket]) -> float:
    """Count the operations of all steps."""
    epoch = sum(bucket.operations * bucket.num_batches for bucket in buckets)
    return epoch * _count_epochs(config, buckets)


def _estimate_run(
    config: TrainConfig, transformer: Any, buckets: Sequence[Bucket], way: Way, compiled: bool
) -> RunSeconds | None:
    """Estimate the time of a run on an H200; None where that of one of the sizes is not known."""
    epoch = 0.0
    for each in buckets:
        one = estimate_seconds(
            transformer, config, each.tokens, way, compiled=compiled, keys=each.keys
        )
        if one is None:
            return None
        epoch += one * each.num_samples
    compiling = COMPILING_SECONDS * min(2, len(buckets)) if compiled else 0.0
    steps = epoch * _count_epochs(config, buckets)
    return RunSeconds(steps / config.steps, steps + compiling)


def _count_checkpoints(config: TrainConfig, transformer: Any) -> int:
    """Return the size of the checkpoints that are kept."""
    has_plain = config.ema_decay is not None or config.optimizer.name == "schedule-free"
    factors = 2 if config.adapter.kind == "minor" else 1  # B0 and A0 beside B and A
    copies = factors * (1 + has_plain) + STATES[config.optimizer.name]
    trained = 4 * count_adapter(transformer, config.adapter)
    return int(config.keep_checkpoints * copies * trained)


def size_of(sample: Sample) -> tuple[int, int]:
    """Return height and width in pixels."""
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
