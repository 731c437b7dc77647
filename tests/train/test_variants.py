"""DoRA, LoKr and OFT: trained, resumed, averaged, used, and refused where they do not go."""

import json
from dataclasses import replace

import pytest
import torch
from safetensors.torch import load_file, save_file

import urae
from urae.adapters.convert import ConvertConfig, convert
from urae.adapters.files import read_adapter
from urae.adapters.variants import attach_variant, build_peft_config
from urae.backbones.flux import load_transformer
from urae.backbones.weights import find_attention_linears
from urae.resolution import ResolutionPolicy
from urae.train import AdapterConfig, OptimizerConfig, train

KINDS = ("dora", "lokr", "oft")
LAYER = "transformer_blocks.0.attn.to_q"


def weights(config) -> dict[str, torch.Tensor]:
    return load_file(config.output_dir / "pytorch_lora_weights.safetensors")


def layer_output(transformer) -> torch.Tensor:
    """What one adapted layer makes of some numbers."""
    x = torch.randn(3, 64, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        return transformer.get_submodule(LAYER)(x)


ONE_IS_QUICK = pytest.mark.parametrize(
    "kind",
    [k if k == "dora" else pytest.param(k, marks=pytest.mark.slow) for k in KINDS],
)
"""For tests that take long, of what the kinds have in common."""


@pytest.fixture(params=KINDS)
def kind(request) -> str:
    return request.param


@pytest.fixture
def variant(kind, settings):
    """A run of two steps, at a rate at which a few steps tell."""

    def build(**changes):
        optimizer = OptimizerConfig(name="adamw", lr=0.05)
        adapter = AdapterConfig(kind, 4)
        return settings(**{"steps": 2, "adapter": adapter, "optimizer": optimizer, **changes})

    return build


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_fresh_one_changes_nothing(kind, bases, dtype):
    transformer = load_transformer(bases["dev"], dtype=dtype)
    x = torch.randn(3, 64, generator=torch.Generator().manual_seed(1)).to(dtype)
    before = transformer.get_submodule(LAYER)(x)
    names = find_attention_linears(transformer)
    parameters = attach_variant(transformer, "a", build_peft_config(kind, 4, names))
    after = transformer.get_submodule(LAYER)(x)
    assert torch.equal(before, after)
    assert after.dtype == dtype
    assert {each.dtype for each in parameters} == {torch.float32}
    assert {name for name, each in transformer.named_parameters() if each.requires_grad} == {
        name for name, each in transformer.named_parameters() if any(each is p for p in parameters)
    }


@ONE_IS_QUICK
def test_resumed_equals_uninterrupted(variant, tmp_path):
    whole = variant(ema_decay=0.9)
    train(whole)
    parts = variant(ema_decay=0.9, steps=1, output_dir=tmp_path / "parts")
    train(parts)
    train(replace(parts, steps=2, resume=True))
    first, second = weights(whole), weights(parts)
    assert first.keys() == second.keys()
    assert all(torch.equal(first[key], second[key]) for key in first)
    checkpoint = whole.output_dir / "checkpoint-000002"
    trained = load_file(checkpoint / "plain_lora_weights.safetensors")
    assert any(not torch.equal(first[key], trained[key]) for key in first)


def test_trained_and_used(variant, load_pipe, kind):
    config = variant(policy=ResolutionPolicy(5.0))
    train(config)
    file = read_adapter(config.output_dir)
    assert (file.kind, file.rank, file.policy) == (kind, 4, config.policy)
    pipe = load_pipe()
    before = layer_output(pipe.transformer)
    urae.adapt(pipe, config.output_dir)
    adapted = layer_output(pipe.transformer)
    assert not torch.equal(adapted, before)
    assert not any(each.requires_grad for each in pipe.transformer.parameters())
    urae.adapt(pipe, config.output_dir)  # again, in its own place
    assert torch.equal(layer_output(pipe.transformer), adapted)
    urae.restore(pipe)
    assert torch.equal(layer_output(pipe.transformer), before)
    assert not getattr(pipe.transformer, "peft_config", None)


@pytest.mark.slow
def test_pictures_differ_and_come_back(variant, load_pipe, sample):
    config = variant()
    train(config)
    pipe = load_pipe()
    before = sample(pipe)
    urae.adapt(pipe)
    without = sample(pipe)
    urae.adapt(pipe, config.output_dir)
    assert not torch.equal(sample(pipe), without)
    urae.restore(pipe)
    assert torch.equal(sample(pipe), before)


@ONE_IS_QUICK
def test_a_run_goes_on_from_its_weights(variant, tmp_path, kind):
    first = variant()
    train(first)
    adapter = AdapterConfig(kind, 4, init=str(first.output_dir))
    further = variant(adapter=adapter, steps=1, output_dir=tmp_path / "further")
    train(replace(further, optimizer=OptimizerConfig(name="adamw", lr=1e-30)))
    for key, each in weights(further).items():
        torch.testing.assert_close(each, weights(first)[key], rtol=1e-3, atol=1e-6)


@ONE_IS_QUICK
def test_what_stock_diffusers_reads(variant, load_pipe, kind):
    config = variant()
    train(config)
    adapted = load_pipe()
    urae.adapt(adapted, config.output_dir)
    wanted = layer_output(adapted.transformer)
    stock = load_pipe()
    if kind == "dora":
        stock.load_lora_weights(config.output_dir)
    elif kind == "lokr":
        with pytest.raises(ValueError, match="Invalid LoRA checkpoint"):
            stock.load_lora_weights(config.output_dir)
        stock.transformer.load_lora_adapter(
            config.output_dir, weight_name="pytorch_lora_weights.safetensors"
        )
    else:
        with pytest.raises(ValueError, match="Invalid LoRA checkpoint"):
            stock.load_lora_weights(config.output_dir)
        return
    assert torch.equal(layer_output(stock.transformer), wanted)


def test_alone(variant, load_pipe, expected, kind, tmp_path):
    config = variant(steps=1)
    train(config)
    lora = str(expected / "dev_2k_lora.safetensors")
    pipe = load_pipe()
    with pytest.raises(
        ValueError,
        match=f"is a {kind} adapter, which cannot be combined with other adapters; leave",
    ):
        urae.adapt(pipe, [lora, config.output_dir])
    with pytest.raises(ValueError, match="so no plain LoRA has the same effect"):
        convert(ConvertConfig((str(config.output_dir),), tmp_path / "out.safetensors"))
    over = AdapterConfig("minor", 4, over=(str(config.output_dir),))
    with pytest.raises(
        ValueError,
        match=f"is a {kind} adapter, which cannot be combined with other adapters; train over",
    ):
        train(variant(adapter=over, output_dir=tmp_path / "minor"))
    pipe.load_lora_weights(lora, adapter_name="style")
    with pytest.raises(
        ValueError,
        match=r"cannot be combined with other adapters, but the pipeline has \['style'\]",
    ):
        urae.adapt(pipe, config.output_dir)


def test_a_damaged_one_leaves_the_pipe_as_it_was(variant, load_pipe, tmp_path, kind):
    config = variant(steps=1)
    train(config)
    tensors, metadata = weights(config), dict(read_adapter(config.output_dir).metadata)
    key = sorted(tensors)[0]
    pipe = load_pipe()
    urae.adapt(pipe, config.output_dir)
    before = layer_output(pipe.transformer)
    save_file({**tensors, key: torch.zeros(7, 7)}, tmp_path / "other.safetensors", metadata)
    with pytest.raises(ValueError, match=r"has shape \(7, 7\) in the adapter"):
        urae.adapt(pipe, tmp_path / "other.safetensors")
    assert torch.equal(layer_output(pipe.transformer), before)
    foreign = {name.replace("blocks.0", "blocks.77"): each for name, each in tensors.items()}
    save_file(foreign, tmp_path / "foreign.safetensors", metadata)
    with pytest.raises(ValueError, match=r"this one has no linear layer .*blocks\.77"):
        urae.adapt(pipe, tmp_path / "foreign.safetensors")
    del metadata["lora_adapter_metadata"]
    save_file(tensors, tmp_path / "bare.safetensors", metadata)
    with pytest.raises(ValueError, match=f"holds a {kind} adapter without its peft settings"):
        urae.adapt(pipe, tmp_path / "bare.safetensors")
    peft_type = {"dora": "LORA", "lokr": "LOKR", "oft": "OFT"}[kind]
    metadata["lora_adapter_metadata"] = json.dumps({"peft_type": peft_type, "unknown": 1})
    save_file(tensors, tmp_path / "strange.safetensors", metadata)
    with pytest.raises(ValueError, match="its LoRA settings are damaged"):
        urae.adapt(pipe, tmp_path / "strange.safetensors")


def test_settings_that_do_not_go_together(settings):
    with pytest.raises(ValueError, match=r"kind dora takes neither adapter\.over nor"):
        AdapterConfig("dora", over=("a",))
    with pytest.raises(
        ValueError, match="muon is only for matrices, and oft has other weights too"
    ):
        settings(adapter=AdapterConfig("oft"), optimizer=OptimizerConfig("muon"))
    with pytest.raises(
        ValueError, match="memory streamed is only for LoRA and minor components; lokr"
    ):
        settings(adapter=AdapterConfig("lokr"), memory="streamed")
    with pytest.raises(ValueError, match=r"the side of OFT's blocks, must be 2 or more and divide"):
        train(settings(adapter=AdapterConfig("oft", 5)))
