import copy
import gc
import logging
import weakref
from functools import cache
from pathlib import Path

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from urae.backbones import flux
from urae.backbones.flux import load_pipeline

# threads cost the tiny models more than they save, on busy machines much more
torch.set_num_threads(1)

GOLDEN = Path(__file__).parent / "golden"


def pytest_collection_finish():
    """Leave all that is imported out of garbage collection, which else takes half a second."""
    gc.collect()
    gc.freeze()


@pytest.fixture(scope="session", autouse=True)
def _cache_dir(tmp_path_factory):
    """Keep minor components out of the user's cache folder."""
    patch = pytest.MonkeyPatch()
    patch.setenv("URAE_CACHE_DIR", str(tmp_path_factory.mktemp("cache")))
    yield
    patch.undo()


@pytest.fixture(autouse=True)
def _logging():
    """Commands set up logging for the process; put it back."""
    root, known = logging.getLogger(), logging.root.manager.loggerDict
    handlers, level = root.handlers[:], root.level
    yield
    root.handlers[:] = handlers
    loggers = {logging.getLogger(n): logging.NOTSET for n in known if n.startswith("urae")}
    for logger, wanted in {root: level, **loggers}.items():
        if logger.level != wanted:  # setting it costs what looking at every logger costs
            logger.setLevel(wanted)
    logging.captureWarnings(False)


@pytest.fixture(scope="session")
def expected() -> Path:
    """The reference's outputs."""
    return GOLDEN / "expected"


@pytest.fixture(scope="session")
def bases() -> dict[str, Path]:
    return {name: GOLDEN / f"base_{name}" for name in ("dev", "schnell")}


@pytest.fixture(params=["dev", "schnell"])
def base(request) -> str:
    return request.param


@pytest.fixture(scope="session")
def load_once(bases):
    """Load a tiny pipeline in float32 that nothing may change; tokenizers, which nothing does."""

    @cache
    def load(name: str, **options):
        pipe = load_pipeline(str(bases[name]), **{"dtype": torch.float32, **options})
        pipe.set_progress_bar_config(disable=True)
        return pipe, {id(each): each for each in (pipe.tokenizer, pipe.tokenizer_2)}

    return load


@pytest.fixture
def load_pipe(load_once):
    """Give a fresh tiny pipeline: a copy, in half the time that loading takes."""

    def load(name: str = "dev", **options):
        pipe, shared = load_once(name, **options)
        return copy.deepcopy(pipe, dict(shared))

    return load


@pytest.fixture(scope="session", autouse=True)
def _flux_once():
    """Lay out FLUX.1 on the meta device once: nothing changes it, and it takes half a second."""
    patch = pytest.MonkeyPatch()
    patch.setattr(flux, "build_meta_flux", cache(flux.build_meta_flux))
    yield
    patch.undo()


def relative_error(found: torch.Tensor, wanted: torch.Tensor) -> float:
    """Return ||found - wanted|| / ||wanted||."""
    found, wanted = found.detach().double(), wanted.detach().double()
    return float((found - wanted).norm() / wanted.norm())


@pytest.fixture(scope="session")
def rel():
    return relative_error


@pytest.fixture(scope="session")
def sample():
    """Run a pipeline as the reference did, to latents."""
    settings = {
        True: {"num_inference_steps": 6, "guidance_scale": 3.5},
        False: {"num_inference_steps": 4, "guidance_scale": 0.0},
    }

    def run(pipe, height=256, width=256, **options):
        defaults = {
            "generator": torch.Generator().manual_seed(7),
            "max_sequence_length": 64,
            "output_type": "latent",
            **settings[pipe.transformer.config.guidance_embeds],
        }
        prompt = options.pop("prompt", "a large red circle on a striped blue background")
        return pipe(prompt, height=height, width=width, **{**defaults, **options}).images

    return run


class Tracker(TorchDispatchMode):
    """Follow the bytes of what operations make, on any device."""

    def __init__(self):
        super().__init__()
        self.now = self.peak = 0
        self.alive = set()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        found = function(*args, **(kwargs or {}))
        for tensor in tree_leaves(found):
            if isinstance(tensor, torch.Tensor):
                self.count(tensor.untyped_storage())
        return found

    def count(self, storage, *, made=True):
        key, size = storage._cdata, storage.nbytes() if made else 0
        if key in self.alive:
            return
        self.alive.add(key)
        self.now += size
        self.peak = max(self.peak, self.now)
        weakref.finalize(storage, self.free, key, size)

    def free(self, key, size):
        self.alive.discard(key)
        self.now -= size


@pytest.fixture
def tracker() -> Tracker:
    """Follow what is allocated."""
    return Tracker()
