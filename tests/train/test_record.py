"""run.toml: a record of everything, and a recipe again."""

import sys
import tomllib
from dataclasses import replace
from importlib.metadata import version

import pytest

import urae
from urae.cli.main import main
from urae.config import build_config
from urae.resolution import ResolutionPolicy
from urae.train import OptimizerConfig, TrainConfig, train
from urae.train.record import find_commit, format_toml

pytestmark = pytest.mark.usefixtures("few_steps")


def read_back(config: TrainConfig) -> tuple[TrainConfig, dict]:
    settings = tomllib.loads((config.output_dir / "run.toml").read_text())
    record = settings.pop("record")
    options = {name: record[name] for name in ("data_dir", "output_dir", "resume", "overwrite")}
    return build_config(TrainConfig, {**settings, **options}, "run.toml"), record


@pytest.mark.parametrize("policy", [None, ResolutionPolicy(5.0)])
def test_the_config_is_rebuilt(settings, minor, policy):
    config = settings(
        steps=1,
        adapter=minor,
        policy=policy,
        ema_decay=0.999,
        num_validation=1,
        preview_prompts=("one", 'a "second"'),
        preview_seeds=(3, 4),
        caption_weights={"prompt": 1.0, "generated_prompt": 0.5},
        optimizer=OptimizerConfig("adamw", lr=1e-5, weight_decay=0.0),
    )
    train(config)
    rebuilt, record = read_back(config)
    assert rebuilt == config
    assert record["policy"]["ntk_factor"] == (5.0 if policy else ResolutionPolicy().ntk_factor)


def test_what_is_recorded(settings):
    config = settings(steps=1)
    train(config)
    _, first = read_back(config)
    assert first["versions"]["torch"] == version("torch")
    assert first["versions"]["urae"] == urae.__version__
    assert first["versions"].get("commit") == find_commit()
    assert first["devices"] == {"num_ranks": 1, "device": "cpu", "dtype": "float32"} | (
        {"cuda": first["devices"]["cuda"]} if "cuda" in first["devices"] else {}
    )
    assert len(first["base"]["revision"]) == len(first["data"]["hash"]) == 64
    assert first["data"]["num_train"] == 4
    assert "resumed_from_step" not in first
    train(replace(config, steps=2, resume=True))
    _, second = read_back(config)
    assert second["resumed_from_step"] == 1
    session = {"started_at", "chosen", "devices", "versions"}
    assert second["earlier"] == [{name: first[name] for name in session}]
    assert second["chosen"]["memory"] == "resident" and second["chosen"]["compile"] is False
    assert second["chosen"]["attention"] == "native"  # on a CPU
    assert second["data"]["hash"] == first["data"]["hash"]


def test_every_field_has_its_comment(settings):
    train(settings(steps=1))
    lines = (settings().output_dir / "run.toml").read_text().splitlines()
    assert lines[lines.index("steps = 1") - 1].startswith("# Number of optimizer steps")
    wanted = "# Rank of each matrix's update, and its alpha; for `oft`, the side of a block."
    assert lines[lines.index("rank = 4") - 1] == wanted


def test_the_command_takes_it_as_a_recipe(settings, tmp_path, monkeypatch):
    train(settings(steps=1))
    recipe = settings().output_dir / "run.toml"
    again = tmp_path / "again"
    arguments = ["--data", settings().data_dir, "--output", again, "--steps", 2]
    monkeypatch.setattr(sys, "argv", ["urae", "train", *map(str, [recipe, *arguments])])
    with pytest.raises(SystemExit) as ended:
        main()
    assert ended.value.code == 0
    assert read_back(settings(output_dir=again))[0] == settings(output_dir=again, steps=2)


def test_odd_values_are_toml():
    settings = {
        "text": 'a "quoted" \\ back\nline \x7f é 🏖',
        "small": 1e-5,
        "large": 2**63 - 1,
        "none": None,
        "list": ("a", "b"),
        "read back": ["a", 1],
        "empty": [],
        "section": {"on": True, "inner": {"x": 1}, "a dot.": {'a "key"': 2}},
    }
    found = tomllib.loads(format_toml(settings, {"text": "what it is", "section": "and that"}))
    assert found == {
        **{name: value for name, value in settings.items() if value is not None},
        "list": ["a", "b"],
    }
