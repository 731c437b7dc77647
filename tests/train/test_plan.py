"""`urae plan train`: buckets, memory and disk of a run without its weights, and the probe."""

import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from PIL import Image
from typer.testing import CliRunner

from urae.adapters.files import read_adapter, write_lora
from urae.backbones import flux
from urae.cli.main import app
from urae.features.cache import CacheConfig, cache
from urae.features.dataset import list_samples
from urae.geometry import num_image_tokens
from urae.resolution import ResolutionPolicy
from urae.train import AdapterConfig, StepReport
from urae.train import plan as plan_module
from urae.train import probe as probe_module
from urae.train.config import DataConfig
from urae.train.estimate import TIERS, Way
from urae.train.inputs import check_inputs
from urae.train.plan import plan_training
from urae.train.probe import probe

GIB = 2**30
ROOT = Path(__file__).parents[2]


def test_every_sample_is_in_a_bucket(settings):
    config = settings(batch_size=2, gradient_accumulation=3, steps=8, num_validation=1)
    plan = plan_training(config, 24 * GIB)
    assert sum(bucket.num_samples for bucket in plan.buckets) == 3
    assert plan.num_held_out == 1
    assert plan.num_epochs == 3 * 8 / sum(bucket.num_batches for bucket in plan.buckets)
    tokens = [bucket.tokens for bucket in plan.buckets]
    assert tokens == sorted(tokens, reverse=True)
    text = list_samples(config.data_dir)[0].text_tokens
    assert text < 512
    assert all(b.tokens == text + b.height * b.width // 256 for b in plan.buckets)
    size = sum(path.stat().st_size for path in config.data_dir.glob("image*.safetensors"))
    assert plan.cache_bytes == size


def test_all_rungs_are_planned_and_the_first_that_fits_chosen(flux_small):
    plan = plan_training(flux_small, 24 * GIB)
    assert [each.way.tier for each in plan.estimates] == list(TIERS)
    assert plan.chosen.way.tier == "streamed"
    assert plan_training(flux_small, 48 * GIB).chosen.way.tier == "resident"
    assert plan_training(flux_small, GIB).chosen is None


def test_local_attention_takes_fewer_operations(settings):
    policy = ResolutionPolicy(attention="local", native_sequence_length=64)
    full, local = (plan_training(settings(policy=each), GIB) for each in (None, policy))
    assert local.operations < full.operations


def test_a_plan_takes_the_policy_of_the_adapter_under_the_one_that_trains(
    settings, expected, tmp_path
):
    policy = ResolutionPolicy(attention="local", native_sequence_length=64)
    layers = read_adapter(expected / "dev_2k_lora.safetensors").layers
    write_lora(tmp_path / "lora.safetensors", layers, {"urae.policy": policy.to_json()})
    for over in ("lora.safetensors", "owner/repo/lora.safetensors"):  # the latter not here
        adapter = AdapterConfig(
            "minor", 4, over=(str(tmp_path / over if "/" not in over else over),)
        )
        inherited, named = (
            plan_training(settings(adapter=adapter, policy=each), GIB) for each in (None, policy)
        )
        is_here = "/" not in over
        assert (inherited.operations == named.operations) == is_here


def test_a_gpu_must_be_named_where_there_is_none(settings):
    with pytest.raises(
        ValueError, match="give the memory of the GPU to plan for, as in --gpu 24GiB"
    ):
        plan_training(settings())


@pytest.mark.parametrize("memory", ["resident", "streamed"])
def test_the_probe_takes_steps_of_the_largest_pictures(settings, memory):
    config = settings(memory=memory, gradient_checkpointing="full", num_validation=1)
    found = probe(config)
    assert [report.step for report in found.reports] == [1, 2, 3]
    plan = plan_training(config, GIB)
    largest = plan.buckets[0]
    sizes = {(each.height, each.width) for each in found.reports}
    assert sizes == {(largest.height, largest.width)}
    assert found.estimate == plan.estimates[0]  # of the way that was measured
    share = plan.operations / (config.steps * largest.operations)
    assert found.seconds == pytest.approx(config.steps * found.reports[-1].seconds * share)
    assert not config.output_dir.exists()


@pytest.fixture
def trials(monkeypatch):
    """Record what would train, in place of training."""
    configs = []

    def record(config, on_step):
        configs.append(config)
        for step in (1, 2, 3):
            report = StepReport(step, 0.1, 1.0, 1e-4, 2.0, 0.0, (None,), 32, 32, None)
            on_step(report)

    monkeypatch.setattr(probe_module, "train", record)
    return configs


def test_the_probe_runs_as_the_run_would(settings, trials, monkeypatch):
    """The whole run pays for compiling, three steps would not."""
    way, pays = Way("offload", "selective"), []
    monkeypatch.setattr(probe_module, "choose_way", lambda *_: way)
    monkeypatch.setattr(
        probe_module, "is_compiled", lambda config, *_: pays.append(config.steps) or True
    )
    found = probe(settings(steps=2000, gradient_checkpointing="auto"))
    (trial,) = trials
    assert (trial.memory, trial.gradient_checkpointing, trial.compile) == (*way, True)
    assert (trial.steps, pays) == (3, [2000])
    assert found.estimate.way == way


def test_the_probe_takes_the_largest_batch(settings, trials, tmp_path):
    """Two of 176 tokens each are more than one of 304."""
    data = shutil.copytree(settings().data_dir, tmp_path / "data")
    for number in range(2):
        for path in settings().data_dir.glob("image_3*"):
            name = path.name.replace("image_3", f"image_9{number}")
            (data / name).write_bytes(path.read_bytes())
    for batch_size, tokens in ((1, 304), (3, 3 * 176)):
        config = settings(data_dir=data, batch_size=batch_size)
        assert count_batch_tokens(config) == tokens
        probe(config)
        assert trials[-1].batch_size == batch_size


def count_batch_tokens(config):
    _, samples, batch_size = probe_module._find_largest_batch(config)
    return batch_size * (
        samples[0].text_tokens + num_image_tokens(*plan_module.size_of(samples[0]))
    )


def test_a_batch_of_one_picture_several_times(settings, trials):
    config = settings(batch_size=2)
    source = DataConfig(config.data_dir, 256, weight=3)
    config = replace(config, data_dir=None, data=(source,))
    probe(config)
    assert trials[0].batch_size == 2
    assert trials[0].data[0].weight == 2  # of the one picture; only whole batches are taken


def test_time_is_that_of_an_h200(settings, flux_sized):
    """2,000 steps of 2.72 s, and compiling; the measured row of docs/performance.md."""
    plan = plan_training(flux_sized, 80 * GIB)
    step, total = plan.seconds[Way("resident", "full")]
    assert step == pytest.approx(2.72, rel=0.1)
    assert total == 2000 * step + 24
    assert Way("4bit", "full") not in plan.seconds
    four = plan_training(replace(flux_sized, gradient_accumulation=4), 80 * GIB)
    assert four.seconds[Way("resident", "full")].step == pytest.approx(4 * step)


@pytest.fixture
def flux_sized(tmp_path, settings):
    """A run of FLUX.1 on pictures of 2048 x 2048 that are not cached yet."""
    folder = tmp_path / "pictures"
    folder.mkdir()
    for number in range(4):
        Image.new("RGB", (2048, 2048)).save(folder / f"{number}.png")
        (folder / f"{number}.json").write_text('{"prompt": "a", "generated_prompt": "b"}')
    Image.new("RGB", (640, 480)).save(folder / "small.png")
    (folder / "small.txt").write_text("too small")
    (folder / "torn.png").write_bytes(b"\x89PNG\r\n\x1a\n")
    (folder / "torn.txt").write_text("cannot be read")
    return replace(
        settings(data_dir=folder, resolution=2048, steps=2000),
        model="flux-dev",
        adapter=AdapterConfig(rank=16),
        gradient_checkpointing="full",
    )


@pytest.fixture
def flux_small(tmp_path, settings):
    """A run of FLUX.1 on a picture of 256 x 256 that is not cached yet."""
    folder = tmp_path / "small"
    folder.mkdir()
    Image.new("RGB", (256, 256)).save(folder / "0.png")
    (folder / "0.txt").write_text("a")
    return settings(data_dir=folder, model="flux-dev", gradient_checkpointing="full")


@pytest.fixture
def cached(tmp_path, bases, settings):
    """A run on a picture that is cached at 64 x 64."""
    folder = tmp_path / "cached"
    folder.mkdir()
    Image.new("RGB", (64, 64)).save(folder / "0.png")
    (folder / "0.txt").write_text("a")
    cache(CacheConfig(folder, str(bases["dev"]), 64))
    return settings(data_dir=folder, resolution=64)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"resolution": 128}, "resolution is 64, but this run needs 128"),
        ({"model": "flux-dev"}, "width of T5's embeddings is 32, but this run needs 4096"),
        ({"model": "miniature-dev"}, "was cached with another setting"),
        ({"caption_weights": {"promt": 1.0}}, "promt"),
    ],
)
def test_a_plan_refuses_what_training_refuses(cached, change, message, monkeypatch):
    """And nothing is fetched to say so."""

    def fetch(*_, **__):
        raise AssertionError("the hub was asked")

    monkeypatch.setattr(flux, "snapshot_download", fetch)
    monkeypatch.setattr(flux.DiffusionPipeline, "download", fetch)
    assert plan_training(cached, GIB).num_pictures is None
    check_inputs(cached)
    wrong = replace(cached, **change)
    with pytest.raises(ValueError, match=message):
        plan_training(wrong, GIB)
    with pytest.raises(ValueError, match=message):
        check_inputs(wrong)


def test_a_folder_that_is_not_cached_is_planned_from_its_pictures(flux_sized):
    plan = plan_training(flux_sized, 80 * GIB)
    (bucket,) = plan.buckets
    assert (bucket.height, bucket.width, bucket.num_samples) == (2048, 2048, 4)
    assert bucket.tokens == 512 + 16_384
    assert (plan.num_pictures, plan.num_left_out) == (4, 2)
    latents, embeds = 2 * 16 * 256 * 256, 2 * (512 * 4096 + 768)
    assert plan.cache_bytes == 4 * 2 * (latents + embeds)
    with pytest.raises(ValueError, match=r"none of the 6 .* is large enough for resolution 4096"):
        plan_training(replace(flux_sized, resolution=4096), GIB)


def test_a_plan_from_pictures_is_that_of_their_features(settings, bases, tmp_path):
    """But for their dtype, which on a GPU is bfloat16, and what their headers take."""
    for number, size in enumerate(((64, 64), (130, 64), (64, 140), (20, 64))):
        Image.new("RGB", size).save(tmp_path / f"{number}.png")
        (tmp_path / f"{number}.txt").write_text("a picture")
    (tmp_path / "4.png").write_bytes((tmp_path / "0.png").read_bytes())
    config = settings(data_dir=tmp_path, resolution=64)
    planned = plan_training(config, GIB)
    cache(CacheConfig(tmp_path, str(bases["dev"]), 64))
    cached = plan_training(config, GIB)
    assert (planned.num_pictures, planned.num_left_out) == (3, 2)
    assert planned.buckets == cached.buckets
    assert planned.operations == cached.operations
    assert 2 * planned.cache_bytes == pytest.approx(cached.cache_bytes, rel=0.15)
    assert cached.num_pictures is None


def test_several_gpus_hold_what_each_of_them_has(flux_small):
    config = flux_small
    one, shared, spread = (
        {each.way.tier: each for each in plan_training(run, GIB).estimates}
        for run in (config, replace(config, context_parallel=2), replace(config, shard=True))
    )
    assert "streamed" not in shared | spread
    assert shared["resident"].block == pytest.approx(one["resident"].block / 2, rel=0.01)
    assert "8bit" not in spread
    assert spread["resident"].weights < 0.6 * one["resident"].weights


def test_the_host_counts_where_the_gpu_is_this_machines(flux_small, monkeypatch):
    monkeypatch.setattr(plan_module, "pick_device", lambda: torch.device("cuda"))
    monkeypatch.setattr(plan_module, "free_bytes", lambda _: 20 * GIB)
    monkeypatch.setattr(plan_module, "_count_keys", lambda *_: None)
    for host_gib, tier in ((64, "streamed"), (16, "8bit")):
        monkeypatch.setattr(plan_module, "free_host_bytes", lambda g=host_gib: g * GIB)
        assert plan_training(flux_small).chosen.way.tier == tier


def test_the_command_prints_it(bases, settings):
    arguments = [
        "plan", "train", str(ROOT / "recipes" / "flux_dev_2k_lora.toml"),
        "--data", str(settings().data_dir), "--gpu", "24GiB", "--resolution", "256",
        "--model", str(bases["dev"]), "--adapter.rank", "4", "--probe",
    ]  # fmt: skip
    done = CliRunner().invoke(app, arguments)
    assert done.exit_code == 0, done.output
    for text in ("256 x 256", "no sample is dropped; ", "MiB of features", "streamed, full"):
        assert text in done.stdout
    for text in ("H200", " 0.0 GiB", "held out", "left out"):  # its times are not known
        assert text not in done.stdout
    assert (
        "measured at 256 x 256, memory resident, gradient checkpointing full: "
        in done.stdout.replace("\n", " ")
    )
    assert "by the operations of all sizes" in done.stdout


@pytest.mark.parametrize("columns", [60, 80])
def test_the_command_says_what_fits(flux_sized, monkeypatch, columns):
    monkeypatch.setenv("COLUMNS", str(columns))
    arguments = [
        "plan", "train", str(ROOT / "recipes" / "flux_dev_2k_lora.toml"),
        "--data", str(flux_sized.data_dir), "--gpu", "80GiB",
    ]  # fmt: skip
    done = CliRunner().invoke(app, arguments)
    assert done.exit_code == 0, done.output
    told = " ".join(done.stdout.split())
    assert told.startswith("planned from 4 pictures")
    assert "without a caption: 2 pictures of an epoch" in told
    assert "2,000 steps train on each 500 times (one process), " in told
    assert "80.0 GiB GPU, 72.0 GiB of it usable" in told
    assert "resident, full 30.6 GiB 0 yes 2.73 s 1:31:" in told
    assert "the base's weights 22.2 GiB" in told
    assert told.endswith("--memory auto would take resident, gradient checkpointing full")
    assert "…" not in told
    assert max(map(len, done.stdout.splitlines())) <= columns
    done = CliRunner().invoke(app, [*arguments, "--memory", "offload"])
    assert "--memory offload fits, gradient checkpointing full" in done.stdout
    done = CliRunner().invoke(app, [*arguments[:-1], "2GiB"])
    assert "nothing fits with --memory auto: 2.0 GiB GPU, 1.8 GiB of it" in str(done.exception)
