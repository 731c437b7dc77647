"""Several processes in one run: another number of them on resuming."""

import logging

from urae.train.output import Start

logger = logging.getLogger(__name__)


def warn_of_other_batch(start: Start, batches_per_step: int) -> None:
    """Say so if a resumed run takes more or fewer batches a step than it did."""
    before = start.record.get("batches_per_step", batches_per_step)
    if before != batches_per_step:
        logger.warning(
            f"a step now takes {batches_per_step} batches over all devices, before it took "
            f"{before}; the order of samples goes on unchanged, and --gradient-accumulation says "
            "how many each device takes"
        )
