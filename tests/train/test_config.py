from pathlib import Path

import pytest

from urae.config import build_config, describe_fields, override, read_toml
from urae.train import OptimizerConfig, TrainConfig

RECIPES = sorted((Path(__file__).parents[2] / "recipes").glob("*.toml"))
PATHS = {"data_dir": "data", "output_dir": "out"}


def build(settings, origin="recipe.toml"):
    return build_config(TrainConfig, {"model": "flux-dev", **PATHS, **settings}, origin)


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.name)
def test_every_recipe_parses(path):
    config = build_config(TrainConfig, {**read_toml(path), **PATHS}, str(path))
    assert config.guidance_scale == 1.0
    assert (config.optimizer.name == "prodigy") == path.name.startswith("flux_")
    # FLUX.1's is that of the reference, the miniature's is its own
    assert (config.policy is None) == path.name.startswith("flux_")
    assert config.adapter.kind == ("minor" if "minor" in path.name else "lora")
    assert bool(config.adapter.over) == ("minor" in path.name)
    native = 1024 if path.name.startswith("flux_") else 256
    assert config.resolution == native * (4 if "4k" in path.name else 2)


def test_there_are_recipes_for_both_models_and_stages():
    assert len([path for path in RECIPES if path.name.startswith("flux_")]) == 4


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"stesp": 3}, r"recipe.toml: stesp: unknown key; did you mean steps\?"),
        ({"optimizer": {"lrr": 1}}, r"optimizer.lrr: unknown key; did you mean lr\?"),
        ({"optimizer": {"zzz": 1}}, r"zzz: unknown key; known keys: name, lr"),
        ({"policy": {"ntk": 1}}, r"policy.ntk: unknown key; known keys: ntk_factor"),
        ({"lr": 2}, r"recipe.toml: lr: unknown key; did you mean optimizer.lr\?"),
        ({"steps": "many"}, r"recipe.toml: steps: must be a whole number, not 'many'"),
        ({"steps": 0}, r"steps 0 must be at least 1"),
        ({"keep_checkpoints": 0}, r"keep_checkpoints 0 must be at least 1"),
        ({"validate_every": 0}, r"validate_every 0 must be at least 1"),
        ({"num_validation": -1}, r"num_validation -1 must be 0 or more"),
        ({"ema_decay": 1.0}, r"ema_decay 1.0 must be above 0 and below 1"),
        ({"resolution": 2050}, r"resolution 2050 is not .*try 2048 or 2064"),
        (
            {"memory": "4bit", "compile": True},
            "compile true cannot be combined with memory 4bit, whose",
        ),
        (
            {"memory": "streamed", "gradient_checkpointing": "selective", "compile": True},
            "memory streamed with gradient_checkpointing selective, whose blocks are never",
        ),
        ({"adapter": {"rank": 0}}, r"adapter: rank 0 must be at least 1"),
        ({"adapter": {"trains": "down"}}, r"adapter: trains 'down' needs adapter.init for a LoRA"),
        ({"adapter": {"kind": "loha"}}, r"adapter.kind: .*'lora', 'minor'.*'loha'"),
        ({"original_caption_share": 1.5}, r"original_caption_share 1.5 must be between"),
        ({"preview_every": 0}, r"preview_every 0 must be at least 1"),
        ({"preview_prompts": ["a", " "]}, r"a prompt in preview_prompts is empty"),
        ({"preview_seeds": []}, r"preview_seeds \(\) must be one or more"),
        ({"preview_seeds": [-1]}, r"preview_seeds \(-1,\) must be one or more between 0"),
        ({"caption_dropout": -0.1}, r"caption_dropout -0.1 must be between 0 and 1"),
        ({"caption_weights": {"a": -1}}, r"caption_weights: -1.0 of 'a' must be 0 or more"),
        ({"caption_weights": {"a": 0}}, r"caption_weights must give some column a weight above 0"),
        ({"caption_weights": {"a": "b"}}, r"caption_weights.a: .*number.*, not 'b'"),
        ({"optimizer": {"lr": -1.0}}, r"lr -1.0 must be a positive"),
        ({"optimizer": {"beta1": 2.0}}, r"beta1 2.0 must be"),
        ({"optimizer": {"name": "sgd"}}, r"optimizer.name: .*'muon', not 'sgd'"),
        (
            {"optimizer": {"name": "schedule-free", "beta1": 0.0}},
            r"optimizer: beta1 0.0 must be above 0 for schedule-free",
        ),
        ({"optimizer": {"schedule": "cosin"}}, r"optimizer.schedule: .*'cosine', not 'cosin'"),
        ({"optimizer": {"warmup_steps": -1}}, r"optimizer: warmup_steps -1 must be 0 or more"),
        ({"optimizer": {"warmup_steps": 0.5}}, r"optimizer.warmup_steps: .*whole number"),
        (
            {"optimizer": {"name": "schedule-free", "schedule": "linear"}},
            "optimizer: schedule linear cannot be combined with schedule-free, which takes only a",
        ),
        ({"optimizer": {"weight_decay": float("nan")}}, r"weight_decay nan must be"),
        ({"seed": -1}, r"seed -1 must be"),
        ({"timestep_sampling": "normal"}, r"timestep_sampling: .*'logit-normal', not 'normal'"),
        ({"timestep_shift": 0.0}, r"timestep_shift 0.0 must be a positive number or 'resolution'"),
        ({"guidance_scale": float("nan")}, r"guidance_scale nan must be"),
        ({"resume": True, "overwrite": True}, r"cannot be combined; choose one"),
    ],
)
def test_bad_settings_are_one_clear_line(settings, message):
    with pytest.raises(ValueError, match=message) as caught:
        build(settings)
    assert "\n" not in str(caught.value)


def test_a_missing_field_is_named():
    with pytest.raises(ValueError, match=r"recipe.toml: model: is required"):
        build_config(TrainConfig, PATHS, "recipe.toml")


def test_overrides():
    settings = {"optimizer": {"lr": 1.0}}
    override(settings, ["--optimizer.lr", "0.5", "--steps=7", "--adapter.over", '["a", "b"]'])
    override(settings, ["--optimizer.schedule", "cosine", "--optimizer.warmup-steps", "100"])
    override(settings, ["--gradient-checkpointing", "off", "--model", "flux-schnell"])
    config = build(settings)
    assert config.optimizer == OptimizerConfig(lr=0.5, schedule="cosine", warmup_steps=100)
    assert config.steps == 7
    assert config.adapter.over == ("a", "b")
    assert config.gradient_checkpointing == "off"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["stray"], "unexpected argument 'stray'"),
        (["--steps"], "option --steps needs a value"),
        (["--steps.more", "1"], "steps is a value, not a section"),
    ],
)
def test_bad_overrides(arguments, message):
    with pytest.raises(ValueError, match=message):
        override({"steps": 3}, arguments)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("--lr 2", "--lr: no such field; did you mean --optimizer.lr? urae train --fields lists"),
        ("--optimiser.lr 2", "--optimiser.lr: no such field; did you mean --optimizer.lr?"),
        ("--optimizer.rank 2", "--optimizer.rank: no such field; did you mean --adapter.rank?"),
        ("--batchsize=2", "--batchsize: no such field; did you mean --batch-size?"),
        ("--warmup 2", "--warmup: no such field; did you mean --optimizer.warmup-steps?"),
        ("--zzz 2", "--zzz: no such field; urae train --fields lists all"),
        ("--steps x", "--steps x: must be a whole number"),
        ("--compile 2", "--compile 2: must be true or false"),
        ("--timestep-shift x", "--timestep-shift x: must be a number or 'resolution'"),
        ("--adapter.kind loha", "--adapter.kind loha: must be 'lora', 'minor'"),
        ("--adapter 3", "--adapter 3: must be a section"),
        ("--caption-weights.prompt x", "--caption-weights.prompt x: must be a number"),
        ('--preview-seeds [1,"x"]', '--preview-seeds [1,"x"]: must be a whole number'),
        ("--steps 0", "--steps 0 must be at least 1"),
        ("--adapter.rank 0", "--adapter.rank 0 must be at least 1"),
        (
            "--optimizer.name muon --adapter.kind oft",
            "recipe.toml and the options: muon is only for matrices",
        ),
    ],
)
def test_errors_of_options_name_them_as_typed(arguments, message):
    settings = {"model": "flux-dev", **PATHS}
    typed = override(settings, arguments.split())
    with pytest.raises(ValueError) as caught:
        build_config(TrainConfig, settings, "recipe.toml", typed)
    assert str(caught.value).startswith(message)


def test_errors_of_a_recipe_name_it_beside_options():
    settings = {"model": "flux-dev", **PATHS, "stesp": 3}
    typed = override(settings, ["--batch-size", "2"])
    with pytest.raises(ValueError, match=r"^recipe.toml: stesp: unknown key; did you mean steps"):
        build_config(TrainConfig, settings, "recipe.toml", typed)


def test_one_of_a_list_needs_no_list():
    settings = {}
    override(settings, ["--adapter.over", "runs/lora"])
    assert build(settings).adapter.over == ("runs/lora",)
    override(settings, ["--preview-prompts", "a lighthouse", "--preview-seeds", "3"])
    config = build(settings)
    assert (config.preview_prompts, config.preview_seeds) == (("a lighthouse",), (3,))


def test_recipes_that_cannot_be_read(tmp_path):
    with pytest.raises(FileNotFoundError, match="does not exist"):
        read_toml(tmp_path / "none.toml")
    (tmp_path / "bad.toml").write_text("steps = = 3")
    with pytest.raises(ValueError, match=r"bad.toml is not TOML"):
        read_toml(tmp_path / "bad.toml")


def test_every_field_is_described():
    rows = describe_fields(TrainConfig)
    assert {"steps", "optimizer.lr", "adapter.kind"} <= {name for name, _, _ in rows}
    assert all(description for _, _, description in rows)
