import csv
import itertools
import json
import math
import multiprocessing
import os
import signal
import threading
import time
from dataclasses import replace
from types import SimpleNamespace
from unittest.mock import MagicMock

import pytest

from urae.study import data, run, run_study
from urae.study.metrics import METRICS, PARTS
from urae.study.questions import QUESTIONS, table_2
from urae.study.run import list_cells
from urae.train import TrainResult

FIGURES = dict.fromkeys((*METRICS, *PARTS), 0.5)


@pytest.fixture
def two_cells(monkeypatch):
    """Question a, but for two of its cells: guidance 1 and 3.5."""
    short = replace(QUESTIONS["a"], cells=lambda bench: table_2(bench)[:2])
    monkeypatch.setitem(QUESTIONS, "a", short)


@pytest.mark.slow
def test_a_cell_from_scenes_to_figures(study, two_cells, monkeypatch):
    monkeypatch.setitem(
        QUESTIONS, "a", replace(QUESTIONS["a"], cells=lambda bench: table_2(bench)[:1])
    )
    config = study("a", steps=2)
    told = []
    result = run_study(config, on_progress=lambda *done: told.append(done))
    assert (result.done, result.total) == (1, 1) and told == [(0, 1), (1, 1)]
    (row,) = csv.DictReader((config.output_dir / "a.csv").read_text().splitlines())
    assert 0 <= float(row["score"]) <= 1 and float(row["held_out_loss"]) > 0
    assert float(row["validation"]) != float(row["validation_before"])
    assert row["training.steps"] == "2" and row["device"] == "cpu" and row["dtype"] == "float32"
    # the same command again has nothing to do; another setting is another cell
    monkeypatch.setattr(run, "run_group", lambda *_, **__: pytest.fail("ran again"))
    assert run_study(config).done == 1
    with pytest.raises(pytest.fail.Exception):
        run_study(study("a", steps=3, output_dir=config.work_dir / "elsewhere"))


def test_a_killed_study_runs_the_rest_only(study, two_cells, monkeypatch):
    scored = []

    def score(cell, *_):
        scored.append((cell.seed, cell.factors["guidance"]))
        if len(scored) == 2:
            raise KeyboardInterrupt
        return FIGURES

    monkeypatch.setattr(run, "make_data", lambda *_, **__: None)
    monkeypatch.setattr(run, "_train", lambda *_: None)
    monkeypatch.setattr(run, "read_losses", lambda *_: [1.0])
    monkeypatch.setattr(run, "_score", score)
    config = study("a", num_seeds=2)
    with pytest.raises(KeyboardInterrupt):
        run_study(config)
    assert run_study(config).done == 4
    assert scored == [(0, 1.0), (0, 3.5), (0, 3.5), (1, 1.0), (1, 3.5)]


def test_a_stop_that_finds_a_run_finished_ends_the_study(study, two_cells, monkeypatch):
    trained = []

    def train(config):
        trained.append(config.output_dir)
        return TrainResult(1, config.output_dir / "adapter", True, 1, stopped=True)

    monkeypatch.setattr(run, "make_data", lambda *_, **__: None)
    monkeypatch.setattr(run, "mix", lambda *_: None)
    monkeypatch.setattr(run, "train", train)
    monkeypatch.setattr(run, "_score", lambda *_: pytest.fail("went on"))
    with pytest.raises(KeyboardInterrupt):
        run_study(study("a"))
    assert len(trained) == 1


def test_no_cell_is_begun_when_the_time_is_up(study, two_cells, monkeypatch):
    monkeypatch.setattr(data, "write_folder", lambda *_, **__: pytest.fail("began"))
    monkeypatch.setattr(run, "_train", lambda *_: pytest.fail("began"))
    monkeypatch.setattr(run, "read_losses", lambda *_: [1.0])
    config = study("a", max_minutes=1e-9)
    result = run_study(config)
    assert (result.done, result.total) == (0, 2)
    assert result.text_path is None and not config.output_dir.exists()


@pytest.mark.parametrize(("deadline", "pictures", "features"), [(1, 0, 0), (4, 2, 0), (14, 4, 2)])
def test_a_data_set_that_ran_out_of_time_goes_on_later(
    study, two_cells, monkeypatch, tmp_path, deadline, pictures, features
):
    monkeypatch.setattr("os.cpu_count", lambda: 1)
    wanted = list_cells(study("a"))[0].training.parts[0].data
    looks = itertools.count(1)  # a second each: before all, each picture and each encoding
    clock = SimpleNamespace(time=lambda: next(looks))
    with monkeypatch.context() as patch:
        patch.setattr("urae.miniature.sources.time", clock)
        patch.setattr("urae.study.data.time", clock)
        data.make_data(tmp_path / "cut", wanted, tmp_path, deadline=deadline)
    folder = data.find_folder(tmp_path / "cut", wanted)
    assert len(list(folder.glob("*.png"))) == pictures
    assert len(list(folder.glob("*.safetensors"))) == features
    data.make_data(tmp_path / "cut", wanted, tmp_path)
    data.make_data(tmp_path / "whole", wanted, tmp_path)
    whole = data.find_folder(tmp_path / "whole", wanted)
    names = {path.name for path in whole.iterdir() if path.is_file()}
    assert "quality.json" in names and names == {p.name for p in folder.iterdir() if p.is_file()}
    assert all((folder / name).read_bytes() == (whole / name).read_bytes() for name in names)


def test_the_teacher_stops_when_the_time_is_up(study, two_cells, monkeypatch, tmp_path):
    wanted = list_cells(study("a", num_samples=150))[0].training.parts[0].data
    wanted = replace(wanted, source="synthetic", teacher=wanted.encoders, teacher_steps=4)
    drawn, looks = [], itertools.count(1)
    monkeypatch.setattr(data, "load_stage", lambda *_: MagicMock())
    monkeypatch.setattr(data, "write_synthetic", lambda *of, **_: drawn.append(of[2]))
    monkeypatch.setattr(data, "cache", lambda *_, **__: pytest.fail("began"))
    monkeypatch.setattr(data, "time", SimpleNamespace(time=lambda: next(looks)))
    data.make_data(tmp_path, wanted, tmp_path, deadline=4)
    data.make_data(tmp_path, wanted, tmp_path, deadline=4 + 5)
    assert drawn == [range(64), range(64, 128), *(range(64), range(64, 128), range(128, 150))]


def test_a_run_that_was_cut_off_is_resumed(study, two_cells, tmp_path):
    cell, _ = list_cells(study("a", steps=4))
    start = run.Start("miniature-dev", run.prepare_start(cell.training, tmp_path).adapter)
    config = run.build_train_config(cell.training, start, tmp_path, tmp_path / "run")
    assert (config.resume, config.overwrite) == (False, True)
    (tmp_path / "run" / "checkpoint-2").mkdir(parents=True)
    config = run.build_train_config(cell.training, start, tmp_path, tmp_path / "run")
    assert (config.resume, config.overwrite) == (True, False)


def test_seeds_have_captions_of_their_own_and_cells_share_them(study, two_cells, monkeypatch):
    import torch

    from urae.study import measure

    drawn = []

    def draw(pipe, scenes, numbers, **sampling):
        drawn.append([scene.seed for scene in scenes])
        return [torch.zeros(3, 192, 192, dtype=torch.uint8) for _ in scenes]

    monkeypatch.setattr(measure, "draw_scenes", draw)
    pipe = type("Pipe", (), {"device": torch.device("cpu")})()
    for cell in list_cells(study("a", num_seeds=2, num_captions=2)):
        found = measure.measure_pictures(pipe, cell.scoring)
        assert found["score"] == 0 and found["spectrum"] > 0
    assert drawn[0] == drawn[1] and drawn[2] == drawn[3]
    assert not set(drawn[0]) & set(drawn[2])


@pytest.mark.slow
@pytest.mark.parametrize("letter", ["c", "d", "e", "f"])
def test_every_question_runs(letter, study, schnell, lora_2k, monkeypatch):
    cells = QUESTIONS[letter].cells

    def fewer(bench):  # one of each kind of run
        some = {}
        for cell in cells(bench):
            kind = (cell.training and cell.training.adapter, cell.scoring.model, *cell.factors)
            some.setdefault(kind, cell)
        return list(some.values())

    monkeypatch.setitem(QUESTIONS, letter, replace(QUESTIONS[letter], cells=fewer))
    config = study(letter, schnell=schnell, adapter_2k=lora_2k)
    result = run_study(config)
    assert result.done == result.total > 0


@pytest.mark.slow
def test_cells_in_several_processes(study, two_cells):
    config = study("a", workers=2)
    result = run_study(config)
    assert result.done == result.total == 2
    files = list((config.work_dir / "study" / "results").glob("*.json"))
    assert len({json.loads(file.read_text())["figures"]["held_out_loss"] for file in files}) == 2


@pytest.mark.parametrize("workers", [1, pytest.param(2, marks=pytest.mark.slow)])
def test_a_run_that_fails_leaves_the_others_alone(workers, caplog):
    done = []
    errors = run._run_all(math.sqrt, [4.0, -1.0, 9.0, -4.0], workers, lambda: done.append(1))
    assert len(done) == len(errors) == 2
    assert all(isinstance(error, ValueError) for error in errors)
    assert caplog.text.count("a run failed; the others continue") == 2


def test_the_report_comes_before_the_error(study, two_cells, finish, monkeypatch):
    def fail(cells, **_):
        raise OSError(f"no {cells[0].key}")

    monkeypatch.setattr(run, "run_group", fail)
    monkeypatch.setattr(run, "list_data", lambda _: [])
    config = study("a")
    finish(config, list_cells(config)[:1])
    with pytest.raises(OSError, match="no "):
        run_study(config)
    assert (config.output_dir / "a.md").exists()


def test_sigterm_ends_the_workers_too():
    timer = threading.Timer(8, os.kill, (os.getpid(), signal.SIGTERM))
    timer.start()
    began = time.monotonic()
    with pytest.raises(KeyboardInterrupt):
        run._run_all(time.sleep, [60, 60, 60], 2, lambda: None)
    assert time.monotonic() - began < 40
    assert not multiprocessing.active_children()
    assert signal.getsignal(signal.SIGTERM) is signal.SIG_DFL
