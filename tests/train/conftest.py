from pathlib import Path

import pytest

from urae.train import AdapterConfig, OptimizerConfig, TrainConfig

GOLDEN = Path(__file__).parents[1] / "golden"


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
