"""Signals that ask a run to stop."""

import signal
import time

import pytest

from urae.train.guards import catch_stop


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


def test_a_lost_terminal_stops_but_not_what_ignores_it():
    with catch_stop() as stop:
        signal.raise_signal(signal.SIGHUP)
        assert stop.is_set()
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)  # as under nohup
    try:
        with catch_stop() as stop:
            signal.raise_signal(signal.SIGHUP)
            assert not stop.is_set()
    finally:
        signal.signal(signal.SIGHUP, before)
