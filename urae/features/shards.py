"""Shards: feature files packed into tar files, with an index that says where each lies.

    urae_shards.json                    the shards in order, and the empty prompt's embeddings
    features-000000-<identity>.tar      feature files, in the layout that `webdataset` groups
    features-000000-<identity>.json     where each of them is in the tar, and what it is

A shard's identity is that of the feature files in it, so a changed picture or caption makes another
shard. In a tar, the files of a sample are named `<stem>.latent_code.safetensors` and
`<stem>.<column>_embed.safetensors`, with the stem's own dots written `%2E`.
"""

import gc
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TypeVar

from pydantic import TypeAdapter, ValidationError

from urae.features.dataset import Sample
from urae.features.shard_folder import ShardFolder
from urae.features.store import EMPTY_PROMPT, Header, PackedFile, embed_name, latent_name

INDEX_NAME = "urae_shards.json"
FORMAT_VERSION = "1"
"""Raised when the layout changes: other versions are refused."""

_NUM_THREADS = 16  # for small files of a far-away folder

Record = TypeVar("Record")


@dataclass(frozen=True, slots=True)
class Entry:
    """A feature file in a shard."""

    offset: int
    """Of its first byte in the tar."""
    num_bytes: int
    crc32: int
    """Of all its bytes."""
    fingerprint: str
    """As `fingerprint_file` has it."""
    header: int
    """Number of its header among the shard's."""


@dataclass(frozen=True, slots=True)
class SampleEntry:
    """The feature files of an image, and its size in pixels."""

    stem: str
    height: int
    width: int
    latents: Entry
    embeds: dict[str, Entry]
    """By caption column."""


@dataclass(frozen=True)
class ShardIndex:
    """What is in a shard."""

    num_bytes: int
    """Of the tar."""
    sha256: str
    """Of the tar, for `sha256sum`."""
    headers: list[Header]
    """Those that its feature files have, each once."""
    samples: list[SampleEntry]


@dataclass(frozen=True)
class IndexFile:
    """The index of a shard, as a file."""

    shard: str
    """Name of shard and index, without their suffixes."""
    num_bytes: int
    crc32: int


@dataclass(frozen=True)
class EmptyPrompt:
    """The empty prompt's embeddings, a file of its own."""

    file: str
    entry: Entry
    header: Header


@dataclass(frozen=True)
class Index:
    """What is in a folder of shards."""

    version: str
    shards: list[IndexFile]
    empty_prompt: EmptyPrompt | None


INDEX_FORM = TypeAdapter(Index)
SHARD_INDEX_FORM = TypeAdapter(ShardIndex)


def read_shards(folder: ShardFolder) -> tuple[list[Sample], PackedFile | None]:
    """List the samples of a folder of shards in the order of their loose files, by the index alone.

    Returns:
        The samples, and the empty prompt's embeddings if they are there.

    Raises:
        ValueError: If an index is damaged or of another version, or a shard is cut short.
        FileNotFoundError: If an index or a shard is not there.
        ConnectionError: If the folder cannot be read.
    """
    where = f"{folder.url}/{INDEX_NAME}"
    try:
        data = folder.read(INDEX_NAME)
    except FileNotFoundError as error:
        raise FileNotFoundError(
            f"data {folder.url} has no {INDEX_NAME}; name a folder that `urae pack` wrote"
        ) from error
    index = decode_record(INDEX_FORM, data, where)
    if index.version != FORMAT_VERSION:
        raise ValueError(
            f"{where} has version {index.version}, but this urae reads {FORMAT_VERSION}; run "
            "`urae pack` again"
        )
    with ThreadPoolExecutor(_NUM_THREADS) as threads, _garbage_kept():
        shards = list(threads.map(lambda file: _read_shard(folder, file), index.shards))
    empty_prompt = None
    if index.empty_prompt is not None:
        file, entry = index.empty_prompt.file, index.empty_prompt.entry
        empty_prompt = _place(folder, file, EMPTY_PROMPT, entry, index.empty_prompt.header)
    return [sample for samples in shards for sample in samples], empty_prompt


@contextmanager
def _garbage_kept() -> Iterator[None]:
    """Pause garbage collection, which would look through a million samples again and again."""
    if not gc.isenabled():
        yield
        return
    gc.disable()
    try:
        yield
    finally:
        gc.enable()


def _read_shard(folder: ShardFolder, file: IndexFile) -> list[Sample]:
    name, tar = f"{file.shard}.json", f"{file.shard}.tar"
    data = folder.read_range(name, 0, file.num_bytes, file.crc32, "the index")
    index = decode_record(SHARD_INDEX_FORM, data, f"{folder.url}/{name}")
    samples = [_build_sample(folder, tar, index.headers, entry) for entry in index.samples]
    size = folder.find_size(tar)
    if size is not None and size != index.num_bytes:
        cut = next((entry.stem for entry in index.samples if _find_end(entry) > size), None)
        raise ValueError(
            f"shard {folder.url}/{tar} has {size} bytes, but {index.num_bytes} were "
            f"packed{f', so sample {cut} is incomplete' if cut else ''}; copy the shard again, or "
            "delete it and run `urae pack` again"
        )
    return samples


def _find_end(entry: SampleEntry) -> int:
    return max(file.offset + file.num_bytes for file in (entry.latents, *entry.embeds.values()))


def _build_sample(
    folder: ShardFolder, tar: str, headers: Sequence[Header], entry: SampleEntry
) -> Sample:
    def place(name: str, file: Entry) -> PackedFile:
        return _place(folder, tar, name, file, headers[file.header])

    return Sample(
        entry.stem,
        place(latent_name(entry.stem), entry.latents),
        {
            column: place(embed_name(entry.stem, column), file)
            for column, file in entry.embeds.items()
        },
        entry.height,
        entry.width,
    )


def _place(folder: ShardFolder, shard: str, name: str, entry: Entry, header: Header) -> PackedFile:
    return PackedFile(
        name, folder, shard, entry.offset, entry.num_bytes, entry.crc32, entry.fingerprint, header
    )


def encode_record(form: TypeAdapter[Record], record: Record) -> bytes:
    """Write an index as JSON, the same bytes for the same content."""
    return form.dump_json(record) + b"\n"


def decode_record(form: TypeAdapter[Record], data: bytes, where: str) -> Record:
    """Read an index.

    Args:
        form: `INDEX_FORM` or `SHARD_INDEX_FORM`.
        data: The file.
        where: Its name, for the error.

    Raises:
        ValueError: If it is no such index.
    """
    try:
        return form.validate_json(data)
    except ValidationError as error:
        first = error.errors()[0]
        fault = f"{'.'.join(map(str, first['loc']))}: {first['msg']}"
        raise ValueError(
            f"{where} is not an index of shards ({fault}); copy it again, or run `urae pack` again"
        ) from error
