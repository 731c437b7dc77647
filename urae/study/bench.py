"""What the cells of a study share: bases, teachers, data sets, and the usual settings."""

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import cache, cached_property
from pathlib import Path

from urae.adapters.adapt import choose_policy
from urae.adapters.files import read_adapter
from urae.adapters.sources import resolve_adapter
from urae.backbones.flux import fetch_model, fingerprint_component
from urae.features.store import fingerprint_encoders
from urae.resolution import ResolutionPolicy, read_base_policy
from urae.storage import digest_file
from urae.study.cells import (
    Adapter,
    Cell,
    DataSet,
    Factor,
    Part,
    Scoring,
    Source,
    Training,
    Weights,
)
from urae.study.config import StudyConfig

_TRAINING_SET, _HELD_OUT_SET = 1, 2  # seeds of sets of scenes
_GUIDANCE = 3.5  # of sampling a guidance-distilled base
_FEW_STEPS = 4  # of sampling schnell
_TEACHER_STEPS = 24  # of its denoising, where a question does not vary them
_RANK = 16


@dataclass(frozen=True)
class Bench:
    """Builds the cells of a study from what they differ in."""

    config: StudyConfig

    @cached_property
    def dev(self) -> Weights:
        """The guidance-distilled base."""
        return find_base(self.config.model)

    @cached_property
    def schnell(self) -> Weights:
        """The four-step base."""
        return find_base(self.config.schnell)

    @cached_property
    def policy(self) -> ResolutionPolicy:
        """The base's own policy, on."""
        return read_base_policy(fetch_model(self.config.model))

    @property
    def policy_off(self) -> ResolutionPolicy:
        """Positions and attention as the base has them, and the static shift."""
        return replace(self.policy, ntk_factor=1.0, proportional_attention=False)

    @property
    def teacher_source(self) -> Source:
        """What the data of the teacher are: renders, if these stand in for them."""
        return "clean" if self.config.stand_in else "synthetic"

    @property
    def lengths(self) -> list[int]:
        """Training steps at which a run is looked at: a quarter, half and all of them."""
        every = max(1, self.config.steps // 4)
        return sorted({every, 2 * every, self.config.steps})

    def synthetic(self) -> tuple[Part, ...]:
        """Return the teacher's pictures for the 2K stage."""
        return self.mix(1.0, _TEACHER_STEPS)

    def real(self) -> tuple[Part, ...]:
        """Return the analogue of photographs, for the 2K stage."""
        return (Part(self._real(), 0, self.config.num_samples),)

    def mix(self, share: float, teacher_steps: int) -> tuple[Part, ...]:
        """Return pictures of the 2K stage of which a share is the teacher's, the rest real."""
        count = self.config.num_samples
        end = round(share * count)
        parts = (
            Part(self._taught(teacher_steps), 0, end),
            Part(self._real(), end, count),
        )
        return tuple(part for part in parts if part.start < part.stop)

    def _taught(self, teacher_steps: int) -> DataSet:
        config = self.config
        data = self._data(self.teacher_source, config.side_2k, config.num_samples)
        if config.stand_in:
            return data
        return replace(data, teacher=self._teacher, teacher_steps=teacher_steps)

    def _real(self) -> DataSet:
        return self._data("real", self.config.side_2k, self.config.num_samples)

    @cached_property
    def _teacher(self) -> Weights:
        return find_stage("teacher_512", self.config.work_dir)

    def _data(
        self, source: Source, side: int, count: int, seed: int = _TRAINING_SET,
        model: Weights | None = None,
    ) -> DataSet:  # fmt: skip
        return DataSet(source, side, count, seed, find_encoders((model or self.dev).name))

    def trained_2k(
        self,
        factors: Mapping[str, Factor],
        *,
        adapter: Adapter = "lora",
        parts: tuple[Part, ...] | None = None,
        guidance_scale: float = 1.0,
        policy: ResolutionPolicy | None = None,
        sampling_policy: ResolutionPolicy | None = None,
        model: Weights | None = None,
        sampling_model: Weights | None = None,
        at_step: int | None = None,
    ) -> Cell:
        """Build a cell of the 2K stage; what is not said is usual.

        Args:
            factors: Its place in the table.
            adapter: What trains.
            parts: Data; the teacher's by default.
            guidance_scale: In training.
            policy: In training; the base's own by default.
            sampling_policy: That of training by default.
            model: To train on; dev by default.
            sampling_model: To sample with; that of training by default.
            at_step: One of `lengths`, when to score; None is the end.
        """
        config, model = self.config, model or self.dev
        policy = policy or self._policy_of(model)
        training = Training(
            model=model,
            parts=parts or self.synthetic(),
            adapter=adapter,
            rank=_RANK,
            guidance_scale=guidance_scale,
            policy=policy,
            steps=config.steps,
            batch_size=config.batch_size,
            lr=config.lr,
            num_validation=config.num_validation,
            checkpoint_every=config.steps if at_step is None else self.lengths[0],
        )
        scoring = self._score_2k(sampling_policy or policy, sampling_model or model)
        return Cell(factors, training, replace(scoring, at_step=at_step))

    def untrained_2k(
        self,
        factors: Mapping[str, Factor],
        policy: ResolutionPolicy | None,
        *,
        model: Weights | None = None,
    ) -> Cell:
        """Build a cell of a base without adapter, stock if there is no policy either."""
        return Cell(factors, None, self._score_2k(policy, model or self.dev))

    def trained_4k(self, factors: Mapping[str, Factor], *, adapter: Adapter, rank: int) -> Cell:
        """Build a cell of the 4K stage: an adapter over the 2K LoRA, on real pictures."""
        config = self.config
        data = self._data("real", config.side_4k, config.num_samples_4k)
        training = Training(
            model=self.dev,
            parts=(Part(data, 0, data.count),),
            adapter=adapter,
            rank=rank,
            guidance_scale=1.0,
            policy=self.policy_4k,
            steps=config.steps_4k,
            batch_size=config.batch_size_4k,
            lr=config.lr,
            num_validation=config.num_validation,
            checkpoint_every=config.steps_4k,
            over=self.lora_2k,
        )
        side, captions = config.side_4k, config.num_captions_4k
        return Cell(factors, training, self._score(self.policy_4k, self.dev, side, captions))

    @cached_property
    def lora_2k(self) -> Weights:
        """The adapter under the 4K stage."""
        path = resolve_adapter(self.config.adapter_2k)
        return Weights(str(path), digest_file(path))

    @cached_property
    def policy_4k(self) -> ResolutionPolicy:
        """That of the adapter under the 4K stage, as in `urae train`."""
        return choose_policy(None, [read_adapter(self.lora_2k.name)], fetch_model(self.dev.name))

    def _score_2k(self, policy: ResolutionPolicy | None, model: Weights) -> Scoring:
        return self._score(policy, model, self.config.side_2k, self.config.num_captions)

    def _score(
        self, policy: ResolutionPolicy | None, model: Weights, side: int, num_captions: int
    ) -> Scoring:
        held_out = self._data("clean", side, self.config.num_held_out, _HELD_OUT_SET, model)
        steps, guidance = self.config.sampling_steps, _GUIDANCE
        if model != self.dev:
            steps, guidance = _FEW_STEPS, 0.0
        return Scoring(model, side, num_captions, steps, guidance, policy, held_out)

    def _policy_of(self, model: Weights) -> ResolutionPolicy:
        return read_base_policy(fetch_model(model.name))


def find_base(name: str) -> Weights:
    """Find a base model, and identify it by its weights.

    Raises:
        ValueError, FileNotFoundError: As `fetch_model`.
    """
    path = fetch_model(name)
    prints = fingerprint_encoders(path)
    parts = [fingerprint_component(path, "transformer"), prints.vae, prints.text_encoders]
    return Weights(name, hashlib.sha256("".join(parts).encode()).hexdigest())


@cache  # every cell asks
def find_encoders(name: str) -> Weights:
    """Identify a model by its VAE and text encoders, which decide its features."""
    prints = fingerprint_encoders(fetch_model(name))
    return Weights(name, hashlib.sha256(f"{prints.vae}{prints.text_encoders}".encode()).hexdigest())


def find_stage(stage: str, work_dir: Path) -> Weights:
    """Find a trained stage of the miniature with the stages that its pipeline needs.

    Raises:
        FileNotFoundError: If one is missing.
    """
    digest = hashlib.sha256()
    for name in ("vae", "text", stage):
        path = work_dir / f"{name}.safetensors"
        if not path.is_file():
            raise FileNotFoundError(
                f"{path} does not exist; the teacher's pictures need it: urae miniature train "
                f"{name}, or --stand-in true to try the study on clean renders"
            )
        digest.update(digest_file(path).encode())
    return Weights(stage, digest.hexdigest())
