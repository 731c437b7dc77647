"""Recomputation, compiled blocks and the choice of attention change cost, not numbers."""

import gc
import logging
import math
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from types import SimpleNamespace

import pytest
import torch
from diffusers.models import attention_dispatch
from diffusers.models.attention_dispatch import attention_backend
from functorch.compile import make_boxed_func, min_cut_rematerialization_partition
from torch._dynamo.backends.common import aot_autograd
from torch._dynamo.utils import counters
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode

from urae.adapters.files import read_adapter
from urae.backbones.attention import backend, measure_error, pick_attention
from urae.backbones.flux import load_transformer
from urae.resolution import ResolutionPolicy, apply_policy
from urae.train import AdapterConfig, step, train
from urae.train.adapter import attach_for_training
from urae.train.attention import choose_attention, sound_attention
from urae.train.estimate import Way
from urae.train.host import HostKeeper
from urae.train.inputs import check_inputs
from urae.train.recompute import set_checkpointing, wants_compiled

ATTENTION = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu.default
SHAPE = (1, 48, 2, 8)
CPU = torch.device("cpu")


class Attentions(TorchDispatchMode):
    """Counts attentions."""

    def __init__(self):
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.count += func is ATTENTION
        return func(*args, **(kwargs or {}))


@pytest.fixture
def build(bases, expected):
    def build(kind="lora"):
        transformer = load_transformer(bases["dev"], dtype=torch.float32)
        apply_policy(transformer, ResolutionPolicy())
        lora = read_adapter(expected / "dev_2k_lora.safetensors")
        if kind == "lora":
            return attach_for_training(transformer, AdapterConfig("lora", 4), [], lora, 0)
        config = AdapterConfig("minor", 4, over=(str(lora.path),))
        return attach_for_training(transformer, config, [lora], None, 0)

    return build


def count_blocks(adapter):
    transformer = adapter.transformer
    return len(transformer.transformer_blocks) + len(transformer.single_transformer_blocks)


WAYS = [
    Way(tier, kept) for tier in ("resident", "offload") for kept in ("off", "selective", "full")
]


@pytest.mark.parametrize("kind", ["lora", "minor"])
@pytest.mark.parametrize("way", WAYS, ids=str)
def test_what_is_recomputed_changes_no_bit(build, kind, way, take_step):
    adapter = build(kind)
    wanted = take_step(adapter)
    set_checkpointing(adapter.transformer, way, CPU)
    for _ in range(2):
        assert all(map(torch.equal, take_step(adapter), wanted))


@pytest.mark.parametrize("way", WAYS, ids=str)
def test_attention_is_not_computed_twice(build, way, take_step):
    adapter = build()
    set_checkpointing(adapter.transformer, way, CPU)
    times = 2 if way.checkpointing == "full" else 1
    with Attentions() as attentions:
        take_step(adapter)
    assert attentions.count == times * count_blocks(adapter)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:The .grad attribute:UserWarning")  # torch's own look at it
@pytest.mark.parametrize(
    "way",
    [
        Way("resident", "off"),
        Way("resident", "selective"),
        Way("resident", "full"),
        Way("offload", "selective"),
        Way("offload", "full"),
    ],
    ids=str,
)
def test_compiled_blocks_give_the_same(build, way, monkeypatch, rel, take_step):
    backward_attentions = []

    def look_at_backward(graph, inputs):
        # recomputed with the random state of the forward, as an argument of another node
        calls = [(node.target, *node.args) for node in graph.graph.nodes]
        backward_attentions.append(sum(ATTENTION in call for call in calls))
        return make_boxed_func(graph)

    # all that torch.compile does on a GPU but the generation of code, which takes a minute
    compiler = aot_autograd(
        fw_compiler=lambda graph, inputs: make_boxed_func(graph),
        bw_compiler=look_at_backward,
        partition_fn=min_cut_rematerialization_partition,
    )
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend=compiler))
    torch.compiler.reset()
    adapter = build()
    wanted = take_step(adapter)
    set_checkpointing(adapter.transformer, way, CPU, compiled=True)
    counters.clear()
    for found, each in zip(take_step(adapter), wanted, strict=True):
        assert rel(found, each) < 1e-5
    assert counters["stats"]["unique_graphs"] == 2
    for side in (10, 12):
        take_step(adapter, side)
    assert counters["stats"]["unique_graphs"] == 4
    assert not counters["graph_break"]
    assert set(backward_attentions) == {1 if way.checkpointing == "full" else 0}


@pytest.mark.parametrize(
    ("tier", "compiled"), [("resident", True), ("8bit", True), ("4bit", False)]
)
def test_blocks_in_4_bits_are_not_compiled(settings, tier, compiled):
    samples = [SimpleNamespace(height=2048, width=2048)]
    assert wants_compiled(settings(steps=10_000), Way(tier, "full"), samples) == compiled


@pytest.mark.filterwarnings("ignore:The .grad attribute:UserWarning")  # torch's own look at it
def test_one_picture_a_batch_is_compiled_no_more_often(build, monkeypatch, take_step):
    """Each kind of block once, and once more for all sizes, as for several pictures."""
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend="eager"))
    torch.compiler.reset()
    adapter = build()
    set_checkpointing(adapter.transformer, Way("resident", "full"), CPU, compiled=True)
    counters.clear()
    for height, graphs in ((8, 2), (10, 4), (12, 4)):
        take_step(adapter, height, batch=1)
        assert counters["stats"]["unique_graphs"] == graphs


@pytest.mark.filterwarnings("ignore:The .grad attribute:UserWarning")  # torch's own look at it
@pytest.mark.parametrize(
    ("checkpointing", "compiled"),
    [
        ("full", False),
        ("selective", False),
        pytest.param("full", True, marks=pytest.mark.slow),
        pytest.param("selective", True, marks=pytest.mark.slow),
    ],
)
def test_what_is_kept_leaves_the_device(build, checkpointing, compiled, monkeypatch, take_step):
    """Blocks' inputs and outputs of attention, no weights and nothing that all blocks share."""
    sent, bring = [], HostKeeper.bring

    def watch(keeper, kept):
        sent.append(kept.host.numel())
        return bring(keeper, kept)

    monkeypatch.setattr(HostKeeper, "bring", watch)
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend="aot_eager"))
    torch.compiler.reset()
    adapter = build()
    set_checkpointing(adapter.transformer, Way("offload", checkpointing), CPU, compiled=compiled)
    take_step(adapter)
    channels, heads = adapter.transformer.inner_dim, adapter.transformer.config.num_attention_heads
    wanted = [2 * 16 * channels, 2 * 6 * channels]
    if checkpointing == "selective":
        wanted += [2 * 22 * channels, 2 * 22 * heads]
    assert sorted(sent) == sorted(count_blocks(adapter) * wanted)


@pytest.mark.filterwarnings("ignore:The .grad attribute:UserWarning")  # torch's own look at it
@pytest.mark.parametrize("compiled", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_what_is_on_the_host_is_not_on_the_device_too(build, compiled, monkeypatch, take_step):
    """Of the maps that were sent, the last block's alone outlive the forward."""
    sent, left, send = [], [], HostKeeper.send

    def watch(keeper, tensor):
        sent.append(StorageWeakRef(tensor.untyped_storage()))
        return send(keeper, tensor)

    def look(*_):
        gc.collect()  # compiling leaves cycles
        left.extend(number for number, storage in enumerate(sent) if not storage.expired())

    monkeypatch.setattr(HostKeeper, "send", watch)
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend="aot_eager"))
    torch.compiler.reset()
    adapter = build()
    set_checkpointing(adapter.transformer, Way("offload", "full"), CPU, compiled=compiled)
    adapter.transformer.proj_out.register_forward_hook(look)
    take_step(adapter)
    assert len(sent) == 2 * count_blocks(adapter)
    assert set(left) <= {len(sent) - 1, len(sent) - 2}


def test_a_block_is_brought_back_ahead():
    keeper = HostKeeper(CPU)
    kept = []
    for number in range(3):
        keeper.begin_block(is_first=number == 0)
        kept.append(keeper.send(torch.full((4,), float(number))))
    assert torch.equal(keeper.bring(kept[2]), torch.full((4,), 2.0))
    assert [each.coming is not None for each in kept] == [False, True, False]
    assert torch.equal(keeper.bring(kept[1]), torch.full((4,), 1.0))
    assert [each.coming is not None for each in kept] == [True, False, False]


def test_a_right_attention_is_found(caplog):
    caplog.set_level(logging.INFO)
    assert measure_error(backend("native"), SHAPE, torch.float32, CPU) < 1e-5
    assert 1e-4 < measure_error(backend("native"), SHAPE, torch.bfloat16, CPU) < 0.02
    assert pick_attention({"native": backend("native")}, SHAPE, torch.bfloat16, CPU) == "native"
    assert "attention native: " in caplog.text


@pytest.mark.parametrize(("fault", "error"), [(math.nan, "inf"), (1.1, "0.1")])
def test_wrong_gradients_are_refused(fault, error):
    class Wrong(torch.autograd.Function):
        @staticmethod
        def forward(ctx, query):
            return query.clone()

        @staticmethod
        def backward(ctx, gradient):
            return gradient * fault

    def attend_wrongly(query, key, value):
        return backend("native")(Wrong.apply(query), key, value)

    candidates = {"wrong": attend_wrongly}
    with pytest.raises(FloatingPointError, match=rf"wrong: gradients are {error} off"):
        pick_attention(candidates, SHAPE, torch.float32, CPU)
    candidates["right"] = backend("native")
    assert pick_attention(candidates, SHAPE, torch.float32, CPU) == "right"


def test_gradients_must_be_finite_at_the_full_length_too(monkeypatch):
    monkeypatch.setattr("urae.backbones.attention._CHECK_TOKENS", SHAPE[1] - 1)

    def attend(query, key, value):
        output = backend("native")(query, key, value)
        return output if query.shape[1] < SHAPE[1] else output * math.inf

    with pytest.raises(FloatingPointError, match="gradients are not finite at 48 tokens"):
        pick_attention({"long": attend}, SHAPE, torch.float32, CPU)


def test_a_missing_kernel_is_left_out(caplog):
    caplog.set_level(logging.INFO)
    candidates = {name: backend(name) for name in ("_native_cudnn", "native")}
    assert pick_attention(candidates, SHAPE, torch.bfloat16, CPU) == "native"
    assert "attention _native_cudnn is left out: No viable backend" in caplog.text


def test_a_crash_of_the_device_is_no_missing_kernel(monkeypatch):
    def crash(*_):
        raise torch.AcceleratorError("CUDA error: an illegal memory access\nCompile with")

    monkeypatch.setattr("urae.backbones.attention._synchronize", crash)
    with pytest.raises(OSError, match=r"attention it crashed on cpu \(CUDA error: an illegal mem"):
        pick_attention({"it": crash}, SHAPE, torch.bfloat16, CPU)


@pytest.mark.parametrize(("tokens", "used"), [(1088, "flash"), (1024, "cudnn"), (1100, "cudnn")])
def test_cudnn_does_not_train_on_half_a_tile(tokens, used):
    def attend(*_, **__):
        return registry.get_active_backend()[0].value

    registry = attention_dispatch._AttentionBackendRegistry
    for compiled in (False, True):  # whose code asks for the active backend too
        found = torch.compile(attend, backend="eager") if compiled else attend
        with attention_backend("_native_cudnn"):
            found()
            with sound_attention(tokens):
                assert found() == f"_native_{used}"
            assert found() == "_native_cudnn"


def test_each_batch_is_asked_for_its_own_tokens(settings, monkeypatch):
    lengths = []

    @contextmanager
    def watch(tokens):
        lengths.append(tokens)
        yield

    monkeypatch.setattr(step, "sound_attention", watch)
    config = settings()
    train(config)
    samples = check_inputs(replace(config, overwrite=True)).samples
    assert len(lengths) == config.steps
    assert set(lengths) <= {s.text_tokens + s.height * s.width // 256 for s in samples}
    assert len(set(lengths)) > 1


def test_on_a_cpu_torch_decides():
    shape = {"heads": 2, "head_dim": 8, "tokens": 48}
    assert choose_attention(CPU, torch.float32, **shape) == "native"
    with attention_backend("_native_math"):  # as DIFFUSERS_ATTN_BACKEND has it
        assert choose_attention(CPU, torch.float32, **shape) == "_native_math"
