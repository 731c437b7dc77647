import pytest
import torch

from urae.adapters.files import LowRank, read_adapter, write_lora
from urae.backbones.flux import load_transformer, predict_velocity
from urae.backbones.weights import find_attention_linears, linear_shape
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


@pytest.mark.parametrize("kind", ["lora", "minor"])
def test_layers_that_a_start_leaves_out_keep_the_adapter_under_them(bases, tmp_path, kind):
    transformer = load_transformer(bases["dev"], dtype=torch.float32)
    generator = torch.Generator().manual_seed(0)

    def write(name, layers, metadata=None):
        path = tmp_path / f"{name}.safetensors"
        write_lora(path, {layer: draw(layer) for layer in layers}, metadata)
        return read_adapter(path)

    def draw(layer):
        rows, columns = linear_shape(transformer, layer)
        factors = torch.randn(columns + rows, 4, generator=generator) / 8
        return LowRank(factors[:columns].T.contiguous(), factors[columns:].contiguous())

    names = find_attention_linears(transformer)
    rank = 2 if kind == "minor" else 4
    over = write("over", names)
    start = write("start", names[::2], {"urae.kind": kind, "urae.rank": str(rank)})
    before = {name: transformer.get_submodule(name).weight.detach() for name in names}
    attach_for_training(transformer, AdapterConfig(kind, rank), [over], start, 0)
    for name in names:
        if kind == "minor" and name in start.layers:
            continue
        layer = transformer.get_submodule(name)
        inputs = torch.eye(layer.in_features)
        found = (layer(inputs) - layer(torch.zeros_like(inputs))).T
        updates = [file.layers[name] for file in (over, start) if name in file.layers]
        wanted = before[name] + sum(pair.up @ pair.down for pair in updates)
        torch.testing.assert_close(found, wanted)
