import csv
import math
import os
import shutil
import signal
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from accelerate import Accelerator
from safetensors.torch import load_file

import urae
from urae.adapters.convert import ConvertConfig, convert
from urae.adapters.files import read_adapter, write_lora
from urae.backbones.flux import load_transformer
from urae.cli.main import main
from urae.features.order import StepBatch, StepShare
from urae.resolution import ResolutionPolicy, find_policy
from urae.train import AdapterConfig, OptimizerConfig, train
from urae.train import loop as loop_module
from urae.train import step as step_module
from urae.train.adapter import attach_for_training
from urae.train.checkpoint import find_checkpoints
from urae.train.inputs import check_inputs
from urae.train.loader import Loader
from urae.train.monitor import Monitor


def same(one, other) -> bool:
    first, second = load_file(one), load_file(other)
    return first.keys() == second.keys() and all(torch.equal(first[k], second[k]) for k in first)


@pytest.mark.parametrize("optimizer", ["adamw", "prodigy"])
@pytest.mark.parametrize("kind", ["lora", "minor"])
def test_resume_is_bitwise(settings, minor, tmp_path, kind, optimizer):
    config = settings(
        optimizer=OptimizerConfig(optimizer, lr=1.0 if optimizer == "prodigy" else 1e-3)
    )
    if kind == "minor":
        config = replace(config, adapter=minor)
    whole = train(config)
    assert whole.finished
    parts = replace(config, output_dir=tmp_path / "parts", steps=3, checkpoint_every=2)
    train(parts)
    # what came after the checkpoint of step 2 is lost, as in a run that was killed
    find_checkpoints(parts.output_dir)[-1].discard()
    resumed = train(replace(parts, steps=4, resume=True))
    assert resumed.step == 4
    assert same(whole.adapter_path, resumed.adapter_path)
    with (parts.output_dir / "loss.csv").open() as file:
        steps = [int(row["step"]) for row in csv.DictReader(file)]
    assert steps == [1, 2, 3, 4]


def test_a_run_goes_on_without_what_it_began_with(settings, expected, tmp_path):
    init = tmp_path / "init.safetensors"
    init.write_bytes((expected / "dev_2k_lora.safetensors").read_bytes())
    config = settings(steps=1, adapter=AdapterConfig("lora", 4, init=str(init)))
    train(config)
    init.unlink()
    assert train(replace(config, steps=2, resume=True)).step == 2


def test_same_seed_same_bits_and_another_seed_others(settings, tmp_path):
    runs = [
        train(settings(seed=seed, output_dir=tmp_path / str(index))).adapter_path
        for index, seed in enumerate((0, 0, 1))
    ]
    assert same(runs[0], runs[1])
    assert not same(runs[0], runs[2])


def test_where_down_alone_trains_up_stays(settings, minor, tmp_path):
    config = settings(adapter=replace(minor, trains="down"), ema_decay=0.99)
    whole = train(config)
    adapter = read_adapter(whole.adapter_path)
    for name, pair in adapter.layers.items():
        assert torch.equal(pair.up, adapter.initial[name].up)
        assert not torch.equal(pair.down, adapter.initial[name].down)
    parts = replace(config, output_dir=tmp_path / "parts", steps=2, checkpoint_every=2)
    train(parts)
    resumed = train(replace(parts, steps=4, resume=True))
    assert same(whole.adapter_path, resumed.adapter_path)


@pytest.mark.parametrize("kind", ["lora", "minor"])
def test_a_tiny_overfit_falls(settings, minor, kind):
    losses = []
    config = settings(steps=60, optimizer=OptimizerConfig("adamw", lr=1e-2))
    if kind == "minor":
        config = replace(config, adapter=minor)
    train(config, on_step=lambda report: losses.append(report.loss))
    first, last = torch.tensor(losses[:20]).mean(), torch.tensor(losses[-20:]).mean()
    # the twenty samples of either mean scatter by about 0.4, so by 0.1 in the mean
    assert last < first - 0.5


def test_accumulation_equals_a_batch(settings, tmp_path):
    """Two batches of one sample give the gradient of one batch of two."""
    data_dir = tmp_path / "data"
    data_dir.mkdir()
    for path in settings().data_dir.glob("image_2_*"):
        for stem in ("a", "b"):
            shutil.copy(path, data_dir / path.name.replace("image_2", stem))
    kwargs = {"data_dir": data_dir, "steps": 1}
    batch = train(settings(batch_size=2, output_dir=tmp_path / "one", **kwargs))
    accumulated = train(settings(gradient_accumulation=2, output_dir=tmp_path / "two", **kwargs))
    moments = []
    for result in (batch, accumulated):
        path = find_checkpoints(result.adapter_path.parent)[-1].path / "optimizer.safetensors"
        moments.append({k: t for k, t in load_file(path).items() if k.endswith("exp_avg")})
    assert len(moments[0]) == 20
    for key, moment in moments[0].items():
        # Adam's first moment after one step is a tenth of the gradient
        assert torch.allclose(moment, moments[1][key], rtol=1e-4, atol=1e-8)


@pytest.mark.parametrize("split", [[(0, 1), (2,)], [(2,), (0,), (1,)]])
def test_each_sample_weighs_the_same_in_any_batches(settings, tmp_path, monkeypatch, split):
    """Batches of two and of one, accumulated or on two ranks, give the gradient of one of three."""
    data_dir = tmp_path / "data"
    data_dir.mkdir()
    for path in settings().data_dir.glob("image_2_*"):
        for stem in "abc":
            shutil.copy(path, data_dir / path.name.replace("image_2", stem))
    config = settings(data_dir=data_dir)
    inputs, accelerator = check_inputs(config), Accelerator(cpu=True)
    transformer = load_transformer(inputs.model_path, dtype=torch.float32)
    adapter = attach_for_training(transformer, config.adapter, [], None, 0)

    def gradient(batches) -> list[torch.Tensor]:
        chosen = StepShare(tuple(StepBatch(batch, batch) for batch in batches), 3)
        turns = replace(config, gradient_accumulation=len(batches))
        with Loader(inputs.samples, inputs.draws, turns, torch.device("cpu"), end=3) as loader:
            monkeypatch.setattr(loader, "share", lambda _first: chosen)
            done = step_module.accumulate(transformer, loader, 0, 1.0, accelerator)
        found = [done.loss, *(parameter.grad.clone() for parameter in adapter.parameters)]
        transformer.zero_grad()
        return found

    for found, wanted in zip(gradient(split), gradient([(0, 1, 2)]), strict=True):
        assert torch.allclose(found, wanted, rtol=1e-4, atol=1e-7)


def test_the_policy_is_that_of_the_adapter_under_the_one_that_trains(settings, expected, tmp_path):
    layers = read_adapter(expected / "dev_2k_lora.safetensors").layers
    lora = tmp_path / "lora.safetensors"
    write_lora(lora, layers, {"urae.policy": ResolutionPolicy(5.0).to_json()})
    minor = AdapterConfig("minor", 4, over=(str(lora),))
    for asked, wanted in ((None, ResolutionPolicy(5.0)), (ResolutionPolicy(3.0),) * 2):
        config = settings(adapter=minor, policy=asked, steps=1, overwrite=True)
        assert read_adapter(train(config).adapter_path).policy == wanted
    further = AdapterConfig("lora", 4, init=str(lora))
    config = settings(adapter=further, steps=1, output_dir=tmp_path / "further")
    assert read_adapter(train(config).adapter_path).policy == ResolutionPolicy(5.0)


def test_the_file_works_by_itself(settings, minor, load_pipe, sample):
    result = train(settings(adapter=minor, policy=ResolutionPolicy(5.0), steps=2))
    adapter = read_adapter(result.adapter_path)
    assert adapter.kind == "minor"
    assert adapter.initial is not None
    assert adapter.metadata["urae.over"] == minor.over[0]
    pipe = urae.adapt(load_pipe(), [minor.over[0], result.adapter_path])
    assert find_policy(pipe.transformer).policy == ResolutionPolicy(5.0)
    assert torch.isfinite(sample(pipe, 64, 64)).all()
    with pytest.raises(ValueError, match="was trained over"):
        urae.adapt(load_pipe(), result.adapter_path)
    # on another base B0 and A0 are computed anew
    other = urae.adapt(load_pipe("schnell"), [minor.over[0], result.adapter_path])
    name = next(iter(adapter.layers))
    layer = other.transformer.get_submodule(name)
    assert not torch.allclose(layer.lora_A["urae_4k"].weight[4:], adapter.initial[name].down)


def test_starting_from_the_reference(settings, expected, tmp_path):
    """Its checkpoints are read: with a learning rate near zero the adapter stays what it was."""
    source = expected / "dev_2k_lora.safetensors"
    config = settings(steps=1, optimizer=OptimizerConfig("adamw", lr=1e-12))
    config = replace(config, adapter=replace(config.adapter, init=str(source)))
    result = train(config)
    wanted = read_adapter(source).layers
    for name, pair in read_adapter(result.adapter_path).layers.items():
        assert torch.allclose(pair.down, wanted[name].down, atol=1e-9)
        assert torch.allclose(pair.up, wanted[name].up, atol=1e-9)


def test_starting_from_the_references_raw_minor_file(settings, minor, expected, tmp_path, rel):
    """It holds A and B alone: B0 and A0 are those that its conversion has subtracted."""
    source = expected / "dev_4k_minor.safetensors"
    adapter = replace(minor, init=str(source))
    result = train(settings(steps=1, optimizer=OptimizerConfig("adamw", lr=1e-12), adapter=adapter))
    started, wanted = read_adapter(result.adapter_path), read_adapter(source).layers
    assert wanted.keys() == started.layers.keys()
    for name, pair in started.layers.items():
        assert torch.allclose(pair.down, wanted[name].down, atol=1e-9)
        assert torch.allclose(pair.up, wanted[name].up, atol=1e-9)
    both = (minor.over[0], str(result.adapter_path))
    ours = read_adapter(convert(ConvertConfig(both, tmp_path / "both.safetensors"))).layers
    for name, pair in read_adapter(expected / "dev_4k_lora_conversion.safetensors").layers.items():
        assert rel(ours[name].up @ ours[name].down, pair.up @ pair.down) < 1e-5


def test_starting_from_another_kind_is_refused(settings, expected):
    config = settings()
    config = replace(
        config, adapter=replace(config.adapter, init=str(expected / "dev_4k_minor.safetensors"))
    )
    with pytest.raises(ValueError, match="is a minor adapter of rank 4, but the recipe trains"):
        train(config)


@pytest.mark.parametrize("broken", ["loss", "gradient"])
def test_a_non_finite_step_stops_the_run(settings, monkeypatch, broken):
    compute = step_module.compute_losses
    calls = []

    def spoil(model, batch, guidance_scale):
        loss = compute(model, batch, guidance_scale)
        calls.append(loss)
        if len(calls) < 3:
            return loss
        if broken == "gradient":
            loss.register_hook(lambda gradient: gradient * math.nan)
            return loss
        return loss * math.nan

    monkeypatch.setattr(step_module, "compute_losses", spoil)
    with pytest.raises(FloatingPointError, match=r"step 3: loss .* on samples image_\d of rank 0"):
        train(settings())
    saved = find_checkpoints(settings().output_dir)[-1]
    assert saved.step == 2
    assert all(torch.isfinite(t).all() for t in load_file(saved.adapter_path).values())


def test_suspects_are_those_of_the_ranks_that_failed(monkeypatch):
    def found(**losses):
        monkeypatch.setattr(
            step_module,
            "gather_object",
            lambda _: [(math.isfinite(loss), stem) for stem, loss in losses.items()],
        )
        mine = step_module.Accumulated(torch.tensor(0.0), torch.zeros(2, 4), [])
        return step_module._name_suspects(mine)

    assert found(a=1.0, b=math.nan) == "b of rank 1"
    assert found(a=1.0, b=2.0) == "a of rank 0, b of rank 1"  # the gradients of one of them


def test_an_output_folder_is_kept(settings):
    train(settings(steps=1))
    with pytest.raises(FileExistsError, match="already holds a run; continue with --resume"):
        train(settings(steps=1))
    (settings().output_dir / "validation.csv").write_text("of the earlier run")
    train(settings(steps=2, overwrite=True))
    assert [c.step for c in find_checkpoints(settings().output_dir)] == [2]
    assert not (settings().output_dir / "validation.csv").exists()


def test_overwriting_waits_until_all_is_checked(settings, tmp_path):
    train(settings(steps=1))
    with pytest.raises(ValueError, match="no cached latents"):
        train(settings(overwrite=True, data_dir=tmp_path))
    assert [c.step for c in find_checkpoints(settings().output_dir)] == [1]


def test_the_users_accelerate_settings_change_nothing(settings, tmp_path, monkeypatch):
    plain = train(settings(steps=2))
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "bf16")
    monkeypatch.setenv("ACCELERATE_GRADIENT_ACCUMULATION_STEPS", "4")
    configured = train(settings(steps=2, output_dir=tmp_path / "configured"))
    assert same(plain.adapter_path, configured.adapter_path)


def test_leftovers_of_a_killed_run_do_not_matter(settings):
    config = settings(steps=2)
    (config.output_dir / ".checkpoint-000001.partial").mkdir(parents=True)
    (config.output_dir / ".checkpoint-000001.partial" / "optimizer.safetensors").write_bytes(b"a")
    train(config)
    assert [c.step for c in find_checkpoints(config.output_dir)] == [2]
    assert not list(config.output_dir.glob(".*"))


def test_too_few_steps(settings):
    train(settings(steps=2))
    with pytest.raises(ValueError, match="has more steps than the 1 requested"):
        train(settings(steps=1, resume=True))


def test_any_failure_saves_first(settings, tmp_path, monkeypatch):
    data_dir = shutil.copytree(settings().data_dir, tmp_path / "data")

    def spoil(report):
        if report.step == 2:
            for path in data_dir.glob("*_latent_code.safetensors"):
                path.write_bytes(path.read_bytes()[:-100])

    with pytest.raises(ValueError, match=r"latent_code.safetensors cannot be used"):
        train(settings(data_dir=data_dir), on_step=spoil)
    (saved,) = find_checkpoints(settings().output_dir)
    assert saved.step in (2, 3)  # the third batch may have been read before


def test_out_of_gpu_memory_says_what_to_try(settings, monkeypatch):
    def fail(*_):
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(step_module, "compute_losses", fail)
    with pytest.raises(MemoryError, match="try --batch-size 1"):
        train(settings())


def test_resuming_needs_the_same_settings(settings):
    with pytest.raises(FileNotFoundError, match="no complete checkpoint"):
        train(settings(resume=True))
    train(settings(steps=1))
    with pytest.raises(ValueError, match="was made with seed = 0, but the run now says 5;"):
        train(settings(seed=5, resume=True))
    with pytest.raises(ValueError, match="was made on another base"):
        other = str(settings().model).replace("base_dev", "base_schnell")
        train(settings(model=other, steps=2, resume=True))


def test_a_stop_saves_and_leaves_measuring_for_later(settings, monkeypatch):
    measured, measure = [], Monitor.measure
    monkeypatch.setattr(
        Monitor, "measure", lambda self, state, *done, **stop: measured.append(state.step)
        or measure(self, state, *done, **stop),
    )  # fmt: skip
    config = settings(num_validation=1, validate_every=2)

    def stop(report):
        if report.step == 1:
            signal.raise_signal(signal.SIGTERM)

    first = train(config, on_step=stop)
    assert (first.step, first.stopped) == (2, True)
    assert measured == [0, 1]
    assert not train(replace(config, resume=True)).stopped
    assert measured == [0, 1, 2, 3, 4]


def test_a_stop_during_the_last_step_is_told_of(settings):
    config = settings()

    def stop(report):
        if report.step == config.steps - 1:
            signal.raise_signal(signal.SIGTERM)

    result = train(config, on_step=stop)
    assert result.finished and result.stopped


def test_a_step_that_cannot_be_logged_is_kept(settings, monkeypatch):
    def fail(self, report, stop):
        if report.step == 3:
            raise OSError("no space left")

    monkeypatch.setattr(Monitor, "log_step", fail)
    with pytest.raises(OSError, match="no space"):
        train(settings())
    assert find_checkpoints(settings().output_dir)[-1].step == 3


@pytest.mark.parametrize(
    ("every", "said"), [(2, "checkpoint-000002 is saved: continue"), (9, "start over")]
)
def test_a_gpu_that_fails_loses_no_checkpoint(settings, monkeypatch, every, said):
    compute = loop_module.Stepper.compute_gradients

    def fail(self, stop):
        if self.state.step == 3:
            raise torch.AcceleratorError("CUDA error: an illegal memory access\nmore of it")
        return compute(self, stop)

    monkeypatch.setattr(loop_module.Stepper, "compute_gradients", fail)
    with pytest.raises(
        OSError, match=rf"failed at step 4 \(CUDA error: an illegal memory access\).*{said}"
    ):
        train(settings(checkpoint_every=every))
    assert [each.step for each in find_checkpoints(settings().output_dir)] == [2] * (every == 2)


def test_a_gpu_out_of_memory_in_other_words_saves(settings, monkeypatch):
    compute, advance = loop_module.Stepper.compute_gradients, loop_module.Stepper.advance

    def run_out(self, stop):
        if self.state.step == 3:
            raise torch.AcceleratorError("CUDA error: out of memory")
        return compute(self, stop)

    def fail(self, gradients):
        if self.state.step == 3:
            raise torch.AcceleratorError("CUDA error: an illegal memory access")
        return advance(self, gradients)

    with monkeypatch.context() as patched:
        patched.setattr(loop_module.Stepper, "compute_gradients", run_out)
        with pytest.raises(MemoryError, match="not enough memory for this step"):
            train(settings(checkpoint_every=9))
    assert find_checkpoints(settings().output_dir)[-1].step == 3
    monkeypatch.setattr(loop_module.Stepper, "advance", fail)
    with pytest.raises(OSError, match="checkpoint-000003 is saved"):
        train(settings(checkpoint_every=9, resume=True))


@pytest.mark.parametrize("where", ["log", "init_trackers"])
def test_a_tracker_that_fails_is_told_once(settings, monkeypatch, caplog, where):
    pytest.importorskip("tensorboard")

    def fail(*_, **__):
        raise ConnectionError("no route")

    monkeypatch.setattr(f"accelerate.Accelerator.{where}", fail)
    assert train(settings(tracker="tensorboard")).finished
    assert caplog.text.count("tracker tensorboard failed (ConnectionError: no route)") == 1


def run_command(arguments: list[str], errors: Path) -> None:
    """Run `urae` in a process of its own, its standard error in a file."""
    sys.argv = ["urae", *arguments]
    sys.stderr = errors.open("w", buffering=1)
    main()


@pytest.mark.parametrize(
    "number", [pytest.param(signal.SIGINT, marks=pytest.mark.slow), signal.SIGTERM]
)
def test_a_signal_saves_first(settings, server, tmp_path, number):
    config = settings()
    recipe = tmp_path / "r.toml"
    recipe.write_text(
        f'model = "{config.model}"\nresolution = 256\nsteps = 100000\n'
        '[adapter]\nrank = 4\n[optimizer]\nname = "adamw"\nlr = 1e-3\n'
    )
    folders = ["--data", str(config.data_dir), "--output", str(config.output_dir)]
    arguments = (["train", str(recipe), *folders], tmp_path / "errors")
    process = server.Process(target=run_command, args=arguments)
    process.start()
    log = config.output_dir / "loss.csv"
    deadline = time.monotonic() + 90
    while time.monotonic() < deadline and not (log.exists() and log.read_text().count("\n") > 3):
        time.sleep(0.2)
    os.kill(process.pid, number)
    process.join(60)
    errors = (tmp_path / "errors").read_text()
    assert process.exitcode == 0, errors
    assert "stopped at step" in errors
    saved = find_checkpoints(config.output_dir)[-1]
    rows = log.read_text().strip().split("\n")
    assert int(rows[-1].split(",")[0]) == saved.step >= 3


@pytest.mark.parametrize("kind", ["lora", "minor"])
def test_a_rank_that_the_base_has_not(settings, monkeypatch, kind):
    monkeypatch.setattr(loop_module, "load_transformer", None)
    config = settings()
    with pytest.raises(ValueError, match=r"adapter.rank 64 must be below 64"):
        train(replace(config, adapter=replace(config.adapter, kind=kind, rank=64)))


def test_a_missing_package_is_named_before_weights_load(settings, monkeypatch):
    monkeypatch.setattr(loop_module, "load_transformer", None)
    with pytest.raises(ModuleNotFoundError, match="wandb needs the package wandb"):
        train(settings(tracker="wandb"))


def test_features_of_another_resolution_or_model(settings, tmp_path, monkeypatch):
    monkeypatch.setattr(loop_module, "load_transformer", None)
    with pytest.raises(ValueError, match="no cached latents"):
        train(settings(data_dir=tmp_path))
    with pytest.raises(FileNotFoundError, match="neither a local path nor a hub id"):
        train(settings(model="no/such/model/here"))


def test_tensorboard(settings):
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    optimizer = OptimizerConfig("adamw", lr=1e-3, schedule="linear")
    config = settings(tracker="tensorboard", steps=2, optimizer=optimizer)
    train(config)
    (events,) = (
        path
        for path in config.output_dir.rglob("events.out.tfevents*")
        if path.parent.name == "urae"
    )
    curves = EventAccumulator(str(events)).Reload()
    assert {"loss", "grad_norm", "lr", "loader_share"} <= set(curves.Tags()["scalars"])
    rates = [(event.step, event.value) for event in curves.Scalars("lr")]
    assert rates == [(1, pytest.approx(1e-3)), (2, pytest.approx(5e-4))]


def test_tensorboard_draws_each_step_once(settings):
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    config = settings(tracker="tensorboard", steps=3, checkpoint_every=1)

    def steps():
        events = EventAccumulator(str(config.output_dir / "urae")).Reload()
        return [event.step for event in events.Scalars("loss")]

    train(config)
    find_checkpoints(config.output_dir)[-1].discard()
    (config.output_dir / "pytorch_lora_weights.safetensors").unlink()
    train(replace(config, resume=True))
    assert steps() == [1, 2, 3]
    (config.output_dir / "urae" / "mine.txt").touch()
    train(replace(config, steps=2, overwrite=True))
    assert steps() == [1, 2]
    assert (config.output_dir / "urae" / "mine.txt").exists()


def test_a_run_where_gradients_are_off(settings):
    with torch.inference_mode():
        result = train(settings(steps=2))
    assert all(map(math.isfinite, result.losses))
