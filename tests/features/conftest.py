import shutil
from pathlib import Path

import pytest

from urae.features.cache import CacheConfig, cache

GOLDEN = Path(__file__).parents[1] / "golden"


@pytest.fixture(scope="session")
def base_dev() -> str:
    return str(GOLDEN / "base_dev")


@pytest.fixture(scope="session")
def train_data() -> Path:
    """The reference's training folder with the caches that it wrote."""
    return GOLDEN / "train_data"


@pytest.fixture(scope="session")
def copy_sources(train_data):
    """Copy the images and captions of the reference's folder, without its caches."""

    def copy(folder: Path) -> Path:
        folder.mkdir(exist_ok=True)
        for file in train_data.iterdir():
            if file.suffix in (".jpg", ".json"):
                shutil.copy(file, folder)
        return folder

    return copy


@pytest.fixture
def folder(tmp_path, copy_sources) -> Path:
    return copy_sources(tmp_path / "data")


@pytest.fixture(scope="session")
def settings(base_dev):
    """Build a config for the tiny model; at 192 pixels none of the four images is too small."""

    def build(folder: Path, **changes) -> CacheConfig:
        return CacheConfig(
            **{
                "data_dir": folder,
                "model": base_dev,
                "resolution": 192,
                "max_sequence_length": 48,
                **changes,
            }
        )

    return build


@pytest.fixture(scope="session")
def cached(tmp_path_factory, copy_sources, settings) -> Path:
    """A folder cached without interruption; to be read, or copied."""
    folder = copy_sources(tmp_path_factory.mktemp("cached"))
    cache(settings(folder))
    return folder


@pytest.fixture
def cached_copy(cached, tmp_path) -> Path:
    return Path(shutil.copytree(cached, tmp_path / "copy"))
