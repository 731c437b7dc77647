"""What the host has free, in a container or not."""

import psutil
import pytest

from urae.backbones import free_memory

GIB = 2**30


@pytest.fixture
def groups(tmp_path, monkeypatch):
    """Control groups of version 2, one within another."""
    monkeypatch.setattr(free_memory, "_GROUPS", tmp_path)
    monkeypatch.setattr(free_memory, "_OWN_GROUP", tmp_path / "own")
    monkeypatch.delenv("LOCAL_WORLD_SIZE", raising=False)
    (tmp_path / "own").write_text("4:memory:/other\n0::/pod/job\n")

    def limit(name, most, used, files):
        folder = tmp_path / name
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "memory.max").write_text(f"{most}\n")
        (folder / "memory.current").write_text(f"{used}\n")
        stat = f"anon 1\ninactive_file {files // 2}\nactive_file {files - files // 2}\n"
        (folder / "memory.stat").write_text(stat)

    return limit


def test_a_container_has_what_its_limit_leaves(groups):
    groups("pod", 3 * GIB // 4, GIB // 2, GIB // 4)  # files that were read do not count
    groups("pod/job", "max", GIB, 0)
    assert free_memory.free_host_bytes() == GIB // 2


def test_the_tightest_limit_counts_and_is_shared(groups, monkeypatch):
    groups("pod", 4 * GIB, 0, 0)
    groups("pod/job", GIB // 4, GIB // 8, 0)
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
    assert free_memory.free_host_bytes() == GIB // 16


def test_without_a_limit_it_is_the_hosts(groups):
    groups("pod/job", "max", GIB, 0)
    assert free_memory.free_host_bytes() <= psutil.virtual_memory().total
    assert free_memory.free_host_bytes() > 0
    assert list(free_memory._list_container_bytes()) == []
