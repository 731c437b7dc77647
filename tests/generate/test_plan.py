from dataclasses import replace

import pytest
import torch
from typer.testing import CliRunner

import urae
from urae.adapters.files import read_adapter
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
    counted = check_adapters([*map(read_adapter, adapters)], (), pipe.transformer)
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
    with pytest.raises(ValueError, match=r"no CUDA device; give the memory .*--gpu 24GiB"):
        plan(PlanConfig())


def test_the_host_counts_where_the_gpu_is_this_machines(monkeypatch):
    assert plan(PlanConfig(gpu_bytes=24 * GIB)).host_bytes is None
    monkeypatch.setattr("urae.generate.plan.pick_device", lambda: torch.device("cuda"))
    monkeypatch.setattr("urae.generate.plan.free_bytes", lambda _: 24 * GIB)
    for host_gib, tier in ((64, "streamed"), (16, "8bit")):
        monkeypatch.setattr("urae.generate.plan.free_host_bytes", lambda g=host_gib: g * GIB)
        assert plan(PlanConfig(height=4096, width=4096)).chosen.tier == tier
    monkeypatch.setattr("urae.generate.plan.free_host_bytes", lambda: 64 * GIB)
    shared = plan(PlanConfig(height=4096, width=4096, gpus=4))  # each process has its own weights
    assert shared.host_bytes == 16 * GIB and shared.chosen.tier == "8bit"


def test_a_part_that_quantises_is_counted():
    whole, quantised = (
        plan(PlanConfig(height=2048, width=2048, gpu_bytes=24 * GIB, part=part))
        for part in (None, "8bit")
    )
    assert [each.tier for each in quantised.estimates] == ["resident", "streamed"]
    assert quantised.chosen.tier == "resident"
    assert whole.chosen.tier == "streamed"
    assert set(whole.seconds) == {"resident", "streamed"}
    assert not quantised.seconds
    with pytest.raises(ValueError, match="--memory 4bit and --part 8bit both quantise"):
        plan(PlanConfig(memory="4bit", part="8bit", gpu_bytes=GIB))


def test_pictures_of_a_job(expected):
    config = PlanConfig(height=2048, width=2048, gpu_bytes=80 * GIB)
    one, many = plan(config), plan(replace(config, num_images=4, max_sequence_length=256))
    assert not one.compiled
    assert many.compiled  # four of them pay for it
    assert many.operations < one.operations
    assert many.seconds["resident"].total(28, 4) > 2 * one.seconds["resident"].total(28)
    assert not plan(replace(config, gpus=2)).seconds


@pytest.mark.parametrize(("model", "most"), [("miniature-dev", 64), ("flux-schnell", 256)])
def test_a_text_length_is_refused_as_by_the_job(model, most):
    config = PlanConfig(model, 512, 512, gpu_bytes=GIB, max_sequence_length=512)
    with pytest.raises(ValueError, match=f"512 is more than the {most} T5 tokens that {model}"):
        plan(config)


def test_other_loras_are_counted(bases, expected):
    lora = (str(expected / "dev_2k_lora.safetensors"), 0.5)
    small = PlanConfig(str(bases["dev"]), 64, 64, gpu_bytes=2 * GIB)
    weights = [plan(c).chosen.sample.weights for c in (small, replace(small, loras=(lora,)))]
    assert weights[1] > weights[0]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"height": 100}, "height 100 is not"),
        ({"steps": 0}, "steps 0 must be at least 1"),
        ({"gpu_bytes": 0}, "GPU memory of 0 bytes"),
        ({"num_images": 0}, "num_images 0 must be at least 1"),
        ({"max_sequence_length": 513}, "max_sequence_length 513 must be between 1 and 512"),
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
        with pytest.raises(ValueError, match="is not an amount such as 24GiB"):
            parse_bytes(text)


@pytest.mark.parametrize("columns", [60, 80])
def test_the_table(monkeypatch, columns):
    monkeypatch.setenv("COLUMNS", str(columns))
    done = CliRunner().invoke(app, ["plan", "generate", "--size", "4k", "--gpu", "24GiB"])
    assert done.exit_code == 0, done.output
    told = " ".join(done.output.split())
    for text in (
        "24.0 GiB GPU, 21.6 GiB of it usable 4096 x 4096",
        "--memory encode sample decode host fits H200",
        "resident 9.6 GiB 26.5 GiB 23.7 GiB 0 no 3:22",
        "streamed: 0.8 GiB of weights",
        "28 steps of 3,908 TFLOP",
        "resident: 19 s before the first step",
        "6.46 s a step",
        "with compiled blocks",
    ):
        assert text in told
    assert told.endswith("--memory auto would take streamed")
    assert "…" not in told
    assert max(map(len, done.output.splitlines())) <= columns


def test_a_small_model_has_figures_and_no_empty_column():
    small = ["plan", "generate", "--model", "miniature-dev", "--size", "512", "--gpu", "24GiB"]
    done = CliRunner().invoke(app, [*small, "--memory", "streamed"])
    assert done.exit_code == 0, done.output
    assert "MiB" in done.output and "GFLOP" in done.output
    assert " 0.0" not in done.output
    assert "H200" not in done.output
    assert done.output.endswith("--memory streamed fits\n")


def test_what_does_not_fit_is_refused():
    done = CliRunner().invoke(app, ["plan", "generate", "--size", "4k", "--gpu", "2GiB"])
    assert "resident 1.0 GiB 26.5 GiB - 0 no" in " ".join(done.output.split())
    assert isinstance(done.exception, MemoryError)  # of which the command makes code 2
    message = "nothing fits with --memory auto: 2.0 GiB GPU, 1.8 GiB of it usable; choose a smaller"
    assert str(done.exception).startswith(message)
