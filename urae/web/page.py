"""The page itself, made with Gradio."""

import logging
import socket
from collections.abc import Callable
from html import escape
from importlib.util import find_spec
from ipaddress import ip_address
from threading import Event
from typing import Any

from urae.adapters.packaged import BASE, PACKAGED_ADAPTERS
from urae.backbones.flux import HUB_IDS, PACKAGED, check_name
from urae.web.config import WebConfig
from urae.web.form import AUTOMATIC, OWN_SIZE, Form, read_number
from urae.web.jobs import Jobs, Stopped

logger = logging.getLogger(__name__)

_SIZES = (OWN_SIZE, "512", "1k", "2k", "4k", "3840x2160")
_EXAMPLES = (
    "a large red circle left of a small blue square on a striped green background",
    "a medium yellow ring above a large purple cross on a dotted blue background",
    "a large teal triangle on a checked pink background, in even light",
)
_INTRODUCTION = f"""# urae
Pictures at 2K and 4K on this machine. `{BASE}` comes with the package: it is small, and
draws scenes of rendered shapes, as in the examples. The others are FLUX.1, from the hub or a local
folder."""


def serve(config: WebConfig, *, on_ready: Callable[[str], None] | None = None) -> None:
    """Serve the page until Ctrl-C.

    Args:
        config: What, where.
        on_ready: Told the page's address when it answers.

    Raises:
        ModuleNotFoundError: If Gradio is not installed.
        ValueError: If the port is taken, or the address not this machine's.
        FileNotFoundError: If the model's name is none.
    """
    check_name(config.model)
    try:
        socket.create_server((config.host, config.port)).close()
    except OSError as error:
        reason = str(error.strerror).split(" (while")[0]
        raise ValueError(
            f"cannot listen on {config.host}:{config.port} ({reason}); choose another --port or "
            "--host"
        ) from error
    jobs = Jobs(config)
    page = build_page(jobs)
    config.output_dir.mkdir(parents=True, exist_ok=True)
    from starlette.middleware import Middleware
    from starlette.middleware.trustedhost import TrustedHostMiddleware

    names = ["127.0.0.1", "localhost", config.host] if _is_this_machine(config.host) else ["*"]
    _, address, _ = page.launch(
        server_name=config.host,
        server_port=config.port,
        inbrowser=config.open_browser,
        prevent_thread_lock=True,
        quiet=True,
        theme=_choose_colours(),
        # a site whose name was made to lead here would otherwise be answered in its visitor's name
        app_kwargs={"middleware": [Middleware(TrustedHostMiddleware, allowed_hosts=names)]},
        max_file_size="1kb",  # the page takes no files
    )
    try:
        if on_ready is not None:
            on_ready(address)
        Event().wait()
    except KeyboardInterrupt:
        logger.info("the page is closed")
    finally:
        jobs.close()
        page.close(verbose=False)


def _choose_colours() -> Any:
    """Darken Gradio's theme where its text stands out less than WCAG's 4.5 to 1."""
    import gradio as gr

    return gr.themes.Default().set(
        body_text_color_subdued="*neutral_500",
        button_primary_background_fill="*primary_700",
        button_primary_background_fill_dark="*primary_700",
    )


def _is_this_machine(host: str) -> bool:
    return ip_address(socket.gethostbyname(host)).is_loopback


def build_page(jobs: Jobs) -> Any:
    """Lay the page out.

    Args:
        jobs: What its buttons do.

    Returns:
        The `gradio.Blocks`, not served yet.

    Raises:
        ModuleNotFoundError: If Gradio is not installed.
    """
    if find_spec("gradio") is None:
        raise ModuleNotFoundError(
            "the page needs gradio; install it: pip install gradio, or in a clone "
            "pip install -e '.[web]'"
        )
    import gradio as gr

    gr.set_static_paths(jobs.config.output_dir)  # pictures are shown from there, not copied first
    with gr.Blocks(title="urae", analytics_enabled=False, fill_width=True) as page:
        gr.Markdown(_INTRODUCTION)
        with gr.Row():
            with gr.Column(scale=2, min_width=320):
                prompt, *others = _lay_out_fields(gr, jobs.config.model)
                with gr.Row():
                    start, stop = gr.Button("Generate", variant="primary"), gr.Button("Stop")
            with gr.Column(scale=3, min_width=320):
                gallery, *texts = _lay_out_results(gr)

        def make(
            prompt: str,
            model: str | None,
            size: str | None,
            adapters: list[str],
            seed: str | None,
            num_images: int | None,
            steps: str | None,
            guidance: str | None,
            request: gr.Request,
            progress: Any = gr.Progress(),  # noqa: B008  # how Gradio is asked for one
        ) -> tuple[Any, str, str]:
            try:
                form = Form(
                    prompt, model, size, tuple(adapters),
                    read_number("seed", seed, int), num_images,
                    read_number("steps", steps, int), read_number("guidance", guidance, float),
                )  # fmt: skip
                files, line, spelt = jobs.make(form, progress, request.session_hash)
                return gr.Gallery(files, selected_index=0), line, spelt
            except Stopped:
                raise gr.Error("stopped", title="Stopped", print_exception=False) from None
            except (ValueError, ArithmeticError, OSError, ImportError, MemoryError) as error:
                logger.info("not generated", exc_info=error)
                text = escape(str(error))  # Gradio shows it as HTML
                raise gr.Error(text, duration=None, print_exception=False) from error

        def halt(request: gr.Request) -> None:
            jobs.stop(request.session_hash)

        def leave(request: gr.Request) -> None:
            jobs.leave(request.session_hash)

        page.unload(leave)
        event = gr.on(
            [start.click, prompt.submit],
            make,
            [prompt, *others],
            [gallery, *texts],
            api_name="generate",
            show_progress_on=gallery,
            concurrency_limit=1,  # there is one device
        )
        stop.click(halt, cancels=event, queue=False, api_name="stop")  # one that waits, too
    return page


def _lay_out_fields(gr: Any, model: str) -> list[Any]:
    """Lay out what is typed, in the order of `Form`."""
    prompt = gr.Textbox(label="Prompt", lines=3, autofocus=True)
    gr.Examples(list(_EXAMPLES), prompt, label=f"Scenes for {BASE}")
    fields = [
        prompt,
        gr.Dropdown(
            [*PACKAGED, *HUB_IDS], value=model, allow_custom_value=True,
            label="Model", info="a name, a hub id, a folder or a .safetensors file",
        ),
        gr.Dropdown(
            list(_SIZES), value=OWN_SIZE, allow_custom_value=True,
            label="Size", info="a side, or WIDTHxHEIGHT; multiples of 16",
        ),
        gr.Dropdown(
            [AUTOMATIC, *PACKAGED_ADAPTERS], value=[AUTOMATIC], multiselect=True,
            allow_custom_value=True, label="Adapters",
            info="in order: files, folders or owner/repo/file; none if left empty",
        ),
    ]  # fmt: skip
    own = "model default if left empty"
    with gr.Accordion("More", open=False):
        return [
            *fields,
            gr.Textbox(label="Seed", info="random if left empty"),  # an empty Number is sent as 0
            gr.Number(label="Pictures", precision=0, value=1, minimum=1, maximum=16),
            gr.Textbox(label="Steps", info=own),
            gr.Textbox(label="Guidance", info=own),
        ]


def _lay_out_results(gr: Any) -> list[Any]:
    """Lay out what comes back: pictures, a line about them, the command that does the same."""
    return [
        gr.Gallery(
            label="Pictures", columns=2, height="min(640px, 90vw)", object_fit="contain",
            format="png", show_label=False, preview=True, buttons=["download", "fullscreen"],
        ),
        gr.Markdown(),
        gr.Textbox(
            label="The same on the command line", lines=2, interactive=False, buttons=["copy"],
        ),
    ]  # fmt: skip
