"""Where features lie: a folder of loose files, or shards in a folder or at a URL."""

from dataclasses import dataclass
from pathlib import Path

from urae.content_cache import find_cache_dir
from urae.features.byte_cache import ByteCache
from urae.features.dataset import Sample, list_samples
from urae.features.shard_folder import ShardFolder
from urae.features.shards import INDEX_NAME, read_shards
from urae.features.store import FeatureFile, empty_prompt_path


@dataclass(frozen=True)
class Features:
    """The features to train on."""

    samples: list[Sample]
    empty_prompt: FeatureFile | None
    """Embeddings of no caption, if they are there."""


def open_features(location: Path | str, remote_cache_gib: float) -> Features:
    """Find features and list their samples, in the same order wherever they lie.

    Args:
        location: A folder that `urae cache` or `urae pack` wrote, or a URL of the latter that
            fsspec knows.
        remote_cache_gib: Most disk space for what is read from a URL.

    Raises:
        ValueError: If there are none, or their files are damaged.
        FileNotFoundError, ConnectionError: If shards cannot be read.
        ImportError: If a package is missing that reads the URL.
    """
    if is_url(location) or (Path(location) / INDEX_NAME).exists():
        cache = ByteCache(find_cache_dir("shards"), int(remote_cache_gib * 2**30))
        return Features(*read_shards(ShardFolder(str(location), cache)))
    data_dir = Path(location)
    empty_prompt = empty_prompt_path(data_dir)
    return Features(list_samples(data_dir), empty_prompt if empty_prompt.exists() else None)


def is_url(location: Path | str) -> bool:
    """Tell a URL from a path; fsspec's chains (`simplecache::s3://...`) are URLs."""
    return isinstance(location, str) and "://" in location
