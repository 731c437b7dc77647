"""Every exact rung of the memory ladder gives what the resident one gives."""

import weakref
from functools import partial

import pytest
import torch
from diffusers import FluxTransformer2DModel
from torch import nn

from urae.adapters.files import read_adapter
from urae.backbones.flux import build_meta_transformer, load_transformer, predict_velocity
from urae.generate import quantize as quantize_module
from urae.generate.speed import list_blocks
from urae.resolution import ResolutionPolicy, apply_policy
from urae.train import AdapterConfig, train
from urae.train import memory as memory_module
from urae.train.adapter import attach_for_training
from urae.train.chunks import chunk_mlps, feed_forward
from urae.train.estimate import Way, estimate
from urae.train.inputs import check_inputs
from urae.train.memory import choose_way, estimate_ways, place
from urae.train.recompute import count_tokens, set_checkpointing
from urae.train.stream import WeightStream

CPU = torch.device("cpu")
GPU = torch.device("cuda")
FULL = ResolutionPolicy(native_sequence_length=64)
LOCAL = ResolutionPolicy(attention="local", native_sequence_length=64)


@pytest.fixture
def build(bases, minor):
    def build(way, *, compiled=False, policy=None):
        transformer = load_transformer(bases["dev"], dtype=torch.float32)
        apply_policy(transformer, policy or ResolutionPolicy())
        over = [read_adapter(path) for path in minor.over]
        adapter = attach_for_training(transformer, minor, over, None, 0, CPU)
        with torch.no_grad():  # away from its start, where every gradient of a layer is alike
            for parameter in adapter.parameters:
                generator = torch.Generator().manual_seed(parameter.numel())
                parameter += 0.01 * torch.randn(parameter.shape, generator=generator)
        place(transformer, way, CPU, compiled=compiled)
        set_checkpointing(transformer.train(), way, CPU, compiled=compiled)
        return adapter

    return build


@pytest.fixture
def take_step(take_step):
    """Pictures that are large enough for local attention."""
    return partial(take_step, height=32, width=16)


@pytest.mark.parametrize("policy", [FULL, LOCAL], ids=["full", "local"])
@pytest.mark.parametrize("checkpointing", ["selective", "full"])
@pytest.mark.parametrize("tier", ["offload", "streamed"])
def test_exact_rungs_give_what_resident_gives(build, tier, checkpointing, policy, rel, take_step):
    wanted = take_step(build(Way("resident", "full"), policy=policy))
    adapter = build(Way(tier, checkpointing), policy=policy)
    for _ in range(2):
        for found, each in zip(take_step(adapter), wanted, strict=True):
            assert rel(found, each) < 1e-5


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:The .grad attribute:UserWarning")  # torch's own look at it
def test_compiled_and_streamed_gives_the_same(build, rel, monkeypatch, take_step):
    monkeypatch.setattr(
        torch, "compile", lambda f, compile=torch.compile: compile(f, backend="aot_eager")
    )
    torch.compiler.reset()
    wanted = take_step(build(Way("resident", "full")))
    adapter = build(Way("streamed", "full"), compiled=True)
    for _ in range(2):
        for found, each in zip(take_step(adapter), wanted, strict=True):
            assert rel(found, each) < 1e-5


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:The .grad attribute:UserWarning")  # torch's own look at it
@pytest.mark.parametrize("checkpointing", ["off", "full", "selective"])
def test_a_compiled_8bit_base_gives_the_same(build, rel, monkeypatch, take_step, checkpointing):
    monkeypatch.setattr(
        torch, "compile", lambda f, compile=torch.compile: compile(f, backend="aot_eager")
    )
    torch.compiler.reset()
    wanted = take_step(build(Way("8bit", "full")))
    adapter = build(Way("8bit", checkpointing), compiled=True)
    for _ in range(2):
        for found, each in zip(take_step(adapter), wanted, strict=True):
            assert rel(found, each) < 1e-5


def test_local_attention_is_local_here(build, rel, take_step):
    full, local = (take_step(build(Way("resident", "full"), policy=p)) for p in (FULL, LOCAL))
    assert rel(local[0], full[0]) > 0.01


# --- weights streamed a block ahead ---------------------------------------------------------------


@pytest.fixture
def watched(build, monkeypatch):
    """A streamed adapter, and the blocks whose weights were brought and were in place."""
    brought, used = [], []
    bring, put = WeightStream._bring, WeightStream._put

    def watch_bring(stream, index):
        if index not in stream._here:
            brought.append(index)
        bring(stream, index)

    def watch_put(stream, index, tensors):
        put(stream, index, tensors)
        if tensors is not stream._host[index]:
            used.append(index)
            assert len(stream._here) <= 2

    monkeypatch.setattr(WeightStream, "_bring", watch_bring)
    monkeypatch.setattr(WeightStream, "_put", watch_put)
    return build(Way("streamed", "full")), brought, used


def test_weights_come_once_each_way_and_a_block_ahead(watched, take_step):
    adapter, brought, used = watched
    take_step(adapter)
    last = len(list_blocks(adapter.transformer)) - 1
    forth, back = list(range(last + 1)), list(range(last, -1, -1))
    assert used == forth + back
    assert brought == forth + back[2:]  # the last two are still there when it turns around
    brought.clear()
    take_step(adapter)
    assert brought == forth[2:] + back[2:]


def test_a_forward_alone_finds_its_weights(watched):
    adapter, _, used = watched
    with torch.no_grad():
        first, second = (
            predict_velocity(
                adapter.transformer,
                torch.ones(1, adapter.transformer.config.in_channels // 4, 8, 8),
                torch.ones(1),
                torch.ones(1, 6, adapter.transformer.config.joint_attention_dim),
                torch.ones(1, adapter.transformer.config.pooled_projection_dim),
                1.0,
            )
            for _ in range(2)
        )
    assert torch.equal(first, second)
    assert used == 2 * list(range(len(list_blocks(adapter.transformer))))


def test_frozen_weights_are_back_on_the_host_after_a_step(build, take_step):
    adapter = build(Way("streamed", "full"))
    blocks = list_blocks(adapter.transformer)
    before = [t.data_ptr() for block in blocks for t in block.parameters()]
    take_step(adapter)
    assert [t.data_ptr() for block in blocks for t in block.parameters()] == before
    assert all(parameter.dtype == torch.float32 for parameter in adapter.parameters)


def test_what_autograd_saves_of_a_weight_stays_on_the_device():
    block = nn.Linear(2, 2).requires_grad_(False)
    stream, host, saved = WeightStream([block], CPU), block.weight, []
    keep = torch.autograd.graph.saved_tensors_hooks(saved.append, lambda _: None)
    with stream.on_device(0), keep:
        torch.ones(2, 2, requires_grad=True) * block.weight  # saved as it is, as compiled code does
        pointer = block.weight.data_ptr()
    assert block.weight is host
    assert [each.data_ptr() for each in saved] == [pointer] != [host.data_ptr()]


def test_an_error_leaves_the_weights_on_the_host():
    block = nn.Linear(2, 2).requires_grad_(False)
    stream, pointer = WeightStream([block], CPU), block.weight.data_ptr()
    with pytest.raises(RuntimeError, match="stop"), stream.on_device(0):
        assert block.weight.data_ptr() != pointer
        raise RuntimeError("stop")
    assert block.weight.data_ptr() == pointer


# --- MLPs in chunks -------------------------------------------------------------------------------


@pytest.mark.parametrize("num_tokens", [3, 7, 100])
def test_chunks_are_the_whole_mlp(num_tokens, rel):
    torch.manual_seed(0)
    up, down = nn.Linear(8, 32), nn.Linear(32, 6)
    tokens = torch.randn(2, 7, 16)[..., :8].requires_grad_()  # strided
    weights = [each.detach() for each in (up.weight, up.bias, down.weight, down.bias)]
    wanted = down(nn.functional.gelu(up(tokens), approximate="tanh"))
    found = feed_forward(tokens, *weights, num_tokens=num_tokens)
    assert rel(found, wanted) < 1e-6
    gradient = torch.randn_like(wanted)
    (right,) = torch.autograd.grad(wanted, tokens, gradient)
    assert rel(torch.autograd.grad(found, tokens, gradient)[0], right) < 1e-6
    torch.library.opcheck(torch.ops.urae.feed_forward.default, (tokens, *weights, num_tokens))


def test_an_mlp_that_an_adapter_acts_on_stays_whole():
    transformer = FluxTransformer2DModel(
        num_layers=1, num_single_layers=1, attention_head_dim=8, num_attention_heads=2,
        axes_dims_rope=(2, 2, 4), joint_attention_dim=8, pooled_projection_dim=8,
    )  # fmt: skip
    single, double = transformer.single_transformer_blocks[0], transformer.transformer_blocks[0]
    single.proj_mlp = type("Adapted", (nn.Linear,), {})(16, 64)
    before = single.proj_out, double.ff
    chunk_mlps(transformer)
    assert single.proj_out is before[0]
    assert double.ff is not before[1]


# --- quantised bases ------------------------------------------------------------------------------


@pytest.mark.filterwarnings("ignore")  # those of torchao
def test_gradients_through_an_8bit_base_are_those_of_its_dequantised_copy(build, rel, take_step):
    pytest.importorskip("torchao")
    quantized, dense = build(Way("8bit", "full")), build(Way("resident", "full"))
    for one, other in zip(
        quantized.transformer.modules(), dense.transformer.modules(), strict=True
    ):
        if isinstance(one, nn.Linear):
            weight = one.weight.data
            if type(weight) is not torch.Tensor:
                weight = weight.dequantize()
            other.weight.data = weight.to(other.weight.dtype)
    for found, wanted in zip(take_step(quantized), take_step(dense), strict=True):
        assert rel(found, wanted) < 1e-5


@pytest.mark.filterwarnings("ignore")  # those of torchao
def test_each_weight_goes_once_it_is_quantised(build, monkeypatch):
    pytest.importorskip("torchao")
    quantize, originals, num_alive = quantize_module._quantize_8bit, [], []

    def watch(parent, name, *arguments):
        num_alive.append(sum(weight() is not None for weight in originals))
        originals.append(weakref.ref(getattr(parent, name).weight))
        return quantize(parent, name, *arguments)

    monkeypatch.setattr(quantize_module, "_quantize_8bit", watch)
    build(Way("8bit", "full"))
    assert max(num_alive) <= 1


@pytest.mark.filterwarnings("ignore")  # those of torchao
def test_minor_components_are_those_of_the_weights_before_they_are_quantised(build):
    pytest.importorskip("torchao")
    quantized, exact = build(Way("8bit", "full")), build(Way("resident", "full"))
    assert quantized.origin_hash == exact.origin_hash
    for name, pair in exact.initial.items():
        assert all(map(torch.equal, pair, quantized.initial[name]))


# --- the choice -----------------------------------------------------------------------------------


@pytest.fixture
def free(monkeypatch):
    """Set what is free on GPU and host, in bytes."""

    def set_free(on_gpu, on_host=10**12):
        monkeypatch.setattr("urae.train.memory.free_bytes", lambda device: on_gpu)
        monkeypatch.setattr("urae.train.memory.free_host_bytes", lambda: on_host)

    return set_free


def test_auto_takes_the_first_that_fits(settings, free, bases, caplog):
    config = settings(gradient_checkpointing="auto", resolution=256)
    inputs = check_inputs(config)
    transformer = load_transformer(bases["dev"], dtype=torch.float32)
    tokens = count_tokens(inputs.samples)
    for way in (
        Way("resident", "selective"),
        Way("resident", "full"),
        Way("offload", "full"),  # selective keeps two blocks' maps, of four, and attentions' too
        Way("streamed", "full"),
    ):
        free(int(estimate(transformer, config, tokens, way).peak / 0.9) + 1)
        assert choose_way(config, inputs, GPU) == way
    free(0)
    with pytest.raises(MemoryError, match=r"0\.0 GiB are free on the GPU.*use --batch-size 1"):
        choose_way(config, inputs, GPU)
    free(10**12, 0)
    assert choose_way(config, inputs, GPU).tier == "resident"


def test_auto_never_chooses_what_training_refuses(settings, free):
    """Streamed weights with everything kept, or under an adapter that needs them in full."""
    for changes in ({}, {"adapter": AdapterConfig("dora", 4)}):
        config = settings(gradient_checkpointing="off", **changes)
        inputs = check_inputs(config)
        transformer = build_meta_transformer(inputs.model_path)
        tokens = count_tokens(inputs.samples)
        streamed = estimate(transformer, config, tokens, Way("streamed", "full"))
        free(int(streamed.peak / 0.9) + 1)
        with pytest.raises(MemoryError, match=r"too little for this run: --memory"):
            choose_way(config, inputs, GPU)


def test_ranks_of_a_context_hold_part_of_the_tokens_each(settings, bases):
    transformer = build_meta_transformer(bases["dev"])

    def find(**changes):
        ways = [Way("resident", "full")]
        return estimate_ways(transformer, settings(**changes), 528, ways)[0].kept

    whole = find()
    assert find(context_parallel=2, compile=False) == pytest.approx(whole / 2, rel=0.01)
    assert find(context_parallel=2) == pytest.approx((1 + 4) * whole / 2, rel=0.01)


def test_all_ranks_choose_by_what_is_free_where_least_is(settings, free, monkeypatch):
    inputs = check_inputs(settings())
    free(10**12)
    monkeypatch.setattr(memory_module, "find_least", lambda values, _: [0, values[1]])
    assert choose_way(settings(), inputs, GPU).tier == "resident"
    with pytest.raises(MemoryError, match=r"0\.0 GiB are free on the GPU"):
        choose_way(settings(), inputs, GPU, num_ranks=2)


def test_a_named_rung_is_taken_whatever_is_free(settings, free):
    inputs = check_inputs(settings())
    free(0, 0)
    for tier in ("resident", "offload", "streamed"):
        config = settings(memory=tier, gradient_checkpointing="full")
        assert choose_way(config, inputs, GPU) == Way(tier, "full")
    assert choose_way(settings(), inputs, CPU) == Way("resident", "off")


def test_what_cannot_be_is_refused_first(settings):
    inputs = check_inputs(settings())
    with pytest.raises(
        ValueError, match="--memory streamed is for one process, but this run has 2"
    ):
        streamed = settings(memory="streamed", gradient_checkpointing="full")
        choose_way(streamed, inputs, CPU, num_ranks=2)
    with pytest.raises(ValueError, match="--memory 4bit needs a CUDA device"):
        choose_way(settings(memory="4bit"), inputs, CPU)


def test_runs_of_all_exact_rungs_are_one_run(settings, tmp_path, rel):
    losses = {}
    for tier in ("resident", "offload", "streamed"):
        config = settings(
            memory=tier,
            gradient_checkpointing="full",
            steps=2,
            output_dir=tmp_path / tier,
            num_validation=1,
        )
        reports = []
        train(config, on_step=reports.append)
        losses[tier] = torch.tensor([report.loss for report in reports])
    assert torch.equal(losses["offload"], losses["resident"])
    assert rel(losses["streamed"], losses["resident"]) < 1e-5
