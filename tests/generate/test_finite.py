import pytest
import torch
from diffusers.models.attention_dispatch import AttentionBackendName

import urae


@pytest.fixture
def sample(sample):
    return lambda *given, **options: sample(*given, **{"num_inference_steps": 2, **options})


@pytest.fixture
def adapted(load_pipe, expected):
    return lambda: urae.adapt(load_pipe(), expected / "dev_2k_lora.safetensors")


def break_attention(pipe):
    """Let one block's attention return what is not finite, as a faulty kernel does."""
    attention = pipe.transformer.single_transformer_blocks[1].attn
    attention.register_forward_hook(lambda _module, _args, output: output * torch.inf)


def test_a_backend_that_fails_is_named_on_the_first_step(adapted, sample):
    pipe = adapted()
    for processor in pipe.transformer.attn_processors.values():
        processor._attention_backend = AttentionBackendName._NATIVE_MATH
    urae.optimize(pipe, parts=["taylorseer-cache=3"])
    break_attention(pipe)
    steps = []
    message = (
        r"first step is not finite at 16 tokens, with attention _native_math in torch.float32 on "
        r"cpu; try leaving out taylorseer-cache=3, pipe.transformer.set_attention_backend"
    )
    with pytest.raises(FloatingPointError, match=message):
        sample(pipe, 64, 64, callback_on_step_end=lambda *_: steps.append(1) or {})
    assert steps == []


def test_inputs_that_are_not_finite_are_not_the_backends_fault(adapted, sample):
    pipe = urae.optimize(adapted())
    embeds, pooled, _ = pipe.encode_prompt("a circle", None, max_sequence_length=64)
    given = {"prompt": None, "prompt_embeds": embeds, "pooled_prompt_embeds": pooled * torch.nan}
    with pytest.raises(FloatingPointError, match="was given pooled_projections that are not fini"):
        sample(pipe, 64, 64, **given)


def test_only_the_first_step_of_a_size_is_looked_at(adapted, sample, monkeypatch):
    looks, isfinite = [], torch.Tensor.isfinite
    monkeypatch.setattr(
        torch.Tensor, "isfinite", lambda each: looks.append(each.shape) or isfinite(each)
    )
    pipe = urae.optimize(adapted())
    for side in (64, 64, 96, 64):
        sample(pipe, side, side)
    assert looks == [(1, 16, 64), (1, 36, 64)]
    urae.restore(pipe)
    sample(pipe, 128, 128)
    assert len(looks) == 2
