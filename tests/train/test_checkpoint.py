"""Checkpoints: kept, checked, set aside when damaged, and safe from a full disk."""

import csv
import errno
import json
import os
import resource
import shutil
import signal
import subprocess
import sys
import threading
import time
from dataclasses import replace
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file

from urae.cli.main import main
from urae.train import TrainConfig, output, train
from urae.train import loader as loader_module
from urae.train.checkpoint import find_checkpoints, find_damage, save_checkpoint
from urae.train.guards import catch_stop
from urae.train.ranks import MAX_WAIT_MINUTES

FILES = ["pytorch_lora_weights.safetensors", "optimizer.safetensors", "state.json"]


def same(one: Path, other: Path) -> bool:
    first, second = load_file(one), load_file(other)
    return first.keys() == second.keys() and all(torch.equal(first[k], second[k]) for k in first)


def steps_of(output_dir: Path) -> list[int]:
    return [checkpoint.step for checkpoint in find_checkpoints(output_dir)]


def flip(path: Path, at: float = 0.7) -> None:
    data = bytearray(path.read_bytes())
    data[int(at * len(data))] ^= 0x10
    path.write_bytes(data)


def truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-7])


@pytest.fixture
def interrupted(settings) -> TrainConfig:
    """A run with the checkpoints of steps 1, 2 and 3, to be resumed."""
    train(settings(steps=3, checkpoint_every=1))
    (settings().output_dir / FILES[0]).unlink()
    return settings(resume=True, checkpoint_every=1)


@pytest.fixture
def whole(settings, tmp_path) -> Path:
    return train(settings(output_dir=tmp_path / "whole")).adapter_path


def test_the_newest_are_kept(settings):
    config = settings(steps=5, checkpoint_every=1, keep_checkpoints=2)
    train(config)
    assert steps_of(config.output_dir) == [4, 5]
    assert not list(config.output_dir.glob(".*"))


def test_an_old_checkpoint_goes_only_once_the_new_one_is_whole(settings, monkeypatch):
    seen = []

    def discard(checkpoint):
        newest = find_checkpoints(settings().output_dir)[-1]
        seen.append((checkpoint.step, newest.step, find_damage(newest)))

    monkeypatch.setattr("urae.train.checkpoint.Checkpoint.discard", discard)
    train(settings(steps=3, checkpoint_every=1, keep_checkpoints=1))
    assert seen == [(1, 2, None), (1, 3, None), (2, 3, None)]


def test_what_cannot_be_deleted_does_not_end_the_run(settings, monkeypatch, caplog):
    """As on NFS, which keeps the files that another process has open."""
    delete = shutil.rmtree

    def refuse(path, ignore_errors=False):
        if Path(path).name.startswith(".checkpoint") and not ignore_errors:
            raise OSError(errno.ENOTEMPTY, "Directory not empty")
        delete(path, ignore_errors)

    monkeypatch.setattr("urae.train.checkpoint.shutil.rmtree", refuse)
    config = settings(steps=2, checkpoint_every=1, keep_checkpoints=1)
    assert train(config).finished
    assert steps_of(config.output_dir) == [2]
    assert ".checkpoint-000001.partial could not be deleted (Directory not empty)" in caplog.text
    assert train(replace(config, steps=3, resume=True)).finished
    assert steps_of(config.output_dir) == [3]


@pytest.mark.parametrize("name", FILES)
@pytest.mark.parametrize(
    "damage",
    [
        flip,
        pytest.param(truncate, marks=pytest.mark.slow),
        pytest.param(Path.unlink, marks=pytest.mark.slow),
    ],
    ids=["flip", "truncate", "miss"],
)
def test_a_damaged_checkpoint_is_set_aside(interrupted, whole, caplog, name, damage):
    newest = find_checkpoints(interrupted.output_dir)[-1].path
    damage(newest / name)
    resumed = train(interrupted)
    assert f"{newest} is damaged ({name}: " in caplog.text
    assert "kept as damaged-checkpoint-000003, and the run continues from step 2" in caplog.text
    assert (interrupted.output_dir / "damaged-checkpoint-000003").is_dir()
    assert steps_of(interrupted.output_dir) == [2, 3, 4]  # it does not count against those kept
    assert same(resumed.adapter_path, whole)
    with (interrupted.output_dir / "loss.csv").open() as file:
        assert [int(row["step"]) for row in csv.DictReader(file)] == [1, 2, 3, 4]


def test_every_flipped_byte_of_a_record_is_seen(interrupted):
    newest = find_checkpoints(interrupted.output_dir)[-1]
    path = newest.path / "state.json"
    before = path.read_bytes()
    record = json.loads(before)
    for at in range(len(before)):
        path.write_bytes(before[:at] + bytes([before[at] ^ 1]) + before[at + 1 :])
        if find_damage(newest) is None:  # a space became another one
            assert json.loads(path.read_bytes()) == record


def test_a_renamed_checkpoint_is_not_taken_for_another(interrupted):
    newest = find_checkpoints(interrupted.output_dir)[-1].path
    newest.rename(newest.with_name("checkpoint-000004"))
    found = find_checkpoints(interrupted.output_dir)[-1]
    assert find_damage(found) == "state.json: it is of step 3"


def test_damage_twice_is_kept_twice(interrupted):
    for _ in range(2):
        flip(find_checkpoints(interrupted.output_dir)[-1].path / FILES[1])
        train(replace(interrupted, steps=3))
    aside = sorted(path.name for path in interrupted.output_dir.glob("damaged-*"))
    assert aside == ["damaged-checkpoint-000003", "damaged-checkpoint-000003-2"]


def test_without_a_whole_checkpoint_nothing_is_touched(interrupted):
    for checkpoint in find_checkpoints(interrupted.output_dir):
        flip(checkpoint.path / FILES[1])
    with pytest.raises(
        ValueError,
        match=r"none of the 3 checkpoints in .* is intact \(newest: checkpoint-000003, "
        r"optimizer.safetensors: checksum differs\); copy one back .* --overwrite",
    ):
        train(interrupted)
    assert steps_of(interrupted.output_dir) == [1, 2, 3]


def test_a_torn_row_of_the_curve_does_not_stay(interrupted):
    path = interrupted.output_dir / "loss.csv"
    path.write_text(path.read_text() + "1")
    train(interrupted)
    with path.open() as file:
        assert [int(row["step"]) for row in csv.DictReader(file)] == [1, 2, 3, 4]


# --- a full disk ----------------------------------------------------------------------------------


@pytest.fixture
def impatient(monkeypatch):
    monkeypatch.setattr("urae.train.checkpoint.RETRY_SECONDS", 0.01)


def fill_disk(monkeypatch, output_dir, number, times, act=lambda: None) -> None:
    """Let the disk be full at a flush after the step 1 is saved, so many times."""
    fsync, count, failures = os.fsync, [], []

    def fill(descriptor):
        if (output_dir / "checkpoint-000001").exists():
            count.append(descriptor)
            if len(count) > number + 1 and len(failures) < times:  # the first is of the folder
                failures.append(descriptor)
                act()
                raise OSError(errno.ENOSPC, "No space left on device")
        fsync(descriptor)

    monkeypatch.setattr(os, "fsync", fill)


AT_A_FLUSH = pytest.mark.parametrize(
    "number", [n if n in (0, 3, 7) else pytest.param(n, marks=pytest.mark.slow) for n in range(8)]
)


@AT_A_FLUSH
def test_the_run_waits_for_space(settings, whole, monkeypatch, caplog, impatient, number):
    """The disk fills at the first, second, ... flush after the step 1 is saved."""
    config = settings(checkpoint_every=1)
    fill_disk(monkeypatch, config.output_dir, number, times=3)
    assert same(train(config).adapter_path, whole)
    (warning,) = (text for text in caplog.messages if "no space left" in text)
    assert "; the run is paused: free some and it continues by itself, or stop it" in warning
    assert steps_of(config.output_dir) == [2, 3, 4]
    assert not list(config.output_dir.glob(".*"))


@AT_A_FLUSH
def test_a_stop_ends_the_pause(settings, whole, monkeypatch, number):
    config = settings(checkpoint_every=1)

    def stop():
        signal.raise_signal(signal.SIGTERM)

    fill_disk(monkeypatch, config.output_dir, number, times=1, act=stop)
    with pytest.raises(
        OSError,
        match=r"of step \d could not be written \(No space left .* the one of step \d is complete",
    ):
        train(config)
    checkpoints = find_checkpoints(config.output_dir)
    assert [find_damage(checkpoint) for checkpoint in checkpoints] == [None] * len(checkpoints)
    assert not list(config.output_dir.glob(".*"))
    monkeypatch.undo()
    assert same(train(replace(config, resume=True)).adapter_path, whole)


def test_a_signal_ends_the_pause_at_once(tmp_path):
    """As it comes while the run waits half a minute for space."""

    def fill(folder):
        raise OSError(errno.EDQUOT, "Disk quota exceeded")

    save = partial(
        save_checkpoint, tmp_path, 2, write_weights=fill, optimizer=None, record={}, keep=3
    )
    began = time.monotonic()
    with catch_stop() as stop:
        timer = threading.Timer(0.2, os.kill, (os.getpid(), signal.SIGINT))
        timer.start()
        with pytest.raises(OSError, match=r"quota exceeded\); there is none before it"):
            save(stop=stop)
        timer.join()
    assert 0.2 < time.monotonic() - began < 5


def test_a_stop_is_announced_before_the_step_is_done(settings, caplog):
    told = []

    def stop(report):
        for _ in range(2):  # as `timeout` does, and launchers
            os.kill(os.getpid(), signal.SIGTERM)
        told.append(caplog.text.count("stopping after this step, with a checkpoint"))

    assert train(settings(), on_step=stop).step == 2
    assert told == [1, 1]


def test_several_processes_do_not_wait_for_long(tmp_path, monkeypatch, caplog):
    """The others wait in a collective for this one, ten minutes at most."""
    tries = []

    def fill(folder):
        tries.append(folder)
        raise OSError(errno.ENOSPC, "No space left on device")

    clock, monotonic = [0.0], "urae.train.checkpoint.time.monotonic"
    monkeypatch.setattr(monotonic, lambda: clock[0])
    monkeypatch.setattr("time.sleep", lambda s: clock.append(clock.pop() + s))
    monkeypatch.setattr("torch.distributed.is_initialized", lambda: True)
    monkeypatch.setattr("torch.distributed.get_world_size", lambda: 2)
    with pytest.raises(OSError, match="No space left"):
        save_checkpoint(
            tmp_path,
            1,
            write_weights=fill,
            optimizer=None,
            record={},
            keep=1,
            stop=threading.Event(),
        )
    assert clock[0] < MAX_WAIT_MINUTES * 60 * 0.6
    assert len(tries) > 9
    assert "free some, within 5 minutes and it continues" in caplog.text


@pytest.fixture
def small_disk(tmp_path):
    folder = tmp_path / "disk"
    folder.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=2m", "tmpfs", str(folder)]
    if shutil.which("mount") is None or subprocess.run(mount, capture_output=True).returncode:
        pytest.skip("mounting a tmpfs is not permitted")
    yield folder
    subprocess.run(["umount", "--lazy", str(folder)], check=True)  # a failed test holds files


def test_a_disk_that_is_really_full(settings, whole, small_disk, impatient, monkeypatch):
    config = settings(output_dir=small_disk / "run", checkpoint_every=1)
    filler = small_disk / "filler"
    warnings = []

    def free(text):
        warnings.append(text)
        filler.unlink()  # what the run waits for

    monkeypatch.setattr("urae.train.checkpoint.logger.warning", free)
    for room in range(0, 120, 12):  # in KiB; a checkpoint has about 100
        shutil.rmtree(config.output_dir, ignore_errors=True)
        filler.unlink(missing_ok=True)
        train(replace(config, steps=1))
        free = shutil.disk_usage(small_disk).free
        filler.write_bytes(bytes(max(0, free - room * 1024)))
        try:
            train(replace(config, steps=2, resume=True))
        except OSError as error:  # there was no room for something else
            assert error.errno == errno.ENOSPC
        checkpoints = find_checkpoints(config.output_dir)
        assert [find_damage(checkpoint) for checkpoint in checkpoints] == [None] * len(checkpoints)
        assert checkpoints[0].step == 1
    assert sum("checkpoint of step 2: no space left in" in text for text in warnings) > 2
    filler.unlink(missing_ok=True)
    assert same(train(replace(config, resume=True)).adapter_path, whole)


def test_the_command_says_so_and_ends_with_code_1(settings, monkeypatch, capsys):
    """A limit on the size of files stands for the full disk."""
    config = settings(steps=1, checkpoint_every=1)
    train(config)
    options = ["--data", config.data_dir, "--output", config.output_dir, "--steps", 2, "--resume"]
    arguments = ["urae", "train", config.output_dir / "run.toml", *options]
    monkeypatch.setattr(sys, "argv", [str(argument) for argument in arguments])
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, before[1]))
    try:
        with pytest.raises(SystemExit) as ended:
            main()
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert ended.value.code == 1
    assert (
        "error: checkpoint of step 2 could not be written (File too large); the one of step 1 "
        "is complete: free some space, then continue with --resume" in capsys.readouterr().err
    )
    assert steps_of(config.output_dir) == [1]


def test_a_curve_that_finds_no_room_pauses_the_run(settings, monkeypatch, caplog):
    append, tries = output._try_to_append, []

    def fill(path, row):
        tries.append(row[0])
        if tries.count(2) in (1, 2) and row[0] == 2:
            append(Path("/dev/full"), row)
        append(path, row)

    monkeypatch.setattr(output, "_try_to_append", fill)
    monkeypatch.setattr("urae.train.checkpoint.RETRY_SECONDS", 0)
    config = settings(steps=3, num_validation=1, validate_every=3)
    assert train(config).finished
    assert tries == [0, 1, 2, 2, 2, 3, 3]  # before the first step and after the last, measured
    assert len(output.read_losses(config.output_dir)) == 3
    assert caplog.text.count("loss.csv of step 2: no space left in") == 1


def test_a_row_that_is_written_in_part_is_taken_back(tmp_path, monkeypatch):
    path = tmp_path / "loss.csv"
    path.write_text("step,loss\r\n")

    def write_half(file):
        def write(row):
            file.write("4")
            file.flush()
            raise OSError(errno.ENOSPC, "No space left on device")

        return SimpleNamespace(writerow=write)

    monkeypatch.setattr(output.csv, "writer", write_half)
    with pytest.raises(OSError, match=r"a row of loss.csv could not be written \(No space left"):
        output._try_to_append(path, [4, 0.5])
    assert path.read_text() == "step,loss\n"


def test_the_best_checkpoint_is_kept_beside_the_last_ones(settings, monkeypatch):
    means = iter((4.0, 1.0, 2.0, 3.0, 4.0, 5.0))
    monkeypatch.setattr(
        "urae.train.monitor.measure_loss", lambda *_: torch.full((1, 4), next(means))
    )
    config = settings(steps=5, num_validation=1, validate_every=1, keep_checkpoints=2)
    train(config)
    kept = [checkpoint.step for checkpoint in find_checkpoints(config.output_dir)]
    assert kept == [1, 4, 5]  # 1 had the lowest held-out loss


def test_a_held_out_loss_that_is_not_finite_ends_the_run(settings, monkeypatch):
    monkeypatch.setattr("urae.train.monitor.measure_loss", lambda *_: torch.full((1, 4), torch.nan))
    config = settings(steps=2, num_validation=1, validate_every=1)
    with pytest.raises(FloatingPointError, match=r"held-out loss is not finite after step 0, on "):
        train(config)
    assert output.read_validation(config.output_dir) == []


# --- the order of samples -------------------------------------------------------------------------


def test_the_order_of_samples_goes_on_with_other_batches_a_step(settings, monkeypatch, caplog):
    numbers, draw = [], loader_module.sample_batch

    def record(samples, counters, *others, **options):
        numbers.extend(counters)
        return draw(samples, counters, *others, **options)

    monkeypatch.setattr(loader_module, "sample_batch", record)
    train(settings(steps=2, gradient_accumulation=3))
    assert not caplog.records
    train(settings(steps=6, resume=True))
    assert "a step now takes 1 batches over all devices instead of 3;" in caplog.text
    steps = [numbers[:3], numbers[3:6], *([number] for number in numbers[6:])]
    assert [sorted(step) for step in steps] == [[0, 1, 2], [3, 4, 5], [6], [7], [8], [9]]


def test_other_features_are_refused(settings, tmp_path):
    data_dir = shutil.copytree(settings().data_dir, tmp_path / "data")
    train(settings(steps=1, data_dir=data_dir))
    moved = data_dir.rename(tmp_path / "moved")
    train(settings(steps=2, data_dir=moved, resume=True))
    for path in moved.glob("image_3*"):
        path.unlink()
    with pytest.raises(ValueError, match=r"are not those that .*checkpoint-000002 was made with"):
        train(settings(steps=3, data_dir=moved, resume=True))
    result = train(
        settings(
            steps=1,
            data_dir=moved,
            output_dir=tmp_path / "other",
            adapter=replace(settings().adapter, init=str(settings().output_dir)),
        )
    )
    assert result.finished
