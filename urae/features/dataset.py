"""Cached features for training: which there are, and whether they fit a model."""

import logging
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from jaxtyping import Float
from torch import Tensor

from urae.features.images import list_picture_stems
from urae.features.store import (
    EMBED_KEYS,
    EMBED_SUFFIX,
    EMPTY_PROMPT,
    LATENT_KEYS,
    LATENT_SUFFIX,
    FeatureFile,
    Fingerprints,
    Header,
    embed_name,
    find_owner,
    latent_name,
    latent_path,
    list_cached_stems,
    read_features,
    read_header,
)
from urae.geometry import VAE_FACTOR

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Sample:
    """An image's feature files and its size."""

    stem: str
    latent_file: FeatureFile
    embed_files: dict[str, FeatureFile]
    """By caption column, at least one."""
    height: int
    """In pixels."""
    width: int
    """In pixels."""
    weight: int = 1
    """How many times an epoch has it."""

    @property
    def files(self) -> list[FeatureFile]:
        """All of them, latents first."""
        return [self.latent_file, *self.embed_files.values()]

    @property
    def text_tokens(self) -> int:
        """As many as `urae cache` padded its T5 embeddings to, alike in all of a run."""
        return read_header(next(iter(self.embed_files.values()))).shapes[EMBED_KEYS[0]][0]


def list_samples(data_dir: Path) -> list[Sample]:
    """List the cached images of a folder, by name; sizes come from the files' headers.

    Raises:
        ValueError: If there are none, one has no prompt embeddings, or a file is corrupt.
    """
    cached = list_cached_stems(data_dir)
    if not cached:
        raise ValueError(
            f"data folder {data_dir} has no cached latents (*{LATENT_SUFFIX}); "
            f"run `urae cache {data_dir} --model MODEL --resolution SIDE` first"
        )
    known = cached | list_picture_stems(data_dir)
    embeds: defaultdict[str, dict[str, FeatureFile]] = defaultdict(dict)
    num_alone = 0
    for path in sorted(data_dir.glob(f"[!.]*{EMBED_SUFFIX}")):
        if path.name == EMPTY_PROMPT and "empty" not in known:
            continue
        owner = find_owner(path, known)
        if owner and owner[0] in cached:
            embeds[owner[0]][owner[1]] = path
        else:
            num_alone += 1
    if num_alone:  # captions are cached first
        logger.warning(
            "%d cached captions in %s have no picture latents and are left out; if urae cache "
            "was interrupted there, run it again",
            num_alone,
            data_dir,
        )
    stems = sorted(cached, key=latent_name)
    return [_read_sample(data_dir, stem, embeds[stem]) for stem in stems]


def _read_sample(data_dir: Path, stem: str, embed_files: dict[str, FeatureFile]) -> Sample:
    path = latent_path(data_dir, stem)
    if not embed_files:
        raise ValueError(
            f"{path.name} has no prompt embeddings beside it ({embed_name(stem, '<column>')}); "
            f"caption the image and cache {data_dir} again, or remove the file"
        )
    _, height, width = _shape(path, read_header(path), "mean", 3)
    return Sample(stem, path, embed_files, height * VAE_FACTOR, width * VAE_FACTOR)


def check_cache(
    samples: Sequence[Sample],
    *,
    latent_channels: int,
    t5_dim: int,
    clip_dim: int,
    resolution: int | None = None,
    fingerprints: Fingerprints | None = None,
    empty_prompt: FeatureFile | None = None,
) -> None:
    """Check, by headers alone, that a cache is what a model is to be trained on.

    Files of the reference say nothing about where they come from: only their shapes are checked.

    Args:
        samples: The cache.
        latent_channels: Of the model's VAE (FLUX.1: 16).
        t5_dim: Width of the model's prompt embeddings (FLUX.1: 4096).
        clip_dim: Width of its pooled prompt embeddings (FLUX.1: 768).
        resolution: The one that images should be cached for; None to take any.
        fingerprints: Of the model's encoders; None to take any.
        empty_prompt: The empty prompt's embeddings, if the run draws them.

    Raises:
        ValueError: If a file does not fit, naming it and both values.
    """
    embeds = [file for sample in samples for file in sample.embed_files.values()]
    if empty_prompt is not None:
        embeds.append(empty_prompt)
    for sample in samples:
        header = read_header(sample.latent_file)
        for key in LATENT_KEYS:
            channels = _shape(sample.latent_file, header, key, 3)[0]
            _expect(sample.latent_file, f"channels of {key}", channels, latent_channels)
        if header.metadata and resolution is not None:
            found = header.metadata["resolution"]
            _expect(sample.latent_file, "resolution", found, str(resolution))
        if header.metadata and fingerprints:
            _expect(sample.latent_file, "VAE", header.metadata["vae"], fingerprints.vae)
    length: int | None = None
    for file in embeds:
        header = read_header(file)
        tokens, width = _shape(file, header, EMBED_KEYS[0], 2)
        _expect(file, "width of T5's embeddings", width, t5_dim)
        (width,) = _shape(file, header, EMBED_KEYS[1], 1)
        _expect(file, "width of CLIP's embedding", width, clip_dim)
        length = tokens if length is None else length
        _expect(file, "max_sequence_length", tokens, length)
        if header.metadata and fingerprints:
            found = header.metadata["text_encoders"]
            _expect(file, "text encoders", found, fingerprints.text_encoders)


def _shape(file: FeatureFile, header: Header, key: str, num_axes: int) -> tuple[int, ...]:
    shape = header.shapes.get(key)
    if shape is None or len(shape) != num_axes:
        raise ValueError(
            f"feature file {file} has no {key!r} with {num_axes} axes (found {header.shapes}); "
            "delete it and run `urae cache` again"
        )
    return shape


def _expect(file: FeatureFile, what: str, found: int | str, wanted: int | str) -> None:
    if found != wanted:
        raise ValueError(
            f"feature file {file} was cached with another setting: {what} is {found}, but this "
            f"run needs {wanted}; run `urae cache` with this run's model, resolution and text "
            "length"
        )


def load_latents(sample: Sample) -> tuple[Float[Tensor, "c h w"], Float[Tensor, "c h w"]]:
    """Read an image's latents: mean and standard deviation, as stored, on the CPU.

    Raises:
        ValueError: If the file is corrupt or not finite.
    """
    tensors = read_features(sample.latent_file, LATENT_KEYS)
    return tensors["mean"], tensors["std"]


def load_embeds(file: FeatureFile) -> tuple[Float[Tensor, "l d"], Float[Tensor, " p"]]:
    """Read a caption's `prompt_embeds` and `pooled_prompt_embeds`, as stored, on the CPU.

    Raises:
        ValueError: If the file is corrupt or not finite.
    """
    tensors = read_features(file, EMBED_KEYS)
    return tensors[EMBED_KEYS[0]], tensors[EMBED_KEYS[1]]
