import gc
import os
from weakref import ref

import accelerate
import pytest
import torch
from diffusers import FluxImg2ImgPipeline
from diffusers.models.transformers.transformer_flux import FluxAttnProcessor
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

import urae
from urae.generate import joined_adapters, optimize, parts, quantize
from urae.generate.memory import stream_blocks
from urae.generate.optimize import choose_parts
from urae.generate.parts import EXACT, PRESETS, Part, find_bits, resolve_parts
from urae.generate.speed import default_cache_dir, keep_compiled
from urae.resolution import ResolutionPolicy, find_policy
from urae.undo import is_optimized

CPU = torch.device("cpu")


@pytest.fixture
def adapted(load_pipe, expected):
    return lambda **options: urae.adapt(
        load_pipe(), expected / "dev_2k_lora.safetensors", **options
    )


def apply(pipe, *names):
    return urae.optimize(pipe, speed=None, parts=names)


# --- which parts ----------------------------------------------------------------------------------


def names(resolved):
    return [str(part) for part in resolved]


def test_a_preset_and_parts_beside_it():
    exact = ["attention-backend", "joined-adapters", "constants", "compile", "striped-vae"]
    assert names(resolve_parts("exact")) == exact
    assert names(resolve_parts(None)) == []
    both = resolve_parts("exact", ["mag-cache=0.1", "fp8"])
    assert names(both) == ["fp8", *exact, "mag-cache=0.1"]
    assert find_bits(both) == "fp8"
    assert find_bits(resolve_parts("exact")) is None


def test_a_part_that_is_named_takes_the_place_of_a_presets(monkeypatch):
    monkeypatch.setitem(PRESETS, "turbo", (*PRESETS["exact"], "8bit", "mag-cache"))
    chosen = resolve_parts("turbo", ["taylorseer-cache=3", "fp8"])
    exact = names(resolve_parts("exact"))
    assert names(chosen) == ["fp8", *exact, "taylorseer-cache=3"]


def test_strengths_default_to_the_libraries_own():
    assert names([Part("mag-cache"), Part("first-block-cache")]) == [
        "mag-cache=0.06",
        "first-block-cache=0.05",
    ]
    assert Part.parse("mag-cache=0.06") == Part("mag-cache")


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (["magic"], "part 'magic' is unknown; known: fp8, 8bit"),
        (["compile=2"], r"part compile has no strength to set; leave out =2.0"),
        (["mag-cache=much"], "'much' is not a number; a part is NAME or NAME=STRENGTH"),
        (["mag-cache=-1"], "strength -1.0 of mag-cache must be a finite number from 0"),
        (["mag-cache=inf"], "must be a finite number from 0"),
        (["taylorseer-cache=2.5"], "must be a whole number from 1"),
        (["taylorseer-cache=0"], "must be a whole number from 1"),
        (
            ["mag-cache", "taylorseer-cache"],
            "mag-cache=0.06 and taylorseer-cache=3 cannot be combined",
        ),
        (["progressive=1.1"], "strength 1.1 of progressive must be a finite number from 0 to 1"),
        (
            ["local-attention=2"],
            "strength 2.0 of local-attention must be a finite number from 0 to 1",
        ),
        (["fp8", "4bit"], "cannot be combined; choose one"),
        (["joined-adapters", "merged-adapters"], "cannot be combined; choose one"),
        (["compile", "compile"], "cannot be combined; choose one"),
    ],
)
def test_parts_that_are_none(load_pipe, given, message):
    with pytest.raises(ValueError, match=message):
        urae.optimize(load_pipe(), speed=None, parts=given)


def test_a_speed_that_is_none(load_pipe):
    with pytest.raises(ValueError, match="speed 'warp' must be exact, fast, turbo or None"):
        urae.optimize(load_pipe(), speed="warp")


def find(load_pipe, speed, **settings):
    settings = {"compiled": False, "known": {}, **settings}
    return optimize.find_unfit(speed, load_pipe().transformer, CPU, **settings)


def test_what_does_not_go_here_is_left_out_of_a_preset(load_pipe, caplog, monkeypatch):
    mixed = (*PRESETS["exact"], "fp8", "progressive", "taylorseer-cache=2")
    monkeypatch.setitem(PRESETS, "fast", mixed)
    unfit = find(load_pipe, "fast")
    assert unfit["fp8"].startswith("part fp8 needs a GPU of compute capability 8.9")
    chosen = names(choose_parts("fast", [], compiled=False, unfit=unfit))
    assert chosen[-1] == "taylorseer-cache=2"
    assert {"fp8", "compile"}.isdisjoint(chosen)
    assert "speed fast: fp8 is left out: part fp8 needs a GPU" in caplog.text
    assert "fp8" in names(choose_parts("fast", ["fp8"], compiled=False, unfit=unfit))
    assert not find(load_pipe, "exact")
    assert find(load_pipe, "turbo", memory="8bit")["fp8"] == "--memory 8bit quantises the weights"
    small = find(load_pipe, "turbo", known={"progressive": "it is small"})
    assert small["progressive"] == "it is small"
    assert small["local-attention"].startswith("it only helps compiled blocks")
    assert "local-attention" not in find(load_pipe, "turbo", compiled=True)
    monkeypatch.setattr(quantize, "_has_fp8", lambda _: True)
    assert find(load_pipe, "fast")["fp8"] == small["local-attention"]
    assert "fp8" not in find(load_pipe, "fast", compiled=True)
    other = find(load_pipe, "turbo", plain=False)
    assert set(other) >= set(parts.SCHEDULED)
    assert other["progressive"] == "it only works with FluxPipeline, and this is another pipeline"


@pytest.mark.parametrize("speed", ["fast", "turbo"])
def test_presets_go_with_every_pipeline(load_pipe, speed, caplog):
    pipe = FluxImg2ImgPipeline.from_pipe(load_pipe(), dtype=torch.float32)
    urae.optimize(pipe, speed=speed)
    assert (
        f"speed {speed}: taylorseer-cache is left out: it only works with FluxPipeline"
        in caplog.text
    )


def test_weights_that_are_quantised_stay_so(load_pipe, monkeypatch):
    monkeypatch.setattr(quantize, "_has_fp8", lambda _: True)
    transformer = load_pipe().transformer
    assert "fp8" not in optimize.find_unfit("fast", transformer, CPU, compiled=True, known={})
    quantize.quantize_blocks(transformer, "8bit", CPU)
    unfit = optimize.find_unfit("fast", transformer, CPU, compiled=True, known={})
    assert unfit["fp8"] == "the weights are already quantised"


def test_an_adapted_pipe_knows_whether_its_4k_adapter_goes_alone(load_pipe, expected, caplog):
    lora = expected / "dev_2k_lora.safetensors"
    alone = expected / "dev_4k_lora_conversion.safetensors"
    for adapters, is_left_out in (([alone], True), ([lora, alone], False), ([lora], False)):
        caplog.clear()
        urae.optimize(urae.adapt(load_pipe(), adapters), speed="fast")
        assert ("progressive is left out: a 4K adapter alone" in caplog.text) == is_left_out


def test_few_steps_have_no_approximations_but_turbos_fp8(load_pipe, monkeypatch):
    monkeypatch.setattr(quantize, "_has_fp8", lambda _: True)
    transformer = load_pipe().transformer
    transformer.register_to_config(guidance_embeds=False)
    fast, turbo = (
        optimize.find_unfit(speed, transformer, CPU, compiled=True, known={})
        for speed in ("fast", "turbo")
    )
    assert set(fast) == {"fp8", *parts.SCHEDULED}
    assert set(turbo) == set(parts.SCHEDULED)
    other = optimize.find_unfit("fast", transformer, CPU, plain=False, compiled=True, known={})
    assert set(other) == set(fast)


def test_a_preset_adds_no_local_attention_to_adapters_that_learnt_it(load_pipe, expected, caplog):
    policy = ResolutionPolicy(native_sequence_length=80, attention="local")
    pipe = urae.adapt(load_pipe(), expected / "dev_2k_lora.safetensors", policy=policy)
    urae.optimize(pipe, speed="turbo")
    assert "local-attention is left out: the adapters were trained with it" in caplog.text
    assert find_policy(pipe.transformer).policy == policy


@pytest.mark.parametrize("speed", ["fast", "turbo"])
def test_a_preset_approximates(adapted, sample, speed):
    pipe = adapted(policy=urae.ResolutionPolicy(native_sequence_length=80))
    wanted = sample(pipe, 128, 128, num_inference_steps=8)
    urae.optimize(pipe, speed=speed)
    found = sample(pipe, 128, 128, num_inference_steps=8)
    assert found.isfinite().all()
    assert not torch.equal(found, wanted)


def test_every_part_of_a_preset_is_one_and_fast_is_not_beyond_turbo():
    for speed, preset in PRESETS.items():
        assert resolve_parts(speed)
        assert {Part.parse(text).name for text in preset} >= set(PRESETS["exact"])
    assert set(PRESETS["exact"]) <= set(EXACT)
    assert parts.BARS["fast"] < parts.BARS["turbo"]


# --- in place, and undone -------------------------------------------------------------------------


def test_on_a_cpu_exact_changes_the_rounding_alone(adapted, sample, rel, caplog):
    pipe = adapted()
    wanted = sample(pipe, 64, 64)
    assert urae.optimize(pipe) is pipe
    assert rel(sample(pipe, 64, 64), wanted) < 1e-5
    kinds = {type(each).__name__ for each in pipe.transformer.modules()}
    assert "_Merged" in kinds  # which has no products of its own
    assert "_OneProduct" not in kinds
    assert not caplog.text
    assert not any(hasattr(b, "_diffusers_hook") for b in pipe.transformer.transformer_blocks)


def test_a_second_call_replaces_the_first(adapted, sample):
    pipe = adapted()
    wanted = sample(pipe, 64, 64)
    apply(pipe, "8bit")
    eight = sample(pipe, 64, 64)
    apply(pipe, "8bit")
    assert torch.equal(sample(pipe, 64, 64), eight)
    apply(pipe)
    assert torch.equal(sample(pipe, 64, 64), wanted)


def test_restore_undoes_a_pipe_that_is_not_adapted(load_pipe, sample):
    pipe = load_pipe()
    wanted = sample(pipe, 64, 64)
    apply(pipe, "8bit", "first-block-cache=1")
    assert not torch.equal(sample(pipe, 64, 64), wanted)
    urae.restore(pipe)
    assert torch.equal(sample(pipe, 64, 64), wanted)


def test_an_optimized_pipe_is_not_adapted(adapted, sample, expected):
    pipe = apply(adapted(), "8bit")
    before = sample(pipe, 64, 64)
    with pytest.raises(
        ValueError, match=r"already optimized for its current adapters.* urae.restore"
    ):
        urae.adapt(pipe, expected / "dev_4k_lora_conversion.safetensors")
    assert torch.equal(sample(pipe, 64, 64), before)


def test_a_failure_leaves_the_pipe_as_adapted(adapted, sample):
    pipe = adapted()
    wanted = sample(pipe, 64, 64)
    pipe.transformer.transformer_blocks[0].compile(backend="eager")
    with pytest.raises(ValueError, match="blocks are compiled with all their hooks"):
        apply(pipe, "8bit", "mag-cache")
    pipe.transformer.transformer_blocks[0]._compiled_call_impl = None
    assert torch.equal(sample(pipe, 64, 64), wanted)


def fail_at(call, function):
    """Wrap a function so that a call of it runs out of memory, the calls before that do not."""
    calls = []

    def wrapped(*arguments, **options):
        calls.append(1)
        if len(calls) == call:
            raise MemoryError
        return function(*arguments, **options)

    return wrapped


@pytest.mark.parametrize(
    ("part", "owner", "name"),
    [("8bit", quantize, "_quantize_8bit"), ("joined-adapters", joined_adapters, "_join_layer")],
)
def test_a_part_that_fails_midway_is_undone(adapted, sample, part, owner, name, monkeypatch):
    monkeypatch.setattr(quantize, "check_quantization", lambda *_, **__: None)
    pipe = adapted()
    wanted, before = sample(pipe, 64, 64), pipe.transformer.state_dict()
    kinds = [type(module) for module in pipe.transformer.modules()]
    monkeypatch.setattr(owner, name, fail_at(3, getattr(owner, name)))
    with pytest.raises(MemoryError):
        apply(pipe, part)
    after = pipe.transformer.state_dict()
    assert before.keys() == after.keys()
    assert all(torch.equal(before[key], after[key]) for key in before)
    assert [type(module) for module in pipe.transformer.modules()] == kinds
    assert torch.equal(sample(pipe, 64, 64), wanted)


def test_a_transformer_that_is_compiled_whole(adapted):
    pipe = adapted()
    pipe.transformer = torch.compile(pipe.transformer, backend="eager")
    with pytest.raises(ValueError, match="compiled as a whole"):
        apply(pipe, "8bit")


def test_blocks_that_are_offloaded_are_not_compiled_or_quantised(adapted):
    pipe = adapted()
    stream_blocks(pipe.transformer, CPU)
    for name in ("compile", "8bit"):
        with pytest.raises(ValueError, match="already offloaded or hooked"):
            apply(pipe, name)
    sequential = adapted()
    sequential.transformer.transformer_blocks[0].attn.to_q._hf_hook = None
    with pytest.raises(ValueError, match="already offloaded or hooked"):
        apply(sequential, "compile")


def test_what_is_compiled_goes_to_the_users_cache_folder(monkeypatch, tmp_path):
    monkeypatch.setenv("URAE_CACHE_DIR", str(tmp_path))
    monkeypatch.delenv("TORCHINDUCTOR_CACHE_DIR", raising=False)
    keep_compiled()
    assert os.environ["TORCHINDUCTOR_CACHE_DIR"] == str(tmp_path / "compiled")
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", default_cache_dir())  # as torch itself does
    keep_compiled()
    assert os.environ["TORCHINDUCTOR_CACHE_DIR"] == str(tmp_path / "compiled")
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", "/elsewhere")
    keep_compiled()
    assert os.environ["TORCHINDUCTOR_CACHE_DIR"] == "/elsewhere"


def test_inputs_may_come_by_position(load_pipe):
    """A stock transformer takes them either way; parts look for them by name."""
    transformer = load_pipe().transformer
    config, generator = transformer.config, torch.Generator().manual_seed(0)
    inputs = {
        "hidden_states": torch.randn(1, 16, config.in_channels, generator=generator),
        "encoder_hidden_states": torch.randn(1, 8, config.joint_attention_dim, generator=generator),
        "pooled_projections": torch.randn(1, config.pooled_projection_dim, generator=generator),
        "timestep": torch.tensor([0.5]),
        "img_ids": torch.zeros(16, 3),
        "txt_ids": torch.zeros(8, 3),
        "guidance": torch.tensor([3.5]),
    }
    (wanted,) = transformer(**inputs, return_dict=False)
    pipe = load_pipe()
    urae.optimize(pipe, parts=["merged-adapters"])
    (found,) = pipe.transformer(*inputs.values(), return_dict=False)
    assert torch.equal(found, wanted)
    with pytest.raises(TypeError, match="too many positional arguments"):
        pipe.transformer(*inputs.values(), None, None, None, True, False, "more")


@pytest.mark.parametrize(("own", "wanted"), [("cuda:1", "cuda:1"), ("cpu", "mps"), ("meta", "mps")])
def test_parts_are_for_the_device_of_the_pipe(load_pipe, own, wanted, monkeypatch):
    pipe, devices = load_pipe(), []
    monkeypatch.setattr(type(pipe.transformer), "device", property(lambda _: torch.device(own)))
    monkeypatch.setattr(optimize, "pick_device", lambda: torch.device("mps"))
    monkeypatch.setattr(optimize, "apply_parts", lambda *given: devices.append(given[-1]))
    urae.optimize(pipe, speed=None)
    assert devices == [torch.device(wanted)]


# --- local attention ------------------------------------------------------------------------------


def test_local_attention_is_that_of_the_policy(adapted, sample):
    policy = urae.ResolutionPolicy(native_sequence_length=128)
    pipe, wanted = adapted(policy=policy), []
    full = sample(pipe, 512, 512)
    local = urae.ResolutionPolicy(native_sequence_length=128, attention="local")
    wanted = sample(adapted(policy=local), 512, 512)
    assert not torch.equal(wanted, full)
    apply(pipe, "local-attention")
    assert torch.equal(sample(pipe, 512, 512), wanted)
    assert find_policy(pipe.transformer).adapted.sources
    urae.optimize(pipe, speed=None)
    assert torch.equal(sample(pipe, 512, 512), full)
    assert find_policy(pipe.transformer).policy == policy


def test_local_attention_of_a_pipe_that_is_not_adapted(load_pipe, sample, caplog):
    pipe = load_pipe()
    wanted = sample(pipe, 64, 64)
    apply(pipe, "local-attention")
    assert "beyond the native size of an adapted pipeline" in caplog.text
    assert torch.equal(sample(pipe, 64, 64), wanted)


# --- quantised weights ----------------------------------------------------------------------------


def is_plain(layer):
    return type(layer.weight) is nn.Parameter


@pytest.mark.filterwarnings("ignore")  # torchao's and bitsandbytes' own
@pytest.mark.parametrize("bits", ["8bit", "4bit"])
def test_weights_are_quantised_and_adapters_stay_outside(adapted, sample, bits, rel, monkeypatch):
    monkeypatch.setattr(quantize, "check_quantization", lambda *_, **__: None)  # a CPU does here
    pipe = adapted()
    wanted, before = sample(pipe, 64, 64), pipe.transformer.state_dict()
    apply(pipe, bits)
    assert 1e-4 < rel(sample(pipe, 64, 64), wanted) < 0.2
    query = pipe.transformer.transformer_blocks[0].attn.to_q
    assert not is_plain(query.base_layer)
    assert all(is_plain(layer) for layer in (query.lora_A["urae_2k"], query.lora_B["urae_2k"]))
    assert is_plain(pipe.transformer.x_embedder)
    with pytest.raises(ValueError, match=f"already quantised; leave out part {bits}"):
        quantize.quantize_blocks(pipe.transformer, bits, CPU)
    urae.optimize(pipe, speed=None)
    after = pipe.transformer.state_dict()
    assert before.keys() == after.keys()
    assert all(torch.equal(before[key], after[key]) for key in before)
    assert torch.equal(sample(pipe, 64, 64), wanted)
    original = ref(pipe.transformer.transformer_blocks[0].attn.to_q.base_layer.weight)
    quantize.quantize_blocks(pipe.transformer, bits, CPU, keep=False)
    gc.collect()
    assert original() is None


@pytest.mark.filterwarnings("ignore")  # torchao's own
def test_fp8_leaves_modulation_and_odd_matrices_alone(adapted, monkeypatch):
    monkeypatch.setattr(quantize, "check_quantization", lambda *_, **__: None)
    built = quantize._build_torchao
    monkeypatch.setattr(quantize, "_build_torchao", lambda _: built("8bit"))  # a CPU has no fp8
    pipe = adapted()
    block = pipe.transformer.single_transformer_blocks[0]
    block.proj_mlp = nn.Linear(64, 250)
    apply(pipe, "fp8")
    assert is_plain(block.norm.linear)
    assert is_plain(block.proj_mlp)
    quantised = [block.proj_out, block.attn.to_q, pipe.transformer.transformer_blocks[0].ff.net[2]]
    assert not any(is_plain(getattr(each, "base_layer", each)) for each in quantised)


def test_fp8_is_dynamic_with_a_scale_a_row():
    from torchao.quantization import PerRow

    built = quantize._build_torchao("fp8")
    assert all(isinstance(each, PerRow) for each in built.granularity)


@pytest.mark.parametrize("bits", ["fp8", "8bit"])
def test_how_the_process_compiles_is_left_alone(bits):
    assert not quantize._build_torchao(bits).set_inductor_config


def test_what_cannot_be_quantised_here(adapted, monkeypatch):
    for bits, message in {"fp8": "capability 8.9 .* runs on cpu", "4bit": "a CUDA device"}.items():
        with pytest.raises(ValueError, match=f"part {bits} needs .*{message}"):
            apply(adapted(), bits)
    monkeypatch.setattr(quantize, "find_spec", lambda _: None)
    with pytest.raises(ModuleNotFoundError, match="part 8bit needs the package torchao: pip in"):
        apply(adapted(), "8bit")


def test_an_older_gpu_has_no_fp8(monkeypatch):
    gpu = torch.device("cuda")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: (8, 6))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda _: "A40")
    with pytest.raises(ValueError, match="this machine runs on A40"):
        quantize.check_quantization("fp8", gpu)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: (8, 9))
    quantize.check_quantization("fp8", gpu)


# --- waiting for the device -----------------------------------------------------------------------


class Reads(TorchDispatchMode):
    """Counts what would wait for a GPU: numbers that go to the host."""

    def __init__(self):
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        aten = torch.ops.aten
        self.count += function in (aten._local_scalar_dense.default, aten.equal.default)
        return function(*args, **(kwargs or {}))


@pytest.mark.parametrize("attention", ["full", "local"])
@pytest.mark.parametrize(
    "parts", [("joined-adapters", "constants"), ("progressive=0.5",), ("taylorseer-cache=2",)]
)
def test_no_step_waits_for_the_device(adapted, sample, parts, attention):
    pipe = adapted(policy=ResolutionPolicy(native_sequence_length=80, attention=attention))
    apply(pipe, *parts)
    counts = []
    for steps in (4, 4, 8):  # the first finds local attention's pattern
        with Reads() as reads:
            sample(pipe, num_inference_steps=steps)
        counts.append(reads.count)
    assert counts[1] == counts[2]


def test_a_part_that_is_no_text(load_pipe):
    with pytest.raises(ValueError, match="must be a string, NAME or NAME=STRENGTH"):
        urae.optimize(load_pipe(), parts=[("progressive", 0.5)])


def test_layers_that_are_offloaded_afterwards_are_not_lost(adapted, sample, rel):
    """By accelerate, one by one, around what `optimize` has put in place."""
    pipe = adapted()
    wanted = sample(pipe, 64, 64)
    urae.optimize(pipe)
    other = adapted()  # another, as a picture drops what was joined, and hooks stay on
    urae.optimize(other)
    accelerate.cpu_offload(other.transformer, CPU)
    assert rel(sample(other, 64, 64), wanted) < 1e-5
    accelerate.cpu_offload(pipe.transformer, CPU)
    for again in (urae.restore, urae.optimize):
        with pytest.raises(ValueError, match="layers were offloaded after"):
            again(pipe)
    pipe.remove_all_hooks()
    urae.restore(pipe)
    assert not is_optimized(pipe.transformer)


def test_layers_that_are_offloaded_already_are_refused(adapted, sample):
    pipe = adapted()
    wanted = sample(pipe, 64, 64)
    accelerate.cpu_offload(pipe.transformer, CPU)
    with pytest.raises(ValueError, match="already offloaded or hooked"):
        urae.optimize(pipe)
    assert torch.equal(sample(pipe, 64, 64), wanted)


class Mine:
    """A user's attention processor, which has no backend to choose."""

    def __init__(self):
        self.inner = FluxAttnProcessor()

    def __call__(self, attn, image, text=None, attention_mask=None, image_rotary_emb=None):
        return self.inner(attn, image, text, attention_mask, image_rotary_emb)


def test_in_half_precision_a_preset_joins(load_pipe, expected, caplog):
    pipe = urae.adapt(load_pipe().to(dtype=torch.bfloat16), expected / "dev_2k_lora.safetensors")
    urae.optimize(pipe)
    kinds = {type(each).__name__ for each in pipe.transformer.modules()}
    assert "_OneProduct" in kinds
    assert "_Merged" not in kinds
    assert "not merged in any" not in caplog.text


def test_a_preset_merges_where_there_is_room(adapted, monkeypatch):
    monkeypatch.setattr(joined_adapters, "free_bytes", lambda _: 1000)
    pipe = urae.optimize(adapted())
    kinds = {type(each).__name__ for each in pipe.transformer.modules()}
    assert "_OneProduct" in kinds
    assert "_Merged" not in kinds


def test_turbo_goes_with_attention_processors_of_a_user(adapted, monkeypatch, caplog):
    monkeypatch.setattr(optimize, "can_compile", lambda _: True)
    monkeypatch.setattr(optimize, "compile_blocks", lambda _: lambda: None)
    pipe = adapted(policy=ResolutionPolicy(native_sequence_length=80))
    pipe.transformer.set_attn_processor(Mine())
    urae.optimize(pipe, speed="turbo")
    assert "local-attention is left out: the transformer has attention processors" in caplog.text


def test_attention_processors_of_a_user(adapted, load_pipe, expected, sample, rel):
    pipe = adapted()
    wanted = sample(pipe, 64, 64)
    pipe.transformer.set_attn_processor(Mine())
    urae.optimize(pipe)
    assert rel(sample(pipe, 64, 64), wanted) < 1e-5
    local = ResolutionPolicy(native_sequence_length=80, attention="local")
    pipe = urae.adapt(load_pipe(), expected / "dev_2k_lora.safetensors", policy=local)
    pipe.transformer.set_attn_processor(Mine())
    with pytest.raises(ValueError, match="diffusers' own attention processors, not Mine"):
        sample(pipe, 256, 256)
