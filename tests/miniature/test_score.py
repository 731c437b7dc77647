"""What is scored: a stage of the work folder, or any model, with adapters or without."""

import json

import pytest
import torch

from urae.adapters.files import LowRank, write_lora
from urae.backbones.flux import load_pipeline
from urae.cli.main import app
from urae.miniature import score as score_module
from urae.miniature.check import SceneReport
from urae.miniature.score import default_sampling, draw_scenes, held_out_scenes, load_scored
from urae.resolution import find_policy


@pytest.fixture
def lora(tmp_path):
    generator = torch.Generator().manual_seed(0)
    down, up = torch.randn(2, 4, 192, generator=generator)
    path = tmp_path / "lora.safetensors"
    write_lora(path, {"transformer_blocks.0.attn.to_q": LowRank(down, up.mT)})
    return str(path)


def test_the_miniature_that_ships_stock_or_adapted(lora):
    pipe = load_scored()
    assert find_policy(pipe.transformer) is None
    assert default_sampling(pipe) == (24, 3.5)
    adapted = load_scored(model="miniature-dev", adapters=[lora])
    assert find_policy(adapted.transformer).policy.native_sequence_length == 320
    scenes = held_out_scenes(1)
    sampling = {"side": 128, "steps": 1, "guidance_scale": 3.5}
    first, again = (next(draw_scenes(pipe, scenes, [0], **sampling)) for _ in range(2))
    (other,) = draw_scenes(adapted, scenes, [0], **sampling)
    assert torch.equal(first, again) and not torch.equal(first, other)


def test_scenes_go_on_from_a_number():
    assert held_out_scenes(4)[2:] == held_out_scenes(2, first=2)


def test_other_captions_can_be_scored(monkeypatch):
    seen = []
    monkeypatch.setattr(
        score_module, "draw_scenes", lambda pipe, scenes, numbers, **_: seen.extend(scenes) or []
    )
    with pytest.raises(ValueError, match="longer"):  # there are no pictures to check
        score_module.score_pipeline(None, score_module.ScoreConfig(512, 2, 2, first_caption=7))
    assert seen == held_out_scenes(2, first=7) * 2


def test_models_without_distilled_guidance(bases):
    pipe = load_pipeline(str(bases["schnell"]), dtype=torch.float32)
    assert default_sampling(pipe) == default_sampling(pipe, "schnell") == (4, 0.0)
    assert default_sampling(pipe, "base") == (24, 3.5)


@pytest.mark.parametrize(
    "arguments", [["--model", "miniature-dev"], ["--adapter", "a.safetensors"]]
)
def test_a_stage_excludes_a_model_and_adapters(arguments, cli):
    outcome = cli("miniature", "score", "dev", *arguments)
    assert isinstance(outcome.exception, ValueError)
    assert "cannot be combined; leave out the stage" in str(outcome.exception)


def test_the_command_says_what_was_scored(lora, tmp_path, monkeypatch, cli):
    configs = []

    def score(pipe, config, on_progress):
        on_progress(1, 1500)
        configs.append(config)
        return [SceneReport(*[True] * 9)] * config.num_captions

    monkeypatch.setattr(score_module, "score_pipeline", score)
    output = tmp_path / "figures" / "score.json"
    outcome = cli("miniature", "score", "--adapter", lora, "--side", "512", "--output", output)
    assert outcome.exit_code == 0, outcome.exception
    found = json.loads(output.read_text())
    assert (found["model"], found["adapters"], found["share"]) == ("miniature-dev", [lora], 1.0)
    assert (found["side"], found["num_seeds"], found["count"]) == (512, 3, 500)
    assert "512 x 512, 24 steps: 100.0% of 500 pictures match the whole caption" in outcome.stdout
    (config,) = configs
    assert (config.side, config.steps, config.guidance_scale) == (512, 24, 3.5)
    assert cli("miniature", "score", "--first", 500).exit_code == 0
    assert (configs[0].first_caption, configs[1].first_caption) == (0, 500)


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        (["--side", "500"], ValueError, "side 500 is not a positive multiple of 16"),
        (["--side", "176"], ValueError, "side 176 must be at least 192, the smallest that the sc"),
        (["--output", "."], FileExistsError, r"output \. is a folder; name a \.json file"),
    ],
)
def test_what_does_not_fit_is_said_before_anything_loads(
    arguments, error, message, cli, monkeypatch
):
    monkeypatch.setattr(score_module, "load_scored", lambda **_: pytest.fail("it loads"))
    outcome = cli("miniature", "score", *arguments)
    with pytest.raises(error, match=message):
        raise outcome.exception


def test_only_stages_with_a_transformer_are_offered(cli, tmp_path):
    outcome = cli("miniature", "score", "vae", "--work", tmp_path)
    message = (
        "stage 'vae' is not a transformer; choose one of base, refined, dev, schnell, teacher_256"
    )
    assert message in str(outcome.exception)


def test_progress_is_told_by_the_picture(monkeypatch):
    def draw(pipe, scenes, numbers, **_):
        return [torch.zeros(3, 192, 192, dtype=torch.uint8) for _ in scenes]

    monkeypatch.setattr(score_module, "draw_scenes", draw)
    told = []
    config = score_module.ScoreConfig(192, num_captions=2, num_seeds=2)
    reports = score_module.score_pipeline(
        None, config, on_progress=lambda done, total: told.append((done, total))
    )
    assert len(reports) == 4
    assert told == [(1, 4), (2, 4), (3, 4), (4, 4)]


@pytest.fixture
def cli():
    from typer.testing import CliRunner

    return lambda *arguments: CliRunner().invoke(app, list(map(str, arguments)))
