"""Publishing a run: the folder with its card, and the upload; no network."""

import json
import shutil
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from huggingface_hub import ModelCard
from huggingface_hub.errors import HfHubHTTPError
from PIL import Image
from safetensors.torch import load_file

from urae.adapters.files import read_adapter
from urae.cli.main import main
from urae.config import read_toml
from urae.train import AdapterConfig, OptimizerConfig, PushConfig, TrainConfig, push, train
from urae.train.card import find_license
from urae.train.publish import CONVERTED_FILE, _without_folders, write_folder

pytestmark = pytest.mark.usefixtures("few_steps")

GOLDEN = Path(__file__).parents[1] / "golden"
LORA = "pytorch_lora_weights.safetensors"


PROMPT = 'a "blue" square | a red one'


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A finished run with every kind of curve and picture."""
    config = TrainConfig(
        model=str(GOLDEN / "base_dev"),
        data_dir=GOLDEN / "train_data",
        output_dir=tmp_path_factory.mktemp("trained") / "run",
        resolution=256,
        steps=2,
        num_validation=1,
        validate_every=1,
        preview_prompts=(PROMPT,),
        gradient_checkpointing="off",
        adapter=AdapterConfig(rank=4),
        optimizer=OptimizerConfig(name="adamw", lr=1e-3),
    )
    train(config)
    return config


@pytest.fixture
def run(trained, tmp_path):
    """A copy of it to publish."""
    shutil.copytree(trained.output_dir, tmp_path / "run")
    return replace(trained, output_dir=tmp_path / "run")


@pytest.fixture
def hub(monkeypatch):
    """A hub in memory, with somebody logged in."""
    calls = []

    class Api:
        exists, refusal = False, None

        def repo_exists(self, repo):
            return Api.exists

        def create_repo(self, repo, **options):
            if Api.refusal:
                response = SimpleNamespace(status_code=Api.refusal, headers={}, request=None)
                raise HfHubHTTPError("no", response=response)
            calls.append(("create", repo, options))

        def upload_folder(self, *, repo_id, folder_path, **_):
            files = {str(p.relative_to(folder_path)) for p in folder_path.rglob("*") if p.is_file()}
            calls.append(("upload", repo_id, files))

    monkeypatch.setattr("urae.train.publish.HfApi", Api)
    monkeypatch.setattr("urae.train.publish.get_token", lambda: "token")
    return SimpleNamespace(api=Api, calls=calls)


def options(config, **changes) -> PushConfig:
    return PushConfig(**{"run_dir": config.output_dir, "repo": "me/my-2k", **changes})


def test_the_folder_has_a_card_that_the_hub_understands(run, capsys):
    folder = write_folder(options(run, license="apache-2.0"))
    card = ModelCard.load(folder / "README.md")
    data = card.data.to_dict()
    assert data["library_name"] == "diffusers"
    assert data["pipeline_tag"] == "text-to-image"
    assert data["license"] == "apache-2.0"
    assert {"lora", "template:sd-lora", "urae"} <= set(data["tags"])
    assert [each["text"] for each in data["widget"]] == [PROMPT]
    for each in data["widget"]:
        with Image.open(folder / each["output"]["url"]) as picture:
            assert picture.size == (256, 256)
            assert picture.info["step"] == "2"
    assert '| a "blue" square \\| a red one | ![' in card.text
    assert f'urae.adapt(pipe, "me/my-2k/{LORA}")' in card.text
    assert f'pipe.load_lora_weights("me/my-2k", weight_name="{LORA}")' in card.text
    with Image.open(folder / "curves.png") as picture:
        assert picture.size == (1120, 400)


def test_the_card_is_for_a_base_of_the_hub(run):
    text = (run.output_dir / "run.toml").read_text()
    (run.output_dir / "run.toml").write_text(text.replace(f'"{run.model}"', '"flux-dev"', 1))
    data = ModelCard.load(write_folder(options(run)) / "README.md").data.to_dict()
    assert data["base_model"] == "black-forest-labs/FLUX.1-dev"
    assert data["base_model_relation"] == "adapter"
    assert data["license"] == "other"
    assert data["license_name"] == "flux-1-dev-non-commercial-license"
    assert data["license_link"].endswith("FLUX.1-dev/blob/main/LICENSE.md")


def test_the_card_loads_a_base_that_ships_with_the_package(run):
    text = (run.output_dir / "run.toml").read_text()
    (run.output_dir / "run.toml").write_text(text.replace(f'"{run.model}"', '"miniature-dev"', 1))
    card = ModelCard.load(write_folder(options(run)) / "README.md").text
    assert 'pipe = load_pipeline("miniature-dev", dtype=torch.float32)' in card
    assert 'pipe("a large red circle on a striped green background", height=256' in card
    assert "guidance_scale=3.5, max_sequence_length=64)" in card
    assert "FluxPipeline" not in card


def test_what_is_published_is_the_run_without_its_folders(run, trained):
    folder = write_folder(options(run, license="other"))
    ours, published = load_file(run.output_dir / LORA), load_file(folder / LORA)
    assert ours.keys() == published.keys()
    assert all(torch.equal(ours[key], published[key]) for key in ours)
    assert read_adapter(folder).policy == read_adapter(run.output_dir).policy
    private = [str(GOLDEN).encode(), str(trained.output_dir.parent).encode()]
    for path in folder.rglob("*"):
        assert path.is_dir() or not any(each in path.read_bytes() for each in private), path
    recipe = read_toml(folder / "run.toml")
    assert recipe["steps"] == 2
    assert recipe["record"]["data_dir"] == run.data_dir.name
    assert json.loads(read_adapter(folder).metadata["urae.config"])["data_dir"] == run.data_dir.name


def test_a_minor_adapter_has_its_conversion_beside_it(settings, minor, rel):
    config = settings(steps=1, adapter=minor)
    train(config)
    folder = write_folder(options(config, license="other"))
    whole = read_adapter(folder / CONVERTED_FILE)
    parts = [read_adapter(minor.over[0]), read_adapter(config.output_dir)]
    name = "transformer_blocks.0.attn.to_q"
    lora, trained, initial = parts[0].layers[name], parts[1].layers[name], parts[1].initial[name]
    wanted = lora.up @ lora.down + trained.up @ trained.down - initial.up @ initial.down
    assert rel(whole.layers[name].up @ whole.layers[name].down, wanted) < 1e-6
    assert f"me/my-2k/{CONVERTED_FILE}" in (folder / "README.md").read_text()
    assert str(GOLDEN).encode() not in (folder / LORA).read_bytes()


def test_upload(run, hub):
    pushed = push(options(run, license="other", private=True))
    assert pushed.url == "https://huggingface.co/me/my-2k"
    create, upload = hub.calls
    assert create == ("create", "me/my-2k", {"private": True, "exist_ok": False})
    assert {"README.md", "run.toml", "curves.png", LORA} < upload[2]


def test_a_dry_run_uploads_nothing(run, hub):
    pushed = push(options(run, license="other", dry_run=True))
    assert (pushed.url, hub.calls) == (None, [])
    assert (pushed.folder / "README.md").exists()


def test_a_repository_that_exists_is_kept(run, hub):
    hub.api.exists = True
    with pytest.raises(FileExistsError, match="me/my-2k exists on the hub and is kept"):
        push(options(run, license="other"))
    assert hub.calls == []
    push(options(run, license="other", overwrite=True))
    assert hub.calls[0][2]["exist_ok"]


@pytest.mark.parametrize(("status", "kind"), [(403, PermissionError), (500, ConnectionError)])
def test_the_hub_refuses(run, hub, status, kind):
    hub.api.refusal = status
    with pytest.raises(kind, match=rf"me/my-2k could not be uploaded \({status}\)"):
        push(options(run, license="other"))


def test_nobody_is_logged_in(run, hub, monkeypatch):
    monkeypatch.setattr("urae.train.publish.get_token", lambda: None)
    with pytest.raises(PermissionError, match="hf auth login"):
        push(options(run))


def test_what_is_no_finished_run(run, tmp_path, monkeypatch, capsys):
    with pytest.raises(ValueError, match=r"the licence of the base .* is unknown; give it with"):
        write_folder(options(run))
    with pytest.raises(ValueError, match="has no owner"):
        push(options(run, repo="my-2k"))
    recipe = run.output_dir / "run.toml"
    recipe.write_text(recipe.read_text().replace("steps = 2\n", "steps = 3\n", 1))
    with pytest.raises(ValueError, match="is at step 2 of 3; continue with --resume"):
        write_folder(options(run, license="other"))
    (run.output_dir / LORA).unlink()
    with pytest.raises(ValueError, match="is at step 2 of 3; continue with --resume"):
        write_folder(options(run, license="other"))
    monkeypatch.setattr("sys.argv", ["urae", "push", str(tmp_path), "me/x", "--dry-run"])
    with pytest.raises(SystemExit) as stop:
        main()
    assert stop.value.code == 2
    assert "holds no run.toml" in capsys.readouterr().err


def test_a_prompt_is_no_path():
    found = _without_folders({"prompt": "/imagine a cat/dog", "data_dir": "/home/me/data"})
    assert found == {"prompt": "/imagine a cat/dog", "data_dir": "data"}


def test_licences_follow_the_base():
    assert str(find_license("flux-dev", None)) == "flux-1-dev-non-commercial-license"
    assert find_license("black-forest-labs/FLUX.1-schnell", "apache-2.0").id == "apache-2.0"
    assert find_license("miniature-dev", None).id == "apache-2.0"
    assert find_license("somebody/model", "mit").id == "mit"
    with pytest.raises(ValueError, match="and its adapters inherit that, not mit"):
        find_license("flux-dev", "mit")
