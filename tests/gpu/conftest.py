"""Tests of what only a GPU does: its kernels, its memory, code compiled for it."""

from pathlib import Path

import pytest
import torch

HERE = Path(__file__).parent


def pytest_collection_modifyitems(items):
    for item in items:
        if HERE in item.path.parents:
            item.add_marker(pytest.mark.gpu)
            # torch's and Triton's own differ from GPU to GPU
            item.add_marker(pytest.mark.filterwarnings("ignore"))


@pytest.fixture
def gpu() -> torch.device:
    return torch.device("cuda")


@pytest.fixture(autouse=True)
def _exact():
    """Products in full float32, and nothing compiled by the test before."""
    torch.compiler.reset()
    before = torch.backends.cudnn.allow_tf32
    torch.backends.cudnn.allow_tf32 = False
    yield
    torch.backends.cudnn.allow_tf32 = before
