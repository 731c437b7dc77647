"""The page in the browser: what is typed, what comes back, and the command that does the same."""

import gc
import io
import shlex
import signal
import socket
import subprocess
import sys
import threading
import time
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import httpx
import pytest
from diffusers import FluxTransformer2DModel
from PIL import Image

from urae.adapters.packaged import PACKAGED_ADAPTERS
from urae.generate import GenerateConfig
from urae.web.config import WebConfig
from urae.web.form import AUTOMATIC, OWN_SIZE, Form, read_form, read_number, spell_command
from urae.web.jobs import Jobs
from urae.web.page import build_page, serve

pytestmark = pytest.mark.filterwarnings("ignore")  # gradio leaves sockets and loops open

PROMPT = "a large red circle on a striped green background"
FORM = Form(PROMPT, "miniature-dev", OWN_SIZE, (AUTOMATIC,))


@pytest.fixture(autouse=True)
def collect_what_gradio_leaves():
    yield
    gc.collect()  # here, where its warnings are ignored


@pytest.fixture
def config(tmp_path):
    return WebConfig(output_dir=tmp_path / "pictures", open_browser=False)


def test_what_is_left_empty_is_the_models_own(config, tmp_path):
    job = read_form(FORM, config, tmp_path)
    assert (job.height, job.width, job.adapters, job.steps) == (256, 256, (), None)
    assert job.seed is not None
    assert read_form(FORM, config, tmp_path).seed != job.seed
    flux = read_form(replace(FORM, model="flux-dev"), config, tmp_path)
    assert (flux.height, flux.adapters) == (1024, ())


def test_adapters_come_by_themselves_or_by_name_or_not_at_all(config, tmp_path):
    large = replace(FORM, size="512x384")
    job = read_form(large, config, tmp_path)
    assert (job.height, job.width) == (384, 512)
    assert job.adapters == tuple(PACKAGED_ADAPTERS)[:1]
    assert read_form(replace(large, adapters=()), config, tmp_path).adapters == ()
    named = replace(large, adapters=("a.safetensors", "b.safetensors"))
    assert read_form(named, config, tmp_path).adapters == named.adapters
    with pytest.raises(
        ValueError,
        match="automatic cannot be combined with other adapters; remove it or the others",
    ):
        read_form(replace(large, adapters=(AUTOMATIC, "miniature-2k")), config, tmp_path)


@pytest.mark.parametrize("prompt", ['a "red" circle', "--steps of a stair"])
def test_the_command_line_reads_the_command_as_the_same_job(config, tmp_path, monkeypatch, prompt):
    from urae.cli import main

    form = replace(FORM, prompt=prompt, size="512", seed=7, steps=3, num_images=2)
    job = read_form(form, replace(config, memory="resident"), tmp_path)
    found = []

    def generate(config, **_):
        found.append(config)
        return [tmp_path / "a.png"]

    monkeypatch.setattr("urae.generate.generate", generate)
    urae, generate_, *words = shlex.split(spell_command(job))
    monkeypatch.setattr("sys.argv", [urae, generate_, "--output", str(tmp_path), *words])
    with pytest.raises(SystemExit) as caught:
        main.main()
    assert caught.value.code == 0
    assert found == [job]
    assert (
        spell_command(GenerateConfig(("x",))) == "urae generate x --model flux-dev --size 1024x1024"
    )


def test_a_job_is_stopped_between_two_steps_and_the_next_is_not(config):
    jobs, steps = Jobs(config), []

    def show(progress, **_):
        steps.append(progress)
        if progress == (2, 5):
            jobs.stop()

    form = replace(FORM, size="64", steps=5)
    with pytest.raises(Exception, match=r"^$") as caught:
        jobs.make(form, show)
    assert caught.typename == "Stopped"
    assert steps == [0.0, (1, 5), (2, 5)]
    assert not list(config.output_dir.rglob("*.png"))
    files, line, _ = jobs.make(replace(form, steps=1), lambda *_, **__: None)
    assert len(files) == 1
    assert line.startswith("1 picture in ")


def test_the_page_makes_pictures_and_says_what_is_wrong(config):
    from gradio_client import Client
    from gradio_client.exceptions import AppError

    config.output_dir.mkdir()
    page = build_page(Jobs(config))
    _, url, _ = page.launch(prevent_thread_lock=True, quiet=True)
    client = Client(url, verbose=False, download_files=False)
    try:
        fields = {"model": "miniature-dev", "adapters": [AUTOMATIC], "seed": 7, "steps": 1}
        fields |= {"prompt": PROMPT, "guidance": None, "num_images": 2}
        pictures, line, command = client.predict(size="64", api_name="/generate", **fields)
        urls = [each["image"]["url"] for each in pictures["value"]]
        assert all(f"file={config.output_dir}" in url for url in urls)  # it was not copied
        with Image.open(io.BytesIO(httpx.get(urls[1]).content)) as image:
            assert image.size == (64, 64)
            assert image.info["prompt"] == PROMPT
            assert image.info["seed"] == "8"
        assert line.startswith("2 pictures in ")
        assert "--seed 7" in command
        with pytest.raises(AppError, match="height 72 is not a positive multiple of 16"):
            client.predict(size="72", api_name="/generate", **fields)
        client.predict(api_name="/stop")
    finally:
        client.close()
        page.close()


def test_pictures_of_a_folder_beside_this_one_are_shown(config, tmp_path, monkeypatch):
    """Their names are parts of addresses, from which browsers take .. and what is before it."""
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    jobs = Jobs(replace(config, output_dir=Path("../pictures")))
    files, line, _ = jobs.make(replace(FORM, size="64", steps=1), lambda *_, **__: None)
    assert Path(files[0]).is_relative_to(tmp_path / "pictures")
    assert "saved in `../pictures/" in line


def test_fields_that_open_empty_stay_so_in_the_browser(config):
    """Gradio leaves a value of None out of what it sends, and in the browser a number is then 0."""
    components = build_page(Jobs(config)).get_config_file()["components"]
    numbers = [each["props"] for each in components if each["type"] == "number"]
    assert [(field["label"], field.get("value")) for field in numbers] == [("Pictures", 1)]


def test_numbers_that_are_typed():
    assert [read_number("seed", text, int) for text in ("7", " ", "", None)] == [
        7,
        None,
        None,
        None,
    ]
    assert read_number("guidance", "3.5", float) == 3.5
    with pytest.raises(ValueError, match=r"seed '7\.5' must be a whole number, or left empty"):
        read_number("seed", "7.5", int)
    with pytest.raises(ValueError, match="guidance '3,5' must be a number, or left empty"):
        read_number("guidance", "3,5", float)


def test_an_address_that_cannot_be_had(config):
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        message = rf"cannot listen on 127.0.0.1:{port} \(Address already in use\); choose"
        with pytest.raises(ValueError, match=message):
            serve(replace(config, port=port))
    with pytest.raises(
        ValueError, match=r"cannot listen on nowhere.invalid:.* \((Name|Temporary failure) "
    ):
        serve(replace(config, host="nowhere.invalid"))
    with pytest.raises(ValueError, match=r"cannot listen on 203.0.113.9:.* \(Cannot assign"):
        serve(replace(config, host="203.0.113.9"))
    with pytest.raises(FileNotFoundError, match="model 'nosuch' is neither a local path nor a hub"):
        serve(replace(config, model="nosuch"))


def test_a_site_whose_name_leads_here_is_not_answered(config):
    """Else a page of evil.example, whose address becomes 127.0.0.1, could use this one."""
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    answers = {}

    def ask(address):
        for host in (f"127.0.0.1:{port}", f"localhost:{port}", f"evil.example:{port}"):
            answers[host] = httpx.get(f"{address}config", headers={"host": host}).status_code
        raise KeyboardInterrupt

    serve(replace(config, port=port), on_ready=ask)
    assert list(answers.values()) == [200, 200, 400]


def test_fields_that_were_emptied(config, tmp_path):
    job = read_form(replace(FORM, size=None, num_images=None), config, tmp_path)
    assert (job.height, job.width, job.num_images) == (256, 256, 1)
    for empty in (None, ""):
        with pytest.raises(ValueError, match="no model is chosen; choose one, or type"):
            read_form(replace(FORM, model=empty), config, tmp_path)


def test_what_may_surprise_is_told_with_the_picture(config):
    """What `urae generate` writes in the terminal, which whoever uses the page may not see."""
    form = replace(FORM, size="64", steps=1)
    _, line, _ = Jobs(config).make(form, lambda *_, **__: None)
    assert "\n" not in line
    strange = replace(form, prompt="a <b>lighthouse</b> *at* _dawn_ — “sea”, " * 20)
    _, line, _ = Jobs(config).make(strange, lambda *_, **__: None)
    first, scene, cut = line.split("\n\n")
    assert first.startswith("1 picture in ")
    assert scene.startswith(r"miniature\-dev only knows scenes of its grammar and will draw a diff")
    assert r"\<b\>lighthouse\<\/b\> \*at\* \_dawn\_ — “sea”" in scene
    assert "only the first 64 are used" in cut


def test_stop_is_for_whoever_began(config):
    jobs, form = Jobs(config), replace(FORM, size="64", steps=2)
    files, _, _ = jobs.make(form, lambda *_, **__: jobs.stop("another"), "one")
    assert len(files) == 1
    with pytest.raises(Exception, match=r"^$") as caught:
        jobs.make(form, lambda *_, **__: jobs.stop("one"), "one")
    assert caught.typename == "Stopped"


def test_a_job_whose_page_is_gone_can_be_stopped(config):
    """A page that is loaded anew has another session."""
    jobs, form = Jobs(config), replace(FORM, size="64", steps=2)
    listeners = build_page(jobs).fns.values()
    (unload,) = [each.fn for each in listeners if (None, "unload") in each.targets]

    def load_anew(*_, **__):
        unload(SimpleNamespace(session_hash="one"))
        jobs.stop("two")

    with pytest.raises(Exception, match=r"^$") as caught:
        jobs.make(form, load_anew, "one")
    assert caught.typename == "Stopped"


def test_nothing_of_a_model_is_held_between_jobs(config):
    def count_models():
        held = [each for each in gc.get_objects() if isinstance(each, FluxTransformer2DModel)]
        return sum(model.device.type != "meta" for model in held)

    jobs, form = Jobs(config), replace(FORM, size="64", steps=1)
    gc.collect()
    gc.disable()
    try:
        before = count_models()  # those of fixtures
        jobs.make(form, lambda *_, **__: None)
        assert count_models() == before
    finally:
        gc.enable()


def test_what_waits_for_a_stopped_job_can_be_stopped_too(config):
    """A stopped job ends its step; the next click waits for it, out of the page's queue."""
    jobs, form, ended = Jobs(config), replace(FORM, size="64", steps=2), {}
    in_step, go_on = threading.Event(), threading.Event()

    def run(name, show):
        try:
            jobs.make(form, show, name)
        except Exception as error:
            ended[name] = type(error).__name__

    def hold(progress, **_):
        if progress:
            in_step.set()
            assert go_on.wait(60)

    shown = []
    threads = [threading.Thread(target=run, args=("one", hold))]
    threads += [
        threading.Thread(target=run, args=(name, lambda progress, **_: shown.append(progress)))
        for name in ("two", "gone", "left")
    ]
    threads[0].start()
    assert in_step.wait(60)
    for thread in threads[1:]:
        thread.start()
    deadline = time.monotonic() + 60
    while len(jobs._requests) < 4:
        assert time.monotonic() < deadline
        time.sleep(0.01)
    jobs.stop("one")
    jobs.stop("two")
    jobs.leave("gone")
    jobs.stop("another")
    closing = threading.Thread(target=jobs.close)
    closing.start()
    time.sleep(0.05)
    go_on.set()
    for thread in (*threads, closing):
        thread.join()
    assert ended == dict.fromkeys(("one", "two", "gone", "left"), "Stopped")
    assert not shown


def test_the_end_of_the_page_waits_for_the_job(config):
    jobs, form = Jobs(config), replace(FORM, size="64", steps=50)
    started, ended = threading.Event(), []

    def run():
        try:
            jobs.make(form, lambda progress, **_: progress and started.set(), "one")
        except Exception as error:
            ended.append(type(error).__name__)

    thread = threading.Thread(target=run)
    thread.start()
    assert started.wait(60)
    jobs.close()
    thread.join()
    assert ended == ["Stopped"]


def test_bad_settings(tmp_path):
    with pytest.raises(ValueError, match="port 0 must be between 1 and 65535"):
        WebConfig(port=0)
    with pytest.raises(ValueError, match="host is empty; give an address"):
        WebConfig(host="")
    (tmp_path / "file").touch()
    with pytest.raises(FileExistsError, match="file is a file; choose a folder with --output"):
        WebConfig(output_dir=tmp_path / "file")


def test_without_gradio(config, monkeypatch):
    monkeypatch.setattr("urae.web.page.find_spec", lambda _: None)
    with pytest.raises(ModuleNotFoundError, match="needs gradio; install it: pip install gradio"):
        build_page(Jobs(config))


@pytest.mark.slow  # a process of its own
def test_ctrl_c_ends_the_page_and_its_job(config):
    from gradio_client import Client

    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    command = [sys.executable, "-m", "urae", "web", "--no-browser", "--port", str(port)]
    command += ["--output", str(config.output_dir)]
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True) as process:
        assert process.stderr is not None
        while "the page is at" not in process.stderr.readline():
            assert process.poll() is None
        client = Client(f"http://127.0.0.1:{port}", verbose=False)
        fields = {"prompt": PROMPT, "model": "miniature-dev", "size": "256", "steps": 1000}
        fields |= {"adapters": [], "seed": 7, "num_images": 1, "guidance": None}
        job = client.submit(api_name="/generate", **fields)
        deadline = time.monotonic() + 120
        while job.status().progress_data is None:
            assert not job.done() and time.monotonic() < deadline, job.status()
            time.sleep(0.1)
        process.send_signal(signal.SIGINT)
        _, errors = process.communicate(timeout=30)
        client.close()
    assert process.returncode == 0, errors
    assert not list(config.output_dir.rglob("*.png"))
