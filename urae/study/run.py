"""A study: data sets first, then every cell that is not done, then the report."""

import json
import logging
import math
import multiprocessing
import os
import signal
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from types import FrameType
from typing import TypeVar

import diffusers
import torch
import transformers
from diffusers import FluxPipeline

from urae.adapters.adapt import adapt, restore
from urae.backbones.devices import name_device, name_dtype, pick_device, pick_dtype
from urae.miniature.score import load_scored
from urae.resolution import ResolutionPolicy
from urae.storage import write_atomic
from urae.study.bench import Bench
from urae.study.cells import Cell, Training, identify
from urae.study.config import StudyConfig
from urae.study.data import find_folder, list_data, make_data, mix, read_quality
from urae.study.measure import measure_held_out, measure_pictures, read_own_validation
from urae.study.output import check_output, holds_more
from urae.study.plot import check_plotting
from urae.study.questions import QUESTIONS
from urae.study.report import write_report
from urae.study.results import check_place, find_result, read_results
from urae.study.starts import Start, prepare_start
from urae.train import OptimizerConfig, TrainConfig, train
from urae.train.checkpoint import find_checkpoints
from urae.train.output import read_losses
from urae.train.record import find_commit

logger = logging.getLogger(__name__)

Item = TypeVar("Item")
OnProgress = Callable[[int, int], None]
"""Called with the cells done and in all."""


@dataclass(frozen=True)
class StudyResult:
    """How far a study is."""

    done: int
    total: int
    """Cells times seeds."""
    text_path: Path | None
    """The report's text; table and plot lie beside it. None if nothing was written, as no cell is
    done, or as the table that is there holds some that are not done here."""


@dataclass(frozen=True)
class Folders:
    """Where a study keeps what."""

    work_dir: Path
    """Of the miniature's stages."""

    @property
    def root(self) -> Path:
        """The study's own folder."""
        return self.work_dir / "study"

    @property
    def results(self) -> Path:
        """A file for each finished cell."""
        return self.root / "results"

    @property
    def data(self) -> Path:
        """A folder for each set of pictures."""
        return self.root / "data"

    def run(self, training: Training) -> Path:
        """Folder of a training run."""
        return self.root / "runs" / identify(asdict(training))

    def result(self, cell: Cell) -> Path:
        """A finished cell's figures."""
        return find_result(self.results, cell)


def list_cells(config: StudyConfig) -> list[Cell]:
    """List the cells of a question for all seeds, the first seed of all of them first.

    Raises:
        ValueError, FileNotFoundError: If a base, teacher or adapter is missing.
    """
    cells = QUESTIONS[config.question].cells(Bench(config))
    return [cell.with_seed(seed) for seed in range(config.num_seeds) for cell in cells]


def run_study(config: StudyConfig, *, on_progress: OnProgress | None = None) -> StudyResult:
    """Work on a question until its cells are done or the time is up, and report what there is.

    A finished cell leaves a small file; a call after a kill runs the rest, and goes on with runs
    that were cut off. A run that fails leaves the others alone; its error comes after the report.

    Args:
        config: Which question, how large, where.
        on_progress: Told of the cells that are done.

    Raises:
        ValueError, FileNotFoundError: If a base, teacher or adapter is missing.
        ValueError, FileExistsError: If the output folder is of another study or of no use, or what
            cells have left is damaged or of another device; before anything is made.
        ModuleNotFoundError: If matplotlib is not installed.
        KeyboardInterrupt: On Ctrl-C or SIGTERM; the runs in progress are saved.
    """
    deadline = time.time() + 60 * config.max_minutes
    check_plotting()
    cells = list_cells(config)
    folders = Folders(config.work_dir.resolve())
    pending = [cell for cell in cells if not folders.result(cell).is_file()]
    there = read_results(folders.results, cells)
    place = check_place(there, folders.results, goes_on=bool(pending))
    check_output(config, cells, place)
    groups = group_cells(pending)

    def tell() -> None:
        if on_progress is not None:
            on_progress(sum(folders.result(cell).is_file() for cell in cells), len(cells))

    tell()
    make = partial(make_data, folders.data, work_dir=folders.work_dir, deadline=deadline)
    for error in _run_all(make, list_data(pending), config.workers, lambda: None):
        raise error
    work = partial(run_group, folders=folders, deadline=deadline)
    errors = _run_all(work, groups, config.workers, tell)
    rows = read_results(folders.results, cells)
    check_place(rows, folders.results, goes_on=False)  # another machine may have shared the folder
    text_path = None
    if rows and not holds_more(config, rows):
        text_path = write_report(config, rows, len(cells))
    for error in errors:
        raise error
    return StudyResult(len(rows), len(cells), text_path)


def group_cells(cells: Sequence[Cell]) -> list[list[Cell]]:
    """Put cells together that share a training run, or have none and the same seed."""
    groups: dict[str, dict[str, Cell]] = {}
    for cell in cells:
        shared = asdict(cell.training) if cell.training else {"seed": cell.seed}
        groups.setdefault(identify(shared), {})[cell.key] = cell
    return [list(group.values()) for group in groups.values()]


def run_group(cells: Sequence[Cell], *, folders: Folders, deadline: float = math.inf) -> None:
    """Train what some cells share, and score each of them.

    Args:
        cells: Of one training run, or of none.
        folders: Where everything is.
        deadline: No cell is begun after this time.
    """
    training = cells[0].training
    start = None
    seconds = 0.0
    if training is not None and time.time() < deadline:
        start = prepare_start(training, folders.root / "starts")
        _train(training, start, folders)
        # of all tries at the run
        seconds = sum(read_losses(folders.run(training), "seconds")[: training.steps])
    pipes: dict[str, FluxPipeline] = {}
    for cell in cells:
        if time.time() < deadline:
            began = time.perf_counter()
            figures = _score(cell, start, pipes, folders)
            times = {"train_seconds": seconds, "score_seconds": time.perf_counter() - began}
            _write_result(cell, {**figures, **times}, folders.result(cell))


def _train(training: Training, start: Start, folders: Folders) -> None:
    run_dir = folders.run(training)
    if _adapter_path(run_dir, training.steps) is not None:
        return
    data_dir = folders.root / "mixes" / run_dir.name
    mix(folders.data, training.parts, data_dir)
    config = build_train_config(training, start, data_dir, run_dir)
    if train(config).stopped:
        raise KeyboardInterrupt  # it caught the signal, and has saved what it had


def build_train_config(
    training: Training, start: Start, data_dir: Path, run_dir: Path
) -> TrainConfig:
    """Build the product's own configuration of a run."""
    resume = bool(find_checkpoints(run_dir))
    return TrainConfig(
        model=start.model,
        data_dir=data_dir,
        output_dir=run_dir,
        resolution=training.side,
        steps=training.steps,
        batch_size=training.batch_size,
        guidance_scale=training.guidance_scale,
        seed=training.seed,
        gradient_checkpointing="off",
        compile=False,  # a process that launches kernels is the limit, and each would compile
        checkpoint_every=training.checkpoint_every,
        keep_checkpoints=training.steps // training.checkpoint_every + 1,
        num_validation=training.num_validation,
        validate_every=training.checkpoint_every,
        resume=resume,
        overwrite=not resume,
        adapter=start.adapter,
        optimizer=OptimizerConfig(name="adamw", lr=training.lr),
        policy=training.policy,
    )


def _adapter_path(run_dir: Path, step: int) -> Path | None:
    """Find a run's adapter after a step."""
    paths = {each.step: each.adapter_path for each in find_checkpoints(run_dir)}
    return paths.get(step)


def _score(
    cell: Cell, start: Start | None, pipes: dict[str, FluxPipeline], folders: Folders
) -> dict[str, float]:
    training, scoring = cell.training, cell.scoring
    figures: dict[str, float] = {}
    adapters: list[Path | str] = []
    model = scoring.model.name
    if training is not None:
        assert start is not None
        step = scoring.at_step or training.steps
        run_dir = folders.run(training)
        path = _adapter_path(run_dir, step)
        assert path is not None
        adapters = [training.over.name, path] if training.over else [path]
        figures |= read_own_validation(run_dir, step)
        figures["data_score"] = read_quality(folders.data, training.parts)
        if scoring.model == training.model:
            model = start.model  # the one with the residual, in the reference's form
    if model not in pipes:
        pipes[model] = load_scored(model=model)
    pipe = pipes[model]
    _apply(pipe, adapters, scoring.policy)
    figures |= measure_pictures(pipe, scoring)
    data_dir = find_folder(folders.data, scoring.held_out)
    figures["held_out_loss"] = measure_held_out(pipe, scoring, data_dir)
    return figures


def _apply(
    pipe: FluxPipeline, adapters: Sequence[Path | str], policy: ResolutionPolicy | None
) -> None:
    if policy is None:
        assert not adapters
        restore(pipe)
    else:
        adapt(pipe, adapters, policy=policy)


def _write_result(cell: Cell, figures: dict[str, float], path: Path) -> None:
    device = pick_device()
    record = {
        "figures": figures,
        "device": name_device(device),
        "dtype": name_dtype(pick_dtype(device)),
        "torch": torch.__version__,
        "commit": find_commit(),
        "training": cell.training and asdict(cell.training),
        "scoring": asdict(cell.scoring),
    }
    path.parent.mkdir(parents=True, exist_ok=True)
    write_atomic(path, json.dumps(record, indent=1).encode())


def _run_all(
    work: Callable[[Item], None],
    items: Sequence[Item],
    workers: int,
    on_done: Callable[[], None],
) -> list[Exception]:
    """Do some work for each item, here or in other processes, item i on GPU i mod their number.

    Returns:
        The errors of the items that failed.
    """
    errors: list[Exception] = []

    def finish(wait: Callable[[], None]) -> None:
        try:
            wait()
        except Exception as error:
            logger.warning("a run failed; the others continue: %s", error)
            errors.append(error)
        else:
            on_done()

    if workers == 1 or len(items) < 2:
        for item in items:
            finish(partial(work, item))
        return errors
    # not forked: this process may hold a GPU and threads
    context = multiprocessing.get_context("spawn")
    threads = max(1, (os.cpu_count() or 1) // workers)
    with ProcessPoolExecutor(
        workers, context, initializer=_start_worker, initargs=(threads,)
    ) as pool:
        futures = [pool.submit(_work_on_gpu, work, number, item) for number, item in
                   enumerate(items)]  # fmt: skip
        try:
            with _told_to_children():
                for future in as_completed(futures):
                    finish(future.result)
        except BaseException:
            pool.shutdown(cancel_futures=True)
            raise
    return errors


@contextmanager
def _told_to_children() -> Iterator[None]:
    """Hand SIGTERM on to the processes that this one has started, as a terminal does Ctrl-C."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def stop(_number: int, _frame: FrameType | None) -> None:
        for child in multiprocessing.active_children():
            child.terminate()
        raise KeyboardInterrupt

    before = signal.signal(signal.SIGTERM, stop)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def _start_worker(num_threads: int) -> None:
    torch.set_num_threads(num_threads)
    diffusers.utils.logging.disable_progress_bar()
    transformers.utils.logging.disable_progress_bar()


def _work_on_gpu(work: Callable[[Item], None], number: int, item: Item) -> None:
    if count := torch.cuda.device_count():
        torch.cuda.set_device(number % count)
    work(item)
