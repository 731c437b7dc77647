"""`urae plan train --probe`: a few steps of a run's largest batch, as the run would take them."""

from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from urae.backbones.devices import pick_device
from urae.backbones.flux import build_meta_models
from urae.features.dataset import Sample
from urae.features.store import empty_prompt_path
from urae.train.config import DataConfig, TrainConfig
from urae.train.estimate import Estimate
from urae.train.inputs import check_inputs, open_sources
from urae.train.loop import train
from urae.train.memory import choose_way, estimate_ways
from urae.train.output import StepReport
from urae.train.plan import count_run, list_buckets, size_of
from urae.train.recompute import count_tokens, is_compiled
from urae.train.validate import hold_out

_PROBE_STEPS = 3  # compiling comes in the first


@dataclass(frozen=True)
class Probe:
    """What real steps took."""

    reports: tuple[StepReport, ...]
    """Of each; the first compiles, where blocks are compiled."""
    estimate: Estimate
    """Of the same batch in the same way."""
    seconds: float
    """Of all steps of the run, by its operations and the pace of the last one."""


def probe(config: TrainConfig) -> Probe:
    """Take three steps on the largest batch, in a folder that is deleted again.

    They are taken as the run would take them on this machine: in the same way, compiled or not.

    Args:
        config: Of the run; what it measures and shows on the way is left out.

    Raises:
        As `train`.
    """
    source, samples, batch_size = _find_largest_batch(config)
    reports: list[StepReport] = []
    with TemporaryDirectory() as folder:
        config = replace(
            config, output_dir=Path(folder) / "run", resume=False, overwrite=False, tracker=None
        )
        inputs, device = check_inputs(config), pick_device()
        way = choose_way(config, inputs, device)
        data = Path(folder) / "data"
        weights = _copy_features(config, samples, data)
        # as many of each as make whole batches
        weight = 1 if len(samples) == batch_size else batch_size
        trial = replace(
            config,
            data_dir=None,
            data=(DataConfig(data, source.resolution, weight),),
            caption_weights=weights,
            batch_size=batch_size,
            steps=_PROBE_STEPS,
            num_validation=0,
            preview_prompts=(),
            memory=way.tier,
            gradient_checkpointing=way.checkpointing,
            compile=is_compiled(config, way, inputs.samples, device),
        )
        train(trial, on_step=reports.append)
    transformer: Any = build_meta_models(config.model)["transformer"]
    (estimate,) = estimate_ways(transformer, trial, count_tokens(samples), [way])
    text_tokens = samples[0].text_tokens
    whole, step = (
        count_run(each, list_buckets(each, taken, text_tokens, transformer, way))
        for each, taken in ((config, inputs.samples), (replace(trial, steps=1), samples * weight))
    )
    return Probe(tuple(reports), estimate, reports[-1].seconds * whole / step)


def _find_largest_batch(config: TrainConfig) -> tuple[DataConfig, list[Sample], int]:
    """Find the samples of the run's largest batch, with their folder, and how many it has.

    They may be fewer than the batch, where each of them comes several times in an epoch.
    """
    sources = open_sources(config)
    everything = [sample for source in sources for sample in source.samples]
    held = set(map(id, hold_out(everything, config.num_validation, config.seed)[1]))
    groups = defaultdict(list)
    for number, source in enumerate(sources):
        for sample in source.samples:
            if id(sample) not in held:
                groups[number, *size_of(sample)].append(sample)

    def count_batch(samples: list[Sample]) -> int:
        return min(config.batch_size, sum(sample.weight for sample in samples))

    number, *_ = key = max(
        groups, key=lambda key: (count_batch(groups[key]) * count_tokens(groups[key]), key)
    )
    batch_size = count_batch(groups[key])
    return config.sources[number], groups[key][:batch_size], batch_size


def _copy_features(
    config: TrainConfig, samples: Sequence[Sample], data: Path
) -> Mapping[str, float] | None:
    """Copy some samples' features into a folder; return the caption weights that are left."""
    empty_prompt_path(data).parent.mkdir(parents=True)
    for sample in samples:
        for file in sample.files:
            (data / file.name).write_bytes(file.read_bytes())
    if (empty_prompt := open_sources(config)[0].empty_prompt) is not None:
        empty_prompt_path(data).write_bytes(empty_prompt.read_bytes())
    columns = {column for sample in samples for column in sample.embed_files}
    weights = {
        column: weight
        for column, weight in (config.caption_weights or {}).items()
        if column in columns
    }
    return weights if any(weights.values()) else None
