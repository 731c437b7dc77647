"""The miniature that ships with the package, as a model like any other, and its adapters."""

import csv
import json
import tomllib
from dataclasses import astuple
from itertools import product
from operator import mul

import pytest
import torch
from diffusers import FluxPipeline

import urae
from urae.adapters.adapt import transformer_of
from urae.adapters.files import check_fits, read_adapter
from urae.adapters.initial import find_initial
from urae.adapters.packaged import FILES, PACKAGED_ADAPTERS
from urae.backbones.flux import PACKAGED, fetch_model, find_native_side, fingerprint_component
from urae.backbones.weights import open_original_weights
from urae.features.cache import CacheConfig, cache
from urae.generate import GenerateConfig, generate
from urae.miniature.check import SceneReport, check_scene
from urae.miniature.model import HELD_OUT_SEED, POLICY, build_tokenizers
from urae.miniature.score import held_out_scenes, summarize
from urae.miniature.sources import write_folder
from urae.miniature.synthetic import generate_pictures
from urae.miniature.world import caption, sample_scene
from urae.resolution import read_base_policy
from urae.study.statistics import compare
from urae.train import train
from urae.train.config import OptimizerConfig, TrainConfig

MAX_BYTES = 36_000_000
MAX_ADAPTER_BYTES = 2_000_000


@pytest.fixture(scope="module")
def pipe():
    pipe = FluxPipeline.from_pretrained(PACKAGED["miniature-dev"], dtype=torch.float32)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def check(pipe, *, side, count, steps=16, guidance_scale=3.5):
    """Check pictures of held-out captions; the noise of each is always the same."""
    scenes = held_out_scenes(count)
    captions = [caption(scene) for scene in scenes]
    noises = [torch.Generator().manual_seed(scene.seed) for scene in scenes]
    sampling = {"side": side, "steps": steps, "guidance_scale": guidance_scale}
    pictures = generate_pictures(pipe, captions, noises, **sampling)
    return [check_scene(each.numpy(), scene) for each, scene in zip(pictures, scenes, strict=True)]


def test_it_is_found_by_name_and_carries_its_policy(tmp_path, monkeypatch):
    folder = fetch_model("miniature-dev")
    assert read_base_policy(folder) == POLICY
    assert find_native_side("miniature-dev") == 256
    assert find_native_side("flux-dev") == find_native_side("someone/a-flux") == 1024
    monkeypatch.chdir(tmp_path)  # a path that exists wins
    (tmp_path / "miniature-dev").mkdir()
    with pytest.raises(ValueError, match=r"no model_index\.json"):
        fetch_model("miniature-dev")


def test_its_tokenizers_are_built_alike_in_every_process(pipe):
    assert [each.get_vocab() for each in build_tokenizers()] == [
        pipe.tokenizer.get_vocab(),
        pipe.tokenizer_2.get_vocab(),
    ]


def test_it_is_small_and_says_what_it_comes_from():
    folders = [*PACKAGED.values(), *{path.parent for path in PACKAGED_ADAPTERS.values()}]
    files = [file for folder in folders for file in folder.rglob("*") if file.is_file()]
    assert sum(file.stat().st_size for file in files) < MAX_BYTES
    for name, folder in PACKAGED.items():
        record = json.loads((folder / "recipe.json").read_text())
        for stage, metadata in record.items():
            assert metadata["urae.stage"] == stage
            assert len(metadata["urae.commit"]) >= 7
            assert stage in tomllib.loads(metadata["urae.recipe"])
        assert name in (folder / "README.md").read_text()


@pytest.mark.parametrize("name", FILES)
def test_adapters_say_what_they_come_from(name, pipe):
    adapter = read_adapter(name)
    assert adapter.path.stat().st_size < MAX_ADAPTER_BYTES
    assert {pair.down.dtype for pair in adapter.layers.values()} == {torch.float16}
    check_fits(adapter, transformer_of(pipe))
    assert adapter.policy is not None
    assert adapter.policy.native_sequence_length == POLICY.native_sequence_length
    base = fingerprint_component(PACKAGED["miniature-dev"], "transformer")
    assert adapter.metadata["urae.base_revision"] == base
    recipe = json.loads(adapter.metadata["urae.config"])
    assert int(adapter.metadata["urae.step"]) == recipe["steps"]
    assert len(adapter.metadata["urae.commit"]) >= 7
    card = (adapter.path.parent / "README.md").read_text()
    assert card.startswith("---\nlicense: apache-2.0\n")
    for phrase in (
        name,
        adapter.path.name,
        f"seed {recipe['seed']}",
        adapter.metadata["urae.commit"],
    ):
        assert phrase in card


def test_the_4k_adapter_is_over_the_2k_adapter(pipe):
    """Its own B0 and A0 are taken, which are those of this base and this LoRA."""
    lora, minor = (read_adapter(name) for name in FILES)
    assert minor.kind == "minor"
    assert minor.metadata["urae.over"] == "miniature-2k"
    transformer = transformer_of(pipe)
    initial = find_initial(minor, [lora.layers], lambda n: open_original_weights(transformer, n))
    assert initial is minor.initial


def test_it_draws_what_captions_say(pipe):
    found = summarize(check(pipe, side=256, count=6), 6)
    assert found["share"] >= 4 / 6 and found["background"] == found["texture"] == 1


def test_schnell_does_in_four_steps():
    schnell = FluxPipeline.from_pretrained(PACKAGED["miniature-schnell"], dtype=torch.float32)
    schnell.set_progress_bar_config(disable=True)
    found = summarize(check(schnell, side=256, count=6, steps=4, guidance_scale=0.0), 6)
    assert found["share"] >= 4 / 6 and found["background"] == found["texture"] == 1


@pytest.fixture(scope="module")
def direct_512(pipe):
    return check(pipe, side=512, count=8)


@pytest.mark.slow
def test_larger_pictures_repeat_objects(direct_512):
    found = summarize(direct_512, 8)
    assert found["share"] <= 0.5 and found["objects"] <= 0.5
    assert found["background"] == 1


@pytest.mark.slow
def test_the_2k_adapter_mends_them(pipe, direct_512):
    urae.adapt(pipe, "miniature-2k")
    adapted = check(pipe, side=512, count=8)
    urae.restore(pipe)
    assert p_value(adapted, direct_512) < 0.05
    assert summarize(adapted, 8)["share"] >= 0.5


@pytest.mark.slow
def test_the_4k_adapter_mends_larger_ones(pipe):
    few = {"side": 1024, "count": 6, "steps": 6}
    direct = check(pipe, **few)
    urae.adapt(pipe, ["miniature-2k", "miniature-4k"])
    adapted = check(pipe, **few)
    urae.restore(pipe)
    assert p_value(adapted, direct) < 0.05
    assert summarize(adapted, 6)["share"] > summarize(direct, 6)["share"]


def p_value(adapted, direct):
    """Return how likely chance alone gains so much: exact, one-sided, paired by caption and noise.

    What counts of a caption is how many parts more hold with the adapter. Were it of no use, each
    change would be as likely with the other sign: this is the share of all signs that gain as much.
    """
    changes = [sum(astuple(a)) - sum(astuple(d)) for a, d in zip(adapted, direct, strict=True)]
    signs = list(product((1, -1), repeat=len(changes)))
    return sum(sum(map(mul, each, changes)) >= sum(changes) for each in signs) / len(signs)


def test_chance_is_told_exactly():
    good, bad = SceneReport(*[True] * 9), SceneReport(*[False] * 9)
    assert p_value([good] * 6, [bad] * 6) == 1 / 64
    assert p_value([good] * 5 + [bad], [bad] * 5 + [good]) == 7 / 64
    assert p_value([good] * 3, [good] * 3) == 1


def test_a_short_run_beyond_native_size_learns(tmp_path):
    """The loss on held-out pictures, each compared with itself, falls."""
    data = tmp_path / "data"
    write_folder(data, "clean", range(12), 1, 384, 384)
    cache(CacheConfig(data, "miniature-dev", 384))
    config = TrainConfig(
        model="miniature-dev",
        data_dir=data,
        output_dir=tmp_path / "run",
        resolution=384,
        steps=8,
        num_validation=5,
        gradient_checkpointing="off",
        optimizer=OptimizerConfig(name="adamw", lr=5e-3),
    )
    train(config)
    with (config.output_dir / "validation.csv").open(newline="") as file:
        first, last = csv.DictReader(file)
    names = [name for name in first if name.startswith("sample_")]
    losses = ([float(row[name]) for name in names] for row in (last, first))
    assert compare(*losses).is_negative


def test_generating_with_it(tmp_path):
    prompt = caption(sample_scene(HELD_OUT_SEED))
    config = GenerateConfig(
        (prompt,), "miniature-dev", height=64, width=64, steps=1, seed=0, output_dir=tmp_path
    )
    (path,) = generate(config)
    assert path.is_file()
