"""One training loop; 2K and 4K, LoRA and minor components are recipes of it."""

from urae.train.config import AdapterConfig, DataConfig, OptimizerConfig, TrainConfig
from urae.train.loop import TrainResult, train
from urae.train.output import StepReport
from urae.train.publish import PushConfig, Pushed, push

__all__ = [
    "AdapterConfig",
    "DataConfig",
    "OptimizerConfig",
    "PushConfig",
    "Pushed",
    "StepReport",
    "TrainConfig",
    "TrainResult",
    "push",
    "train",
]
