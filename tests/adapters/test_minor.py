import logging
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch

from urae.adapters import minor
from urae.adapters.minor import minor_components, split_minor

SIZE, RANK = 512, 8
FLOAT32_ROUNDING = 1e-6  # about 16 units in the last place: the factors are float32


def gaussian(*shape, seed=0):
    weight = torch.randn(*shape, generator=torch.Generator().manual_seed(seed))
    return (weight * 2.7e-2).bfloat16().float()


def with_spectrum(values, seed=0):
    generator = torch.Generator().manual_seed(seed)
    left, right = (
        torch.linalg.qr(torch.randn(len(values), len(values), generator=generator).double()).Q
        for _ in range(2)
    )
    return left * values.double() @ right.mT


def assert_matches_svd(weight, split, rank, tolerance=FLOAT32_ROUNDING):
    left, values, right_t = torch.linalg.svd(weight.double(), full_matrices=False)
    left, values, right_t = left[:, -rank:], values[-rank:], right_t[-rank:]
    down, up = split.down.double(), split.up.double()
    minor_part = left * values @ right_t
    assert split.down.dtype == split.up.dtype == torch.float32
    assert split.down.shape == (rank, weight.shape[1])
    assert split.up.shape == (weight.shape[0], rank)
    assert torch.dist(up @ down, minor_part) <= tolerance * minor_part.norm()
    for squares in (down.square().sum(dim=1), up.square().sum(dim=0)):
        assert torch.allclose(squares, values, rtol=tolerance, atol=tolerance * values[0])
    outside = down - down @ right_t.mT @ right_t
    assert outside.norm() <= tolerance * down.norm()


@pytest.fixture
def no_full_svd(monkeypatch):
    def refuse(matrix, rank, norm):
        raise AssertionError("fell back to a full SVD")

    monkeypatch.setattr(minor, "_split_by_full_svd", refuse)


@pytest.fixture
def count_solves(monkeypatch):
    calls = []

    def counted(weight, rank):
        calls.append(rank)
        return split_minor(weight, rank)

    monkeypatch.setattr(minor, "split_minor", counted)
    return calls


SPECTRA = {
    "exponential decay": 4 * torch.exp(-torch.arange(SIZE) / SIZE * 9),
    "power law to a hard edge": torch.arange(1, SIZE + 1) ** -0.6
    * (1 - torch.arange(1, SIZE + 1) / (SIZE + 1)),
    "cluster inside": torch.cat([torch.linspace(3, 0.02, SIZE - RANK), torch.full((RANK,), 0.01)]),
    "two clusters, tied beyond the block": torch.cat(
        [torch.linspace(3, 0.1, SIZE - 48), torch.full((40,), 0.02), torch.full((8,), 0.01)]
    ),
    "outliers": torch.cat([torch.tensor([300.0, 90, 40]), torch.linspace(2, 1e-3, SIZE - 3)]),
}


@pytest.mark.parametrize("name", SPECTRA)
def test_matches_full_svd_without_one(name, no_full_svd):
    weight = with_spectrum(SPECTRA[name])
    assert_matches_svd(weight, split_minor(weight, RANK), RANK)


@pytest.mark.parametrize("rank", [1, 4, 12])
def test_gaussian_weight_of_any_rank(rank, no_full_svd):
    weight = gaussian(SIZE, SIZE)
    assert_matches_svd(weight, split_minor(weight, rank), rank)


def test_tie_at_the_boundary_gives_valid_components():
    values = torch.cat([torch.linspace(3, 0.1, SIZE - 40), torch.full((40,), 0.01)])
    weight = with_spectrum(values)
    down, up = (factor.double() for factor in split_minor(weight, RANK))
    assert torch.allclose(down @ down.mT, 0.01 * torch.eye(RANK).double(), atol=1e-8)
    # The factors' own float32 rounding, magnified by the largest singular value.
    rounding = 3 * torch.finfo(torch.float32).eps * down.norm()
    assert torch.dist(weight @ down.mT, 0.01 * up) <= rounding
    assert torch.dist(up.mT @ weight, 0.01 * down) <= rounding


@pytest.mark.parametrize("shape", [(320, 96), (96, 320), (24, 24), (2, 2)])
def test_small_and_non_square_weights(shape):
    rank = min(RANK, min(shape) - 1)
    weight = gaussian(*shape)
    assert_matches_svd(weight, split_minor(weight, rank), rank)


@pytest.mark.parametrize("num_null", [1, 3, 2 * RANK])
def test_singular_weight(num_null):
    weight = gaussian(SIZE, SIZE)
    weight[:, :num_null] = 0
    split = split_minor(weight, RANK)
    expected = torch.linalg.svdvals(weight.double())[-RANK:]
    assert torch.allclose(split.down.double().square().sum(dim=1), expected, atol=1e-12)
    if num_null < RANK:
        assert_matches_svd(weight, split, RANK)


def test_nearly_singular_weight():
    values = torch.linspace(3, 0.01, SIZE).double()
    values[-1] = 1e-12
    weight = with_spectrum(values)
    assert_matches_svd(weight, split_minor(weight, RANK), RANK)


def test_zero_and_orthogonal_weights():
    assert not split_minor(torch.zeros(SIZE, SIZE), RANK).up.any()
    split = split_minor(torch.eye(SIZE), RANK)
    assert torch.allclose(split.down @ split.down.mT, torch.eye(RANK), atol=1e-6)


def test_wrong_solve_does_not_leave(monkeypatch):
    lu_solve = torch.linalg.lu_solve

    def imprecise(*args, **kwargs):
        return lu_solve(*args, **kwargs).bfloat16().double()

    monkeypatch.setattr(torch.linalg, "lu_solve", imprecise)
    weight = gaussian(SIZE, SIZE)
    assert_matches_svd(weight, split_minor(weight, RANK), RANK)


def test_repeated_directions_do_not_leave(monkeypatch):
    monkeypatch.setattr(minor, "_orthonormalise", lambda vectors, basis: torch.linalg.qr(vectors).Q)
    weight = gaussian(SIZE, SIZE)
    assert_matches_svd(weight, split_minor(weight, RANK), RANK)


def test_bf16_and_parameter_input(no_full_svd):
    weight = gaussian(SIZE, SIZE)
    split = split_minor(torch.nn.Parameter(weight.bfloat16()), RANK)
    assert torch.equal(split.down, split_minor(weight, RANK).down)
    assert not split.up.requires_grad


class OnMps(torch.Tensor):
    """Says that it is on Apple's GPU, which has no float64."""

    device = torch.device("mps")

    def double(self):
        raise TypeError("the MPS framework doesn't support float64")


def test_a_device_without_float64_has_it_solved_on_the_cpu(monkeypatch):
    weight = gaussian(SIZE, SIZE)
    wanted = split_minor(weight, RANK)

    def move(tensor, target):
        return tensor.as_subclass(OnMps if torch.device(target).type == "mps" else torch.Tensor)

    monkeypatch.setattr(torch.Tensor, "to", move)
    split = split_minor(weight.to("mps"), RANK)
    assert all(type(factor) is OnMps for factor in split)
    for found, factor in zip(split, wanted, strict=True):
        assert torch.equal(found.to("cpu"), factor)


def test_same_bits_whatever_the_global_generator():
    weight = gaussian(SIZE, SIZE)
    torch.manual_seed(1)
    first = split_minor(weight, RANK)
    torch.manual_seed(2)
    second = split_minor(weight, RANK)
    assert torch.equal(first.down, second.down)
    assert torch.equal(first.up, second.up)


def test_order_and_signs():
    weight = gaussian(SIZE, SIZE)
    split, smaller = split_minor(weight, RANK), split_minor(weight, RANK - 3)
    assert split.down.norm(dim=1).diff().lt(0).all()
    assert split.down.gather(1, split.down.abs().argmax(1, keepdim=True)).gt(0).all()
    assert torch.allclose(smaller.down, split.down[3:], atol=1e-7)
    assert torch.allclose(smaller.up, split.up[:, 3:], atol=1e-7)


@pytest.mark.parametrize("rank", [0, -1, 96, 97])
def test_rank_out_of_range(rank):
    with pytest.raises(ValueError, match=rf"rank {rank} .* \(320, 96\); use 1 <= rank <= 95"):
        split_minor(gaussian(320, 96), rank)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_non_finite_weight(value):
    weight = gaussian(SIZE, SIZE)
    weight[3, 5] = value
    with pytest.raises(ValueError, match="must be finite"):
        split_minor(weight, RANK)


@pytest.mark.parametrize("shape", [(SIZE,), (4, SIZE, SIZE)])
def test_weight_must_be_2d(shape):
    with pytest.raises(ValueError, match="must be 2-D"):
        split_minor(torch.ones(shape), 1)


def loaders(count=3):
    return {f"w{seed}": lambda seed=seed: gaussian(SIZE, SIZE, seed=seed) for seed in range(count)}


def assert_same_splits(first, second):
    assert list(first) == list(second)
    for name in first:
        assert torch.equal(first[name].down, second[name].down)
        assert torch.equal(first[name].up, second[name].up)


def test_cache_hit_does_not_solve(tmp_path, count_solves):
    seen = []
    first = minor_components(
        loaders(), RANK, cache_dir=tmp_path / "new" / "folder", progress=lambda *n: seen.append(n)
    )
    assert len(count_solves) == 3
    assert seen == [(1, 3), (2, 3), (3, 3)]
    again = minor_components(loaders(), RANK, cache_dir=tmp_path / "new" / "folder")
    assert len(count_solves) == 3
    assert_same_splits(first, again)
    assert torch.equal(first["w1"].up, split_minor(gaussian(SIZE, SIZE, seed=1), RANK).up)


def test_cache_misses_for_another_weight_rank_or_solver(tmp_path, count_solves, monkeypatch):
    weight = gaussian(SIZE, SIZE)
    minor_components({"w": lambda: weight}, RANK, cache_dir=tmp_path)
    minor_components({"w": lambda: weight}, RANK + 1, cache_dir=tmp_path)
    changed = weight.clone()
    changed[0, 0] += 1e-3
    minor_components({"w": lambda: changed}, RANK, cache_dir=tmp_path)
    monkeypatch.setattr(minor, "SOLVER_VERSION", minor.SOLVER_VERSION + 1)
    minor_components({"w": lambda: weight}, RANK, cache_dir=tmp_path)
    assert count_solves == [RANK, RANK + 1, RANK, RANK]


@pytest.mark.parametrize("damage", ["empty", "truncated", "flipped bit", "garbage"])
def test_damaged_cache_file_is_recomputed(tmp_path, count_solves, caplog, damage):
    first = minor_components(loaders(1), RANK, cache_dir=tmp_path)
    (path,) = tmp_path.iterdir()
    data = path.read_bytes()
    flipped = data[:-5] + bytes([data[-5] ^ 1]) + data[-4:]
    damaged = {
        "empty": b"",
        "truncated": data[:-9],
        "flipped bit": flipped,
        "garbage": b"\xff" * 99,
    }
    path.write_bytes(damaged[damage])
    with caplog.at_level(logging.WARNING):
        again = minor_components(loaders(1), RANK, cache_dir=tmp_path)
    assert len(count_solves) == 2
    assert f"cannot use cache file {path}" in caplog.text
    assert_same_splits(first, again)
    assert path.read_bytes() == data


def test_unusable_cache_folder_is_one_warning(tmp_path, caplog):
    (tmp_path / "file").write_text("not a folder")
    with caplog.at_level(logging.WARNING):
        splits = minor_components(loaders(), RANK, cache_dir=tmp_path / "file" / "minor")
    assert len(splits) == 3
    assert caplog.text.count("cannot write to cache folder") == 1


def test_full_disk_is_a_warning_and_leaves_no_file(tmp_path, caplog, monkeypatch):
    def full(self, target):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("pathlib.Path.replace", full)
    with caplog.at_level(logging.WARNING):
        splits = minor_components(loaders(), RANK, cache_dir=tmp_path)
    assert len(splits) == 3
    assert "No space left on device" in caplog.text
    assert not list(tmp_path.iterdir())


def test_concurrent_writers(tmp_path):
    def work(_):
        return minor_components(loaders(4), RANK, cache_dir=tmp_path)

    with ThreadPoolExecutor(4) as pool:
        results = list(pool.map(work, range(4)))
    for result in results[1:]:
        assert_same_splits(results[0], result)
    assert len(list(tmp_path.iterdir())) == 4
    assert all(path.suffix == ".safetensors" for path in tmp_path.iterdir())


def test_process_killed_before_the_rename(tmp_path, count_solves, caplog):
    script = f"""
import os, pathlib, torch
from urae.adapters.minor import minor_components
pathlib.Path.replace = lambda self, target: os._exit(9)
weight = torch.randn({SIZE}, {SIZE}, generator=torch.Generator().manual_seed(0))
weight = (weight * 2.7e-2).bfloat16().float()
minor_components({{"w0": lambda: weight}}, {RANK}, cache_dir=pathlib.Path({str(tmp_path)!r}))
"""
    killed = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert killed.returncode == 9, killed.stderr
    (leftover,) = tmp_path.iterdir()
    assert leftover.suffix == ".tmp"
    with caplog.at_level(logging.WARNING):
        splits = minor_components(loaders(1), RANK, cache_dir=tmp_path)
    assert count_solves == [RANK]
    assert not caplog.text
    assert_matches_svd(gaussian(SIZE, SIZE), splits["w0"], RANK)
    assert len(list(tmp_path.glob("*.safetensors"))) == 1


def test_default_cache_folder(tmp_path, monkeypatch):
    monkeypatch.setenv("URAE_CACHE_DIR", str(tmp_path))
    minor_components(loaders(1), RANK)
    assert len(list((tmp_path / "minor").iterdir())) == 1


def test_errors_name_the_weight(tmp_path):
    with pytest.raises(ValueError, match=r"^blocks\.0\.to_q: rank 512 is out of range"):
        minor_components({"blocks.0.to_q": loaders(1)["w0"]}, SIZE, cache_dir=tmp_path)
