import copy
import shutil
from types import SimpleNamespace

import pytest
import torch
from diffusers import (
    DDIMScheduler,
    Flux2Transformer2DModel,
    FluxControlNetModel,
    FluxControlNetPipeline,
    FluxImg2ImgPipeline,
    FluxPipeline,
)
from diffusers.models.attention_dispatch import attention_backend
from PIL import Image
from safetensors.torch import load_file, save_file

import urae
from urae import ResolutionPolicy
from urae.adapters import adapt as adapt_module
from urae.adapters.attach import attach, attach_frozen, attach_trainable, detach, read_factors
from urae.adapters.files import LowRank, read_adapter
from urae.resolution import find_policy

NATIVE = ResolutionPolicy(ntk_factor=1.0, proportional_attention=False, time_shift="dynamic")


@pytest.fixture
def style(tmp_path, expected):
    """A style LoRA that is none of ours."""
    tensors = load_file(expected / "schnell_2k_lora.safetensors")
    save_file({key: 3 * tensor for key, tensor in tensors.items()}, tmp_path / "s.safetensors")
    return tmp_path / "s.safetensors"


def stages(expected, base):
    lora, minor = (
        expected / f"{base}_2k_lora.safetensors",
        expected / f"{base}_4k_minor.safetensors",
    )
    conversion = expected / f"{base}_4k_lora_conversion.safetensors"
    return {"2k": [lora], "4k": [lora, minor], "conversion": [conversion]}


@pytest.mark.parametrize("size", [(192, 320), (256, 256)])
@pytest.mark.parametrize("stage", ["2k", "4k", "conversion"])
def test_pipeline_equals_the_reference(base, load_pipe, expected, rel, sample, stage, size):
    height, width = size
    name = "2k" if stage == "2k" else "4k"
    golden = load_file(expected / f"{base}_{name}_{height}x{width}_pipeline.safetensors")
    pipe = urae.adapt(load_pipe(base), stages(expected, base)[stage])
    first = []

    def keep_first(_, step, __, values):
        if step == 0:
            first.append(values["latents"])
        return values

    latents = sample(pipe, height, width, callback_on_step_end=keep_first)
    assert rel(first[0], golden["latents_step0"]) < 1e-5
    assert rel(latents, golden["latents"]) < 1e-4
    assert torch.allclose(pipe.scheduler.sigmas, golden["sigmas"], atol=1e-6)
    if "image" in golden:
        image = sample(pipe, height, width, output_type="pt")
        # the reference kept the VAE's output, in [-1, 1]; pipelines clip it to [0, 1]
        wanted = (golden["image"] / 2 + 0.5).clamp(0, 1)
        assert rel(image, wanted) < 1e-4


def test_restore_is_bitwise(base, load_pipe, expected, sample):
    pipe = load_pipe(base)
    before, weights = sample(pipe), copy.deepcopy(pipe.transformer.state_dict())
    scheduler = pipe.scheduler
    urae.adapt(pipe, stages(expected, base)["4k"])
    assert not torch.allclose(sample(pipe), before)
    assert urae.restore(pipe) is pipe
    assert torch.equal(sample(pipe), before)
    assert pipe.scheduler is scheduler
    after = pipe.transformer.state_dict()
    assert after.keys() == weights.keys()
    assert all(torch.equal(after[key], weights[key]) for key in weights)
    assert pipe.get_list_adapters() == {}
    urae.restore(pipe)  # a second time does nothing


def test_adapters_are_named_peft_adapters(load_pipe, expected, sample):
    lora, minor = stages(expected, "dev")["4k"]
    pipe = urae.adapt(load_pipe(), [lora, minor])
    assert pipe.get_list_adapters() == {"transformer": ["urae_2k", "urae_4k"]}
    assert pipe.get_active_adapters() == ["urae_2k", "urae_4k"]
    both = sample(pipe)
    pipe.set_adapters("urae_2k")
    with pytest.warns(UserWarning, match="urae_4k is not active"):
        only_2k = sample(pipe)
    assert not torch.allclose(only_2k, both)
    pipe.set_adapters(["urae_2k", "urae_4k"])
    assert torch.equal(sample(pipe), both)
    pipe.delete_adapters("urae_4k")
    with pytest.warns(UserWarning, match="urae_4k was removed"):
        assert torch.equal(sample(pipe), only_2k)
    urae.adapt(pipe, [lora, minor], adapter_names=["a", "b"])
    assert pipe.get_active_adapters() == ["a", "b"]
    assert torch.equal(sample(pipe), both)


def test_scale_keeps_the_minor_halves_together(load_pipe, expected, sample, rel):
    """At scale 0 nothing is left; B A alone would be a large change, B0 A0 unsubtracted."""
    lora, minor = stages(expected, "dev")["4k"]
    pipe = urae.adapt(load_pipe(), [lora, minor])
    pipe.set_adapters(["urae_2k", "urae_4k"], [1.0, 0.0])
    without = sample(pipe)
    urae.adapt(pipe, lora)
    assert rel(without, sample(pipe)) < 1e-6


def test_a_second_adapt_replaces_the_first(load_pipe, expected, sample):
    lora, minor = stages(expected, "dev")["4k"]
    once = sample(urae.adapt(load_pipe(), lora))
    pipe = urae.adapt(load_pipe(), [lora, minor], policy=NATIVE)
    assert torch.equal(sample(urae.adapt(pipe, lora)), once)
    assert pipe.get_list_adapters() == {"transformer": ["urae_2k"]}


def test_without_adapters_the_policy_alone(load_pipe, sample):
    pipe = load_pipe()
    stock = sample(pipe)
    urae.adapt(pipe, policy=NATIVE)
    assert torch.equal(sample(pipe), stock)
    urae.adapt(pipe)
    assert find_policy(pipe.transformer).policy == ResolutionPolicy()
    assert not torch.allclose(sample(pipe), stock)


def test_fresh_minor_changes_nothing(load_pipe, tmp_path, sample, rel):
    """B = B0 and A = A0: the update is zero up to rounding."""
    from urae.adapters.initial import compute_initial
    from urae.backbones.weights import find_attention_linears, open_original_weights

    pipe = load_pipe()
    names = find_attention_linears(pipe.transformer)
    initial = compute_initial(open_original_weights(pipe.transformer, names), [], 4)
    raw = {}
    for name, pair in initial.items():
        attention, _, layer = name.partition(".attn.")
        stem = f"{attention}.attn.processor.{layer.removesuffix('.0')}"
        raw[f"module.{stem}_a.weight"], raw[f"module.{stem}_b.weight"] = pair.down, pair.up
    save_file(raw, tmp_path / "adapter_weights.safetensors")
    stock = sample(urae.adapt(pipe))
    assert rel(sample(urae.adapt(pipe, tmp_path)), stock) < 1e-6


def test_style_loras_before_and_after(load_pipe, expected, style, sample, rel):
    lora = stages(expected, "dev")["2k"][0]
    pipe = load_pipe()
    pipe.load_lora_weights(style, adapter_name="style")
    pipe.set_adapters("style", 0.5)
    styled = sample(pipe)
    urae.adapt(pipe, lora)
    assert pipe.get_active_adapters() == ["style", "urae_2k"]
    both = sample(pipe)
    urae.restore(pipe)
    assert pipe.get_active_adapters() == ["style"]
    assert torch.equal(sample(pipe), styled)

    pipe = urae.adapt(load_pipe(), lora)
    pipe.load_lora_weights(style, adapter_name="style")
    with pytest.warns(UserWarning, match=r"urae_2k is not active .*set_adapters\(\['style'"):
        sample(pipe)
    pipe.set_adapters(["style", "urae_2k"], [0.5, 1.0])
    assert rel(sample(pipe), both) < 1e-6


def test_minor_origin_has_no_style_lora(load_pipe, expected, style, sample, rel):
    sources = stages(expected, "dev")["4k"]
    after = urae.adapt(load_pipe(), sources)
    after.load_lora_weights(style, adapter_name="style")
    after.set_adapters(["urae_2k", "urae_4k", "style"])
    before = load_pipe()
    before.load_lora_weights(style, adapter_name="style")
    urae.adapt(before, sources)
    assert rel(sample(before), sample(after)) < 1e-6


def test_from_pipe_inherits_everything(load_pipe, expected, sample):
    pipe = urae.adapt(load_pipe(), stages(expected, "dev")["2k"])
    other = FluxImg2ImgPipeline.from_pipe(pipe, dtype=torch.float32)
    other.set_progress_bar_config(disable=True)
    assert other.scheduler is pipe.scheduler
    assert find_policy(other.transformer) is not None
    picture = Image.new("RGB", (64, 64), "red")
    result = other("a", image=picture, height=64, width=64, num_inference_steps=2).images[0]
    assert result.size == (64, 64)
    for _ in range(2):
        urae.adapt(other)
        assert other.get_active_adapters() == ["urae_2k"]
    urae.restore(other)
    assert other.scheduler.config.use_dynamic_shifting


def test_a_shared_transformer_gets_its_scheduler_only(load_pipe, expected, sample):
    pipe = urae.adapt(load_pipe(), stages(expected, "dev")["2k"], policy=ResolutionPolicy(4.0))
    wanted = sample(pipe)
    other = load_pipe()
    other.transformer = pipe.transformer
    positions = pipe.transformer.pos_embed
    urae.adapt(other)
    assert other.transformer.pos_embed is positions
    assert not other.scheduler.config.use_dynamic_shifting
    assert torch.equal(sample(other), wanted)
    with pytest.raises(ValueError, match="already adapted differently through another pipe"):
        third = load_pipe()
        third.transformer = pipe.transformer
        urae.adapt(third, policy=NATIVE)
    fourth = load_pipe()
    fourth.transformer = pipe.transformer
    with pytest.raises(ValueError, match="already adapted differently through another pipe"):
        urae.adapt(fourth, stages(expected, "dev")["conversion"])
    urae.adapt(fourth, stages(expected, "dev")["2k"])
    assert torch.equal(sample(fourth), wanted)


def test_a_part_that_changes_the_policy_does_not_make_another_pipe_differ(load_pipe, expected):
    lora, policy = stages(expected, "dev")["2k"], ResolutionPolicy(native_sequence_length=80)
    pipe = urae.optimize(
        urae.adapt(load_pipe(), lora, policy=policy), speed=None, parts=["local-attention"]
    )
    other = FluxPipeline(**pipe.components)
    assert urae.adapt(other, lora, policy=policy).transformer is pipe.transformer
    assert find_policy(pipe.transformer).policy.attention == "local"


def test_a_folders_name_says_that_its_adapter_is_for_4k(load_pipe, expected, tmp_path):
    folder = tmp_path / "my_4k"
    folder.mkdir()
    source = expected / "dev_4k_lora_conversion.safetensors"
    shutil.copy(source, folder / "pytorch_lora_weights.safetensors")
    for each in (folder, source):
        positions = find_policy(urae.adapt(load_pipe(), each).transformer)
        assert positions.adapted.names_4k == positions.adapted.names == ("urae_4k",)


def test_controlnets_follow(load_pipe, expected):
    pipe = load_pipe()
    controlnet = FluxControlNetModel.from_transformer(
        pipe.transformer, num_layers=1, num_single_layers=1, attention_head_dim=32,
        num_attention_heads=2,
    )  # fmt: skip
    pipe = FluxControlNetPipeline(**pipe.components, controlnet=controlnet)
    pipe.set_progress_bar_config(disable=True)
    urae.adapt(pipe, stages(expected, "dev")["2k"])
    assert find_policy(pipe.controlnet).policy == find_policy(pipe.transformer).policy
    image = Image.new("RGB", (64, 64), "red")
    pipe("a", control_image=image, height=64, width=64, num_inference_steps=1)
    urae.restore(pipe)
    assert find_policy(pipe.controlnet) is None


def test_a_shared_transformer_with_another_kind_of_scheduler_changes_nothing(load_pipe):
    pipe = urae.adapt(load_pipe())
    controlnet = FluxControlNetModel.from_transformer(
        load_pipe().transformer, num_layers=1, num_single_layers=1, attention_head_dim=32,
        num_attention_heads=2,
    )  # fmt: skip
    other = FluxControlNetPipeline(**pipe.components, controlnet=controlnet)
    other.scheduler = own = DDIMScheduler()
    with pytest.raises(ValueError, match="DDIMScheduler has no shift"):
        urae.adapt(other)
    assert other.scheduler is own
    assert find_policy(controlnet) is None


def test_several_images_a_prompt(load_pipe, expected, sample, rel):
    pipe = urae.adapt(load_pipe(), stages(expected, "dev")["2k"])
    generators = [torch.Generator().manual_seed(seed) for seed in (7, 8)]
    both = sample(pipe, 64, 64, num_images_per_prompt=2, generator=generators)
    alone = sample(pipe, 64, 64, generator=torch.Generator().manual_seed(8))
    assert rel(both[1:], alone) < 1e-5


def test_half_precision(load_pipe, expected, sample, rel):
    noise = torch.randn(1, 16, 32, 32, generator=torch.Generator().manual_seed(7))
    half, full = load_pipe(dtype=torch.bfloat16), load_pipe()
    latents = full._pack_latents(noise, 1, 16, 32, 32)

    def error():
        return rel(sample(half, latents=latents.bfloat16()), sample(full, latents=latents))

    urae.adapt(half), urae.adapt(full)
    base_error = error()
    for pipe in (half, full):
        urae.adapt(pipe, stages(expected, "dev")["4k"])
    layer = half.transformer.transformer_blocks[0].attn.to_q
    assert layer.lora_A["urae_4k"].weight.dtype == torch.bfloat16
    # the random base amplifies rounding by itself; the adapters add little to that
    assert error() < 1.5 * base_error


@pytest.mark.filterwarnings("ignore")  # torchao's own deprecations
@pytest.mark.parametrize("kind", ["int8", "fp8"])
def test_quantised_transformer(base, kind, load_pipe, bases, expected, sample, rel):
    from torchao.quantization import Float8WeightOnlyConfig, Int8WeightOnlyConfig, quantize_

    pipe = load_pipe(base)
    stock = copy.deepcopy(pipe)
    quantize_(
        pipe.transformer,
        Int8WeightOnlyConfig(version=2) if kind == "int8" else Float8WeightOnlyConfig(),
        lambda module, name: isinstance(module, torch.nn.Linear) and "blocks" in name,
    )
    quantised = sample(pipe)
    # B0 and A0 come from the original files: far below an 8-bit base's noise, the update is exact
    urae.adapt(pipe, stages(expected, base)["4k"])
    exact = urae.adapt(stock, stages(expected, base)["4k"])
    name = "transformer_blocks.0.attn.to_q"
    found = pipe.transformer.get_submodule(name).lora_A["urae_4k"].weight
    wanted = exact.transformer.get_submodule(name).lora_A["urae_4k"].weight
    assert torch.equal(found, wanted)
    assert rel(sample(pipe), sample(exact)) < 0.05
    assert torch.equal(sample(urae.restore(pipe)), quantised)


def bitsandbytes_linear(kind, linear):
    import bitsandbytes

    size, weight = (linear.in_features, linear.out_features), linear.weight.data.clone()
    if kind == "8bit":
        layer = bitsandbytes.nn.Linear8bitLt(*size, has_fp16_weights=False)
        layer.weight = bitsandbytes.nn.Int8Params(
            weight, has_fp16_weights=False, requires_grad=False
        )
    else:
        layer = bitsandbytes.nn.Linear4bit(*size, compute_dtype=torch.float32, quant_type="nf4")
        layer.weight = bitsandbytes.nn.Params4bit(weight, quant_type="nf4", requires_grad=False)
    layer.bias = linear.bias
    return layer.to("cpu")  # quantises


@pytest.mark.filterwarnings("ignore")  # bitsandbytes' own
@pytest.mark.parametrize(("kind", "tolerance"), [("8bit", 0.05), ("nf4", 0.3)])
def test_bitsandbytes(load_pipe, expected, sample, rel, kind, tolerance):
    pipe = load_pipe()
    for block in [
        *pipe.transformer.transformer_blocks,
        *pipe.transformer.single_transformer_blocks,
    ]:
        for name in ("to_q", "to_k", "to_v"):
            setattr(block.attn, name, bitsandbytes_linear(kind, getattr(block.attn, name)))
    quantised = sample(pipe, 64, 64)
    urae.adapt(pipe, stages(expected, "dev")["4k"])
    exact = urae.adapt(load_pipe(), stages(expected, "dev")["4k"])
    name = "transformer_blocks.0.attn.to_q"
    found, wanted = (
        p.transformer.get_submodule(name).lora_A["urae_4k"].weight for p in (pipe, exact)
    )
    assert torch.equal(found, wanted)
    assert rel(sample(pipe, 64, 64), sample(exact, 64, 64)) < tolerance
    assert torch.equal(sample(urae.restore(pipe), 64, 64), quantised)


def test_quantised_without_the_original_files(load_pipe, expected):
    pipe = load_pipe()
    for block in pipe.transformer.transformer_blocks:
        block.attn.to_q.to(torch.float8_e4m3fn)
    pipe.transformer.register_to_config(_name_or_path="/nowhere")
    with pytest.raises(FileNotFoundError, match="original weights, but the transformer is quant"):
        urae.adapt(pipe, stages(expected, "dev")["4k"])
    assert find_policy(pipe.transformer) is None
    assert pipe.get_list_adapters() == {}


def test_bad_adapters_leave_the_pipe_as_it_was(load_pipe, expected, sample, tmp_path):
    lora = stages(expected, "dev")["2k"][0]
    pipe = urae.adapt(load_pipe(), lora)
    before = sample(pipe)
    other = {
        key: tensor[:, :8].clone() if "lora_A" in key else tensor
        for key, tensor in load_file(lora).items()
    }
    save_file(other, tmp_path / "other.safetensors")
    with pytest.raises(
        ValueError, match=r"another base: .*to_k is 64 x 8 in the adapter and 64 x 64 in the model"
    ):
        urae.adapt(pipe, [lora, tmp_path / "other.safetensors"])
    with pytest.raises(ValueError, match=r"adapter_names .* has 2 names for 1 adapters"):
        urae.adapt(pipe, lora, adapter_names=["a", "b"])
    with pytest.raises(ValueError, match="must differ"):
        urae.adapt(pipe, [lora, lora], adapter_names=["a", "a"])
    for name in ("", "my.adapter"):  # a module of torch has no such name
        with pytest.raises(ValueError, match="and contain no dot"):
            urae.adapt(pipe, lora, adapter_names=name)
    assert torch.equal(sample(pipe), before)


def test_the_call_time_scale_of_stock_pipelines(load_pipe, expected, sample, rel):
    pipe = urae.adapt(load_pipe(), stages(expected, "dev")["2k"])
    zero = sample(pipe, joint_attention_kwargs={"scale": 0.0})
    assert rel(zero, sample(urae.adapt(load_pipe()))) < 1e-6
    assert not torch.allclose(zero, sample(pipe))


def test_a_failure_while_attaching_keeps_the_first(load_pipe, expected, sample, monkeypatch):
    lora, minor = stages(expected, "dev")["4k"]
    pipe = urae.adapt(load_pipe(), lora)
    whole = sample(pipe)
    pipe.set_adapters("urae_2k", 0.5)
    before = sample(pipe)
    assert not torch.equal(before, whole)
    attach_real, calls = adapt_module.attach, []

    def fail_second(*arguments, **options):
        calls.append(arguments)
        if len(calls) == 2:
            raise torch.OutOfMemoryError("no memory")
        attach_real(*arguments, **options)

    monkeypatch.setattr(adapt_module, "attach", fail_second)
    with pytest.raises(torch.OutOfMemoryError):
        urae.adapt(pipe, [lora, minor], policy=NATIVE)
    assert pipe.get_list_adapters() == {"transformer": ["urae_2k"]}
    assert torch.equal(sample(pipe), before)


def test_fused_adapters_are_refused(load_pipe, expected, style, sample):
    pipe = load_pipe()
    pipe.load_lora_weights(style, adapter_name="style")
    pipe.fuse_lora()
    with pytest.raises(ValueError, match=r"fused into the base's weights; call pipe.unfuse_lora"):
        urae.adapt(pipe, stages(expected, "dev")["2k"])
    pipe = urae.adapt(load_pipe(), stages(expected, "dev")["2k"])
    pipe.fuse_lora()
    with pytest.raises(ValueError, match="fused into the base's weights"):
        urae.restore(pipe)
    pipe = load_pipe()
    pipe.transformer.fuse_qkv_projections()
    with pytest.raises(ValueError, match="q, k and v are fused into one matrix"):
        urae.adapt(pipe, stages(expected, "dev")["2k"])


def test_disabled_adapters_warn(load_pipe, expected, sample):
    pipe = urae.adapt(load_pipe(), stages(expected, "dev")["2k"])
    before = sample(pipe)
    pipe.disable_lora()
    with pytest.warns(UserWarning, match=r"urae_2k is not active .*enable_lora\(\)"):
        sample(pipe)
    pipe.enable_lora()
    assert torch.equal(sample(pipe), before)


def test_a_copy_of_an_adapted_pipe(load_pipe, expected, sample, rel):
    lora, minor = stages(expected, "dev")["4k"]
    pipe = load_pipe()
    stock = sample(pipe)
    urae.adapt(pipe, lora)
    duplicate = copy.deepcopy(pipe)
    # a copy lies elsewhere in memory, where kernels may sum in another order
    assert rel(sample(duplicate), sample(pipe)) < 1e-6
    urae.adapt(duplicate, [lora, minor])
    assert duplicate.get_active_adapters() == ["urae_2k", "urae_4k"]
    assert pipe.get_active_adapters() == ["urae_2k"]
    assert rel(sample(urae.restore(duplicate)), stock) < 1e-6
    assert duplicate.scheduler.config.use_dynamic_shifting


@pytest.mark.slow
def test_a_compiled_transformer(load_pipe, expected, sample):
    lora = stages(expected, "dev")["2k"][0]
    wanted = sample(urae.adapt(load_pipe(), lora))
    pipe = load_pipe()
    stock = sample(pipe)
    pipe.transformer = torch.compile(pipe.transformer, backend="eager")
    urae.adapt(pipe, lora)
    assert torch.equal(sample(pipe), wanted)
    assert torch.equal(sample(urae.restore(pipe)), stock)
    torch._dynamo.reset()


def test_restore_after_the_user_deleted_the_adapters(load_pipe, expected):
    pipe = load_pipe()
    stock = set(pipe.transformer.state_dict())
    urae.adapt(pipe, stages(expected, "dev")["2k"])
    pipe.delete_adapters("urae_2k")
    urae.restore(pipe)
    assert set(pipe.transformer.state_dict()) == stock


def test_a_taken_name(load_pipe, expected, style):
    pipe = load_pipe()
    pipe.load_lora_weights(style, adapter_name="urae_2k")
    with pytest.raises(ValueError, match="'urae_2k' is in use"):
        urae.adapt(pipe, stages(expected, "dev")["2k"])


def test_no_flux_pipeline():
    with pytest.raises(ValueError, match=r"object is not a FLUX\.1 pipeline with a transformer"):
        urae.adapt(object())
    other = Flux2Transformer2DModel(
        num_layers=1, num_single_layers=1, attention_head_dim=32, num_attention_heads=2,
        axes_dims_rope=(8, 8, 8, 8), joint_attention_dim=16, in_channels=16,
    )  # fmt: skip
    with pytest.raises(ValueError, match=r"Namespace is not a FLUX\.1 pipeline with a transformer"):
        urae.adapt(SimpleNamespace(transformer=other))


def test_attach_then_detach(load_pipe):
    transformer = load_pipe().transformer
    stock = dict(transformer.named_modules())
    pair = LowRank(torch.randn(3, 64), torch.randn(64, 3))
    other = LowRank(torch.randn(2, 64), torch.randn(64, 2))
    attach(transformer, "one", {"transformer_blocks.0.attn.to_q": pair,
                                "transformer_blocks.0.attn.to_k": other})  # fmt: skip
    layer = transformer.transformer_blocks[0].attn.to_k
    x = torch.randn(5, 64)
    wanted = layer.base_layer(x) + x @ other.down.T @ other.up.T
    assert torch.allclose(layer(x), wanted, atol=1e-5)
    detach(transformer, ["one"])
    assert dict(transformer.named_modules()) == stock


def test_frozen_stays_frozen_whatever_is_activated(load_pipe):
    transformer = load_pipe().transformer
    name = "transformer_blocks.0.attn.to_q"
    pair = LowRank(torch.randn(3, 64), torch.randn(64, 3))
    attach_frozen(transformer, "initial", {name: pair})
    parameters = attach_trainable(transformer, "trained", {name: pair})
    assert len(parameters) == 2
    transformer.set_adapter(["trained"])
    transformer.set_adapter(["initial", "trained"])
    transformer.set_adapters(["initial", "trained"])
    trainable = [p for p in transformer.parameters() if p.requires_grad]
    assert {id(p) for p in trainable} == {id(p) for p in parameters}


def test_what_trains_is_float32_and_computes_in_the_dtype_of_the_base(load_pipe):
    transformer = load_pipe().transformer.to(torch.bfloat16)
    name = "transformer_blocks.0.attn.to_q"
    pair = LowRank(torch.randn(3, 64), torch.randn(64, 3))
    parameters = attach_trainable(transformer, "trained", {name: pair})
    layer = transformer.transformer_blocks[0].attn.to_q
    x = torch.randn(5, 64).bfloat16()
    found = layer(x)
    wanted = layer.base_layer(x) + x @ pair.down.bfloat16().T @ pair.up.bfloat16().T
    assert torch.equal(found, wanted)
    found.float().square().sum().backward()
    assert [p.dtype for p in parameters] == [torch.float32] * 2
    assert [p.grad.dtype for p in parameters] == [torch.float32] * 2


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_what_is_subtracted_cancels_what_starts_equal(load_pipe, rel, dtype):
    transformer = load_pipe().transformer.to(dtype)
    name = "transformer_blocks.0.attn.to_q"
    torch.manual_seed(0)
    initial, other = (LowRank(torch.randn(3, 64), torch.randn(64, 3)) for _ in range(2))
    opposite = LowRank(initial.down, -initial.up)
    parameters = attach_trainable(transformer, "trained", {name: initial}, {name: opposite})
    layer = transformer.transformer_blocks[0].attn.to_q
    x = torch.randn(5, 64).to(dtype)
    assert rel(layer(x), layer.base_layer(x)) < (1e-6 if dtype == torch.float32 else 1e-4)
    with torch.no_grad():
        for parameter, factor in zip(parameters, other, strict=True):
            parameter.copy_(factor)
    wanted = layer.base_layer(x) + (
        x.float() @ (other.down.T @ other.up.T - initial.down.T @ initial.up.T)
    )
    assert rel(layer(x), wanted) < (1e-6 if dtype == torch.float32 else 1e-2)
    assert len([p for p in transformer.parameters() if p.requires_grad]) == 2


def test_file_metadata_brings_its_policy(load_pipe, expected, tmp_path):
    policy = ResolutionPolicy(3.0, time_shift=5.0, native_sequence_length=320)
    tensors = load_file(stages(expected, "dev")["2k"][0])
    save_file(tensors, tmp_path / "own.safetensors", {"urae.policy": policy.to_json()})
    pipe = urae.adapt(load_pipe(), tmp_path / "own.safetensors")
    assert find_policy(pipe.transformer).policy == policy
    assert pipe.scheduler.config.shift == 5.0
    urae.adapt(pipe, tmp_path / "own.safetensors", policy=NATIVE)
    assert find_policy(pipe.transformer).policy == NATIVE
    assert read_adapter(tmp_path / "own.safetensors").policy == policy


def test_layers_whose_names_end_alike_keep_their_ranks(load_pipe):
    blocks = ("single_transformer_blocks.0.", "single_transformer_blocks.1.")
    ranks = {"proj_out": 2} | {f"{block}proj_out": 4 for block in blocks}
    transformer = load_pipe().transformer
    layers = {}
    for name, rank in ranks.items():
        out, inner = transformer.get_submodule(name).weight.shape
        layers[name] = LowRank(torch.randn(rank, inner), torch.randn(out, rank))
    attach(transformer, "a", layers)
    attached = read_factors(transformer, "a")
    assert attached.keys() == layers.keys()
    for name, pair in attached.items():
        assert torch.equal(pair.down, layers[name].down)
        assert transformer.get_submodule(name).scaling["a"] == 1


@pytest.mark.parametrize("order", ["before", "after"])
def test_model_offload(load_pipe, expected, sample, rel, monkeypatch, order):
    """Offloading's hooks wrap forward; without a GPU the CPU stands in for it."""
    wanted = sample(urae.adapt(load_pipe(), stages(expected, "dev")["4k"]))
    enable = FluxPipeline.enable_model_cpu_offload
    monkeypatch.setattr(
        FluxPipeline, "enable_model_cpu_offload", lambda pipe, **_: enable(pipe, device="cpu")
    )
    pipe = load_pipe()
    if order == "before":
        pipe.enable_model_cpu_offload()
    urae.adapt(pipe, stages(expected, "dev")["4k"])
    if order == "after":
        pipe.enable_model_cpu_offload()
    assert hasattr(pipe.transformer, "_hf_hook")
    assert rel(sample(pipe), wanted) < 1e-6


def test_attention_backend(load_pipe, expected, sample, rel):
    pipe = urae.adapt(load_pipe(), stages(expected, "dev")["2k"])
    wanted = sample(pipe)
    with attention_backend("native"):  # set_attention_backend sets the process's own for good
        pipe.transformer.set_attention_backend("_native_math")
        assert rel(sample(pipe), wanted) < 1e-5


def test_a_removed_adapter_warns_with_what_helps(load_pipe, expected, sample):
    pipe = urae.adapt(load_pipe(), stages(expected, "dev")["2k"])
    pipe.unload_lora_weights()
    with pytest.warns(UserWarning, match=r"urae_2k was removed; call urae.adapt again"):
        sample(pipe)


def test_a_scheduler_made_of_ours_gets_its_shift_back(load_pipe, expected):
    lora, policy = stages(expected, "dev")["2k"], ResolutionPolicy(time_shift=6.0)
    pipe = load_pipe()
    before = {name: pipe.scheduler.config[name] for name in ("shift", "use_dynamic_shifting")}
    for _ in range(2):
        urae.adapt(pipe, lora, policy=policy)
        pipe.scheduler = type(pipe.scheduler).from_config(pipe.scheduler.config)
        assert pipe.scheduler.config.shift == 6.0
    urae.restore(pipe)
    assert {name: pipe.scheduler.config[name] for name in before} == before
    urae.adapt(pipe, lora, policy=policy)
    pipe.scheduler = own = type(pipe.scheduler).from_config(pipe.scheduler.config, shift=2.0)
    assert urae.restore(pipe).scheduler is own


def test_a_policy_of_another_type(load_pipe):
    with pytest.raises(ValueError, match=r"must be a urae\.ResolutionPolicy"):
        urae.adapt(load_pipe(), policy={"ntk_factor": 2.0})
