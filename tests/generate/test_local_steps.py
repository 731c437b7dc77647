import pytest
import torch
from diffusers.models.attention_dispatch import AttentionBackendName

import urae
from urae.generate import attention
from urae.resolution import find_policy

POLICY = urae.ResolutionPolicy(native_sequence_length=64 + 64, time_shift=3.0)
LEVEL = 0.8
SIGMAS = [1.0, 0.9, 0.75, 0.5]  # four steps at a shift of 3


@pytest.fixture
def adapted(load_pipe, expected):
    def load(policy=POLICY):
        return urae.adapt(load_pipe(), expected / "dev_2k_lora.safetensors", policy=policy)

    return load


@pytest.fixture
def draw(sample):
    """Make a picture; return its latents, and of each step what attention was."""

    def run(pipe, side=512):
        steps = []
        transformer = pipe.transformer

        def look(*_):
            backends = {each._attention_backend for each in transformer.attn_processors.values()}
            steps.append((find_policy(transformer)._num_local_keys is not None, *backends))

        handle = transformer.register_forward_hook(look)
        latents = sample(pipe, side, side, num_inference_steps=len(SIGMAS))
        handle.remove()
        return latents, steps

    return run


def is_local(steps):
    return [local for local, *_ in steps]


def optimized(pipe, *parts):
    return urae.optimize(pipe, speed=None, parts=parts)


def test_steps_below_the_level_are_local(adapted, draw):
    pipe = adapted()
    exact, steps = draw(pipe)
    assert is_local(steps) == [False] * 4
    optimized(pipe, f"local-attention={LEVEL}")
    late, steps = draw(pipe)
    assert is_local(steps) == [sigma <= LEVEL for sigma in SIGMAS] == [False, False, True, True]
    assert is_local(draw(pipe)[1]) == is_local(steps)  # the next picture begins anew
    optimized(pipe, "local-attention")
    whole, steps = draw(pipe)
    assert is_local(steps) == [True] * 4
    assert not torch.equal(late, whole)
    assert not torch.equal(late, exact)
    assert is_local(draw(pipe, side=128)[1]) == [False] * 4  # native


def test_it_is_undone(adapted, draw):
    pipe = adapted()
    wanted, _ = draw(pipe)
    optimized(pipe, f"local-attention={LEVEL}")
    optimized(pipe)
    assert find_policy(pipe.transformer).policy == POLICY
    assert torch.equal(draw(pipe)[0], wanted)


@pytest.mark.parametrize("part", ["constants", "progressive=0.25", "taylorseer-cache=1"])
def test_other_parts_beside_it(adapted, draw, part):
    pipe = optimized(adapted(), f"local-attention={LEVEL}", part)
    latents, steps = draw(pipe)
    assert is_local(steps) == [False, False, True, True]
    if "progressive" not in part:
        wanted, _ = draw(optimized(adapted(), f"local-attention={LEVEL}"))
        assert torch.equal(latents, wanted)


def test_an_adapter_that_was_trained_with_it_always_has_it(adapted, draw):
    local = urae.ResolutionPolicy(native_sequence_length=64 + 64, attention="local")
    pipe = optimized(adapted(local), f"local-attention={LEVEL}")
    assert is_local(draw(pipe)[1]) == [True] * 4


def test_full_steps_have_the_fastest_backend(adapted, draw, monkeypatch):
    monkeypatch.setattr(attention, "_decides", lambda _: True)
    fastest = AttentionBackendName._NATIVE_MATH
    monkeypatch.setattr(attention, "_find_fastest", lambda *_: fastest)
    pipe = optimized(adapted(), f"local-attention={LEVEL}", "attention-backend")
    for _ in range(2):
        steps = draw(pipe)[1]
        native = AttentionBackendName.NATIVE  # of local attention on a CPU
        assert steps == [(False, fastest)] * 2 + [(True, native)] * 2
    urae.restore(pipe)
    assert {p._attention_backend for p in pipe.transformer.attn_processors.values()} == {None}
