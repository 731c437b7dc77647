"""What `urae train` shows: a panel on a terminal, else a plain line a minute."""

import io
import itertools
from types import SimpleNamespace

import pytest
from rich.console import Console

from urae.cli import train as command
from urae.train import StepReport


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
    monkeypatch.setattr(command, "_SECONDS_BETWEEN_LINES", 0.0)
    assert "GPU" not in show(report(1, memory_gib=None), terminal=False)


def test_durations():
    assert [command.format_seconds(s) for s in (0.4, 61, 3599.6, 86400)] == [
        "0:00",
        "1:01",
        "1:00:00",
        "24:00:00",
    ]
