"""What a run is guarded against: being stopped in the middle of a step."""

import contextlib
import logging
import signal
import threading
import time
from collections.abc import Iterator
from types import FrameType

logger = logging.getLogger(__name__)

_ONE_REQUEST_SECONDS = 1.0


@contextlib.contextmanager
def catch_stop() -> Iterator[threading.Event]:
    """Turn the first Ctrl-C, SIGTERM or SIGHUP into a flag; a second one acts as usual.

    SIGHUP is what a terminal leaves behind when it is closed or its connection is lost; what runs
    under `nohup` ignores it, here too.

    What stops a job often signals it twice at once, by itself and with its process group, as
    `timeout` does and launchers that hand a terminal's Ctrl-C on: that is one request.
    """
    stop = threading.Event()
    if threading.current_thread() is not threading.main_thread():
        yield stop
        return
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    if signal.getsignal(signal.SIGHUP) is not signal.SIG_IGN:
        before[signal.SIGHUP] = signal.getsignal(signal.SIGHUP)
    asked_at: float | None = None

    def request(number: int, frame: FrameType | None) -> None:
        nonlocal asked_at
        now = time.monotonic()
        if asked_at is None:
            asked_at = now  # first: another signal may come while the event holds its lock
            stop.set()
            logger.warning(
                "stopping after this step, with a checkpoint; Ctrl-C again stops at once without "
                "saving"
            )
        elif now - asked_at > _ONE_REQUEST_SECONDS:
            signal.signal(number, before[signal.Signals(number)])
            signal.raise_signal(number)

    for number in before:
        signal.signal(number, request)
    try:
        yield stop
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
