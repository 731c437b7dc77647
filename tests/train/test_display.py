"""What `urae train` shows: a panel on a terminal, else a plain line a minute."""

import io
import itertools
from pathlib import Path
from types import SimpleNamespace

import pytest
from rich.console import Console
from typer.testing import CliRunner

from urae.cli import train as command
from urae.cli.main import app
from urae.train import StepReport, TrainResult


def report(step: int, **changes) -> StepReport:
    fields = {
        "step": step,
        "loss": 0.5,
        "grad_norm": 1.0,
        "lr": 9.0451e-05,
        "seconds": 4.0,
        "loader_seconds": 0.01,
        "level_losses": (None, None, 0.5, None),
        "height": 2048,
        "width": 3072,
        "memory_gib": 30.41,
    }
    return StepReport(**{**fields, **changes})


@pytest.fixture
def show(monkeypatch):
    """Show steps on a console of either kind; return what it got."""
    monkeypatch.setenv("TERM", "xterm")

    def run(*reports: StepReport, terminal: bool) -> str:
        output = io.StringIO()
        console = Console(file=output, force_terminal=terminal, width=100, color_system=None)
        monkeypatch.setattr(command, "console", console)
        display = command.Display(1000)
        for each in reports:
            display.show(each)
        display.close()
        return output.getvalue()

    return run


def test_a_plain_line_a_minute(show, monkeypatch):
    times = itertools.count(0.0, 10.0)
    monkeypatch.setattr(command, "time", SimpleNamespace(monotonic=lambda: next(times)))
    text = show(*[report(step) for step in range(1, 13)], terminal=False)
    assert len(text.splitlines()) == 2
    assert text.splitlines()[0] == (
        "step 6 of 1000: loss 0.5000, lr 9.05e-05, s/step 4.00, ETA 1:06:16, GPU 30.4 GiB, "
        "size 3072 x 2048"
    )


def test_a_panel_on_a_terminal(show):
    text = show(report(1, loss=1.0), report(2), terminal=True)
    figures = "2 of 1000", "0.7500", "9.05e-05", "4.00", "1:06:32", "30.4 GiB", "3072 x 2048"
    for part in ("step", *figures):
        assert part in text
    assert max(len(line) for line in text.splitlines()) < 120


def test_the_panel_has_room_for_a_long_run(show):
    late = report(19_999, seconds=131.5, memory_gib=130.41, height=4096, width=4096)
    text = show(late, terminal=True)
    for part in ("19999 of 1000", "9.05e-05", "131.50", "130.4 GiB", "4096 x 4096"):
        assert part in text


def test_no_memory_on_a_cpu(show, monkeypatch):
    monkeypatch.setattr(command, "SECONDS_BETWEEN_LINES", 0.0)
    assert "GPU" not in show(report(1, memory_gib=None), terminal=False)


def test_a_dumb_terminal_has_lines(show, monkeypatch):
    monkeypatch.setenv("TERM", "dumb")
    monkeypatch.setattr(command, "SECONDS_BETWEEN_LINES", 0.0)
    assert show(report(1), terminal=True).startswith("step 1 of 1000: loss 0.5000")


def test_the_held_out_loss_is_shown(show, monkeypatch):
    late = report(1, seconds=131.5, held_out_loss=0.40812)
    assert "held-out 0.4081" in show(late, terminal=True)
    monkeypatch.setattr(command, "SECONDS_BETWEEN_LINES", 0.0)
    assert "loss 0.5000, held-out 0.4081, lr" in show(late, terminal=False)
    assert "held-out" not in show(report(1), terminal=False)


@pytest.fixture
def finish(monkeypatch, tmp_path):
    """Run the command to a result; return what it said."""

    def run(result: TrainResult | type[BaseException], recipe: str = "") -> str:
        def train(config, on_step):
            if isinstance(result, TrainResult):
                return result
            raise result

        output = io.StringIO()
        console = Console(file=output, width=100, color_system=None)
        monkeypatch.setattr(command, "console", console)
        monkeypatch.setattr("urae.train.train", train)
        path = tmp_path / "recipe.toml"
        path.write_text(recipe or 'model = "miniature-dev"\nresolution = 512')
        CliRunner().invoke(app, ["train", str(path), "--data", "d", "--output", "my run"])
        return output.getvalue()

    return run


def test_the_last_line_says_what_its_figures_are(finish):
    losses = (9.0,) + 50 * (0.5,)
    text = finish(TrainResult(51, Path("a"), True, 3, losses, (0.40812, 0.5, 0.29104)))
    assert text.splitlines() == [
        "done: 51 steps, adapter a (mean loss of the last 50 steps 0.5000, "
        "held-out 0.4081 -> 0.2910)",
        "next: urae generate \"...\" --adapter 'my run' --size 512",
    ]
    assert "done: 1 step, adapter a (mean loss of one step 0.5000)" in finish(
        TrainResult(1, Path("a"), True, 1, (0.5,))
    )


def test_a_run_that_was_finished_says_so(finish):
    text = finish(TrainResult(30, Path("a"), True, 0, (0.5, 0.7)))
    assert text.startswith(
        "finished already: 30 steps, adapter a (mean loss of the last 2 steps 0.6"
    )


def test_the_next_command_has_what_the_run_needs(finish):
    recipe = 'model = "flux-dev"\nresolution = 4096\nadapter.kind = "minor"\nadapter.over = ["2k"]'
    text = finish(TrainResult(1, Path("a"), True, 1), recipe)
    command = "--model flux-dev --adapter 2k --adapter 'my run' --size 4096"
    assert text.splitlines()[-1] == f'next: urae generate "..." {command}'


def test_what_stops_at_once_says_so(finish):
    assert finish(KeyboardInterrupt).startswith(
        "stopped at once without saving; --resume continues"
    )


def test_durations():
    assert [command.format_seconds(s) for s in (0.4, 61, 3599.6, 86400)] == [
        "0:00",
        "1:01",
        "1:00:00",
        "24:00:00",
    ]
