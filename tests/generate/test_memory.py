import pytest
import torch
from torch._dynamo.testing import CompileCounter

import urae
from urae.backbones.flux import build_meta_models, predict_velocity
from urae.backbones.free_memory import free_bytes, vae_bytes
from urae.backbones.ranks import Ranks
from urae.generate.estimate import AUTO_TIERS, Request, estimate
from urae.generate.memory import (
    Room,
    _pinned_bytes,
    find_room,
    list_tiers,
    place,
    stream_blocks,
    stream_layers,
)
from urae.generate.quantize import (
    _quantize_8bit,
    build_quantization,
    can_quantize,
    check_quantization,
)
from urae.generate.speed import compile_blocks

GIB = 2**30
CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def room():
    models = build_meta_models("flux-dev")

    def build(gib, host_gib=64, *, tiers=AUTO_TIERS, side=4096, compiled=False):
        request = Request(side, side, compiled=compiled)
        estimates = [estimate(models, request, tier, gib * GIB) for tier in tiers]
        return Room(estimates, gib * GIB, host_gib * GIB)

    return build


@pytest.fixture
def adapters(expected):
    return [str(expected / f"dev_{name}.safetensors") for name in ("2k_lora", "4k_minor")]


# --- which tier -----------------------------------------------------------------------------------


def test_auto_takes_the_first_that_fits(room):
    assert room(80).choose("auto") == "resident"
    assert room(24).choose("auto") == "streamed"
    assert room(24, 16).choose("auto") == "8bit"


def test_auto_passes_over_a_library_that_is_missing(room, monkeypatch):
    monkeypatch.setattr("urae.generate.quantize.find_spec", lambda name: name != "torchao" or None)
    assert room(24, 16).choose("auto") == "4bit"


def test_a_named_tier_is_taken_even_if_it_does_not_fit(room):
    assert room(80).choose("4bit") == "4bit"
    assert room(8).choose("resident") == "resident"


def test_nothing_that_fits(room):
    with pytest.raises(MemoryError, match=r"4.0 GiB are free on the GPU and 64.0 .*smaller --size"):
        room(4).choose("auto")


def test_without_a_gpu_nothing_is_chosen():
    room = find_room({}, Request(4096, 4096), AUTO_TIERS, Ranks(CPU))
    assert room.choose("auto") == "resident"
    assert room.choose("streamed") == "streamed"
    assert room.find_fallback("resident") is None


def test_what_there_is_to_choose_from(tmp_path):
    assert list_tiers("auto", tmp_path) == AUTO_TIERS
    assert list_tiers("streamed", "flux-dev") == AUTO_TIERS
    assert list_tiers("offload", tmp_path) == ("offload", *AUTO_TIERS)
    (tmp_path / "one.safetensors").touch()
    assert list_tiers("auto", tmp_path / "one.safetensors") == ("resident", "streamed")


def test_what_to_try_next(room):
    assert room(80).find_fallback("resident") == "streamed"
    assert room(80).find_fallback("streamed") is None
    assert room(80, 8).find_fallback("resident") == "4bit"
    assert room(80, compiled=True).find_fallback("streamed") is None
    every = room(80, tiers=("offload", *AUTO_TIERS))
    assert every.choose("offload") == "offload"
    assert every.find_fallback("offload") == "streamed"


def test_a_cap_on_the_process_counts(monkeypatch):
    figures = {
        "mem_get_info": (60 * GIB, 80 * GIB),
        "memory_allocated": 2 * GIB,
        "memory_reserved": 5 * GIB,
        "get_per_process_memory_fraction": 1.0,
    }
    asked = []

    def answer(value):
        return lambda device: (asked.append(device), value)[1]

    for name, value in figures.items():
        monkeypatch.setattr(torch.cuda, name, answer(value))
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 3)
    for gpu in (torch.device("cuda"), torch.device("cuda", 3)):
        assert free_bytes(gpu) == 63 * GIB
    assert set(asked) == {torch.device("cuda", 3)}  # torch refuses one without a number
    monkeypatch.setattr(torch.cuda, "get_per_process_memory_fraction", answer(0.125))
    assert free_bytes(torch.device("cuda")) == 8 * GIB


def test_the_vae_takes_what_pays_of_a_gpu():
    gpu, small, large = torch.device("cuda"), 1024**2, 8192**2
    assert vae_bytes(gpu, 100 * GIB, small) == vae_bytes(gpu, 100 * GIB, 4096**2) == 7 * GIB
    assert vae_bytes(gpu, 100 * GIB, large) == 28 * GIB
    assert vae_bytes(gpu, 5 * GIB, small) == vae_bytes(gpu, 5 * GIB, large) == 4.5 * GIB
    assert vae_bytes(CPU, 100 * GIB, small) == 90 * GIB


# --- streaming; the CPU stands in for the GPU, without a side stream ------------------------------


@pytest.mark.parametrize("order", ["adapted, then streamed", "streamed, then adapted"])
def test_streamed_blocks_give_the_same_numbers(load_pipe, adapters, sample, order):
    wanted = sample(urae.adapt(load_pipe(), adapters), 64, 64)
    pipe = load_pipe()
    if order.startswith("adapted"):
        urae.adapt(pipe, adapters)
    stream_blocks(pipe.transformer, CPU)
    if order.startswith("streamed"):
        urae.adapt(pipe, adapters)
    assert all(hasattr(b, "_diffusers_hook") for b in pipe.transformer.transformer_blocks)
    assert torch.equal(sample(pipe, 64, 64), wanted)


def test_a_streamed_pipe_runs_where_its_blocks_come_to(load_pipe):
    pipe = load_pipe()
    place(pipe, "streamed", CPU)
    assert pipe._execution_device == CPU


def test_a_block_a_group_and_no_recorded_stream(load_pipe, monkeypatch):
    """Recorded streams let copies run ahead of a busy GPU, block upon block."""
    calls = []
    monkeypatch.setattr(
        "urae.generate.memory.apply_group_offloading",
        lambda module, **options: calls.append(options),
    )
    transformer = load_pipe().transformer
    stream_blocks(transformer, torch.device("cuda"))
    monkeypatch.setattr("urae.generate.memory.free_host_bytes", lambda: 0)
    stream_blocks(transformer, torch.device("cuda"))
    stream_layers(transformer, torch.device("cuda"))
    assert [c["offload_type"] for c in calls] == ["block_level", "block_level", "leaf_level"]
    assert [c["low_cpu_mem_usage"] for c in calls] == [False, True, True]
    assert all(c["use_stream"] and not c.get("record_stream") for c in calls)
    assert calls[0]["num_blocks_per_group"] == 1


def test_host_memory_too_short_to_pin(load_pipe, monkeypatch, caplog):
    monkeypatch.setattr("urae.generate.memory.apply_group_offloading", lambda *_, **__: None)
    monkeypatch.setattr("urae.generate.memory.free_host_bytes", lambda: 0)
    stream_blocks(load_pipe().transformer, torch.device("cuda"))
    assert "not enough host memory to pin" in caplog.text


def test_pinned_tensors_are_rounded_up():
    module = torch.nn.Linear(5, 3, bias=False)  # 60 bytes
    assert _pinned_bytes(module) == 64
    assert _pinned_bytes(torch.nn.Linear(4, 4, bias=False)) == 64


@pytest.mark.filterwarnings("ignore")  # torchao's own
def test_of_quantised_tensors_what_is_stored_is_pinned():
    parent = torch.nn.ModuleDict({"one": torch.nn.Linear(64, 64, bias=False, dtype=torch.bfloat16)})
    _quantize_8bit(parent, "one", "8bit", torch.device("cpu"))
    assert 64 * 64 < _pinned_bytes(parent) < 64 * 64 + 1024  # bytes, and a scale a row


@pytest.mark.slow
@torch.no_grad()
@pytest.mark.filterwarnings("ignore")  # dynamo's own
def test_streamed_blocks_are_compiled_once_a_kind(load_pipe, expected, monkeypatch, rel):
    pipe = urae.adapt(load_pipe(), expected / "dev_2k_lora.safetensors")
    transformer, compile_function = pipe.transformer, torch.compile
    config = transformer.config
    inputs = (
        torch.randn(1, 16, 8, 8),
        torch.tensor([0.5]),
        torch.randn(1, 9, config.joint_attention_dim),
        torch.randn(1, config.pooled_projection_dim),
    )
    wanted = predict_velocity(transformer, *inputs, 3.5)
    torch._dynamo.reset()
    counter = CompileCounter()
    monkeypatch.setattr(torch, "compile", lambda f: compile_function(f, backend=counter))
    compile_blocks(transformer)
    stream_blocks(transformer, CPU)
    for _ in range(2):
        assert rel(predict_velocity(transformer, *inputs, 3.5), wanted) < 1e-6
    assert counter.frame_count == 2  # as without streaming
    for height in (10, 12):  # once more for all sizes
        with torch.no_grad():
            predict_velocity(transformer, torch.randn(1, 16, height, 8), *inputs[1:], 3.5)
        assert counter.frame_count == 4


def test_a_streamed_text_encoder_gives_the_same_numbers(load_pipe):
    encoder = load_pipe().text_encoder_2
    ids = torch.arange(20)[None]
    with torch.no_grad():
        wanted = encoder(ids)[0]
        stream_layers(encoder.encoder, CPU)
        assert torch.equal(encoder(ids)[0], wanted)
    hooked = {name for name, m in encoder.encoder.named_modules() if hasattr(m, "_diffusers_hook")}
    held = {name.rpartition(".")[0] for name, _ in encoder.encoder.named_parameters()}
    assert held <= hooked  # no weight is left behind


# --- quantised ------------------------------------------------------------------------------------


def test_a_missing_library_is_named_with_its_install_line(monkeypatch):
    monkeypatch.setattr("urae.generate.quantize.find_spec", lambda _: None)
    with pytest.raises(ModuleNotFoundError, match=r"8bit needs .* torchao: pip install torchao"):
        check_quantization("8bit", CPU)
    with pytest.raises(ModuleNotFoundError, match="pip install bitsandbytes"):
        check_quantization("4bit", torch.device("cuda"))
    check_quantization("streamed", CPU)
    assert can_quantize("streamed")
    assert not can_quantize("4bit")


def test_four_bits_need_a_gpu():
    with pytest.raises(ValueError, match=r"4bit needs a CUDA device .* runs on cpu"):
        check_quantization("4bit", CPU)


@pytest.mark.filterwarnings("ignore")  # torchao's and bitsandbytes' own
def test_settings_of_the_quantised_tiers():
    four = build_quantization("4bit", torch.bfloat16)
    assert (four.bnb_4bit_quant_type, four.bnb_4bit_compute_dtype) == ("nf4", torch.bfloat16)
    assert build_quantization("8bit", torch.bfloat16).quant_method == "torchao"
    assert build_quantization("streamed", torch.bfloat16) is None
