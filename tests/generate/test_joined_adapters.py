import logging

import pytest
import torch
from accelerate import cpu_offload
from peft.tuners.lora import Linear, LoraLayer
from safetensors.torch import save_file
from torch import nn
from torch._dynamo.testing import CompileCounter

import urae
from urae.generate import joined_adapters
from urae.generate.joined_adapters import merge_weight
from urae.generate.memory import stream_blocks

CPU = torch.device("cpu")
PARTS = ["joined-adapters", "merged-adapters"]


@pytest.fixture(params=PARTS)
def part(request):
    return request.param


@pytest.fixture
def adapted(load_pipe, expected):
    """Adapt a pipe with two LoRAs, at scales of their own."""

    def load():
        names = [expected / f"dev_{name}.safetensors" for name in ("2k_lora", "4k_lora_conversion")]
        pipe = urae.adapt(load_pipe(), names)
        pipe.set_adapters(["urae_2k", "urae_4k"], [0.7, 1.3])
        return pipe

    return load


@pytest.fixture
def style(tmp_path):
    """A LoRA of the user's, on a layer that the others leave alone too."""
    generator = torch.Generator().manual_seed(0)
    state = {}
    for layer in ("transformer_blocks.0.attn.to_q", "single_transformer_blocks.0.proj_mlp"):
        rows = 256 if layer.endswith("proj_mlp") else 64
        for key, shape in (("lora_A", (4, 64)), ("lora_B", (rows, 4))):
            numbers = torch.randn(shape, generator=generator)
            state[f"transformer.{layer}.{key}.weight"] = 0.2 * numbers
    path = tmp_path / "style.safetensors"
    save_file(state, path)
    return path


@pytest.fixture
def draw(sample):
    return lambda pipe, **options: sample(pipe, 64, 64, num_inference_steps=1, **options)


def apply(pipe, *parts):
    return urae.optimize(pipe, speed=None, parts=parts)


def kinds(pipe):
    """Count the LoRA layers by what computes them."""
    found = [type(m).__name__ for m in pipe.transformer.modules() if isinstance(m, Linear)]
    return {name: found.count(name) for name in sorted(set(found))}


def count_products(pipe, run):
    counted = []
    linear = torch.nn.functional.linear

    class Count(torch.overrides.TorchFunctionMode):
        def __torch_function__(self, function, types, args=(), kwargs=None):
            counted.append(function is linear)
            return function(*args, **(kwargs or {}))

    with Count():
        run(pipe)
    return sum(counted)


def test_the_same_pictures_in_fewer_products(adapted, draw, rel, part):
    pipe = adapted()
    wanted = draw(pipe)
    before = count_products(pipe, draw)
    apply(pipe, part)
    assert rel(draw(pipe), wanted) < 1e-6
    after = count_products(pipe, draw)
    num_layers = sum(kinds(pipe).values())
    assert before - after == num_layers * (2 if part == "joined-adapters" else 4)
    assert list(kinds(pipe)) == ["_OneProduct" if part == "joined-adapters" else "_Merged"]


def test_one_adapter_at_scale_one_is_bitwise_the_same(load_pipe, expected, draw):
    pipe = urae.adapt(load_pipe(), expected / "dev_2k_lora.safetensors")
    wanted = draw(pipe)
    assert torch.equal(draw(apply(pipe, "joined-adapters")), wanted)


def test_undone_bitwise(adapted, load_pipe, draw, part):
    pipe = adapted()
    wanted, before = draw(pipe), pipe.transformer.state_dict()
    apply(pipe, part)
    draw(pipe)
    assert pipe.transformer.state_dict().keys() == before.keys()
    apply(pipe)
    after = pipe.transformer.state_dict()
    assert all(torch.equal(before[key], after[key]) for key in before)
    assert torch.equal(draw(pipe), wanted)
    assert list(kinds(pipe)) == ["Linear"]
    assert not [name for name, _ in pipe.transformer.named_buffers() if "joined" in name]
    apply(pipe, part)
    assert torch.equal(draw(urae.restore(pipe)), draw(load_pipe()))


def zero_a_factor(pipe):
    with torch.no_grad():
        pipe.transformer.transformer_blocks[0].attn.to_q.lora_B["urae_2k"].weight.zero_()


def load_style(pipe, style):
    pipe.load_lora_weights(style.parent, weight_name=style.name, adapter_name="style")
    pipe.set_adapters(["urae_2k", "urae_4k", "style"], [1.0, 1.0, 0.5])


def replace_style(pipe, style):
    """Put other weights under the name of an adapter that has been used."""
    load_style(pipe, style)
    pipe("a circle", height=64, width=64, num_inference_steps=1, output_type="latent")
    pipe.delete_adapters("style")
    load_style(pipe, style)
    with torch.no_grad():
        for layer in pipe.transformer.modules():
            if isinstance(layer, Linear) and "style" in layer.lora_B:
                layer.lora_B["style"].weight.mul_(2)


CHANGES = {
    "scale": lambda pipe, _: pipe.set_adapters(["urae_2k", "urae_4k"], [0.1, 1.0]),
    "fewer": lambda pipe, _: pipe.set_adapters("urae_2k"),
    "none": lambda pipe, _: pipe.disable_lora(),
    "deleted": lambda pipe, _: pipe.delete_adapters("urae_4k"),
    "unloaded": lambda pipe, _: pipe.unload_lora_weights(),
    "numbers": lambda pipe, _: zero_a_factor(pipe),
    "another": load_style,
    "replaced": replace_style,
    "fused": lambda pipe, _: pipe.fuse_lora(),
    "fused and not": lambda pipe, _: (pipe.fuse_lora(), pipe.unfuse_lora()),
}


@pytest.mark.filterwarnings("ignore:the resolution policy is on")
@pytest.mark.filterwarnings("ignore:Already found a `peft_config` attribute")
@pytest.mark.parametrize("change", CHANGES)
def test_whatever_happens_to_the_adapters_is_followed(adapted, draw, rel, style, change):
    pipe = apply(adapted(), PARTS[[*CHANGES].index(change) % 2])
    before = draw(pipe)
    CHANGES[change](pipe, style)
    found = draw(pipe)
    wanted = draw(apply(pipe))
    assert rel(found, wanted) < 2e-6
    assert change in ("fused", "fused and not") or rel(before, wanted) > 1e-3


@pytest.mark.filterwarnings("ignore:the resolution policy is on")
def test_a_lora_that_comes_back_under_its_name_is_joined(adapted, draw, style):
    pipe = adapted()
    pipe.unload_lora_weights()
    apply(pipe, "joined-adapters")
    for _ in range(2):
        pipe.load_lora_weights(style.parent, weight_name=style.name, adapter_name="style")
        draw(pipe)
        assert "_OneProduct" in kinds(pipe)
        pipe.unload_lora_weights()


def test_a_scale_of_one_call(adapted, draw, rel, part):
    pipe = adapted()
    half = {"joint_attention_kwargs": {"scale": 0.5}}
    whole, wanted = draw(pipe), draw(pipe, **half)
    apply(pipe, part)
    assert rel(whole, wanted) > 1e-3
    for _ in range(2):
        assert rel(draw(pipe, **half), wanted) < 1e-6
        assert rel(draw(pipe), whole) < 1e-6


def test_streamed_and_changed(adapted, draw, rel, part, caplog):
    pipe, plain = apply(adapted(), part), adapted()
    stream_blocks(pipe.transformer, CPU)
    assert rel(draw(pipe), draw(plain)) < 1e-6
    assert list(kinds(pipe)) != ["Linear"]
    for each in (pipe, plain):
        each.set_adapters(["urae_2k", "urae_4k"], [0.1, 1.0])
    with caplog.at_level(logging.WARNING):
        assert torch.equal(draw(pipe), draw(plain))
    assert caplog.text.count("adapters have changed in an offloaded transformer") == 1


def test_offloaded_layer_by_layer(adapted, draw, part):
    pipe, plain = apply(adapted(), part), adapted()
    cpu_offload(pipe.transformer, CPU)
    assert torch.equal(draw(pipe), draw(plain))


def test_weights_of_another_dtype(adapted, draw, rel, caplog):
    pipe, plain = apply(adapted(), "merged-adapters"), adapted()
    assert not caplog.text
    for each in (pipe, plain):
        each.to(dtype=torch.bfloat16)
    assert rel(draw(pipe), draw(plain)) < 0.05
    assert list(kinds(pipe)) == ["_OneProduct"]  # which merging would have lost
    count = sum(kinds(pipe).values())
    assert (
        f"not merged in any of {count} layers, since in torch.bfloat16 that would not"
        in caplog.text
    )


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")  # dynamo's own
def test_compiled_blocks_are_one_graph_a_kind(adapted, draw, rel, part, monkeypatch):
    pipe = adapted()
    wanted = draw(pipe)
    torch._dynamo.reset()
    counter, compile_function = CompileCounter(), torch.compile
    monkeypatch.setattr(torch, "compile", lambda f: compile_function(f, backend=counter))
    apply(pipe, part, "compile")
    assert rel(draw(pipe), wanted) < 1e-5
    assert counter.frame_count == 2


def test_layers_that_do_more_keep_their_own_forward(adapted, draw, part):
    pipe = adapted()
    query, key = (
        getattr(pipe.transformer.transformer_blocks[0].attn, name) for name in ("to_q", "to_k")
    )
    query.lora_dropout["urae_2k"] = nn.Dropout(0.5)
    key.lora_A["urae_2k"].double()
    wanted = kinds(pipe)["Linear"] - 2
    apply(pipe, part)
    assert type(query) is type(key) is Linear
    assert sum(kinds(pipe).values()) - kinds(pipe)["Linear"] == wanted


@pytest.mark.parametrize("size", [1e-4, 1e-2, 1.0])
def test_in_bfloat16_merging_is_never_right(size):
    """Small updates are rounded away, large ones cost more of the output than is allowed."""
    generator = torch.Generator().manual_seed(0)
    weight = nn.Parameter(torch.randn(256, 256, generator=generator))
    down, up = torch.randn(8, 256, generator=generator), torch.randn(256, 8, generator=generator)
    up *= size / (up @ down).std()
    merged = merge_weight(weight, down, up)
    assert torch.allclose(merged, weight + up @ down, atol=1e-5)
    half = [each.detach().bfloat16() for each in (weight, down, up)]
    assert merge_weight(nn.Parameter(half[0]), *half[1:]) is None


def test_what_is_lost_is_not_merged(monkeypatch):
    """An update below the weight's rounding changes the output little, by being dropped."""
    weight = nn.Parameter(torch.ones(8, 8, dtype=torch.bfloat16))
    down, up = torch.ones(1, 8), torch.full((8, 1), 5e-4)
    assert merge_weight(weight, down, up) is None
    monkeypatch.setattr(joined_adapters, "_MAX_LOSS", 1.0)
    assert torch.equal(merge_weight(weight, down, up), weight)


@pytest.mark.parametrize("sign", [0.5, -1.0])
def test_numbers_written_past_torchs_count_are_followed(adapted, draw, rel, part, sign):
    """As peft's hotswap writes them."""
    pipe = apply(adapted(), part)
    before = draw(pipe)
    for layer in pipe.transformer.modules():
        if isinstance(layer, LoraLayer):
            layer.lora_B["urae_2k"].weight.data.mul_(sign)
    found = draw(pipe)
    assert rel(before, found) > 1e-3
    assert rel(found, draw(apply(pipe))) < 2e-6


def test_factors_that_moved_hold_what_they_held(adapted, draw, part, monkeypatch):
    """As when a pipe goes to a GPU after `optimize`: other memory, whose sums must be the same."""
    pipe = apply(adapted(), part)
    joins = []
    monkeypatch.setattr(joined_adapters._JoinedAdapters, "join", lambda *_: joins.append(1))
    for layer in pipe.transformer.modules():
        if isinstance(layer, LoraLayer):
            for factor in (layer.lora_A["urae_2k"].weight, layer.lora_B["urae_2k"].weight):
                factor.data = factor.data.T.contiguous().T  # summed in another order
    draw(pipe)
    assert not joins


def test_a_hotswap_under_embeddings_that_are_kept(load_pipe, part, rel):
    """As servers do, which encode a prompt once."""
    pipe = load_pipe()
    linears = {
        name: each
        for name, each in pipe.transformer.named_modules()
        if name.endswith(("attn.to_q", "attn.to_k"))
    }

    def build(seed):
        generator = torch.Generator().manual_seed(seed)
        return {
            f"transformer.{name}.{key}.weight": 0.3 * torch.randn(shape, generator=generator)
            for name, each in linears.items()
            for key, shape in (
                ("lora_A", (4, each.in_features)), ("lora_B", (each.out_features, 4)),
            )
        }  # fmt: skip

    text, pooled, _ = pipe.encode_prompt("a red circle", None, max_sequence_length=32)

    def draw_again():
        noise = torch.Generator().manual_seed(0)
        return pipe(
            prompt_embeds=text, pooled_prompt_embeds=pooled, height=64, width=64,
            num_inference_steps=2, generator=noise, output_type="latent",
        ).images  # fmt: skip

    pipe.load_lora_weights(build(1), adapter_name="style")
    apply(pipe, part)
    before = draw_again()
    pipe.load_lora_weights(build(2), adapter_name="style", hotswap=True)
    found = draw_again()
    assert rel(found, before) > 1e-3
    assert rel(found, (urae.restore(pipe), draw_again())[1]) < 2e-6
