"""Several processes on the CPU (gloo): data parallel, context parallel, a base in shards."""

import multiprocessing
import os
import socket
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from urae.train import AdapterConfig, TrainConfig, train
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
    train_and_keep_gradients(config, rank)


def train_and_keep_gradients(config: TrainConfig, rank: int = 0) -> None:
    advance, found = TrainingState.advance, []

    def keep(self, num_batches):
        found.append([parameter.grad.clone() for parameter in self.adapter.parameters])
        advance(self, num_batches)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(TrainingState, "advance", keep)
        train(config)
    torch.save(found, config.output_dir / f"gradients-{rank}.pt")


def start_ranks(config: TrainConfig, number: int) -> list[multiprocessing.process.BaseProcess]:
    port = free_port()
    processes = [
        server.Process(target=run_rank, args=(config, rank, number, port), daemon=True)
        for rank in range(number)
    ]
    for process in processes:
        process.start()
    return processes


def train_on(config: TrainConfig, number: int) -> None:
    processes = start_ranks(config, number)
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


@pytest.mark.parametrize("mode", MODES)
def test_two_ranks_have_the_gradients_of_one(settings, adapter, tmp_path, rel, mode):
    config = settings(steps=2, **MODES[mode], gradient_checkpointing="full", adapter=adapter)
    ranks = 2 // config.context_parallel
    alone = replace(config, output_dir=tmp_path / "alone", shard=False, context_parallel=1,
                    gradient_accumulation=ranks)  # fmt: skip
    check_parity(config, alone, 2, rel)


@pytest.mark.slow
@pytest.mark.parametrize("shard", [False, True])
def test_a_mesh_of_two_by_two_has_the_gradients_of_one(settings, adapter, tmp_path, rel, shard):
    config = settings(steps=2, context_parallel=2, shard=shard, adapter=adapter)
    alone = replace(config, output_dir=tmp_path / "alone", shard=False, context_parallel=1,
                    gradient_accumulation=2)  # fmt: skip
    check_parity(config, alone, 4, rel)
