import pytest
from typer.testing import CliRunner

import urae
from urae.backbones import flux
from urae.cli.main import app
from urae.generate import job as job_module
from urae.generate.estimate import count_bytes
from urae.generate.inputs import check_adapters
from urae.generate.joined_adapters import join_adapters
from urae.generate.plan import PlanConfig, parse_bytes, plan

GIB = 2**30


@pytest.fixture(autouse=True)
def _no_weights(monkeypatch):
    """Fail if anything loads weights or reaches for the hub."""

    def fail(*_, **__):
        raise AssertionError("weights were loaded")

    monkeypatch.setattr(job_module, "load_pipeline", fail)
    monkeypatch.setattr(flux, "snapshot_download", fail)
    monkeypatch.setattr(flux.DiffusionPipeline, "download", fail)


def test_a_known_name_needs_no_hub():
    found = plan(PlanConfig(height=4096, width=4096, gpu_bytes=24 * GIB))
    assert [each.tier for each in found.estimates] == ["resident", "streamed", "8bit", "4bit"]
    assert found.chosen.tier == "streamed"
    assert found.compiled
    schnell = plan(PlanConfig("flux-schnell", 4096, 4096, gpu_bytes=24 * GIB))
    assert not schnell.compiled  # four steps


def test_a_folder_with_an_adapter(bases, expected):
    adapter = str(expected / "dev_2k_lora.safetensors")
    small = PlanConfig(str(bases["dev"]), 64, 64, gpu_bytes=2 * GIB)
    plain, adapted = (
        plan(small),
        plan(PlanConfig(str(bases["dev"]), 64, 64, (adapter,), gpu_bytes=2 * GIB)),
    )
    assert plain.chosen.tier == "resident"
    assert adapted.chosen.sample.weights > plain.chosen.sample.weights


@pytest.mark.parametrize(
    "names", [("dev_2k_lora",), ("dev_4k_minor",), ("dev_2k_lora", "dev_4k_minor")]
)
def test_adapters_take_what_is_attached_and_joined(load_pipe, expected, names):
    adapters = [str(expected / f"{name}.safetensors") for name in names]
    pipe = load_pipe(without=("vae", *flux.TEXT_COMPONENTS))
    before = count_bytes(pipe.transformer)
    urae.adapt(pipe, adapters)
    join_adapters(pipe.transformer, merge=False)
    counted = check_adapters(adapters, (), pipe.transformer)
    assert counted == count_bytes(pipe.transformer) - before


def test_another_hub_id_gives_its_configs_alone(bases, monkeypatch):
    calls = []

    def download(hub_id, **options):
        calls.append((hub_id, options))
        return str(bases["dev"])

    monkeypatch.setattr(flux, "snapshot_download", download)
    plan(PlanConfig("someone/flux", 64, 64, gpu_bytes=GIB))
    assert calls == [("someone/flux", {"allow_patterns": "*.json"})]


def test_one_tier():
    (only,) = plan(PlanConfig(memory="offload", gpu_bytes=48 * GIB)).estimates
    assert only.tier == "offload"


def test_nothing_fits():
    assert plan(PlanConfig(height=4096, width=4096, gpu_bytes=4 * GIB)).chosen is None


def test_without_a_gpu_one_must_be_named():
    with pytest.raises(ValueError, match=r"no CUDA device; name the memory .*--gpu 24GiB"):
        plan(PlanConfig())


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"height": 100}, "height 100 is not"),
        ({"steps": 0}, "steps 0 must be at least 1"),
        ({"gpu_bytes": 0}, "GPU memory of 0 bytes"),
    ],
)
def test_bad_values(changes, message):
    with pytest.raises(ValueError, match=message):
        PlanConfig(**changes)


def test_amounts_of_memory():
    assert parse_bytes("24GiB") == parse_bytes("24") == parse_bytes(" 24 gib") == 24 * GIB
    assert parse_bytes("24GB") == 24 * 10**9
    assert parse_bytes("1.5GiB") == 1.5 * GIB
    for text in ("", "much", "24 apples", "-3"):
        with pytest.raises(ValueError, match="is not an amount as 24GiB"):
            parse_bytes(text)


def test_the_table(monkeypatch):
    monkeypatch.setenv("COLUMNS", "120")
    done = CliRunner().invoke(app, ["plan", "generate", "--size", "4k", "--gpu", "24GiB"])
    assert done.exit_code == 0, done.output
    for text in ("4096 x 4096", "resident", "streamed", "8bit", "4bit", "26.5", "yes", "no"):
        assert text in done.output
    assert "compiled" in done.output
    done = CliRunner().invoke(app, ["plan", "generate", "--size", "4k", "--gpu", "4GiB"])
    assert "nothing fits" in done.output
