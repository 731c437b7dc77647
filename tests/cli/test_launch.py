"""`--gpus` with processes on the CPU, which stand in for those of a machine with GPUs."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest
from PIL import Image
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError, ProcessFailure
from torch.distributed.launcher import api

from urae.cli.launch import launch
from urae.cli.main import main

GOLDEN = Path(__file__).parents[1] / "golden"


def run_main(monkeypatch, *arguments: str) -> object:
    monkeypatch.setattr(sys, "argv", ["urae", *arguments])
    with pytest.raises(SystemExit) as ended:
        main()
    return ended.value.code


def test_more_gpus_than_there_are(monkeypatch, capsys):
    monkeypatch.setattr("torch.cuda.device_count", lambda: 2)
    assert run_main(monkeypatch, "generate", "a", "--gpus", "4") == 2
    message = "4 GPUs were requested, but this host has 2; give --gpus 2"
    assert message in capsys.readouterr().err
    assert run_main(monkeypatch, "generate", "a", "--gpus", "0") == 2


def test_no_gpu_at_all(monkeypatch, capsys):
    monkeypatch.setattr("torch.cuda.device_count", lambda: 0)
    for gpus in ("1", "2"):
        assert run_main(monkeypatch, "generate", "a", "--gpus", gpus) == 2
        message = f"--gpus {gpus} needs CUDA GPUs, but this host has none; leave it out"
        assert message in capsys.readouterr().err


def test_under_torchrun_its_processes_count(monkeypatch, capsys):
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
    assert run_main(monkeypatch, "generate", "a", "--gpus", "4") == 2
    assert (
        "--gpus 4 cannot be combined with the 2 processes that torchrun" in capsys.readouterr().err
    )
    started = []
    monkeypatch.setattr("urae.cli.generate.launch", lambda *_: started.append(1))
    monkeypatch.setattr("urae.generate.generate", lambda *_, **__: [])
    run_main(monkeypatch, "generate", "a", "--gpus", "2")
    assert not started  # joined


def test_the_same_arguments_go_to_every_process(monkeypatch):
    monkeypatch.setattr("torch.cuda.device_count", lambda: 2)
    started = []
    monkeypatch.setattr(
        api, "elastic_launch", lambda config, *command: (
            lambda *arguments: started.append((config.nproc_per_node, *command, *arguments))
        ),
    )  # fmt: skip
    arguments = ("generate", "a red circle", "--gpus", "2")
    assert run_main(monkeypatch, *arguments) == 0
    assert started == [(2, sys.executable, "-m", "urae", *arguments)]


def fail(monkeypatch, tmp_path, *ends: tuple[int, dict | None]) -> None:
    """Let processes end with exit codes and what they have handed over."""
    failures = {}
    for rank, (code, data) in enumerate(ends):
        path = tmp_path / f"{rank}.json"
        path.unlink(missing_ok=True)
        if data is not None:
            path.write_text(json.dumps(data))
        failures[rank] = ProcessFailure(rank, 100 + rank, code, str(path))

    def run(*_):
        raise ChildFailedError("urae", failures)

    monkeypatch.setattr(api, "elastic_launch", lambda *_: run)


def test_the_failure_that_others_came_of_is_told(monkeypatch, tmp_path):
    lost = {"message": "another process has ended", "lost": True}
    wrong = {"message": "height 5", "lost": False}
    ended = (-signal.SIGTERM, None)
    fail(monkeypatch, tmp_path, ended, (2, wrong))
    with pytest.raises(ValueError, match=r"^height 5$"):
        launch(2, [])
    fail(monkeypatch, tmp_path, (1, lost), (1, {"message": "disk full", "lost": False}))
    with pytest.raises(ChildProcessError, match=r"^disk full$"):
        launch(2, [])
    fail(monkeypatch, tmp_path, (1, lost), (-signal.SIGKILL, None), ended)
    with pytest.raises(ChildProcessError, match=r"GPU 1 \(pid 101\) was killed by SIGKILL; if nob"):
        launch(3, [])
    fail(monkeypatch, tmp_path, ended, (1, None))
    with pytest.raises(ChildProcessError, match=r"GPU 1 .* ended with exit code 1; see its own"):
        launch(2, [])


def test_a_process_hands_its_error_over(monkeypatch, tmp_path, capsys):
    path = tmp_path / "error.json"
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "urae-gpus")
    monkeypatch.setenv("TORCHELASTIC_ERROR_FILE", str(path))
    monkeypatch.setattr(os, "_exit", sys.exit)
    for options in ((), ("--verbose",)):
        assert run_main(monkeypatch, "generate", "a", "--size", "17", *options) == 2
        told = json.loads(path.read_text())["message"]
        assert told.startswith("height 17 is not a positive mult")
        path.unlink()
        assert ("Traceback" in capsys.readouterr().err) == bool(options)


# --- real processes -------------------------------------------------------------------------------

COMMAND = """
import os, urae.cli.generate
from urae.cli.main import main
urae.cli.generate.wants_launch = lambda gpus: "LOCAL_WORLD_SIZE" not in os.environ
main()
"""


def start(folder: Path, *arguments: str) -> subprocess.Popen:
    model = ("--model", str(GOLDEN / "base_dev"), "--gpus", "2", "--seed", "5")
    command = [sys.executable, "-c", COMMAND, "generate", *model, *arguments]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    return subprocess.Popen(
        command, cwd=folder, env=environment, text=True,
        stdout=subprocess.PIPE, stderr=subprocess.PIPE,
    )  # fmt: skip


@pytest.mark.slow
def test_two_processes_speak_as_one(tmp_path):
    for code, error in (
        (0, "done: 1 picture in outputs"),
        (2, "1 of 1 pictures exist); make the others with"),
    ):
        job = start(tmp_path, "a", "--size", "128x96", "--steps", "1")
        out, err = job.communicate(timeout=120)
        assert job.returncode == code
        assert err.count("\n") == 1, err
        assert error in err
        assert out == ("" if code else "outputs/0000-a-5.png\n")


@pytest.mark.slow
def test_a_killed_process_ends_all(tmp_path):
    (tmp_path / "prompts.txt").write_text("a\nb\nc\n")
    size = ("--size", "256", "--steps", "40")
    job = start(tmp_path, "--prompts", "prompts.txt", *size)
    ranks = []
    while not list(tmp_path.glob("outputs/*.png")):  # the one that both make
        assert job.poll() is None, job.communicate()
        ranks = psutil.Process(job.pid).children() or ranks
        time.sleep(0.02)
    assert len(ranks) == 2
    ranks[1].kill()
    began = time.monotonic()
    out, err = job.communicate(timeout=60)
    assert time.monotonic() - began < 10
    assert job.returncode == 1
    assert not any(rank.is_running() for rank in ranks)
    assert out == ""
    assert err.count("\n") == 1, err
    assert f"GPU 1 (pid {ranks[1].pid}) was killed by SIGKILL" in err
    for path in (tmp_path / "outputs").iterdir():
        assert path.suffix == ".png"
        Image.open(path).load()
