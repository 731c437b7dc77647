"""Several processes in one run: one that is lost, and another number of them on resuming."""

import logging
from collections.abc import Iterator
from contextlib import contextmanager

from torch.distributed import DistError

from urae.train.output import Start

logger = logging.getLogger(__name__)

_LOST = (
    "Connection closed by peer",
    "Connection reset by peer",
    "Broken pipe",
    "Timed out waiting",
)


@contextmanager
def explain_lost_rank() -> Iterator[None]:
    """Turn what a collective says of a lost process into an error that says what to do.

    Raises:
        ConnectionError: In place of torch's own error.
    """
    try:
        yield
    except RuntimeError as error:
        if not isinstance(error, DistError) and not any(text in str(error) for text in _LOST):
            raise
        reason = str(error).splitlines()[0].split("] ", 1)[-1].split(". ")[0]
        raise ConnectionError(
            f"another process of this run has ended or is out of reach ({reason}); see its own "
            "last lines for why, then start all of them again with --resume"
        ) from error


def warn_of_other_batch(start: Start, batches_per_step: int) -> None:
    """Say so if a resumed run takes more or fewer batches a step than it did."""
    before = start.record.get("batches_per_step", batches_per_step)
    if before != batches_per_step:
        logger.warning(
            f"a step now takes {batches_per_step} batches over all devices, before it took "
            f"{before}; the order of samples goes on unchanged, and --gradient-accumulation says "
            "how many each device takes"
        )
