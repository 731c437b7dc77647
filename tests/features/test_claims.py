import errno
import subprocess
import sys

import pytest

from urae.features.claims import Claims

HOLD = """
import sys, time
from pathlib import Path
from urae.features.claims import Claims
with Claims(Path(sys.argv[1])) as claims, claims.claim("one", wait=True) as granted:
    print(granted, flush=True)
    time.sleep(60)
"""


TRY = """
import sys
from pathlib import Path
from urae.features.claims import Claims
with Claims(Path(sys.argv[1])) as claims:
    for name in sys.argv[2:]:
        with claims.claim(name, wait=False) as granted:
            print(name if granted else "-")
"""


def test_a_claim_excludes_other_processes_until_its_owner_dies(tmp_path):
    path = tmp_path / ".urae" / "lock"
    command = [sys.executable, "-c", HOLD, str(path)]
    with (
        Claims(path) as claims,
        subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as other,
    ):
        assert other.stdout.readline() == "True\n"
        with claims.claim("one", wait=False) as granted:
            assert not granted
        with claims.claim("two", wait=False) as granted:
            assert granted

        done = []
        for number in claims.share(["one", "two"], done.append):
            if number == 1:  # the free one comes first; then its owner is waited for
                other.kill()
        assert done == [0, 1, 2]
    assert list(path.parent.iterdir()) == [path]


def find_free(path, *names):
    command = [sys.executable, "-c", TRY, str(path), *names]
    return subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True).stdout.split()


def test_the_next_free_name_is_claimed_ahead_and_no_further(tmp_path):
    path, names, ahead, done = tmp_path / ".urae" / "lock", ["two", "one", "three", "four"], [], []
    command = [sys.executable, "-c", HOLD, str(path)]
    with (
        Claims(path) as claims,
        subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as other,
    ):
        assert other.stdout.readline() == "True\n"
        seen = []
        for number in claims.share(names, done.append, ahead=ahead.append):
            seen.append((number, list(ahead)))
            if number == 0:
                assert find_free(path, *names) == ["-", "-", "-", "four"]
            if number == 3:
                assert find_free(path, *names) == ["two", "-", "three", "-"]
                other.kill()
        assert seen == [(0, [0, 2]), (2, [0, 2, 3]), (3, [0, 2, 3]), (1, [0, 2, 3, 1])]
        assert done == [0, 1, 2, 3, 4]
        assert find_free(path, *names) == names


def test_an_error_gives_up_what_was_claimed_ahead(tmp_path):
    path, names = tmp_path / ".urae" / "lock", ["one", "two", "three"]
    with Claims(path) as claims:
        turns = claims.share(names, lambda done: None, ahead=lambda number: None)
        assert next(turns) == 0
        assert find_free(path, *names) == ["-", "-", "three"]
        turns.close()
        assert find_free(path, *names) == names


def test_without_locks_every_claim_is_granted(tmp_path, monkeypatch, caplog):
    def refuse(*_):
        raise OSError(errno.ENOSYS, "Function not implemented")

    monkeypatch.setattr("fcntl.lockf", refuse)
    with Claims(tmp_path / "data" / "lock") as claims:
        assert list(claims.share(["one", "two"], lambda _: None)) == [0, 1]
    assert "data cannot be locked (Function not implemented); let no other process" in caplog.text


def test_other_failures_of_locking_are_errors(tmp_path, monkeypatch):
    def refuse(*_):
        raise OSError(errno.EIO, "Input/output error")

    monkeypatch.setattr("fcntl.lockf", refuse)
    with pytest.raises(OSError, match="Input/output error"), Claims(tmp_path / "lock"):
        pass
