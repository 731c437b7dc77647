"""Several processes on the CPU (gloo): context parallelism and data parallelism."""

import math
import os
import socket
import subprocess
import sys
from contextlib import ExitStack
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import AutoencoderKL
from PIL import Image
from safetensors.torch import load_file
from torch import multiprocessing
from torch._dynamo.utils import counters

from urae.backbones import vae
from urae.backbones.context_parallel import build_mesh, context_parallel
from urae.backbones.flux import load_transformer
from urae.backbones.ranks import join_ranks
from urae.backbones.vae_plan import plan_decode
from urae.generate import GenerateConfig, generate
from urae.generate.chunks import token_chunks
from urae.generate.memory import stream_blocks
from urae.generate.speed import compile_blocks
from urae.geometry import build_image_ids, build_text_ids
from urae.resolution import ResolutionPolicy, apply_policy
from urae.train.output import find_previews

ROOT = Path(__file__).parents[1]
GOLDEN = ROOT / "tests" / "golden"

pytestmark = pytest.mark.slow


def free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return listener.getsockname()[1]


def in_two(function, *arguments) -> None:
    """Call a function in two processes that torchrun might have started."""
    multiprocessing.spawn(join, (free_port(), function, arguments), nprocs=2)


def join(rank: int, port: int, function, arguments) -> None:
    torch.set_num_threads(1)
    os.environ |= {
        "RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2",
        "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port),
    }  # fmt: skip
    with join_ranks(torch.device("cpu")) as ranks:
        function(ranks, *arguments)


# --- one picture ----------------------------------------------------------------------------------


def build_inputs(dtype: torch.dtype) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    drawn = {
        "hidden_states": torch.randn(1, 64, 64, generator=generator),
        "encoder_hidden_states": torch.randn(1, 8, 32, generator=generator),
        "pooled_projections": torch.randn(1, 24, generator=generator),
        "timestep": torch.ones(1),
    }
    given = {"guidance": torch.ones(1), "img_ids": build_image_ids(8, 8)}
    return (
        {name: each.to(dtype) for name, each in drawn.items()}
        | given
        | {"txt_ids": build_text_ids(8)}
    )


def share_forwards(ranks, folder: Path) -> None:
    mesh = build_mesh(2, ranks.device)
    found = {}
    for name, dtype in {"fp32": torch.float32, "bf16": torch.bfloat16}.items():
        inputs = build_inputs(dtype)
        for way in ("whole", "chunked", "streamed"):
            transformer = load_transformer(GOLDEN / "base_dev", dtype=dtype)
            apply_policy(transformer, ResolutionPolicy())

            def run(transformer=transformer, inputs=inputs) -> torch.Tensor:
                return 1.0 * transformer(**inputs, return_dict=False)[0]  # waits for the gather

            with torch.no_grad(), ExitStack() as stack:
                before = run()
                if way == "chunked":
                    stack.enter_context(token_chunks(transformer, 16))
                elif way == "streamed":
                    stream_blocks(transformer, ranks.device)
                with context_parallel(transformer, mesh):
                    together = run()
                if way == "whole":
                    found[f"{name}, undone"] = before, run()
                found[f"{name}, {way}"] = before, together
    torch.save(found, folder / f"{ranks.rank}.pt")


def test_two_ranks_make_the_forward_of_one(tmp_path, rel):
    """With the global length in proportional attention; every rank has all of it."""
    in_two(share_forwards, tmp_path)
    for rank in range(2):
        for name, (alone, together) in torch.load(tmp_path / f"{rank}.pt").items():
            if "undone" in name:
                assert torch.equal(together, alone)
            else:
                assert rel(together, alone) < (1e-5 if "fp32" in name else 1e-2), name


def compile_and_share(ranks, folder: Path) -> None:
    mesh = build_mesh(2, ranks.device)
    transformer = load_transformer(GOLDEN / "base_dev", dtype=torch.float32)
    apply_policy(transformer, ResolutionPolicy())
    inputs = build_inputs(torch.float32)
    with torch.no_grad():
        alone = transformer(**inputs, return_dict=False)[0]
        compile_blocks(transformer)
        with context_parallel(transformer, mesh):
            together = 1.0 * transformer(**inputs, return_dict=False)[0]
        again = transformer(**inputs, return_dict=False)[0]
    torch.save((alone, together, again), folder / f"{ranks.rank}.pt")
    assert not counters["graph_break"]


def test_compiled_blocks_are_shared(tmp_path, rel):
    in_two(compile_and_share, tmp_path)
    for rank in range(2):
        alone, together, again = torch.load(tmp_path / f"{rank}.pt")
        assert rel(together, alone) < 1e-5
        assert rel(again, alone) < 1e-5


def refuse_backend(ranks) -> None:
    transformer = load_transformer(GOLDEN / "base_dev", dtype=torch.float32)
    mesh = build_mesh(2, ranks.device)
    transformer.set_attention_backend("_native_math")
    with (
        pytest.raises(ValueError, match="_native_math cannot be combined with several GPUs on one"),
        context_parallel(transformer, mesh),
    ):
        pass
    transformer.set_attention_backend("native")
    apply_policy(transformer, ResolutionPolicy(native_sequence_length=100, attention="local"))
    inputs = build_inputs(torch.float32)
    inputs["hidden_states"] = torch.randn(1, 1024, 64)
    inputs["img_ids"] = build_image_ids(32, 32)
    with (
        pytest.raises(
            ValueError, match="local attention cannot be combined with context parallelism"
        ),
        context_parallel(transformer, mesh),
    ):
        transformer(**inputs)


def test_what_context_parallelism_does_not_go_with():
    in_two(refuse_backend)


# rows and columns of latents, shares of what the stock model takes; one row leaves a rank without
SIZES = [(22, 14, (None, 0.5, 0.35)), (10, 26, (None, 0.5)), (54, 4, (None, 0.3)), (1, 30, (None,))]


def share_decoding(ranks, folder: Path) -> None:
    group = build_mesh(2, ranks.device).get_group("ulysses")
    found = {}
    for attention in (True, False):
        torch.manual_seed(1)
        model = AutoencoderKL(
            down_block_types=("DownEncoderBlock2D",) * 4,
            up_block_types=("UpDecoderBlock2D",) * 4,
            block_out_channels=(4, 4, 8, 8),
            norm_num_groups=2,
            latent_channels=16,
            mid_block_add_attention=attention,
        ).requires_grad_(False)
        for rows, columns, shares in SIZES:
            latents = torch.randn(1, 16, rows, columns, generator=torch.Generator().manual_seed(0))
            alone = model.decode(latents).sample
            whole = plan_decode(model, 8 * rows, 8 * columns).peak_bytes
            for share in shares:
                limit = int(share * whole) + ranks.rank if share else None  # the least counts
                together = vae.decode(model, latents, max_bytes=limit, group=group)
                found[attention, rows, share] = alone, together
    torch.save(found, folder / f"{ranks.rank}.pt")


def test_two_ranks_decode_as_one(tmp_path, rel):
    in_two(share_decoding, tmp_path)
    pictures = []
    for rank in range(2):
        found = torch.load(tmp_path / f"{rank}.pt")
        assert all(rel(together, alone) < 1e-5 for alone, together in found.values())
        pictures.append([together for _, together in found.values()])
    assert all(torch.equal(*pair) for pair in zip(*pictures, strict=True))


# --- jobs -----------------------------------------------------------------------------------------

JOBS = {
    "three": {"prompts": ("one", "two", "three"), "num_images": 1},
    "streamed": {"memory": "streamed"},
    "offload": {"memory": "offload"},
    "taylorseer": {"parts": ("taylorseer-cache=2",), "steps": 6},
    "8bit": {"parts": ("8bit",)},
    "mag": {"parts": ("mag-cache=0",), "prompts": ("one", "two")},
}


def build_job(name: str, folder: Path) -> GenerateConfig:
    expected = GOLDEN / "expected"
    adapters = tuple(str(expected / f"dev_{each}.safetensors") for each in ("2k_lora", "4k_minor"))
    defaults = {"prompts": ("one",), "steps": 2, "adapters": adapters}
    return GenerateConfig(
        **{**defaults, **JOBS[name]}, model=str(GOLDEN / "base_dev"), height=256, width=192, seed=5,
        output_dir=folder / name,
    )  # fmt: skip


def make_jobs(ranks, folder: Path) -> None:
    told: list[int] = []
    for name in JOBS:
        paths = generate(build_job(name, folder), on_progress=lambda p: told.append(p.picture))
        assert [path.exists() for path in paths] == [True] * len(paths)  # those of others too
    assert bool(told) == (ranks.rank == 0)


@pytest.mark.filterwarnings("ignore")  # those of torchao
def test_two_ranks_make_the_pictures_of_one(tmp_path, monkeypatch):
    monkeypatch.setenv("URAE_CACHE_DIR", str(tmp_path / "cache"))
    in_two(make_jobs, tmp_path / "two")
    for name in JOBS:
        for path in generate(build_job(name, tmp_path / "one")):
            with Image.open(path) as alone, Image.open(tmp_path / "two" / name / path.name) as both:
                gpus = both.info["gpus"]
                first, second = (np.asarray(image).astype(int) for image in (alone, both))
            # on the edge between two 8-bit levels; a picture that one rank makes is the same
            assert np.abs(first - second).max() <= (1 if gpus == "2" else 0), name
            assert gpus == ("2" if "0000-one" in path.name and name != "mag" else "1")


# --- training -------------------------------------------------------------------------------------


@pytest.mark.parametrize("launched", ["torchrun", "accelerate"])
def test_two_processes_train_as_one_that_accumulates(tmp_path, rel, launched):
    def train(*arguments: str, launcher: tuple[str, ...]) -> None:
        command = [
            *launcher, "-m", "urae", "train", str(ROOT / "recipes" / "flux_dev_2k_lora.toml"),
            "--data", str(GOLDEN / "train_data"), "--model", str(GOLDEN / "base_dev"),
            "--resolution", "256", "--adapter.rank", "4", "--steps", "2",
            "--preview-prompts", '["a", "b", "c"]', *arguments,
        ]  # fmt: skip
        environment = {**os.environ, "ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": "1"}
        done = subprocess.run(
            command, cwd=tmp_path, env=environment, capture_output=True, text=True
        )
        assert done.returncode == 0, done.stderr

    port = str(free_port())
    if launched == "torchrun":
        module, options = "torch.distributed.run", ("--nproc-per-node", "2", "--master-port", port)
    else:
        module = "accelerate.commands.launch"
        config = str(ROOT / "recipes" / "cluster" / "one_host.yaml")
        options = ("--config_file", config, "--num_processes", "2", "--main_process_port", port)
    split = ("--context-parallel", "2") if launched == "accelerate" else ()
    alone = () if split else ("--gradient-accumulation", "2")
    train("--output", "two", *split, launcher=(sys.executable, "-m", module, *options))
    train("--output", "one", *alone, launcher=(sys.executable,))
    two, one = (
        load_file(tmp_path / name / "pytorch_lora_weights.safetensors") for name in ("two", "one")
    )
    for key, tensor in one.items():
        assert rel(two[key], tensor) < 1e-4
    shared, alone = (
        {path.relative_to(tmp_path / name): path for path in find_previews(tmp_path / name)}
        for name in ("two", "one")
    )
    assert shared.keys() == alone.keys()
    assert len(alone) == 6  # three prompts before the first step and after the last
    for name, path in alone.items():
        first, second = (np.asarray(Image.open(each)).astype(int) for each in (path, shared[name]))
        assert np.abs(first - second).max() <= 1


class Line(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.weight = torch.nn.Parameter(torch.ones(3))


def train_a_line(rank: int, port: int, folder: str, num_ranks: int) -> None:
    from torch import distributed

    from urae.miniature.loop import LoopConfig, StageRun, run_loop

    if num_ranks > 1:
        distributed.init_process_group(
            "gloo", init_method=f"tcp://127.0.0.1:{port}", rank=rank, world_size=num_ranks
        )
    device = torch.device("cpu")
    # stopped halfway by the clock, then gone on with
    for max_seconds, done in ((-1.0, False), (math.inf, True)):
        run = StageRun(Path(folder), 0, {}, device, max_seconds, rank, num_ranks)
        line = Line()
        wanted = torch.arange(12.0).view(4, 3)
        own = wanted[rank * run.share(4) : (rank + 1) * run.share(4)]

        def compute_loss(step, generator, line=line, own=own):
            return (line.weight - own).square().mean(), {}

        found = run_loop(line, compute_loss, LoopConfig(120, 0.1), "line", run)
        assert found == done
        if num_ranks > 1:
            distributed.barrier()
    torch.save(line.weight, Path(folder) / f"{rank}.pt")
    if num_ranks > 1:
        distributed.destroy_process_group()


def test_two_processes_share_a_stage_of_the_miniature(tmp_path):
    for folder in ("two", "one"):
        (tmp_path / folder).mkdir()
    arguments = (free_port(), str(tmp_path / "two"), 2)
    multiprocessing.spawn(train_a_line, arguments, nprocs=2)
    train_a_line(0, 0, str(tmp_path / "one"), 1)
    first, second, alone = (
        torch.load(tmp_path / name) for name in ("two/0.pt", "two/1.pt", "one/0.pt")
    )
    assert torch.equal(first, second)
    torch.testing.assert_close(first, alone)
