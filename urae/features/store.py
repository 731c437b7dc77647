"""Feature files: their names, metadata, reading and writing.

The names and tensors are the reference implementation's, so that either tool reads the other's
folder. The metadata is ours: it says what a file was made from.

    <stem>_latent_code.safetensors       mean, std: 16 x h/8 x w/8
    <stem>_<column>_embed.safetensors    caption_feature_t5: L x d, caption_feature_clip: p
    .urae/empty_prompt_embed.safetensors the same, of no caption at all

Such a file lies beside its picture, or packed with others in a shard.
"""

import hashlib
import os
import zlib
from collections.abc import Collection, Mapping
from contextlib import suppress
from dataclasses import dataclass
from enum import Enum
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load
from torch import Tensor

from urae.backbones.flux import TEXT_COMPONENTS, fingerprint_component
from urae.features.shard_folder import ShardFolder
from urae.storage import serialize, write_atomic

LATENT_SUFFIX = "_latent_code.safetensors"
EMBED_SUFFIX = "_embed.safetensors"
WORK_DIR = ".urae"
"""Folder in a data folder for what belongs to no image."""
EMPTY_PROMPT = f"empty_prompt{EMBED_SUFFIX}"
"""Name of the file of the empty prompt's embeddings."""
LATENT_KEYS = ("mean", "std")
EMBED_KEYS = ("caption_feature_t5", "caption_feature_clip")

FORMAT_KEY = "urae_features"
FORMAT_VERSION = "1"
"""Raised when the way features are made changes: older files are then made again."""
CHECKSUM_KEY = "crc32"

_EDGE_BYTES = 4096


class Status(Enum):
    """What a feature file is to a run of the cache."""

    DUE = "due"
    CURRENT = "current"
    FOREIGN = "foreign"


@dataclass(frozen=True)
class Fingerprints:
    """The weights that features come from, as `fingerprint_component` identifies them."""

    vae: str
    text_encoders: str
    """Of both text encoders and both tokenizers."""


@dataclass(frozen=True)
class Header:
    """What a feature file says about itself before its tensors are read."""

    metadata: dict[str, str] | None
    """Ours, or None: such a file was written by the reference."""
    shapes: dict[str, tuple[int, ...]]


@dataclass(frozen=True, slots=True)
class PackedFile:
    """A feature file in a shard."""

    name: str
    """Of the file, as it is outside of shards."""
    folder: ShardFolder
    shard: str
    """Name of the shard's file."""
    offset: int
    """Of the feature file's first byte in it."""
    num_bytes: int
    crc32: int
    fingerprint: str
    header: Header
    """Without what differs from picture to picture."""

    def __str__(self) -> str:
        return f"{self.name} in shard {self.folder.url}/{self.shard}"

    def read_bytes(self) -> bytes:
        """Read the feature file and check its bytes; the errors are `ShardFolder`'s."""
        return self.folder.read_range(
            self.shard, self.offset, self.num_bytes, self.crc32, self.name
        )


FeatureFile = Path | PackedFile
"""Where a feature file lies."""


def latent_name(stem: str) -> str:
    """Name the file of an image's latents."""
    return f"{stem}{LATENT_SUFFIX}"


def embed_name(stem: str, column: str) -> str:
    """Name the file of the prompt embeddings of an image's caption in `column`."""
    return f"{stem}_{column}{EMBED_SUFFIX}"


def latent_path(data_dir: Path, stem: str) -> Path:
    """Say where an image's latents lie, beside it."""
    return data_dir / latent_name(stem)


def list_cached_stems(data_dir: Path) -> set[str]:
    """List the stems of a folder's images that have latents."""
    names = (path.name for path in data_dir.glob(f"[!.]*{LATENT_SUFFIX}"))
    return {name.removesuffix(LATENT_SUFFIX) for name in names}


def embed_path(data_dir: Path, stem: str, column: str) -> Path:
    """Say where the prompt embeddings of an image's caption in `column` lie, beside it."""
    return data_dir / embed_name(stem, column)


def empty_prompt_path(data_dir: Path) -> Path:
    """Name the embeddings of the empty prompt, which stands in for captions that are left out."""
    return data_dir / WORK_DIR / EMPTY_PROMPT


def split_embed_name(name: str, stems: Collection[str]) -> tuple[str, str] | None:
    """Undo `embed_name`: the longest of `stems` that fits, and the column; None if none fits."""
    head = name.removesuffix(EMBED_SUFFIX)
    cuts = (at for at in range(len(head) - 2, 0, -1) if head[at] == "_")
    return next(((head[:at], head[at + 1 :]) for at in cuts if head[:at] in stems), None)


def find_owner(path: Path, stems: Collection[str]) -> tuple[str, str] | None:
    """Tell which image's caption a file of embeddings holds: the stem and the column.

    By name alone `beach_2_prompt` is column `2_prompt` of `beach` where nothing else of `beach_2`
    is left, so the file's own metadata counts, unless the file has been renamed.

    Args:
        path: The file.
        stems: Of all images that are known.

    Returns:
        What its metadata say, else the longest of `stems` that fits; None if none fits.
    """
    owner = split_embed_name(path.name, stems)
    if owner is None or "_" not in owner[1]:  # no shorter column to be
        return owner
    with suppress(ValueError):  # a damaged one says nothing
        found = read_header(path).metadata or {}
        own = found.get("stem", ""), found.get("column", "")
        if embed_name(*own) == path.name:
            return own
    return owner


def fingerprint_encoders(model_path: Path) -> Fingerprints:
    """Identify a model's VAE and text encoders without loading them.

    Args:
        model_path: The folder or file that `fetch_model` found.
    """
    text = [fingerprint_component(model_path, component) for component in TEXT_COMPONENTS]
    return Fingerprints(
        vae=fingerprint_component(model_path, "vae"),
        text_encoders=hashlib.sha256("".join(text).encode()).hexdigest(),
    )


def find_status(path: Path, identity: Mapping[str, str]) -> Status:
    """Compare a feature file with what it should be made from.

    Args:
        path: The file, there or not.
        identity: The metadata that decides; more is allowed.

    Returns:
        `CURRENT` if all of `identity` is in its metadata, `FOREIGN` if it is sound but carries no
        metadata of ours, else `DUE`.

    Raises:
        OSError: If the system cannot read it.
    """
    if not path.exists():
        return Status.DUE
    try:
        metadata = read_header(path).metadata
    except ValueError:
        return Status.DUE
    if metadata is None:
        return Status.FOREIGN
    return Status.CURRENT if identity.items() <= metadata.items() else Status.DUE


def read_header(file: FeatureFile) -> Header:
    """Read a feature file's metadata and shapes.

    Raises:
        ValueError: If the file is truncated or corrupt.
        OSError: If the system cannot read it.
    """
    if isinstance(file, PackedFile):
        return file.header
    try:
        with safe_open(file, "pt") as opened:
            metadata: dict[str, str] = opened.metadata() or {}
            shapes = {key: tuple(opened.get_slice(key).get_shape()) for key in opened.keys()}
    except SafetensorError as error:
        raise _corrupt(file, str(error)) from error
    except OSError as error:
        raise _unreachable(file, error) from error
    return Header(metadata if FORMAT_KEY in metadata else None, shapes)


def read_features(file: FeatureFile, keys: Collection[str]) -> dict[str, Tensor]:
    """Read a feature file's tensors, as stored, onto the CPU.

    Args:
        file: The file.
        keys: Those that must be there.

    Raises:
        ValueError: If the file is truncated or corrupt, lacks a key, is not finite, or does not
            have the checksum that it was written with.
        OSError: If the system cannot read it; FileNotFoundError and ConnectionError of its shard.
    """
    if isinstance(file, PackedFile):
        tensors: dict[str, Tensor] = load(file.read_bytes())
        is_checked = True  # when it was packed, and its bytes are those still
    else:
        tensors, is_checked = _read_loose(file)
    for key in keys:
        if key not in tensors:
            raise _corrupt(file, f"it has no {key!r}, only {', '.join(tensors) or 'nothing'}")
        if not (is_checked or tensors[key].isfinite().all()):
            raise _corrupt(file, f"{key!r} holds values that are not finite")
    return tensors


def _read_loose(path: Path) -> tuple[dict[str, Tensor], bool]:
    """Return the tensors, and whether they are the finite ones that `write_features` wrote."""
    try:
        with safe_open(path, "pt") as opened:
            wanted = (opened.metadata() or {}).get(CHECKSUM_KEY)
            tensors: dict[str, Tensor] = {key: opened.get_tensor(key) for key in opened.keys()}
    except SafetensorError as error:
        raise _corrupt(path, str(error)) from error
    except OSError as error:
        raise _unreachable(path, error) from error
    if wanted is not None and wanted != checksum(tensors):
        raise _corrupt(path, "its bytes have changed since it was written")
    return tensors, wanted is not None


def count_bytes(file: FeatureFile) -> int:
    """Return a feature file's size in bytes."""
    return file.num_bytes if isinstance(file, PackedFile) else file.stat().st_size


def fingerprint_file(file: FeatureFile) -> str:
    """Identify a feature file without reading it whole, the same loose or packed.

    Returns:
        SHA-256 over its size, beginning (which holds what `urae cache` says of its origin) and
        end, 64 hex digits.
    """
    if isinstance(file, PackedFile):
        return file.fingerprint
    with file.open("rb") as stream:
        size = stream.seek(0, os.SEEK_END)
        found = hashlib.sha256(f"{size}\n".encode())
        for begin in (0, max(0, size - _EDGE_BYTES)):
            stream.seek(begin)
            found.update(stream.read(_EDGE_BYTES))
    return found.hexdigest()


def write_features(path: Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> None:
    """Write a feature file that is there whole or not at all.

    Raises:
        ValueError: If a tensor is not finite: then the encoder is broken, not the file.
        OSError: If it cannot be written, no space being left for one.
    """
    for key, tensor in tensors.items():
        if not tensor.isfinite().all():
            raise ValueError(
                f"{key!r} for {path.name} holds values that are not finite; the model's encoder "
                "overflows in this dtype or its weights are damaged"
            )
    cpu = {key: tensor.detach().cpu().contiguous() for key, tensor in tensors.items()}
    ours = {FORMAT_KEY: FORMAT_VERSION, CHECKSUM_KEY: checksum(cpu)}
    write_atomic(path, serialize(cpu, {**ours, **metadata}))


def checksum(tensors: Mapping[str, Tensor]) -> str:
    """Return the CRC-32 of some tensors' bytes, by name: cheap beside reading them."""
    found = 0
    for key in sorted(tensors):
        found = zlib.crc32(tensors[key].contiguous().view(torch.uint8).numpy().data, found)
    return f"{found:08x}"


def digest(data: bytes | str) -> str:
    """Return the SHA-256 of bytes, or of text in UTF-8, as 64 hex digits."""
    return hashlib.sha256(data.encode() if isinstance(data, str) else data).hexdigest()


def _unreachable(file: Path, error: OSError) -> OSError:
    """Say that the system cannot read a file, which may be as good as ever."""
    return OSError(
        f"feature file {file} cannot be read ({error.strerror or error}); check that its "
        "storage can be reached, and run the command again, training with --resume"
    )


def _corrupt(file: FeatureFile, reason: str) -> ValueError:
    return ValueError(
        f"feature file {file} cannot be used: {reason}; delete it and run `urae cache` again"
    )
