"""Signals that ask a run to stop."""

import signal
import time

import pytest

from urae.train.guards import catch_stop


@pytest.fixture(autouse=True)
def interruptible():
    """As in a terminal: what a shell starts in the background ignores SIGINT."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


def test_signals_of_one_request_count_once_and_a_later_one_acts(monkeypatch):
    now = [100.0]
    monkeypatch.setattr(time, "monotonic", lambda: now[0])
    with catch_stop() as stop:
        signal.raise_signal(signal.SIGINT)
        assert stop.is_set()
        signal.raise_signal(signal.SIGTERM)  # would end this process
        signal.raise_signal(signal.SIGINT)
        now[0] += 2
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(signal.SIGINT)
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


def test_a_signal_within_another_ones_handler():
    """The event's lock would have it wait for itself."""
    with catch_stop() as stop:
        stop.set = lambda: signal.raise_signal(signal.SIGTERM)
        signal.raise_signal(signal.SIGINT)


def test_a_lost_terminal_stops_but_not_what_ignores_it():
    for handler, stops in ((signal.SIG_DFL, True), (signal.SIG_IGN, False)):  # nohup has the second
        before = signal.signal(signal.SIGHUP, handler)
        try:
            with catch_stop() as stop:
                signal.raise_signal(signal.SIGHUP)
                assert stop.is_set() == stops
        finally:
            signal.signal(signal.SIGHUP, before)
