from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import multiprocessing

from urae.adapters.files import read_adapter
from urae.adapters.minor import split_minor
from urae.backbones.flux import PACKAGED, fetch_model, load_transformer
from urae.backbones.weights import find_attention_linears, open_original_weights
from urae.study.run import list_cells
from urae.study.starts import prepare_start
from urae.train.adapter import attach_for_training, read_adapters

LAYER = "transformer_blocks.0.attn.to_q"


@pytest.fixture
def weight(lora_2k):
    """A matrix of base and 2K LoRA together."""
    transformer = load_transformer(PACKAGED["miniature-dev"], dtype=torch.float32)
    pair = read_adapter(lora_2k).layers[LAYER]
    return open_original_weights(transformer, [LAYER])[LAYER]() + pair.up @ pair.down


@pytest.fixture
def start(study, lora_2k, tmp_path):
    """Prepare a start at rank 4, and read what its adapter begins with."""

    def prepare(adapter, seed=0):
        cells = list_cells(study("c", adapter_2k=lora_2k))
        training = next(cell.training for cell in cells if cell.training.adapter == adapter)
        training = replace(training, seed=seed)
        found = prepare_start(training, tmp_path / "starts")
        return training, found, read_adapters(found.adapter)

    return prepare


def attach(found, over, begin):
    transformer = load_transformer(fetch_model(found.model), dtype=torch.float32)
    return attach_for_training(transformer, found.adapter, over, begin, seed=0)


def test_lora_and_minor_components_are_the_products_own(start):
    for adapter in ("lora", "minor"):
        _, found, (over, begin) = start(adapter)
        assert found.adapter.kind == adapter and begin is None and len(over) == 1


def test_principal_components_are_the_largest(start, weight):
    training, found, (over, begin) = start("principal")
    pair = begin.layers[LAYER]
    left, values, right = torch.linalg.svd(weight)
    rank = training.rank
    wanted = left[:, :rank] * values[:rank] @ right[:rank]
    torch.testing.assert_close(pair.up @ pair.down, wanted, atol=1e-4, rtol=1e-3)
    adapter = attach(found, over, begin)  # they are subtracted, not computed anew
    torch.testing.assert_close(adapter.initial[LAYER].down, pair.down)


def test_random_components_differ_by_seed_and_are_components(start, weight):
    _, _, (_, begin) = start("random")
    _, _, (_, again) = start("random")
    _, _, (_, other) = start("random", seed=1)
    pair = begin.layers[LAYER]
    assert torch.equal(pair.down, again.layers[LAYER].down)
    assert not torch.equal(pair.down, other.layers[LAYER].down)
    values = torch.linalg.svdvals(pair.up @ pair.down)[: pair.down.shape[0]]
    distances = (values[:, None] - torch.linalg.svdvals(weight)).abs().min(dim=1).values
    assert distances.max() < 1e-4


def test_mica_keeps_the_minor_left_vectors(start, weight):
    training, found, (over, begin) = start("mica")
    pair = begin.layers[LAYER]
    assert not pair.down.any()
    minor = split_minor(weight, training.rank).up
    basis = torch.linalg.qr(minor).Q
    torch.testing.assert_close(pair.up, basis @ (basis.mT @ pair.up), atol=1e-3, rtol=0)
    adapter = attach(found, over, begin)
    assert [parameter.shape[0] for parameter in adapter.parameters] == 20 * [training.rank]
    assert sum(p.requires_grad for p in adapter.transformer.parameters()) == 20


def test_the_residual_loses_part_of_what_is_subtracted(study, tmp_path):
    cells = list_cells(study("e"))
    training = next(c.training for c in cells if c.training.adapter == "bf16 residual")
    found = prepare_start(training, tmp_path / "starts")
    assert found == prepare_start(training, tmp_path / "starts")
    names = find_attention_linears(load_transformer(PACKAGED["miniature-dev"], dtype=torch.float32))
    base, residual = (
        open_original_weights(load_transformer(path, dtype=torch.bfloat16), names)
        for path in (PACKAGED["miniature-dev"], fetch_model(found.model))
    )
    layers = read_adapter(found.adapter.init).layers
    errors = torch.stack(
        [
            (residual[name]() + pair.up @ pair.down - base[name]()).norm() / base[name]().norm()
            for name, pair in layers.items()
        ]
    )
    assert 0 < errors.max() < 2**-8  # a rounding of bfloat16 at most, but not nothing
    product = layers[LAYER].up @ layers[LAYER].down
    unchanged = (residual[LAYER]() == base[LAYER]()) & (product != 0)
    assert unchanged.float().mean() > 0.1


def write_residual(rank, training, folder):
    torch.set_num_threads(1)
    prepare_start(training, folder)


@pytest.mark.slow  # seconds of imports in each process
def test_processes_prepare_a_start_one_at_a_time(study, tmp_path):
    cells = list_cells(study("e"))
    training = next(c.training for c in cells if c.training.adapter == "bf16 residual")
    multiprocessing.spawn(write_residual, (training, tmp_path), nprocs=3)
    found = prepare_start(training, tmp_path)
    assert load_transformer(fetch_model(found.model), dtype=torch.bfloat16).dtype == torch.bfloat16
    names = {path.name for path in tmp_path.iterdir()}
    assert names == {"lock", Path(found.model).name, Path(found.adapter.init).name}
