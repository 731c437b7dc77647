"""The estimate of a step is what was measured, and what the stock blocks hold by count."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from diffusers import FluxTransformer2DModel
from diffusers.models.attention_dispatch import attention_backend
from torch import nn

from urae.adapters.attach import attach_trainable
from urae.adapters.files import LowRank
from urae.backbones.flux import build_meta_models, load_transformer, predict_velocity
from urae.backbones.weights import find_attention_linears
from urae.local_attention import build_local_attention
from urae.train import AdapterConfig, OptimizerConfig, TrainConfig
from urae.train.adapter import attach_for_training
from urae.train.chunks import chunk_mlps
from urae.train.estimate import (
    _CHUNKED,
    _WHOLE,
    TERMS,
    TIERS,
    Way,
    count_adapter,
    count_operations,
    estimate,
    estimate_seconds,
    list_ways,
)
from urae.train.recompute import set_checkpointing

GIB = 2**30
TOKENS = {1024: 4608, 2048: 16_896, 4096: 66_048}


@pytest.fixture(scope="module")
def flux():
    return build_meta_models("flux-dev")["transformer"]


def config(kind="lora", **changes):
    over = ("lora.safetensors",) if kind == "minor" else ()
    adapter = AdapterConfig(kind, 16, over=over)
    return TrainConfig("flux-dev", Path("data"), Path("run"), adapter=adapter, **changes)


@pytest.mark.parametrize(
    ("kind", "measured"), [("lora", 30.43), ("minor", 30.57), ("minor", 30.49)]
)
def test_a_step_is_what_was_measured(flux, kind, measured):
    """The rows of docs/performance.md at 2048 x 2048 on one H200, eager and compiled, in GiB."""
    found = estimate(flux, config(kind), TOKENS[2048], Way("resident", "full"))
    assert found.peak / GIB == pytest.approx(measured, rel=0.01)
    assert found.weights / GIB == pytest.approx(22.2, rel=0.01)
    assert found.peak == sum(getattr(found, term) for term in TERMS)


@pytest.mark.parametrize(
    ("kind", "side", "way", "measured"),
    [
        ("lora", 2048, Way("resident", "selective"), 35.95),
        ("minor", 2048, Way("offload", "full"), 25.23),
        ("minor", 4096, Way("resident", "selective"), 75.7),
        ("minor", 4096, Way("resident", "full"), 53.4),
        ("minor", 4096, Way("resident", "full"), 52.3),
        ("minor", 2048, Way("streamed", "full"), 3.64),
        ("minor", 4096, Way("streamed", "full"), 8.46),
        ("lora", 2048, Way("8bit", "full"), 19.2),
    ],
)
def test_other_ways_take_what_was_measured(flux, kind, side, way, measured):
    found = estimate(flux, config(kind), TOKENS[side], way).peak / GIB
    assert found == pytest.approx(measured, rel=0.03)


def test_streamed_steps_that_keep_attention_take_what_was_measured(flux):
    found = estimate(flux, config("minor"), TOKENS[4096], Way("streamed", "selective"))
    assert found.peak / GIB == pytest.approx(8.85, rel=0.07)


def test_a_shared_picture_takes_what_was_measured(flux):
    shared, tokens = config("minor", context_parallel=2), TOKENS[4096] // 2
    found = estimate(flux, shared, tokens, Way("resident", "full")).peak / GIB
    assert found == pytest.approx(83.4, rel=0.03)  # fitted to
    for way, same in ((Way("resident", "full"), {"shard": True}), (Way("4bit", "full"), {})):
        found, plain = (
            estimate(flux, replace(shared, **changes), tokens, way, 2 if same else 1)
            for changes in (same, {**same, "compile": False})
        )
        assert found.peak == plain.peak  # neither is compiled


@pytest.mark.parametrize(
    ("side", "way", "compiled", "measured"),
    [
        (2048, ("resident", "selective"), True, 2.41),  # fitted to, and 4096^2
        (4096, ("resident", "selective"), True, 23.2),
        (2048, ("resident", "full"), False, 4.51),  # fitted to, and the minor's
        (2048, ("resident", "full"), False, 4.60),
        (2048, ("resident", "full"), True, 2.72),
        (2048, ("resident", "full"), True, 2.76),  # minor
        (2048, ("offload", "full"), True, 2.85),
        (4096, ("resident", "full"), True, 28.5),
        (2048, ("streamed", "full"), True, 3.15),  # fitted to
        (4096, ("streamed", "full"), True, 29.7),
        (4096, ("streamed", "selective"), False, 26.9),
        (2048, ("8bit", "full"), True, 2.85),  # fitted to
    ],
)
def test_a_step_takes_the_time_that_was_measured(flux, side, way, compiled, measured):
    """The rows of docs/performance.md on one H200, in seconds."""
    found = estimate_seconds(flux, config(), TOKENS[side], Way(*way), compiled=compiled)
    assert found == pytest.approx(measured, rel=0.1)


def test_a_step_with_local_attention_takes_the_time_that_was_measured(flux):
    """The row that its rate was fitted to; four times the pixels take about four times as long."""

    def find(side):
        pattern = build_local_attention(side, side, 512, 64, torch.device("cpu"))
        tokens, way = side**2 + 512, Way("resident", "selective")
        return estimate_seconds(flux, config(), tokens, way, compiled=True, keys=pattern.num_keys)

    assert find(256) == pytest.approx(7.99, rel=0.02)
    assert 3.9 < find(512) / find(256) < 4.6  # each tile has an anchor that all tokens see


def test_what_was_not_measured_has_no_time(flux):
    def find(run, tokens=TOKENS[2048], way=("resident", "full"), compiled=True, keys=None):
        return estimate_seconds(flux, run, tokens, Way(*way), compiled=compiled, keys=keys)

    assert find(config()) is not None
    for way in (
        ("4bit", "full"), ("8bit", "selective"),
        ("resident", "off"), ("offload", "selective"),
    ):  # fmt: skip
        assert find(config(), way=way) is None
    assert find(config(), way=("streamed", "full"), compiled=False) is None
    assert find(config(), way=("streamed", "selective")) is None
    assert find(config(), way=("streamed", "full"), tokens=TOKENS[1024]) is None
    assert find(config(), keys=7954.5) is None
    assert find(config(), compiled=False, tokens=TOKENS[1024]) is None
    assert find(config(), tokens=512) is None
    for changes in ({"shard": True}, {"context_parallel": 2}):
        assert find(config(**changes)) is None
    assert find(config("dora")) is None


# --- which ways there are -------------------------------------------------------------------------


def tiers(num_ranks=1, **changes):
    return [way.tier for way in list_ways(config(**changes), num_ranks)]


def test_ways_are_those_that_the_config_allows():
    assert tiers(gradient_checkpointing="full") == list(TIERS)
    assert "streamed" not in tiers(gradient_checkpointing="off")
    assert "streamed" not in tiers(2)
    assert tiers(2, shard=True) == ["resident", "offload"]
    assert tiers(kind="dora") == ["resident", "offload"]
    assert list_ways(config(gradient_checkpointing="auto"))[0] == Way("resident", "selective")
    with pytest.raises(ValueError, match="--memory 8bit cannot be combined with shard"):
        tiers(2, memory="8bit", shard=True)
    with pytest.raises(
        ValueError, match="--memory streamed is for one process, but this run has 2"
    ):
        tiers(2, memory="streamed", gradient_checkpointing="full")


def test_less_memory_rung_by_rung(flux):
    peaks = {
        tier: estimate(flux, config("minor"), TOKENS[2048], Way(tier, "full")).peak / GIB
        for tier in TIERS
    }
    assert peaks["resident"] > peaks["offload"] > peaks["8bit"] > peaks["4bit"] > peaks["streamed"]
    assert peaks["streamed"] < 10
    assert peaks["8bit"] < 20


def test_what_is_offloaded_is_on_the_host(flux):
    full, selective = (
        estimate(flux, config(), TOKENS[4096], Way("offload", kept))
        for kept in ("full", "selective")
    )
    resident = estimate(flux, config(), TOKENS[4096], Way("resident", "full"))
    assert resident.host_bytes == 0
    assert resident.kept <= full.host_bytes < 2 * resident.kept
    assert selective.host_bytes >= 2 * full.host_bytes
    assert full.kept == pytest.approx(2 / 57 * resident.kept, rel=0.01)
    streamed = estimate(flux, config(), TOKENS[4096], Way("streamed", "full"))
    assert streamed.host_bytes - full.host_bytes > resident.weights - 2 * GIB


@pytest.mark.parametrize(("name", "copies"), [("prodigy", 5), ("adamw", 3), ("muon", 2)])
def test_the_optimizers_states_are_counted(flux, name, copies):
    optimizer = OptimizerConfig(name=name)
    found = estimate(flux, config(optimizer=optimizer), TOKENS[2048], Way("resident", "full"))
    assert found.adapter == copies * 4 * 18_677_760
    assert found.gradients == 4 * 18_677_760


def test_the_optimizers_states_are_as_many():
    from urae.train.estimate import STATES
    from urae.train.optimizer import build_optimizer

    for name in ("prodigy", "adamw", "schedule-free", "muon"):
        parameter = nn.Parameter(torch.ones(64, 64))
        optimizer = build_optimizer([parameter], OptimizerConfig(name=name))
        parameter.grad = torch.ones_like(parameter)
        optimizer.step()
        states = [t for t in optimizer.state[parameter].values() if isinstance(t, torch.Tensor)]
        assert sum(t.numel() for t in states) // parameter.numel() == STATES[name], name


@pytest.mark.parametrize("kind", ["lora", "minor", "dora", "lokr", "oft"])
def test_what_trains_is_counted_as_it_is_attached(bases, kind):
    adapter = AdapterConfig(kind, 4)
    transformer = load_transformer(bases["dev"], dtype=torch.float32)
    counted = count_adapter(transformer, adapter)
    attached = attach_for_training(transformer, adapter, [], None, 0)
    assert counted == sum(parameter.numel() for parameter in attached.parameters)


def test_operations_are_those_of_the_formula(flux):
    """418 TFLOP a forward at 2048^2, 3,907 at 4096^2, of which attention 78%."""
    forward = {side: count_operations(flux, t, "off") for side, t in TOKENS.items()}
    full = count_operations(flux, TOKENS[2048], "full")
    selective = count_operations(flux, TOKENS[2048], "selective")
    assert full - forward[2048] == pytest.approx(418e12, rel=0.01)
    attention = full - selective
    assert attention == pytest.approx(4 * 3072 * TOKENS[2048] ** 2 * 57, rel=1e-6)
    local = count_operations(flux, TOKENS[4096], "selective", keys=6_739)
    assert local < count_operations(flux, TOKENS[4096], "selective") / 3


# --- the maps of a block, by count on the meta device ---------------------------------------------


class Attention(torch.autograd.Function):
    """Holds what a GPU's does: log-sum-exp, and the sums of a gradient in float32."""

    @staticmethod
    def forward(ctx, query, key, value):
        output = torch.empty_like(query)
        sums = torch.empty(query.shape[:3], dtype=torch.float32, device=query.device)
        ctx.save_for_backward(query, key, value, output, sums)
        return output

    @staticmethod
    def backward(ctx, gradient):
        query, key, value, _, _ = ctx.saved_tensors
        sums = torch.empty(query.shape, dtype=torch.float32, device=query.device)
        found = [torch.empty_like(each) for each in (query, key, value)]
        del sums
        return tuple(found)


class Norm(torch.autograd.Function):
    """A fused RMS norm."""

    @staticmethod
    def forward(ctx, tokens, weight):
        ctx.save_for_backward(tokens)
        return torch.empty_like(tokens)

    @staticmethod
    def backward(ctx, gradient):
        return torch.empty_like(ctx.saved_tensors[0]), None


@pytest.mark.parametrize("beside", [False, True])
@pytest.mark.parametrize("chunked", [False, True])
@pytest.mark.parametrize("blocks", [(2, 0), (0, 2)])
def test_the_maps_are_those_of_the_stock_blocks(tracker, blocks, chunked, beside, monkeypatch):
    def attend(query, key, value, **_):
        return Attention.apply(*(each.contiguous() for each in (query, key, value)))

    monkeypatch.setattr(nn.functional, "scaled_dot_product_attention", attend)
    monkeypatch.setattr(nn.functional, "rms_norm", lambda tokens, _, w, eps: Norm.apply(tokens, w))
    dual, single = blocks
    shapes = [(1, 16, 256, 256), (1,), (1, 512, 4096), (1, 768)]
    with torch.device("meta"), attention_backend("native"):
        transformer = FluxTransformer2DModel(num_layers=dual, num_single_layers=single)
        nn.Module.to(transformer, torch.bfloat16)
        layers = {
            name: LowRank(torch.empty(16, 3072), torch.empty(3072, 16))
            for name in find_attention_linears(transformer)
        }
        parameters = attach_trainable(transformer, "new", layers, layers if beside else None)
        if chunked:
            chunk_mlps(transformer)
        set_checkpointing(transformer.train(), Way("resident", "full"), torch.device("cpu"))
        inputs = [torch.empty(shape, dtype=torch.bfloat16) for shape in shapes]
        for tensor in [*inputs, *transformer.parameters(), *transformer.buffers()]:
            tracker.count(tensor.untyped_storage(), made=False)
        with tracker:
            predict_velocity(transformer, *inputs, 3.5).square().mean().backward()
    assert all(parameter.grad is not None for parameter in parameters)
    found = tracker.peak / (TOKENS[2048] * 3072 * 2) - sum(blocks)
    wanted = _CHUNKED if chunked else _WHOLE
    assert found < wanted
    if single:  # the last block to run is where the most inputs are kept
        assert found == pytest.approx(wanted, abs=1)
