import pytest
import torch

from urae.backbones.flux import load_transformer, predict_velocity
from urae.train import AdapterConfig
from urae.train.adapter import attach_for_training


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_fresh_lora_changes_nothing_before_its_first_step(base, bases, dtype):
    transformer = load_transformer(bases[base], dtype=dtype)
    generator = torch.Generator().manual_seed(0)
    shapes = (1, 16, 8, 12), (1,), (1, 6, 32), (1, transformer.config.pooled_projection_dim)
    latents, sigmas, embeds, pooled = (torch.rand(s, generator=generator) for s in shapes)
    inputs = latents.to(dtype), sigmas, embeds.to(dtype), pooled.to(dtype)
    with torch.no_grad():
        before = predict_velocity(transformer, *inputs, 3.5)
        adapter = attach_for_training(transformer, AdapterConfig("lora", 4), [], None, 0)
        assert torch.equal(predict_velocity(transformer, *inputs, 3.5), before)
        for parameter in adapter.parameters:  # so what is equal is not an adapter that is off
            parameter.add_(0.1)
        assert not torch.equal(predict_velocity(transformer, *inputs, 3.5), before)
