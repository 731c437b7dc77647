import pytest
import torch
from safetensors.torch import load_file

from urae.adapters.attach import read_factors
from urae.adapters.files import read_adapter
from urae.backbones.flux import load_transformer, read_latent_scale
from urae.resolution import ResolutionPolicy, apply_policy
from urae.train import AdapterConfig
from urae.train.adapter import attach_for_training
from urae.train.batch import Batch
from urae.train.loss import compute_losses

LORA_POLICY = ResolutionPolicy(ntk_factor=1.0, proportional_attention=False)


@pytest.fixture(params=["lora", "minor"])
def kind(request):
    return request.param


@pytest.fixture
def golden(expected, base, kind):
    name = {"lora": "2k_lora_ntk1", "minor": "4k_minor_ntk10"}[kind]
    return load_file(expected / f"{base}_train_{name}.safetensors")


@pytest.fixture
def adapter(base, bases, expected, kind):
    transformer = load_transformer(bases[base], dtype=torch.float32)
    apply_policy(transformer, LORA_POLICY if kind == "lora" else ResolutionPolicy())
    lora = read_adapter(expected / f"{base}_2k_lora.safetensors")
    if kind == "lora":
        return attach_for_training(transformer, AdapterConfig("lora", 4), [], lora, 0)
    config = AdapterConfig("minor", 4, over=(str(lora.path),))
    return attach_for_training(transformer, config, [lora], None, 0)


@pytest.mark.parametrize("checkpointing", [False, True])
def test_a_step_equals_the_reference(base, bases, golden, adapter, kind, rel, checkpointing):
    if checkpointing:
        adapter.transformer.enable_gradient_checkpointing()
    latents = golden["latent_mean"] + golden["latent_std"] * golden["latent_eps"]
    batch = Batch(
        read_latent_scale(bases[base]).normalize(latents),
        golden["noise"],
        golden["sigma"],
        golden["prompt_embeds_t5"],
        golden["prompt_embeds_clip"],
    )
    losses = compute_losses(adapter.transformer.train(), batch, float(golden["guidance"]))
    loss = losses.mean()
    loss.backward()
    assert rel(loss, golden["loss"]) < 1e-5
    factors = read_factors(adapter.transformer, adapter.name)
    assert 2 * len(factors) == sum(key.startswith("grad.") for key in golden) == 20
    for name, pair in factors.items():
        if kind == "lora":
            stem = f"grad.{name}.lora_"
            assert rel(pair.down.grad, golden[f"{stem}A.default_0.weight"]) < 1e-4
            assert rel(pair.up.grad, golden[f"{stem}B.default_0.weight"]) < 1e-4
            continue
        attention, _, layer = name.partition(".attn.")
        stem = f"grad.{attention}.attn.processor.{layer.removesuffix('.0')}_"
        down, up = golden[f"{stem}a.weight"], golden[f"{stem}b.weight"]
        # a singular pair is known up to its sign, which up and down share
        signs = (pair.down.grad * down).sum(1).sign()
        assert rel(signs[:, None] * pair.down.grad, down) < 1e-4
        assert rel(signs * pair.up.grad, up) < 1e-4


def test_only_the_adapter_trains(adapter):
    trainable = [p for p in adapter.transformer.parameters() if p.requires_grad]
    assert {id(p) for p in trainable} == {id(p) for p in adapter.parameters}
    assert all(p.dtype == torch.float32 for p in trainable)


def test_trainables_stay_in_float32_over_a_bfloat16_base(bases):
    transformer = load_transformer(bases["dev"], dtype=torch.bfloat16)
    adapter = attach_for_training(transformer, AdapterConfig("minor", 4), [], None, 0)
    assert {p.dtype for p in adapter.parameters} == {torch.float32}
    assert transformer.x_embedder.weight.dtype == torch.bfloat16
    layer = transformer.transformer_blocks[0].attn.to_q
    x = torch.randn(9, 64).bfloat16()
    # fresh: B A x and B0 A0 x are the same numbers in float32, so nothing changes
    assert torch.equal(layer(x), layer.base_layer(x))
