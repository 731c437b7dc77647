"""What several processes need of each other, checked before weights load."""

from dataclasses import replace

import pytest

from urae.features.dataset import list_samples
from urae.resolution import ResolutionPolicy
from urae.train import AdapterConfig, train
from urae.train import loop as loop_module
from urae.train import ranks as ranks_module
from urae.train.inputs import check_inputs
from urae.train.mesh import Mesh, check_mesh
from urae.train.ranks import check_alike


@pytest.fixture
def check(settings, bases):
    def check(num_ranks, policy=None, samples=None, **changes):
        config = settings(**changes)
        samples = samples or list_samples(config.data_dir)
        check_mesh(config, samples, bases["dev"], policy or ResolutionPolicy(), num_ranks)

    return check


def test_what_divides_is_let_through(check):
    check(1)
    check(3)
    check(2, context_parallel=2)
    check(6, context_parallel=2, shard=True, preview_prompts=("a",))


@pytest.mark.parametrize(
    ("num_ranks", "degree", "message"),
    [
        (1, 2, r"2 does not divide 1, the number of processes; this run can have 1 \("),
        (4, 3, r"3 does not divide 4, the number of processes; this run can have 1, 2 \("),
        (4, 4, r"4 does not divide 2, the base's attention heads; this run can have 1, 2 \(from 2"),
    ],
)
def test_processes_and_heads_must_divide(check, num_ranks, degree, message):
    with pytest.raises(ValueError, match=f"context_parallel {message}"):
        check(num_ranks, context_parallel=degree)


def test_every_picture_must_divide(check, settings):
    samples = list_samples(settings().data_dir)
    odd = replace(samples[2], height=240, width=208)
    message = r"2 does not divide 195, the tokens of image_2, 208 x 240 pixels; this run can have 1"
    with pytest.raises(ValueError, match=message):
        check(2, samples=[*samples, odd], context_parallel=2)
    with pytest.raises(ValueError, match=r"does not divide 225, the tokens of a preview;"):
        check(2, context_parallel=2, resolution=240, preview_prompts=("a",))


def test_local_attention_is_not_split(check):
    with pytest.raises(
        ValueError, match="2 cannot be combined with local attention, for which each rank"
    ):
        check(2, ResolutionPolicy(attention="local"), context_parallel=2)


def test_shards_need_processes_of_one_host(check, monkeypatch):
    with pytest.raises(ValueError, match="processes of a host, of which there are 1 here and 1 in"):
        check(1, shard=True)
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "4")
    check(8, shard=True)
    with pytest.raises(ValueError, match="there are 4 here and 6 in all; start two or more on"):
        check(6, shard=True)
    with pytest.raises(ValueError, match="compile true cannot be combined with shard"):
        check(8, shard=True, compile=True)


def test_all_is_checked_before_weights_load(settings, monkeypatch):
    monkeypatch.setattr(loop_module, "load_transformer", None)
    with pytest.raises(ValueError, match="context_parallel 2 does not divide 1, the number of"):
        train(settings(context_parallel=2))
    with pytest.raises(ValueError, match="context_parallel 0 must be at least 1"):
        settings(context_parallel=0)
    assert not settings().output_dir.exists()


def test_processes_that_would_train_apart_are_refused(settings, monkeypatch):
    """Accelerate leaves processes of torchrun that see no GPU to themselves."""
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(ValueError, match="2 processes were started, and this one, on cpu, would"):
        train(settings())
    assert not settings().output_dir.exists()


@pytest.mark.parametrize(
    ("differs", "change"),
    [
        ("seed: 1, not 0;", {"seed": 1}),
        ("adapter.rank: 3, not 4;", {"adapter": AdapterConfig(rank=3)}),
        (r"base: \w+, not \w+;", {"model": "schnell"}),
    ],
)
def test_processes_that_differ_are_refused(settings, bases, monkeypatch, differs, change):
    if "model" in change:
        change = {"model": str(bases[change["model"]])}
    inputs, facts = check_inputs(settings()), []
    monkeypatch.setattr(ranks_module, "gather_object", lambda found: facts.extend(found) or facts)
    policy = ResolutionPolicy()
    check_alike(settings(), inputs, policy)
    elsewhere = replace(settings(), output_dir=settings().data_dir)  # paths may differ
    check_alike(elsewhere, inputs, policy)
    with pytest.raises(ValueError, match=f"process 2 differs from process 0 in {differs}"):
        check_alike(settings(**change), check_inputs(settings(**change)), policy)
    with pytest.raises(ValueError, match="process 2 differs from process 0 in policy"):
        facts.pop()
        check_alike(settings(), inputs, ResolutionPolicy(ntk_factor=2.0))


def test_every_rank_has_as_much_to_do(settings):
    meshes = [Mesh(None, rank, 6, 2) for rank in range(6)]
    assert [mesh.data_rank for mesh in meshes] == [0, 0, 1, 1, 2, 2]
    shares = [mesh.share(7) for mesh in meshes]
    assert shares[::2] == shares[1::2] == [[0, 3, 6], [1, 4, 6], [2, 5, 6]]
    assert Mesh(None, 0, 1, 1).share(3) == [0, 1, 2]
    assert Mesh(None, 0, 1, 1).share(0) == []
