"""Previews: pictures on the way, which training does not notice."""

import signal
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

from urae.adapters.sources import LORA_FILE_NAME
from urae.features.cache import CacheConfig, cache
from urae.generate import GenerateConfig, generate
from urae.miniature.sources import write_folder
from urae.train import AdapterConfig, OptimizerConfig, TrainConfig, train
from urae.train import loop as loop_module
from urae.train.checkpoint import find_checkpoints
from urae.train.monitor import Monitor
from urae.train.output import find_previews
from urae.train.preview import Previewer

pytestmark = pytest.mark.usefixtures("few_steps")

PROMPT = "a large red circle on a plain blue background"
SIDE = 64


@pytest.fixture(scope="module")
def data_dir(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("renders")
    write_folder(folder, "clean", range(3), 1, SIDE, SIDE)
    cache(CacheConfig(folder, "miniature-dev", SIDE))
    return folder


@pytest.fixture
def config(data_dir, tmp_path) -> TrainConfig:
    """A short run on the miniature that ships, with previews."""
    return TrainConfig(
        model="miniature-dev",
        data_dir=data_dir,
        output_dir=tmp_path / "run",
        resolution=SIDE,
        steps=4,
        gradient_checkpointing="off",
        adapter=AdapterConfig(rank=4),
        optimizer=OptimizerConfig(name="adamw", lr=1e-3),
        preview_prompts=(PROMPT,),
        preview_every=2,
    )


def same(one: Path, other: Path) -> bool:
    first, second = load_file(one), load_file(other)
    return first.keys() == second.keys() and all(torch.equal(first[k], second[k]) for k in first)


def pictures(output_dir: Path) -> dict[str, bytes]:
    folder = output_dir / "previews"
    return {str(path.relative_to(folder)): path.read_bytes() for path in find_previews(output_dir)}


def pixels(path: Path) -> np.ndarray:
    return np.asarray(Image.open(path)).astype(int)


def test_training_does_not_notice(config, tmp_path):
    unseen_config = replace(config, preview_prompts=(), output_dir=tmp_path / "without")
    states = []
    for each in (config, unseen_config):
        torch.manual_seed(0)
        train(each, on_step=lambda report: states.append(torch.random.get_rng_state()))
    assert all(torch.equal(a, b) for a, b in zip(states[:4], states[4:], strict=True))
    seen, unseen = (each.output_dir / LORA_FILE_NAME for each in (config, unseen_config))
    assert same(seen, unseen)
    assert not (tmp_path / "without" / "previews").exists()
    name = "0000-a-large-red-circle-on-a-plain-blue-background-0"
    assert list(pictures(config.output_dir)) == [f"{name}/step-{s:06d}.png" for s in (0, 2, 4)]
    found = [pixels(path) for path in find_previews(config.output_dir)]
    assert {picture.shape for picture in found} == {(SIDE, SIDE, 3)}
    assert (found[0] != found[1]).any() and (found[1] != found[2]).any()
    with Image.open(next(iter(find_previews(config.output_dir)))) as image:
        assert image.text["prompt"] == PROMPT
        assert (image.text["seed"], image.text["step"]) == ("0", "0")


@pytest.mark.slow
def test_a_killed_run_has_them_all_in_the_end(config, tmp_path):
    config = replace(config, preview_every=1, checkpoint_every=2, ema_decay=0.9)
    whole = train(config)
    parts = replace(config, output_dir=tmp_path / "parts")
    train(replace(parts, steps=3))
    find_checkpoints(parts.output_dir)[-1].discard()  # what came after step 2 is lost
    later = next(reversed(find_previews(parts.output_dir)))
    assert later.name == "step-000003.png"
    later.write_bytes(b"half a picture")
    resumed = train(replace(parts, resume=True))
    assert same(whole.adapter_path, resumed.adapter_path)
    assert len(pictures(config.output_dir)) == 5
    assert pictures(parts.output_dir) == pictures(config.output_dir)


def test_they_are_what_is_generated_with_the_adapter(config, tmp_path):
    result = train(replace(config, preview_seeds=(5,), ema_decay=0.9))
    (path,) = generate(
        GenerateConfig(
            (PROMPT,),
            "miniature-dev",
            height=SIDE,
            width=SIDE,
            adapters=(str(result.adapter_path.parent),),
            seed=5,
            output_dir=tmp_path / "pictures",
        )
    )
    last = next(reversed(find_previews(config.output_dir)))
    assert last.name == "step-000004.png"
    assert np.abs(pixels(last) - pixels(path)).max() <= 1  # the last bit, where sums are rounded


def test_a_new_run_in_the_folder_has_its_own(config):
    train(replace(config, steps=1, preview_every=1))
    train(replace(config, steps=2, overwrite=True))
    assert list(find_previews(config.output_dir).values()) == [0, 2]


def test_what_to_preview_may_change_on_resuming(config):
    train(replace(config, steps=2))
    other = ("a small green square", "a medium yellow ring")
    train(replace(config, preview_prompts=other, preview_seeds=(1, 2), resume=True))
    names = [Path(name).parent.name for name in pictures(config.output_dir)]
    later = sorted(set(names))[-4:]
    assert later == [
        "0000-a-small-green-square-1",
        "0000-a-small-green-square-2",
        "0001-a-medium-yellow-ring-1",
        "0001-a-medium-yellow-ring-2",
    ]
    assert [names.count(name) for name in later] == [2] * 4  # where it went on, and at the end


def test_they_reach_the_tracker(config):
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    train(replace(config, tracker="tensorboard"))
    folders = {path.parent for path in config.output_dir.rglob("events.out.tfevents*")}
    tags = {}
    for folder in folders:
        events = EventAccumulator(str(folder)).Reload()
        tags |= {tag: events.Images(tag) for tag in events.Tags()["images"]}
    ((tag, images),) = tags.items()
    assert tag.startswith("previews/0000-a-large-red-circle")
    assert [image.step for image in images] == [0, 2, 4]
    assert {(image.height, image.width) for image in images} == {(SIDE, SIDE)}


def test_a_preview_that_fails_saves_first(config, monkeypatch):
    draw, calls = Previewer.draw, []

    def fail(self, transformer, preview):
        calls.append(preview)
        if len(calls) == 2:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return draw(self, transformer, preview)

    monkeypatch.setattr(Previewer, "draw", fail)
    with pytest.raises(MemoryError):
        train(config)
    assert [each.step for each in find_checkpoints(config.output_dir)] == [2]


def test_nothing_is_lost_while_previews_are_made(config, monkeypatch):
    """A kill in the middle of them, by which time the last checkpoint may be old."""
    seen = []

    def look(self, transformer, preview):
        seen.append([each.step for each in find_checkpoints(config.output_dir)])
        raise KeyboardInterrupt

    monkeypatch.setattr(Previewer, "draw", look)
    monkeypatch.setattr(Monitor, "catch_up", lambda *_: None)  # at step 0 there is nothing to lose
    with pytest.raises(KeyboardInterrupt):
        train(replace(config, checkpoint_every=100))
    assert seen == [[2]]


def test_half_a_set_is_made_whole_on_resuming(config):
    config = replace(config, preview_seeds=(0, 1))
    train(replace(config, steps=2))
    last = next(reversed(find_previews(config.output_dir)))
    last.unlink()  # as if killed before it was written
    train(replace(config, steps=3, resume=True))
    assert last.exists()


def test_running_out_of_memory_says_what_to_do(config, monkeypatch):
    def fail(*_):
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(Previewer, "_draw", fail)
    with pytest.raises(MemoryError, match=r"for a preview of 64 x 64 pixels \(.*\); try training"):
        train(config)


def test_the_text_encoders_come_first(config, monkeypatch):
    order = []
    for module, name in ((loop_module, "Previewer"), (loop_module, "load_transformer")):
        original = getattr(module, name)

        def record(*arguments, name=name, original=original, **options):
            order.append(name)
            return original(*arguments, **options)

        monkeypatch.setattr(module, name, record)
    train(replace(config, steps=1))
    assert order == ["Previewer", "load_transformer"]


def test_a_stop_while_measuring_ends_the_run_there(config, monkeypatch):
    """What is not drawn by then is drawn when the run goes on."""
    draw, drawn = Previewer.draw, []

    def stop(self, *arguments):
        drawn.append(len(drawn))
        if len(drawn) == 3:  # the first of two, after a step
            signal.raise_signal(signal.SIGTERM)
        return draw(self, *arguments)

    monkeypatch.setattr(Previewer, "draw", stop)
    config = replace(config, preview_prompts=(PROMPT, f"{PROMPT}, lit from the left"))
    result = train(config)
    assert (result.step, len(drawn)) == (2, 3)
    train(replace(config, resume=True))
    assert len(drawn) == 3 + 2 + 2  # of step 2 and of step 4
