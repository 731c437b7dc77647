"""The page itself, made with Gradio, and what its buttons do."""

import logging
import os
import socket
import time
from collections.abc import Callable
from datetime import datetime
from importlib.util import find_spec
from pathlib import Path
from threading import Event, Lock
from typing import Any

from urae.adapters.packaged import PACKAGED_ADAPTERS
from urae.backbones.flux import HUB_IDS, PACKAGED, pick_device
from urae.backbones.free_memory import release_memory
from urae.generate import Progress, generate
from urae.web.config import WebConfig
from urae.web.form import AUTOMATIC, OWN_SIZE, Form, read_form, spell_command

logger = logging.getLogger(__name__)

_SIZES = (OWN_SIZE, "512", "1k", "2k", "4k", "3840x2160")
_EXAMPLES = (
    "a large red circle left of a small blue square on a striped green background",
    "a medium yellow ring above a large purple cross on a dotted blue background",
    "a large teal triangle on a checked pink background, in even light",
)
_INTRODUCTION = """# urae
Pictures at 2K and 4K on this machine. `miniature-dev` comes with the package: it is small, and
draws scenes of rendered shapes, as in the examples. The others are FLUX.1, from the hub or a local
folder."""


class _Stopped(Exception):  # noqa: N818  # no error: it was asked for
    """Raised between two steps when the user stops a job."""


def serve(config: WebConfig, *, on_ready: Callable[[str], None] | None = None) -> None:
    """Serve the page until Ctrl-C.

    Args:
        config: What, where.
        on_ready: Told the page's address when it answers.

    Raises:
        ModuleNotFoundError: If Gradio is not installed.
        OSError: If the port is taken, or the address not this machine's.
    """
    try:
        socket.create_server((config.host, config.port)).close()
    except OSError as error:
        raise OSError(
            f"{config.host}:{config.port} cannot be listened on ({os.strerror(error.errno or 0)}); "
            "choose another --port or --host"
        ) from error
    maker = _Maker(config)
    page = build_page(maker)
    config.output_dir.mkdir(parents=True, exist_ok=True)
    _, address, _ = page.launch(
        server_name=config.host,
        server_port=config.port,
        inbrowser=config.open_browser,
        allowed_paths=[str(config.output_dir.resolve())],
        prevent_thread_lock=True,
        quiet=True,
    )
    if on_ready is not None:
        on_ready(address)
    try:
        Event().wait()
    except KeyboardInterrupt:
        logger.info("the page ends")
    finally:
        maker.close()
        page.close(verbose=False)


def build_page(maker: "_Maker") -> Any:
    """Lay the page out.

    Args:
        maker: Does what its buttons ask for.

    Returns:
        The `gradio.Blocks`, not served yet.

    Raises:
        ModuleNotFoundError: If Gradio is not installed.
    """
    if find_spec("gradio") is None:
        raise ModuleNotFoundError("the page needs gradio; install it: pip install 'urae[web]'")
    import gradio as gr

    with gr.Blocks(title="urae", analytics_enabled=False, fill_width=True) as page:
        gr.Markdown(_INTRODUCTION)
        with gr.Row():
            with gr.Column(scale=2, min_width=320):
                prompt = gr.Textbox(label="Prompt", lines=3, autofocus=True)
                gr.Examples(list(_EXAMPLES), prompt, label="Scenes for miniature-dev")
                model = gr.Dropdown(
                    [*PACKAGED, *HUB_IDS], value=maker.config.model, allow_custom_value=True,
                    label="Model", info="a name, a hub id, a folder or a .safetensors file",
                )  # fmt: skip
                size = gr.Dropdown(
                    list(_SIZES), value=OWN_SIZE, allow_custom_value=True,
                    label="Size", info="a side, or WIDTHxHEIGHT; multiples of 16",
                )  # fmt: skip
                adapters = gr.Dropdown(
                    [AUTOMATIC, *PACKAGED_ADAPTERS], value=[AUTOMATIC], multiselect=True,
                    allow_custom_value=True, label="Adapters",
                    info="in order; files, folders, owner/repo/file. Empty: none",
                )  # fmt: skip
                with gr.Accordion("More", open=False):
                    seed = gr.Number(
                        label="Seed", info="drawn where empty", precision=0, value=None
                    )
                    count = gr.Number(label="Pictures", precision=0, value=1, minimum=1, maximum=16)
                    steps = gr.Number(
                        label="Steps", info="the model's own where empty", precision=0, value=None
                    )
                    guidance = gr.Number(
                        label="Guidance", info="the model's own where empty", value=None
                    )
                with gr.Row():
                    start = gr.Button("Generate", variant="primary")
                    stop = gr.Button("Stop")
            with gr.Column(scale=3, min_width=320):
                gallery = gr.Gallery(
                    label="Pictures", columns=2, height=640, object_fit="contain", format="png",
                    show_label=False, preview=True, buttons=["download", "fullscreen"],
                )  # fmt: skip
                status = gr.Markdown()
                command = gr.Textbox(
                    label="The same on the command line", lines=2, interactive=False,
                    buttons=["copy"],
                )  # fmt: skip

        def make(
            prompt: str,
            model: str,
            size: str,
            adapters: list[str],
            seed: int | None,
            num_images: int,
            steps: int | None,
            guidance: float | None,
            request: gr.Request,
            progress: Any = gr.Progress(),  # noqa: B008  # how Gradio is asked for one
        ) -> tuple[Any, str, str]:
            form = Form(prompt, model, size, tuple(adapters), seed, num_images, steps, guidance)
            try:
                files, line, spelt = maker.make(form, progress, request.session_hash)
                return gr.Gallery(files, selected_index=0), line, spelt
            except _Stopped:
                raise gr.Error("stopped", title="Stopped", print_exception=False) from None
            except (ValueError, ArithmeticError, OSError, ImportError, MemoryError) as error:
                logger.info("not generated", exc_info=error)
                raise gr.Error(str(error), duration=None, print_exception=False) from error

        def halt(request: gr.Request) -> None:
            maker.stop(request.session_hash)

        job = gr.on(
            [start.click, prompt.submit],
            make,
            [prompt, model, size, adapters, seed, count, steps, guidance],
            [gallery, status, command],
            api_name="generate",
            show_progress_on=gallery,
            concurrency_limit=1,  # there is one device
        )
        stop.click(halt, cancels=job, queue=False, api_name="stop")  # one that waits, too
    return page


class _Maker:
    """Makes what the page asks for, one job at a time."""

    def __init__(self, config: WebConfig) -> None:
        self.config = config
        self._stop = Event()
        self._busy = Lock()
        self._session: str | None = None

    def make(
        self, form: Form, show: Callable[..., object], session: str | None = None
    ) -> tuple[list[str], str, str]:
        """Generate.

        Args:
            form: What was typed.
            show: Told how far it is, as `gradio.Progress` is.
            session: Of whoever asks, who alone can stop it.

        Returns:
            The files, a line about them, and the command.
        """
        with self._busy:
            self._session = session
            self._stop.clear()
            try:
                return self._make(form, show)
            finally:
                release_memory(pick_device())  # a pipeline's parts refer to one another

    def _make(self, form: Form, show: Callable[..., object]) -> tuple[list[str], str, str]:
        moment = f"{datetime.now().astimezone():%Y-%m-%d-%H%M%S-%f}"
        job = read_form(form, self.config, self.config.output_dir / moment)
        show(0.0, desc="loading")

        def report(progress: Progress) -> None:
            if self._stop.is_set():
                raise _Stopped
            name = f"picture {progress.picture} of {progress.num_pictures}"
            show((progress.step, progress.num_steps), desc=name, unit="steps")

        began = time.perf_counter()
        files = generate(job, on_progress=report)
        seconds = time.perf_counter() - began
        return [str(file) for file in files], _describe(files, seconds), spell_command(job)

    def stop(self, session: str | None = None) -> None:
        """Stop the job at hand after its step, if it is this session's."""
        if session == self._session:
            self._stop.set()

    def close(self) -> None:
        """Stop the job at hand, whoever's it is, and wait until it has."""
        self._stop.set()
        with self._busy:
            pass


def _describe(files: list[Path], seconds: float) -> str:
    plural = "s" if len(files) > 1 else ""
    return f"{len(files)} picture{plural} in {seconds:.1f} s, saved in `{files[0].parent}`"
