import os
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from urae.features.byte_cache import ByteCache


def size_of(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.iterdir())


@pytest.fixture
def used_long_ago():
    """Make pieces look as old as they are in order: a disk's clock may be coarse."""

    def age(cache: ByteCache, *keys: str) -> None:
        for second, key in enumerate(keys):
            os.utime(cache._path(key), (second, second))

    return age


def test_pieces_are_kept_under_their_keys(tmp_path):
    cache = ByteCache(tmp_path / "cache", 1000)
    assert cache.load("a") is None
    cache.store("a", b"one")
    cache.store("b", b"two")
    assert (cache.load("a"), cache.load("b"), cache.load("c")) == (b"one", b"two", None)
    assert ByteCache(tmp_path / "cache", 1000).load("a") == b"one"


def test_the_least_recently_used_goes_first(tmp_path, used_long_ago):
    cache = ByteCache(tmp_path, 1000)
    for key in "abc":
        cache.store(key, bytes(300))
    used_long_ago(cache, "a", "b", "c")
    assert cache.load("a") is not None
    cache.store("d", bytes(300))
    assert [key for key in "abcd" if cache.load(key) is not None] == ["a", "c", "d"]


def test_it_stays_in_its_bounds(tmp_path):
    cache = ByteCache(tmp_path, 10_000)
    for number in range(200):
        cache.store(str(number), bytes(1 + 37 * number % 900))
        assert size_of(tmp_path) <= 10_000
    assert size_of(tmp_path) > 8_000  # and makes use of them
    smaller = ByteCache(tmp_path, 2_000)
    smaller.store("new", bytes(100))
    assert size_of(tmp_path) <= 2_000
    smaller.store("large", bytes(1_900))
    assert smaller.load("large") is None
    nothing = ByteCache(tmp_path / "none", 0)
    nothing.store("a", b"")
    nothing.store("b", b"b")
    assert nothing.load("b") is None


def test_several_share_a_folder(tmp_path):
    """What is read is whole, whoever writes it and makes room meanwhile."""

    def work(_: int) -> int:
        cache, found = ByteCache(tmp_path, 20_000), 0
        for number in range(150):
            key = str(number % 40)
            data = cache.load(key)
            found += data is not None
            assert data is None or data == key.encode() * 400
            cache.store(key, key.encode() * 400)
        return found

    with ThreadPoolExecutor(4) as threads:
        assert sum(threads.map(work, range(4))) > 0
    assert size_of(tmp_path) <= 20_000
    assert not list(tmp_path.glob("*.tmp"))


def test_troubles_are_told_once_and_not_raised(tmp_path, caplog):
    (tmp_path / "file").touch()
    cache = ByteCache(tmp_path / "file" / "cache", 1000)
    for key in "ab":
        cache.store(key, b"data")
    assert caplog.text.count("cannot write to cache folder") == 1
