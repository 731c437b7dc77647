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
            steps.append((find_policy(transformer).num_local_keys is not None, *backends))

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


@pytest.mark.parametrize("part", ["constants", "progressive=0.25", "joined-adapters"])
def test_other_parts_beside_it(adapted, draw, part):
    pipe = optimized(adapted(), f"local-attention={LEVEL}", part)
    latents, steps = draw(pipe)
    assert is_local(steps) == [False, False, True, True]
    if "progressive" not in part:
        wanted, _ = draw(optimized(adapted(), f"local-attention={LEVEL}"))
        assert torch.equal(latents, wanted)


def test_what_a_step_cache_predicts_keeps_its_tokens_in_place(adapted, sample, rel):
    """The first local step is predicted from full ones: as if it were full."""

    def run(*parts):
        pipe = optimized(adapted(), "taylorseer-cache=3", *parts)
        found = []
        hook = pipe.transformer.register_forward_hook(lambda _m, _a, out: found.append(out[0]))
        sample(pipe, 512, 512, num_inference_steps=6)
        hook.remove()
        return found

    sigmas = [1.0, 0.9375, 0.857, 0.75, 0.6, 0.375]  # the first two are computed, and the last
    full, local = run(), run("local-attention=0.86")
    for index in range(len(sigmas)):
        if sigmas[index] > 0.86 or index == 2:
            assert rel(local[index], full[index]) < 1e-5
    assert rel(local[-1], full[-1]) > 1e-3


def test_numbers_that_are_not_finite_in_local_steps_are_found(adapted, sample):
    pipe = optimized(adapted(), f"local-attention={LEVEL}")
    transformer = pipe.transformer

    def break_local(_module, _args, output):
        return output * torch.nan if find_policy(transformer).num_local_keys else output

    transformer.proj_out.register_forward_hook(break_local)
    with pytest.raises(FloatingPointError, match=r"leaving out local-attention=0\.8"):
        sample(pipe, 512, 512, num_inference_steps=len(SIGMAS))


def test_what_excludes_it_is_said_before_the_first_step(adapted, sample):
    pipe = optimized(adapted(), f"local-attention={LEVEL}")
    steps = []
    mask = torch.ones(1, 1, 1, 1, dtype=torch.bool)
    with pytest.raises(ValueError, match="leave out the part local-attention"):
        sample(
            pipe,
            512,
            512,
            num_inference_steps=len(SIGMAS),
            joint_attention_kwargs={"attention_mask": mask},
            callback_on_step_end=lambda *given: steps.append(given) or given[-1],
        )
    assert steps == []


def test_an_adapter_that_was_trained_with_it_always_has_it(adapted, draw, caplog):
    local = urae.ResolutionPolicy(native_sequence_length=64 + 64, attention="local")
    pipe = optimized(adapted(local), f"local-attention={LEVEL}")
    assert is_local(draw(pipe)[1]) == [True] * 4
    assert "which is on wherever they act" in caplog.text


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
