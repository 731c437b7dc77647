"""A run's folder is for one run at a time."""

import errno
import time
from contextlib import contextmanager

import pytest

from urae.train import train
from urae.train.checkpoint import find_checkpoints
from urae.train.output import find_previews, hold_output


def hold(output_dir, held):
    with hold_output(output_dir):
        held.set()
        time.sleep(600)


@contextmanager
def another_run_in(output_dir, server):
    held = server.Event()
    process = server.Process(target=hold, args=(output_dir, held))
    process.start()
    try:
        assert held.wait(90)
        yield
    finally:
        process.kill()
        process.join()


def test_a_second_run_is_refused_and_writes_nothing(settings, server):
    config = settings(steps=1)
    with another_run_in(config.output_dir, server):
        before = sorted(config.output_dir.iterdir())
        for options in ({}, {"overwrite": True}, {"resume": True}):
            with pytest.raises(
                FileExistsError, match=r"run is in use by another run; wait until it ends, stop it"
            ):
                train(settings(steps=1, **options))
        assert sorted(config.output_dir.iterdir()) == before
    assert (config.output_dir / ".run.lock").exists()  # it was killed
    assert train(config).finished
    assert not (config.output_dir / ".run.lock").exists()
    assert find_checkpoints(config.output_dir)


def test_a_folder_that_was_not_there_goes_again(settings, tmp_path):
    with pytest.raises(FileNotFoundError, match="holds no complete checkpoint"):
        train(settings(resume=True))
    assert not settings().output_dir.exists()
    (tmp_path / "mine").mkdir()
    with hold_output(tmp_path / "mine"):
        pass
    assert (tmp_path / "mine").exists()


def test_a_lock_that_its_run_has_just_deleted_is_none(tmp_path, monkeypatch):
    from urae.features.claims import Claims

    claim = Claims.claim

    def claim_late(self, name, *, wait):
        (tmp_path / ".run.lock").unlink()
        return claim(self, name, wait=wait)

    monkeypatch.setattr(Claims, "claim", claim_late)
    with pytest.raises(FileExistsError, match="in use by another run"), hold_output(tmp_path):
        pass


def test_other_files_beside_previews_do_not_matter(tmp_path):
    folder = tmp_path / "previews" / "one"
    folder.mkdir(parents=True)
    for name in ("step-000200.png", "step-000200 copy.png", "step-best.png"):
        (folder / name).touch()
    assert find_previews(tmp_path) == {folder / "step-000200.png": 200}


def test_a_file_system_without_locks_is_told_of(settings, monkeypatch, caplog):
    def refuse(*_):
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr("fcntl.lockf", refuse)
    with hold_output(settings().output_dir):
        pass
    assert "run cannot be locked (No locks available); let no other process" in caplog.text
