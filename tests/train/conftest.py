import multiprocessing
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from urae.backbones.flux import predict_velocity
from urae.generate.inputs import default_sampling
from urae.train import AdapterConfig, OptimizerConfig, TrainConfig

GOLDEN = Path(__file__).parents[1] / "golden"


@pytest.fixture(scope="session")
def server():
    """Fork processes from one that has imported everything, so that a start takes no time."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["urae.train", "torch.distributed.fsdp", "torch._dynamo"])
    return context


@pytest.fixture
def few_steps(monkeypatch):
    """Previews, and what is generated beside them, take 3 steps in place of 28."""

    def few(*of):
        return replace(default_sampling(*of), steps=3)

    for module in ("urae.generate.inputs", "urae.train.preview"):
        monkeypatch.setattr(f"{module}.default_sampling", few)


@pytest.fixture
def settings(tmp_path):
    """A run on the reference's own cached features."""

    def build(**changes) -> TrainConfig:
        return TrainConfig(
            **{
                "model": str(GOLDEN / "base_dev"),
                "data_dir": GOLDEN / "train_data",
                "output_dir": tmp_path / "run",
                "resolution": 256,
                "steps": 4,
                "gradient_checkpointing": "off",
                "adapter": AdapterConfig(rank=4),
                "optimizer": OptimizerConfig(name="adamw", lr=1e-3),
                **changes,
            }
        )

    return build


@pytest.fixture
def minor(expected) -> AdapterConfig:
    return AdapterConfig("minor", 4, over=(str(expected / "dev_2k_lora.safetensors"),))


@pytest.fixture(scope="session")
def take_step():
    """Give velocity and gradients of one forward and backward, of latents of height x width."""

    def take_step(adapter, height=8, width=8, batch=2):
        transformer = adapter.transformer.train()
        channels = transformer.config.in_channels // 4
        generator = torch.Generator().manual_seed(0)
        inputs = (
            torch.randn(batch, channels, height, width, generator=generator),
            torch.tensor([0.3, 0.9])[:batch],
            torch.randn(batch, 6, transformer.config.joint_attention_dim, generator=generator),
            torch.randn(batch, transformer.config.pooled_projection_dim, generator=generator),
        )
        for parameter in adapter.parameters:
            parameter.grad = None
        velocity = predict_velocity(transformer, *inputs, 1.0)
        velocity.square().mean().backward()
        return [velocity.detach(), *(parameter.grad for parameter in adapter.parameters)]

    return take_step
