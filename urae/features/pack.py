"""The pack job: a folder of loose features to shards."""

import hashlib
import re
import zlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from tarfile import BLOCKSIZE, TarInfo

from urae.config import check_types
from urae.features.claims import Claims
from urae.features.dataset import Sample, list_samples
from urae.features.shards import (
    FORMAT_VERSION,
    INDEX_FORM,
    INDEX_NAME,
    SHARD_INDEX_FORM,
    EmptyPrompt,
    Entry,
    Index,
    IndexFile,
    SampleEntry,
    ShardIndex,
    decode_record,
    encode_record,
)
from urae.features.store import (
    CHECKSUM_KEY,
    EMBED_KEYS,
    LATENT_KEYS,
    WORK_DIR,
    Header,
    empty_prompt_path,
    fingerprint_file,
    read_features,
    read_header,
)
from urae.storage import open_atomic, write_atomic

_IDENTITY_DIGITS = 12
_OURS = re.compile(  # also what a killed run was writing
    rf"\.?(features-\d{{6,}}|empty_prompt)-[0-9a-f]{{{_IDENTITY_DIGITS}}}\.\w+(\.tmp)?"
)
_PER_PICTURE = {CHECKSUM_KEY, "image_sha256", "caption_sha256"}  # metadata of no use in an index

Progress = Callable[[int, int], None]
"""Called with the number of shards that are done, and of all."""


@dataclass(frozen=True)
class PackConfig:
    """What to pack, and where to."""

    data_dir: Path
    """Folder of features, of `urae cache` or the reference implementation."""
    output_dir: Path
    """Folder for the shards; what else is in it is left alone."""
    shard_gib: float = 1.0
    """Most that a shard holds, in GiB, unless one sample is larger."""

    def __post_init__(self) -> None:
        """Refuse values out of range."""
        check_types(self)
        if not 0 < self.shard_gib < float("inf"):
            raise ValueError(f"shard_gib {self.shard_gib} must be a positive number; 1 is usual")
        if self.output_dir.resolve() == self.data_dir.resolve():
            raise ValueError(
                f"output {self.output_dir} is the data folder; choose another folder for the shards"
            )


@dataclass
class PackReport:
    """What a run of `pack` did."""

    num_samples: int = 0
    num_bytes: int = 0
    """Of all shards."""
    written: list[str] = field(default_factory=list)
    """Shards that this run wrote."""
    unchanged: list[str] = field(default_factory=list)
    """Shards that were there, from an earlier run or another process."""
    removed: list[str] = field(default_factory=list)
    """Files of an earlier packing that are no part of this one."""


def pack(config: PackConfig, *, progress: Progress | None = None) -> PackReport:
    """Pack a folder of features into shards, as far as they are not packed already.

    The same features give the same bytes. A shard is named by what is in it, and the index, which
    comes last, says which belong: until then whoever reads the folder has the earlier ones. A run
    that was killed goes on where it stopped, and several processes share a folder.

    Args:
        config: What to do.
        progress: Told of every shard.

    Returns:
        What was done.

    Raises:
        ValueError: If there are no features, or a file is damaged.
        OSError: If a file cannot be written; nothing is left half written.
    """
    samples = list_samples(config.data_dir)
    shards = dict(_plan_shards(samples, int(config.shard_gib * 2**30)))
    names, report = list(shards), PackReport(len(samples))
    config.output_dir.mkdir(parents=True, exist_ok=True)

    def advance(done: int) -> None:
        if progress is not None:
            progress(done, len(names))

    with Claims(config.output_dir / WORK_DIR / "lock") as claims:
        for number in claims.share(names, advance):
            tar = config.output_dir / f"{names[number]}.tar"
            if _is_whole(tar):
                report.unchanged.append(tar.name)
                continue
            index = _write_tar(tar, shards[tar.stem])
            write_atomic(tar.with_suffix(".json"), encode_record(SHARD_INDEX_FORM, index))
            report.written.append(tar.name)
        with claims.claim(INDEX_NAME, wait=True):
            kept = _write_index(config, names)
            for path in sorted(config.output_dir.iterdir()):
                if _OURS.fullmatch(path.name) and path.name not in kept:
                    path.unlink(missing_ok=True)
                    report.removed.append(path.name)
    report.num_bytes = sum((config.output_dir / f"{name}.tar").stat().st_size for name in names)
    return report


def _plan_shards(
    samples: Sequence[Sample], max_bytes: int
) -> Iterator[tuple[str, Sequence[Sample]]]:
    """Fill one shard after another with the samples in order; give each its name."""
    number, num_bytes, begin = 0, 0, 0
    for end, sample in enumerate(samples):
        size = sum(_count_bytes(sample, path) for path in _list_files(sample))
        if end > begin and num_bytes + size > max_bytes:
            yield _name_shard(number, samples[begin:end]), samples[begin:end]
            number, num_bytes, begin = number + 1, 0, end
        num_bytes += size
    yield _name_shard(number, samples[begin:]), samples[begin:]


def _name_shard(number: int, samples: Sequence[Sample]) -> str:
    identity = hashlib.sha256(f"{FORMAT_VERSION}\n".encode())
    for sample in samples:
        for path in _list_files(sample):
            identity.update(f"{path.name}:{fingerprint_file(path)}\n".encode())
    return f"features-{number:06}-{identity.hexdigest()[:_IDENTITY_DIGITS]}"


def _list_files(sample: Sample) -> list[Path]:
    """List a sample's files, which are loose, latents first."""
    return [file for file in sample.files if isinstance(file, Path)]


def _count_bytes(sample: Sample, path: Path) -> int:
    num_bytes = path.stat().st_size
    return len(_build_header(sample, path, num_bytes)) + num_bytes + _count_padding(num_bytes)


def _build_header(sample: Sample, path: Path, num_bytes: int) -> bytes:
    """Build what stands before a file in a tar: nothing in it but name and size varies."""
    # a reader groups the files of a sample by what is before the first dot
    stem = sample.stem.replace("%", "%25").replace(".", "%2E")
    member = TarInfo(f"{stem}.{path.name.removeprefix(f'{sample.stem}_')}")
    member.size = num_bytes
    return member.tobuf()


def _count_padding(num_bytes: int) -> int:
    return -num_bytes % BLOCKSIZE


def _is_whole(tar: Path) -> bool:
    try:
        index = decode_record(SHARD_INDEX_FORM, tar.with_suffix(".json").read_bytes(), tar.name)
        return index.num_bytes == tar.stat().st_size
    except (FileNotFoundError, ValueError):
        return False


def _write_tar(tar: Path, samples: Sequence[Sample]) -> ShardIndex:
    headers: list[Header] = []
    entries: list[SampleEntry] = []
    digest = hashlib.sha256()
    expected = sum(_count_bytes(sample, path) for sample in samples for path in _list_files(sample))
    with open_atomic(tar, expected) as stream:
        for sample in samples:
            packed: list[Entry] = []
            for path in _list_files(sample):
                data = _read_checked(path, EMBED_KEYS if packed else LATENT_KEYS)
                before = _build_header(sample, path, len(data))
                header = _simplify(read_header(path))
                if header not in headers:
                    headers.append(header)
                offset = stream.tell() + len(before)
                packed.append(_describe(path, data, offset, headers.index(header)))
                for part in (before, data, bytes(_count_padding(len(data)))):
                    stream.write(part)
                    digest.update(part)
            embeds = dict(zip(sample.embed_files, packed[1:], strict=True))
            entries.append(SampleEntry(sample.stem, sample.height, sample.width, packed[0], embeds))
        end = bytes(2 * BLOCKSIZE)  # of every tar
        stream.write(end)
        digest.update(end)
        num_bytes = stream.tell()
    return ShardIndex(num_bytes, digest.hexdigest(), headers, entries)


def _read_checked(path: Path, keys: Sequence[str]) -> bytes:
    read_features(path, keys)  # nothing damaged is packed
    return path.read_bytes()


def _describe(path: Path, data: bytes, offset: int, header: int) -> Entry:
    return Entry(offset, len(data), zlib.crc32(data), fingerprint_file(path), header)


def _simplify(header: Header) -> Header:
    """Leave out what differs from picture to picture; sort the rest, which is read in no order."""
    metadata = header.metadata
    if metadata is not None:
        metadata = {key: metadata[key] for key in sorted(metadata.keys() - _PER_PICTURE)}
    return Header(metadata, dict(sorted(header.shapes.items())))


def _write_index(config: PackConfig, names: Sequence[str]) -> set[str]:
    """Write what the folder holds, and return the names of the files that are part of it."""
    kept = {f"{name}{suffix}" for name in names for suffix in (".tar", ".json")}
    empty_prompt = None
    path = empty_prompt_path(config.data_dir)
    if path.exists():
        data, header = _read_checked(path, EMBED_KEYS), _simplify(read_header(path))
        entry = _describe(path, data, 0, 0)
        file = f"empty_prompt-{entry.fingerprint[:_IDENTITY_DIGITS]}{path.suffix}"
        write_atomic(config.output_dir / file, data)
        empty_prompt = EmptyPrompt(file, entry, header)
        kept.add(file)
    indices = [(name, (config.output_dir / f"{name}.json").read_bytes()) for name in names]
    shards = [IndexFile(name, len(data), zlib.crc32(data)) for name, data in indices]
    index = encode_record(INDEX_FORM, Index(FORMAT_VERSION, shards, empty_prompt))
    write_atomic(config.output_dir / INDEX_NAME, index)
    return kept
