"""Processes that render and check pictures side by side."""

import multiprocessing
from concurrent.futures import ProcessPoolExecutor

import torch


def start_processes(count: int) -> ProcessPoolExecutor:
    """Start processes of one thread each, to use as a context.

    They are not forked: this process may hold a GPU and threads.
    """
    context = multiprocessing.get_context("spawn")
    return ProcessPoolExecutor(count, context, initializer=_use_one_thread)


def _use_one_thread() -> None:
    torch.set_num_threads(1)
