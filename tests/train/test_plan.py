"""`urae plan train`: buckets, memory and disk of a run without its weights, and the probe."""

from dataclasses import replace
from pathlib import Path

import pytest
from typer.testing import CliRunner

from urae.cli.main import app
from urae.features.dataset import list_samples
from urae.resolution import ResolutionPolicy
from urae.train.estimate import TIERS
from urae.train.plan import plan_training, probe

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


def test_all_rungs_are_planned_and_the_first_that_fits_chosen(settings):
    config = replace(settings(), model="flux-dev", gradient_checkpointing="full")
    plan = plan_training(config, 24 * GIB)
    assert [each.way.tier for each in plan.estimates] == list(TIERS)
    assert plan.chosen.way.tier == "streamed"
    assert plan_training(config, 48 * GIB).chosen.way.tier == "resident"
    assert plan_training(config, GIB).chosen is None


def test_local_attention_takes_fewer_operations(settings):
    policy = ResolutionPolicy(attention="local", native_sequence_length=64)
    full, local = (plan_training(settings(policy=each), GIB) for each in (None, policy))
    assert local.operations < full.operations


def test_a_gpu_must_be_named_where_there_is_none(settings):
    with pytest.raises(ValueError, match="name the memory of the one to plan for: --gpu 24GiB"):
        plan_training(settings())


@pytest.mark.parametrize("memory", ["resident", "streamed"])
def test_the_probe_takes_steps_of_the_largest_pictures(settings, memory):
    config = settings(memory=memory, gradient_checkpointing="full", num_validation=1)
    reports = probe(config)
    assert [report.step for report in reports] == [1, 2, 3]
    largest = plan_training(config, GIB).buckets[0]
    assert {(each.height, each.width) for each in reports} == {(largest.height, largest.width)}
    assert not config.output_dir.exists()


def test_the_command_prints_it(bases, settings):
    arguments = [
        "plan", "train", str(ROOT / "recipes" / "flux_dev_2k_lora.toml"),
        "--data", str(settings().data_dir), "--gpu", "24GiB", "--resolution", "256",
    ]  # fmt: skip
    done = CliRunner().invoke(app, [*arguments, "--gradient-checkpointing", "auto"])
    assert done.exit_code == 0, done.output
    for text in ("256 x 256", "no sample is dropped", "GiB of features", "streamed, selective"):
        assert text in done.stdout
    small = ["--model", str(bases["dev"]), "--adapter.rank", "4", "--probe"]
    done = CliRunner().invoke(app, [*arguments, *small])
    assert done.exit_code == 0, done.output
    assert "measured at 256 x 256: " in done.stdout
