import pytest
import torch

import urae
from urae.generate.chunks import token_chunks


@pytest.mark.parametrize("num_tokens", [1, 7, 16, 1000])
def test_the_same_numbers(load_pipe, expected, sample, rel, num_tokens):
    pipe = urae.adapt(load_pipe(), expected / "dev_2k_lora.safetensors")
    wanted = sample(pipe, 64, 96, num_inference_steps=2)
    with token_chunks(pipe.transformer, num_tokens):
        found = sample(pipe, 64, 96, num_inference_steps=2)
    assert rel(found, wanted) < 1e-6
    assert torch.equal(sample(pipe, 64, 96, num_inference_steps=2), wanted)


def test_the_blocks_are_restored_even_after_an_error(load_pipe):
    transformer = load_pipe().transformer
    before = list(transformer.named_modules())
    with pytest.raises(RuntimeError, match="inside"), token_chunks(transformer):
        raise RuntimeError("inside")
    assert list(transformer.named_modules()) == before


def test_a_lora_on_the_mlp_takes_part(load_pipe, rel):
    from urae.adapters.attach import attach
    from urae.adapters.files import LowRank
    from urae.backbones.flux import predict_velocity

    transformer = load_pipe().transformer
    generator = torch.Generator().manual_seed(0)

    def draw(*shape):
        return torch.randn(shape, generator=generator)

    inputs = (draw(1, 16, 8, 8), torch.tensor([0.5]), draw(1, 9, 64), draw(1, 48))
    config = transformer.config
    inputs = (
        *inputs[:2],
        draw(1, 9, config.joint_attention_dim),
        draw(1, config.pooled_projection_dim),
    )
    plain = predict_velocity(transformer, *inputs, 3.5)
    layers = {
        name: LowRank(draw(4, linear.in_features), draw(linear.out_features, 4))
        for name, linear in transformer.named_modules()
        if name.endswith(("proj_mlp", "single_transformer_blocks.0.proj_out", "ff.net.2"))
    }
    attach(transformer, "mlp", layers)
    wanted = predict_velocity(transformer, *inputs, 3.5)
    assert rel(wanted, plain) > 1e-3
    with token_chunks(transformer, 5):
        assert rel(predict_velocity(transformer, *inputs, 3.5), wanted) < 1e-6
