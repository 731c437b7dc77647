"""Several processes in one run: those that differ, and another number of them on resuming."""

import logging
from dataclasses import asdict

from accelerate.utils import gather_object

from urae.backbones.flux import fingerprint_component
from urae.config import flatten
from urae.resolution import ResolutionPolicy
from urae.train.config import TrainConfig
from urae.train.inputs import Inputs
from urae.train.output import Start

logger = logging.getLogger(__name__)

MAX_WAIT_MINUTES = 10
"""How long a rank waits for the others: longer than loading, compiling or a preview takes."""


def check_alike(config: TrainConfig, inputs: Inputs, policy: ResolutionPolicy) -> None:
    """Refuse processes that would train different things together, on several hosts above all.

    All processes wait here until each has found its inputs, and before one changes the folder.

    Raises:
        ValueError: Names the first process that differs from the first, and in what.
    """
    paths = dict.fromkeys(("data_dir", "output_dir", "model"))  # hosts may have them elsewhere
    settings = {
        name: value
        for name, value in {**flatten(asdict(config)), **paths}.items()
        if not name.endswith(".dir")
    }
    facts = {
        **{name: repr(value) for name, value in settings.items()},
        "features": inputs.data_hash[:12],
        "base": fingerprint_component(inputs.model_path, "transformer")[:12],
        "policy": policy.to_json(),
        "starting step": str(inputs.start.step),
    }
    first, *others = gather_object([facts])
    for rank, found in enumerate(others, start=1):
        for what, value in found.items():
            if value != first[what]:
                raise ValueError(
                    f"process {rank} differs from process 0 in {what}: {value}, not "
                    f"{first[what]}; start all with the same command, features and base, and an "
                    "--output folder that all hosts share"
                )


def warn_of_other_batch(start: Start, batches_per_step: int) -> None:
    """Say so if a resumed run takes more or fewer batches a step than it did."""
    before = start.record.get("batches_per_step", batches_per_step)
    if before != batches_per_step:
        logger.warning(
            f"a step now takes {batches_per_step} batches over all devices instead of {before}; "
            "the order of samples is unchanged, and --gradient-accumulation sets how many each "
            "device takes"
        )
