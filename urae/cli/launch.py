"""`--gpus`: the same command in a process a GPU, and one message if one of them fails."""

import json
import logging
import os
import signal
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, NoReturn

if TYPE_CHECKING:
    from torch.distributed.elastic.multiprocessing.errors import ProcessFailure

_RUN_ID = "urae-gpus"  # torch's launcher hands it to the processes
_MESSAGE, _LOST = "message", "lost"


def wants_launch(gpus: int) -> bool:
    """Tell whether processes are to be started: not for one GPU, nor where torchrun has done it.

    Raises:
        ValueError: If there are not as many GPUs, or torchrun has started another number.
    """
    if started := os.environ.get("LOCAL_WORLD_SIZE"):
        if int(started) != gpus:
            raise ValueError(
                f"--gpus {gpus} cannot be combined with the {started} processes that torchrun has "
                "started on this host; leave it out"
            )
        return False
    from torch.cuda import device_count

    from urae.backbones.ranks import check_gpus

    if not device_count():
        raise ValueError(
            f"--gpus {gpus} needs CUDA GPUs, but this host has none; leave it out to run without "
            "them"
        )
    check_gpus(gpus)
    return gpus > 1


def launch(gpus: int, arguments: Sequence[str]) -> None:
    """Run `urae` in one process a GPU of this host, as `torchrun --standalone` would.

    When one fails, the others are ended.

    Args:
        gpus: How many, at least 2.
        arguments: Of the command line.

    Raises:
        ValueError: What a process says that the user got wrong.
        ChildProcessError: If a process fails otherwise; says which and why.
    """
    from torch.distributed.elastic.multiprocessing import DefaultLogsSpecs, SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.launcher.api import LaunchConfig, elastic_launch

    for name in logging.root.manager.loggerDict:
        if name.startswith("torch.distributed.elastic"):
            logging.getLogger(name).setLevel(logging.CRITICAL)
    with TemporaryDirectory() as folder:
        config = LaunchConfig(
            min_nodes=1,
            max_nodes=1,
            nproc_per_node=gpus,
            run_id=_RUN_ID,
            rdzv_backend="c10d",
            rdzv_endpoint="localhost:0",
            max_restarts=0,
            shutdown_timeout=10,
            logs_specs=DefaultLogsSpecs(log_dir=folder),
        )
        try:
            elastic_launch(config, sys.executable)("-m", "urae", *arguments)
        except ChildFailedError as failed:
            error = _explain(failed.failures.values())
        except SignalException as stopped:
            sys.exit(128 + stopped.sigval)
        else:
            return
    raise error


def is_launched() -> bool:
    """Tell whether `launch` has started this process, and waits for what it has to say."""
    return os.environ.get("TORCHELASTIC_RUN_ID") == _RUN_ID


def hand_over(error: BaseException, message: str, code: int) -> NoReturn:
    """Leave an error of this process for `launch` to show, and end it.

    At once: tidying up could wait for processes that wait for this one.
    """
    from urae.storage import write_atomic

    data = {_MESSAGE: message, _LOST: isinstance(error, ConnectionError)}
    write_atomic(Path(os.environ["TORCHELASTIC_ERROR_FILE"]), json.dumps(data).encode())
    os._exit(code)


def _explain(failures: Iterable["ProcessFailure"]) -> ValueError | ChildProcessError:
    """Make an error of the failure that the others came of."""

    def is_consequence(failure: "ProcessFailure") -> bool:
        return failure.exitcode == -signal.SIGTERM or bool(failure.error_file_data.get(_LOST))

    first = min(failures, key=is_consequence)
    if _LOST in first.error_file_data:
        message = str(first.error_file_data[_MESSAGE])
        return ValueError(message) if first.exitcode == 2 else ChildProcessError(message)
    how = f"ended with exit code {first.exitcode}; see its own output above"
    if first.exitcode < 0:
        how = f"was killed by {first.signal_name()}; if nobody did that, the host ran out of memory"
    return ChildProcessError(
        f"the process of GPU {first.local_rank} (pid {first.pid}) {how}; all processes have "
        "ended, and finished pictures are kept"
    )
