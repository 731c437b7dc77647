import pytest
import torch

import urae
from urae.generate.memory import stream_blocks

CPU = torch.device("cpu")


@pytest.fixture
def sample(sample):
    return lambda *given, **options: sample(*given, **{"num_inference_steps": 2, **options})


@pytest.fixture
def adapted(load_pipe, expected):
    return lambda: urae.adapt(load_pipe(), expected / "dev_2k_lora.safetensors")


def apply(pipe, *parts):
    return urae.optimize(pipe, speed=None, parts=("constants", *parts))


@pytest.fixture
def count(monkeypatch):
    """Count how often positions, text and pooled text are computed."""

    def attach(pipe):
        calls = dict.fromkeys(("positions", "text", "pooled"), 0)
        modules = {
            "positions": pipe.transformer.pos_embed.rope,
            "text": pipe.transformer.context_embedder,
            "pooled": pipe.transformer.time_text_embed.text_embedder,
        }
        for name, module in modules.items():
            original = module.forward

            def forward(*args, name=name, original=original):
                calls[name] += 1
                return original(*args)

            monkeypatch.setattr(module, "forward", forward)
        return calls

    return attach


def test_once_a_picture_and_the_same_bits(adapted, sample, count):
    pipe = adapted()
    wanted = sample(pipe, 64, 64)
    calls = count(pipe)
    apply(pipe)
    for number in (1, 2):
        assert torch.equal(sample(pipe, 64, 64), wanted)
        assert calls == {"positions": number, "text": number, "pooled": number}


def test_another_prompt_size_length_or_policy(adapted, sample):
    pipe, plain = apply(adapted()), adapted()
    for options in (
        {},
        {"prompt": "a small blue square"},
        {"height": 96},
        {"max_sequence_length": 32},
        {"num_images_per_prompt": 2},
    ):
        found, wanted = (
            sample(each, **{"width": 64, "height": 64, **options}) for each in (pipe, plain)
        )
        assert torch.equal(found, wanted)


def test_embeddings_that_are_kept_over_pictures(adapted, sample, count):
    """They are projected once a picture: a weight may have changed in between without a trace."""
    pipe, plain = adapted(), adapted()
    embeds, pooled, _ = pipe.encode_prompt("a circle", None, max_sequence_length=64)
    given = {"prompt": None, "prompt_embeds": embeds, "pooled_prompt_embeds": pooled}
    calls = count(pipe)
    apply(pipe)
    for _ in range(2):
        assert torch.equal(sample(pipe, 64, 64, **given), sample(plain, 64, 64, **given))
    assert calls["text"] == calls["pooled"] == 2
    for each in (pipe, plain):
        each.transformer.context_embedder.weight.data += 0.1  # as fusing a LoRA does
    assert torch.equal(sample(pipe, 64, 64, **given), sample(plain, 64, 64, **given))


def test_both_prompts_of_true_guidance(adapted, sample, count):
    pipe = adapted()
    guided = {"negative_prompt": "a blue square", "true_cfg_scale": 2.0}
    wanted = sample(pipe, 64, 64, **guided)
    calls = count(pipe)
    apply(pipe)
    assert torch.equal(sample(pipe, 64, 64, **guided), wanted)
    assert calls["text"] == calls["pooled"] == 2


def test_weights_that_change_and_other_dtypes(adapted, sample):
    pipe, plain = apply(adapted()), adapted()
    embeds, pooled, _ = plain.encode_prompt("a circle", None, max_sequence_length=64)
    given = {"prompt": None, "prompt_embeds": embeds, "pooled_prompt_embeds": pooled}
    sample(pipe, 64, 64, **given)
    for each in (pipe, plain):
        with torch.no_grad():
            each.transformer.context_embedder.weight.mul_(1.5)
            each.transformer.time_text_embed.text_embedder.linear_2.weight.mul_(1.5)
    assert torch.equal(sample(pipe, 64, 64, **given), sample(plain, 64, 64, **given))
    for each in (pipe, plain):
        each.to(dtype=torch.bfloat16)
    half = {name: tensor if tensor is None else tensor.bfloat16() for name, tensor in given.items()}
    assert torch.equal(sample(pipe, 64, 64, **half), sample(plain, 64, 64, **half))


def test_adapters_on_the_text_projections(adapted, sample):
    """One on the first layer acts on what is reused, one on the second is computed each step."""
    generator = torch.Generator().manual_seed(0)
    pipe, plain = apply(adapted()), adapted()
    sample(pipe, 64, 64)
    state = {}
    for layer in ("context_embedder", "time_text_embed.text_embedder.linear_1"):
        linear = pipe.transformer.get_submodule(layer)
        for key, shape in (
            ("lora_A", (2, linear.in_features)),
            ("lora_B", (linear.out_features, 2)),
        ):
            state[f"transformer.{layer}.{key}.weight"] = torch.randn(shape, generator=generator)
    before = sample(plain, 64, 64)
    for each in (pipe, plain):
        each.load_lora_weights(dict(state), adapter_name="style")
        each.set_adapters(["urae_2k", "style"], [1.0, 0.5])
    wanted = sample(plain, 64, 64)
    assert not torch.equal(wanted, before)
    assert torch.equal(sample(pipe, 64, 64), wanted)
    for each in (pipe, plain):
        each.set_adapters(["urae_2k", "style"], [1.0, 1.0])
    assert torch.equal(sample(pipe, 64, 64), sample(plain, 64, 64))


def test_local_attention_and_streaming(load_pipe, sample):
    policy = urae.ResolutionPolicy(native_sequence_length=128, attention="local")
    pipe, plain = (urae.adapt(load_pipe(), policy=policy) for _ in range(2))
    stream_blocks(apply(pipe).transformer, CPU)
    for side in (512, 64, 512):
        options = {"height": side, "width": side, "num_inference_steps": 2}
        assert torch.equal(sample(pipe, **options), sample(plain, **options))


def test_gradients_are_not_lost(adapted):
    pipe = apply(adapted())
    embedder = pipe.transformer.context_embedder.requires_grad_(True)
    text = torch.randn(1, 8, embedder.in_features)
    with torch.no_grad():
        assert embedder(text) is embedder(text)
    assert embedder(text).requires_grad


def test_undone(adapted, load_pipe, sample):
    pipe = apply(adapted())
    sample(pipe, 64, 64)
    urae.restore(pipe)
    assert torch.equal(sample(pipe, 64, 64), sample(load_pipe(), 64, 64))
    assert not pipe.transformer._forward_pre_hooks
    assert pipe.transformer.context_embedder._diffusers_hook.hooks == {}
