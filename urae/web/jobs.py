"""What the page's buttons do: one job at a time, which whoever began it can stop."""

import logging
import re
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import datetime
from pathlib import Path
from threading import Event, Lock

from urae.backbones.devices import pick_device
from urae.backbones.flux import PACKAGED
from urae.backbones.free_memory import release_memory
from urae.generate import Progress, generate
from urae.miniature.grammar import foresee_another_scene
from urae.web.config import WebConfig
from urae.web.form import Form, read_form, spell_command


class Stopped(Exception):  # noqa: N818  # no error: it was asked for
    """Raised between two steps when the user stops a job."""


@dataclass(eq=False)
class _Request:
    """A click that is at work, or waits for another: a stopped one ends its step first."""

    session: str | None
    """Of whoever may stop it; None: anybody."""
    stop: Event = field(default_factory=Event)


class Jobs:
    """Makes what the page asks for, one job at a time."""

    def __init__(self, config: WebConfig) -> None:
        self.config = config
        self._busy = Lock()
        self._requests: list[_Request] = []
        self._closed = False

    def make(
        self, form: Form, show: Callable[..., object], session: str | None = None
    ) -> tuple[list[str], str, str]:
        """Generate.

        Args:
            form: What was typed.
            show: Told how far it is, as `gradio.Progress` is.
            session: Of whoever asks, who alone can stop it.

        Returns:
            The files' whole paths, Markdown about them with what may surprise, and the command.
        """
        request = _Request(session)
        self._requests.append(request)  # from now on it can be asked to stop
        try:
            with self._busy, _collect_warnings() as surprises:
                if request.stop.is_set() or self._closed:
                    raise Stopped
                try:
                    return self._make(form, show, surprises, request.stop)
                finally:
                    release_memory(pick_device())  # a pipeline's parts refer to one another
        finally:
            self._requests.remove(request)

    def _make(
        self, form: Form, show: Callable[..., object], surprises: list[str], stop: Event
    ) -> tuple[list[str], str, str]:
        moment = f"{datetime.now().astimezone():%Y-%m-%d-%H%M%S-%f}"
        job = read_form(form, self.config, self.config.output_dir / moment)
        show(0.0, desc="loading")
        surprise = foresee_another_scene(job.model, job.prompts)
        if job.model in PACKAGED and surprise:
            surprises.append(surprise)

        def report(progress: Progress) -> None:
            if stop.is_set():
                raise Stopped
            name = f"picture {progress.picture} of {progress.num_pictures}"
            if progress.step == progress.num_steps:
                name += ", decoding"
            show((progress.step, progress.num_steps), desc=name, unit="steps")

        began = time.perf_counter()
        files = generate(job, on_progress=report)
        line = _describe(files, time.perf_counter() - began)
        text = "\n\n".join([line, *map(_escape, dict.fromkeys(surprises))])  # each picture's
        # whole: a browser would take the dots of ../pictures out of a picture's address
        return [str(file.resolve()) for file in files], text, spell_command(job)

    def stop(self, session: str | None = None) -> None:
        """Stop what is this session's, or nobody's any more, after its step or before its first."""
        for request in [*self._requests]:
            if request.session in (session, None):
                request.stop.set()

    def leave(self, session: str | None) -> None:
        """Let a job go on whose page was closed or loaded anew; from now on anybody can stop it."""
        for request in [*self._requests]:
            if request.session == session:
                request.session = None

    def close(self) -> None:
        """Stop all jobs, whoever's they are, and wait until the one at hand has; make no other."""
        self._closed = True
        for request in [*self._requests]:
            request.stop.set()
        with self._busy:
            pass


class _Collector(logging.Handler):
    """Keeps what is warned of."""

    def __init__(self) -> None:
        super().__init__(logging.WARNING)
        self.texts: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.texts.append(record.getMessage())


@contextmanager
def _collect_warnings() -> Iterator[list[str]]:
    """Keep what is warned of: whoever uses the page may not see the terminal."""
    collector, urae = _Collector(), logging.getLogger("urae")
    urae.addHandler(collector)
    try:
        yield collector.texts
    finally:
        urae.removeHandler(collector)


def _escape(text: str) -> str:
    """Write a text, of which a prompt may be a part, as Markdown that shows it as it is."""
    # of other signs, as typographic quotes, Markdown would show the backslash
    return re.sub(r"(?![.,:;])([!-/:-@\[-`{-~])", r"\\\1", " ".join(text.split()))


def _describe(files: list[Path], seconds: float) -> str:
    plural = "s" if len(files) > 1 else ""
    return f"{len(files)} picture{plural} in {seconds:.1f} s, saved in `{files[0].parent}`"
