"""Several processes on the CPU (gloo): data parallel, context parallel, a base in shards."""

import csv
import multiprocessing
import os
import random
import shutil
import signal
import socket
import time
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from accelerate.state import AcceleratorState
from PIL import Image
from safetensors.torch import load_file

from urae.train import AdapterConfig, OptimizerConfig, TrainConfig, train
from urae.train.checkpoint import find_checkpoints, find_damage
from urae.train.config import DataConfig
from urae.train.loader import Loader
from urae.train.output import find_previews
from urae.train.preview import Previewer
from urae.train.state import TrainingState

MODES = {
    "data": {},
    "shard": {"shard": True},
    "context": {"context_parallel": 2},
    "context and shard": {"context_parallel": 2, "shard": True},
}

# a server that has imported everything forks each rank, so that a start takes no time
server = multiprocessing.get_context("forkserver")
server.set_forkserver_preload(["urae.train", "torch.distributed.fsdp", "torch._dynamo"])


def free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return listener.getsockname()[1]


def run_rank(config: TrainConfig, rank: int, number: int, port: int) -> None:
    """Train as one of several processes, and keep the gradients of each step."""
    os.environ |= {
        "RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(number),
        "LOCAL_WORLD_SIZE": str(number), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port),
        "ACCELERATE_USE_CPU": "true",
    }  # fmt: skip
    torch.set_num_threads(1)
    torch.compile = partial(torch.compile, backend="aot_eager")  # all but the generation of code
    AcceleratorState._reset_state(reset_partial_state=True)  # of what was forked
    try:
        train_and_keep_gradients(config, rank)
    except ConnectionError as error:
        (config.output_dir / f"lost-{rank}.txt").write_text(str(error))


def train_and_keep_gradients(config: TrainConfig, rank: int = 0) -> None:
    advance, found = TrainingState.advance, []

    def keep(self, num_batches):
        found.append([parameter.grad.clone() for parameter in self.adapter.parameters])
        advance(self, num_batches)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(TrainingState, "advance", keep)
        train(config)
    torch.save(found, config.output_dir / f"gradients-{rank}.pt")


def run_and_stop_the_last(config: TrainConfig, rank: int, number: int, port: int) -> None:
    """Train as one of several processes, of which the last is asked to stop after a preview."""
    draw = Previewer.draw

    def draw_and_stop(self, *arguments):
        picture = draw(self, *arguments)
        if rank == number - 1:
            signal.raise_signal(signal.SIGTERM)
        return picture

    Previewer.draw = draw_and_stop
    run_rank(config, rank, number, port)


def run_and_miss_a_batch(
    config: TrainConfig, rank: int, number: int, port: int, *, error: Exception
) -> None:
    """Train as one of several processes, of which the last cannot read its third step's batch."""
    take = Loader.take

    def take_two(self, first, index):
        if rank == number - 1 and first == 2 * number:
            raise error
        return take(self, first, index)

    Loader.take = take_two
    run_rank(config, rank, number, port)


def start_ranks(
    config: TrainConfig, number: int, run=run_rank
) -> list[multiprocessing.process.BaseProcess]:
    port = free_port()
    processes = [
        server.Process(target=run, args=(config, rank, number, port), daemon=True)
        for rank in range(number)
    ]
    for process in processes:
        process.start()
    return processes


def train_on(config: TrainConfig, number: int, run=run_rank) -> None:
    processes = start_ranks(config, number, run)
    for process in processes:
        process.join(120)
        assert process.exitcode == 0


def adapter_of(output_dir: Path) -> dict[str, torch.Tensor]:
    return load_file(output_dir / "pytorch_lora_weights.safetensors")


@pytest.fixture(params=["lora", "minor"])
def adapter(request, minor, expected) -> AdapterConfig:
    if request.param == "minor":
        return minor
    return AdapterConfig("lora", 4, init=str(expected / "dev_2k_lora.safetensors"))


def check_parity(config: TrainConfig, alone: TrainConfig, number: int, rel) -> None:
    train_on(config, number)
    train_and_keep_gradients(alone)
    wanted = torch.load(alone.output_dir / "gradients-0.pt")
    for rank in range(number):
        found = torch.load(config.output_dir / f"gradients-{rank}.pt")
        assert len(found) == len(wanted)
        for one, other in zip(found[0], wanted[0], strict=True):
            assert rel(one, other) < 1e-5
    found, wanted = adapter_of(config.output_dir), adapter_of(alone.output_dir)
    assert found.keys() == wanted.keys()
    for key, tensor in wanted.items():
        assert rel(found[key], tensor) < 1e-4


def alone_like(config: TrainConfig, output_dir: Path, number: int) -> TrainConfig:
    """Make the run of one process that takes the same steps."""
    return replace(
        config,
        output_dir=output_dir,
        gradient_accumulation=number // config.context_parallel,
        context_parallel=1,
        shard=False,
    )


@pytest.mark.parametrize(
    "mode", [pytest.param("shard", marks=pytest.mark.slow), "context and shard"]
)
def test_two_ranks_in_short(settings, minor, tmp_path, rel, mode):
    """As below, with one adapter."""
    config = settings(steps=1, adapter=minor, **MODES[mode])
    check_parity(config, alone_like(config, tmp_path / "alone", 2), 2, rel)


@pytest.mark.slow
def test_a_rank_that_is_asked_to_stop_leaves_no_other_in_a_preview(settings):
    """Each forward gathers the blocks' weights, so that all ranks must begin it."""
    prompts = ("a", "b", "c", "d")  # two a rank
    config = settings(resolution=64, shard=True, preview_prompts=prompts, data_dir=None,
                      data=(DataConfig(settings().data_dir, 256),))  # fmt: skip
    train_on(config, 2, run_and_stop_the_last)
    assert len(find_previews(config.output_dir)) == 2
    assert [each.step for each in find_checkpoints(config.output_dir)] == [1]


@pytest.mark.slow
def test_up_factors_that_stay_are_not_spread(settings, minor, tmp_path, rel):
    config = settings(steps=1, adapter=replace(minor, trains="down"), shard=True)
    check_parity(config, alone_like(config, tmp_path / "alone", 2), 2, rel)


@pytest.mark.slow
@pytest.mark.parametrize("mode", MODES)
def test_two_ranks_have_the_gradients_of_one(settings, adapter, tmp_path, rel, mode):
    config = settings(steps=2, **MODES[mode], gradient_checkpointing="full", adapter=adapter)
    check_parity(config, alone_like(config, tmp_path / "alone", 2), 2, rel)


@pytest.mark.slow
@pytest.mark.parametrize("shard", [False, True])
def test_a_mesh_of_two_by_two_has_the_gradients_of_one(settings, adapter, tmp_path, rel, shard):
    config = settings(steps=2, context_parallel=2, shard=shard, adapter=adapter)
    check_parity(config, alone_like(config, tmp_path / "alone", 4), 4, rel)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("memory", "checkpointing"),
    [("resident", "full"), ("resident", "selective"), ("offload", "full")],
)
def test_compiled_blocks_may_share_pictures(
    settings, expected, tmp_path, rel, memory, checkpointing
):
    lora = AdapterConfig("lora", 4, init=str(expected / "dev_2k_lora.safetensors"))
    config = settings(steps=1, context_parallel=2, adapter=lora, compile=True, memory=memory,
                      gradient_checkpointing=checkpointing)  # fmt: skip
    alone = replace(alone_like(config, tmp_path / "alone", 2), compile=False)
    check_parity(config, alone, 2, rel)


@pytest.mark.slow
def test_ranks_with_batches_of_different_size(settings, adapter, tmp_path, rel):
    """One rank has two samples, the other one: each sample weighs a third."""
    data_dir = tmp_path / "data"
    data_dir.mkdir()
    for path in settings().data_dir.glob("image_2_*"):
        for stem in "abc":
            shutil.copy(path, data_dir / path.name.replace("image_2", stem))
    config = settings(steps=2, data_dir=data_dir, batch_size=2, adapter=adapter)
    check_parity(config, alone_like(config, tmp_path / "alone", 2), 2, rel)


@pytest.mark.slow
@pytest.mark.parametrize("mode", MODES)
def test_what_a_run_leaves_is_what_one_process_leaves(settings, expected, tmp_path, rel, mode):
    """Averaged weights, validation and previews, an odd number of each, and the files of it all."""
    config = settings(
        **MODES[mode],
        steps=2,
        checkpoint_every=1,
        adapter=AdapterConfig("lora", 4, init=str(expected / "dev_2k_lora.safetensors")),
        ema_decay=0.99,
        num_validation=3,
        validate_every=1,
        preview_prompts=("a", "b", "c"),
        preview_every=2,
    )
    alone = alone_like(config, tmp_path / "alone", 2)
    check_parity(config, alone, 2, rel)
    files = [
        {path.relative_to(each.output_dir) for path in each.output_dir.rglob("*.*")}
        - {Path(f"gradients-{rank}.pt") for rank in range(2)}
        for each in (config, alone)
    ]
    assert files[0] == files[1]
    for name in ("pytorch_lora_weights", "plain_lora_weights", "optimizer"):
        path = f"checkpoint-000002/{name}.safetensors"
        one, other = (load_file(each.output_dir / path) for each in (config, alone))
        assert {key: (t.shape, t.dtype) for key, t in one.items()} == {
            key: (t.shape, t.dtype) for key, t in other.items()
        }
    for name in ("loss.csv", "validation.csv"):
        one, other = (read_curve(each.output_dir / name) for each in (config, alone))
        assert one == pytest.approx(other, rel=1e-4)
    for path in find_previews(alone.output_dir):
        same_place = config.output_dir / path.relative_to(alone.output_dir)
        one, other = (np.asarray(Image.open(each)).astype(int) for each in (path, same_place))
        assert np.abs(one - other).max() <= 1


def read_curve(path: Path) -> list[float]:
    with path.open(newline="") as file:
        rows = [{key: text for key, text in row.items() if not key.endswith("seconds")}
                for row in csv.DictReader(file)]  # fmt: skip
    return [float(text) for row in rows for text in row.values() if text]


@pytest.mark.slow
@pytest.mark.parametrize("mode", MODES)
def test_a_run_that_was_killed_resumes_bitwise(settings, adapter, tmp_path, mode):
    optimizer = OptimizerConfig("adamw", lr=1e-3, schedule="cosine", warmup_steps=2)
    config = settings(**MODES[mode], steps=8, checkpoint_every=1, ema_decay=0.9, adapter=adapter,
                      optimizer=optimizer)  # fmt: skip
    whole = replace(config, output_dir=tmp_path / "whole")
    train_on(whole, 2)
    moments = random.Random(mode)
    for _ in range(2):
        step = max((each.step for each in find_checkpoints(config.output_dir)), default=0)
        processes = start_ranks(replace(config, resume=step > 0), 2)
        wait_for_checkpoint(config.output_dir, step + moments.randint(1, 3))
        for process in moments.sample(processes, 2):
            process.kill()
        for process in processes:
            process.join()
    train_on(replace(config, resume=True), 2)
    found, wanted = adapter_of(config.output_dir), adapter_of(whole.output_dir)
    assert found.keys() == wanted.keys()
    assert all(torch.equal(found[key], tensor) for key, tensor in wanted.items())


def wait_for_checkpoint(output_dir: Path, step: int) -> None:
    deadline = time.monotonic() + 60
    while not any(each.step >= step for each in find_checkpoints(output_dir)):
        assert time.monotonic() < deadline
        time.sleep(0.005)


@pytest.mark.slow
def test_a_stop_is_clean_on_a_host_that_does_not_see_the_checkpoint(settings, tmp_path):
    """Of a network file system the list of names may be half a minute old."""
    configs = [settings(steps=100_000, output_dir=tmp_path / f"host-{host}") for host in range(2)]
    port = free_port()
    processes = [
        server.Process(target=run_rank, args=(config, rank, 2, port), daemon=True)
        for rank, config in enumerate(configs)
    ]
    for process in processes:
        process.start()
    losses, deadline = configs[0].output_dir / "loss.csv", time.monotonic() + 60
    while not losses.exists() or losses.read_text().count("\n") < 3:
        assert time.monotonic() < deadline
        time.sleep(0.05)
    processes[0].terminate()
    for process in processes:
        process.join(60)
    assert [process.exitcode for process in processes] == [0, 0]
    assert len(find_checkpoints(configs[0].output_dir)) == 1
    assert not find_checkpoints(configs[1].output_dir)


@pytest.mark.parametrize(
    ("error", "reason"),
    [
        (FileNotFoundError("lake is gone"), "lake is gone"),
        pytest.param(MemoryError(), "MemoryError", marks=pytest.mark.slow),
    ],
)
def test_a_rank_without_a_batch_ends_all_after_the_last_whole_step(settings, error, reason):
    config = settings(steps=4, checkpoint_every=100)
    ranks = start_ranks(config, 2, partial(run_and_miss_a_batch, error=error))
    for rank in ranks:
        rank.join(60)
    assert [rank.exitcode for rank in ranks] == [0, 1]
    message = (config.output_dir / "lost-0.txt").read_text()
    assert message == f"process 1 could not read its batch: {reason}"
    (saved,) = find_checkpoints(config.output_dir)
    assert saved.step == 2 and find_damage(saved) is None


@pytest.mark.slow
@pytest.mark.parametrize("lost", [0, 1])
@pytest.mark.parametrize("mode", MODES)
def test_a_lost_rank_ends_the_other_in_every_mode(settings, mode, lost):
    config = settings(**MODES[mode], steps=100_000, checkpoint_every=1)
    processes = start_ranks(config, 2)
    wait_for_checkpoint(config.output_dir, 2)
    processes[lost].kill()
    processes[1 - lost].join(20)
    assert processes[1 - lost].exitcode == 0
    message = (config.output_dir / f"lost-{1 - lost}.txt").read_text()
    assert message.startswith("another process of this run has ended or cannot be reached (")
    checkpoints = find_checkpoints(config.output_dir)
    assert all(find_damage(checkpoint) is None for checkpoint in checkpoints)


@pytest.mark.slow
def test_the_mode_may_change_on_resuming(settings, adapter, tmp_path, rel):
    config = settings(steps=6, adapter=adapter)
    alone = alone_like(config, tmp_path / "alone", 2)
    train(alone)
    train_on(replace(config, steps=2, context_parallel=2, gradient_accumulation=2), 2)
    train_on(replace(config, steps=4, resume=True, shard=True), 2)
    train(replace(config, resume=True, gradient_accumulation=2))
    for key, tensor in adapter_of(alone.output_dir).items():
        assert rel(adapter_of(config.output_dir)[key], tensor) < 1e-4
