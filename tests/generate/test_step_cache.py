import ast

import pytest
import torch
from diffusers import FluxImg2ImgPipeline, MagCacheConfig
from safetensors.torch import load_file
from torch._dynamo.testing import CompileCounter

import urae
from urae.generate.memory import stream_blocks
from urae.generate.step_cache import DEFAULT_STRENGTH

CPU = torch.device("cpu")
STEPS = 12
EAGER = {"first-block-cache": "0.5", "mag-cache": "5", "taylorseer-cache": "4"}
EXACT = {"first-block-cache": "0", "mag-cache": "0", "taylorseer-cache": "1"}


@pytest.fixture(autouse=True)
def cache_dir(tmp_path, monkeypatch):
    monkeypatch.setenv("URAE_CACHE_DIR", str(tmp_path))
    return tmp_path / "step-cache"


@pytest.fixture
def adapted(load_pipe, expected):
    return lambda: urae.adapt(load_pipe(), expected / "dev_2k_lora.safetensors")


@pytest.fixture
def draw(sample):
    """Make one picture, and count the steps that computed the blocks."""

    def run(pipe, seed=7, steps=STEPS, side=128, **options):
        computed = []
        attention = pipe.transformer.single_transformer_blocks[0].attn
        hook = attention.register_forward_hook(lambda *_: computed.append(1))
        generator = torch.Generator().manual_seed(seed)
        try:
            latents = sample(
                pipe, side, side, num_inference_steps=steps, generator=generator, **options
            )
        finally:
            hook.remove()
        return latents, len(computed)

    return run


ONE_IS_QUICK = pytest.mark.parametrize(
    "kind",
    [
        k if k == "taylorseer-cache" else pytest.param(k, marks=pytest.mark.slow)
        for k in DEFAULT_STRENGTH
    ],
)
"""For tests that take long, of what the kinds have in common."""


@pytest.fixture(params=DEFAULT_STRENGTH)
def kind(request):
    return request.param


def cached(pipe, kind, strength=EAGER):
    return urae.optimize(pipe, speed=None, parts=[f"{kind}={strength[kind]}"])


def break_off(at):
    """Return a callback that interrupts a picture after a step."""

    def interrupt(_pipe, step, *_):
        if step == at:
            raise KeyboardInterrupt
        return {}

    return interrupt


def test_a_cache_without_tolerance_changes_nothing(adapted, draw, kind):
    pipe = adapted()
    wanted, _ = draw(pipe)
    cached(pipe, kind, EXACT)
    for _ in range(2):  # MagCache's first picture measures
        found, computed = draw(pipe)
        assert torch.equal(found, wanted)
        assert computed == STEPS


def test_steps_are_skipped_and_each_picture_is_for_itself(adapted, draw, kind, rel):
    pipe = adapted()
    wanted, _ = draw(pipe)
    cached(pipe, kind)
    draw(pipe, seed=3)
    first, computed = draw(pipe)
    assert 0 < computed < STEPS
    assert 0 < rel(first, wanted) < 1
    draw(pipe, seed=5)
    again, _ = draw(pipe)
    assert torch.equal(again, first)


def test_taylorseer_computes_two_steps_then_some_and_the_last(adapted, draw):
    pipe = urae.optimize(adapted(), speed=None, parts=["taylorseer-cache=5"])
    for steps, whole in ((12, [0, 1, 3, 8, 11]), (9, [0, 1, 3, 8]), (2, [0, 1]), (1, [0])):
        computed, schedule = [], []
        block = pipe.transformer.single_transformer_blocks[0].attn
        hooks = [
            pipe.transformer.register_forward_pre_hook(lambda *_, s=schedule: s.append(1)),
            block.register_forward_hook(lambda *_, s=schedule, c=computed: c.append(len(s) - 1)),
        ]
        draw(pipe, steps=steps)
        for hook in hooks:
            hook.remove()
        assert computed == whole


def test_a_picture_that_was_broken_off_leaves_nothing(adapted, draw, kind):
    pipe = cached(adapted(), kind)
    draw(pipe, seed=3)
    wanted, _ = draw(pipe)

    for step in (0, 6):
        with pytest.raises(KeyboardInterrupt):
            draw(pipe, seed=3, callback_on_step_end=break_off(step))
        found, _ = draw(pipe)
        assert torch.equal(found, wanted)


@ONE_IS_QUICK
def test_both_forwards_of_true_guidance_have_a_state(adapted, draw, kind):
    pipe = adapted()
    guided = {"negative_prompt": "a blue square", "true_cfg_scale": 2.0}
    wanted, _ = draw(pipe, **guided)
    cached(pipe, kind, EXACT)
    for _ in range(2):
        assert torch.equal(draw(pipe, **guided)[0], wanted)
    cached(pipe, kind)
    found, computed = draw(pipe, **guided)
    assert computed < 2 * STEPS
    assert torch.equal(draw(pipe, **guided)[0], found)


@ONE_IS_QUICK
def test_restore_undoes_it(adapted, load_pipe, draw, kind):
    pipe, stock = adapted(), load_pipe()
    wanted, _ = draw(pipe)
    cached(pipe, kind)
    urae.optimize(pipe, speed=None)
    assert torch.equal(draw(pipe)[0], wanted)
    cached(pipe, kind)
    urae.restore(pipe)
    assert torch.equal(draw(pipe)[0], draw(stock)[0])
    assert not pipe.transformer.is_cache_enabled
    assert not pipe.transformer._forward_pre_hooks


@ONE_IS_QUICK
def test_streamed_weights(adapted, draw, kind):
    pipe = cached(adapted(), kind)
    draw(pipe)
    wanted, skipped = draw(pipe)
    other = cached(adapted(), kind)
    stream_blocks(other.transformer, CPU)
    found, computed = draw(other)
    assert torch.equal(found, wanted)
    assert computed == skipped
    urae.restore(other)  # with the offloading hooks around what is undone
    assert torch.equal(draw(other)[0], draw(urae.restore(pipe))[0])


@pytest.mark.filterwarnings("ignore")  # dynamo's own
@pytest.mark.parametrize(
    "kind",
    [
        "taylorseer-cache",
        pytest.param("mag-cache", marks=pytest.mark.slow),
        pytest.param("first-block-cache", marks=pytest.mark.slow),
    ],
)
def test_compiled_blocks(adapted, draw, kind, rel, monkeypatch):
    pipe = adapted()
    wanted = [draw(cached(pipe, kind))[0] for _ in range(2)][1]
    torch._dynamo.reset()
    counter, compile_function = CompileCounter(), torch.compile
    monkeypatch.setattr(torch, "compile", lambda f: compile_function(f, backend=counter))
    name = f"{kind}={EAGER[kind]}"
    urae.optimize(pipe, speed=None, parts=["compile", name])
    found, _ = draw(pipe)
    assert rel(found, wanted) < 1e-5
    assert counter.frame_count in (2, 3)
    assert counter.op_count > 20
    urae.restore(pipe)
    assert pipe.transformer.transformer_blocks[0]._diffusers_hook.hooks == {}


@ONE_IS_QUICK
def test_local_attention_goes_with_it(load_pipe, draw, kind):
    policy = urae.ResolutionPolicy(native_sequence_length=64 + 64, attention="local")
    pipe = urae.adapt(load_pipe(), policy=policy)
    wanted, _ = draw(pipe, side=512, steps=6)
    cached(pipe, kind, EXACT)
    for _ in range(2):
        assert torch.equal(draw(pipe, side=512, steps=6)[0], wanted)
    cached(pipe, kind)
    assert draw(pipe, side=512, steps=6)[1] < 6 or kind == "first-block-cache"


# --- MagCache's calibration -----------------------------------------------------------------------


def files(folder):
    return sorted(folder.glob("*.safetensors"))


def test_the_measured_ratios_are_those_of_diffusers(adapted, draw, cache_dir, capsys):
    pipe = adapted()
    pipe.transformer.enable_cache(MagCacheConfig(calibrate=True, num_inference_steps=STEPS))
    draw(pipe)
    pipe.transformer.disable_cache()
    printed = ast.literal_eval(capsys.readouterr().out.strip().splitlines()[-1])
    draw(cached(pipe, "mag-cache"))
    assert capsys.readouterr().out == ""
    (path,) = files(cache_dir)
    assert load_file(path)["ratios"].tolist() == pytest.approx(printed)


def test_under_true_guidance_the_ratios_are_the_prompts_own(adapted, draw, cache_dir):
    """With hardly any guidance the path is the prompt's, and so must the ratios be."""

    def measure(**options):
        for path in files(cache_dir):
            path.unlink()
        draw(cached(adapted(), "mag-cache"), **options)
        (path,) = files(cache_dir)
        return load_file(path)["ratios"].tolist()

    alone = measure()
    negative = "a small blue square on a checked pink background"
    assert measure(prompt=negative) != pytest.approx(alone, abs=1e-4)
    guided = measure(negative_prompt=negative, true_cfg_scale=1 + 1e-6)
    assert guided == pytest.approx(alone, abs=1e-4)


def test_ratios_are_kept_for_the_next_run(adapted, draw, cache_dir):
    assert draw(cached(adapted(), "mag-cache"))[1] == STEPS
    (path,) = files(cache_dir)
    assert draw(cached(adapted(), "mag-cache"))[1] < STEPS
    assert files(cache_dir) == [path]


@pytest.mark.parametrize("other", ["size", "steps", "adapter", "strength", "policy"])
def test_ratios_belong_to_what_they_were_measured_on(
    adapted, load_pipe, expected, draw, cache_dir, other
):
    draw(cached(adapted(), "mag-cache"))
    pipe, options = adapted(), {}
    if other == "size":
        options = {"side": 160}
    elif other == "steps":
        options = {"steps": 10}
    elif other == "adapter":
        lora = expected / "dev_4k_lora_conversion.safetensors"
        pipe = urae.adapt(load_pipe(), lora, policy=urae.ResolutionPolicy())
    elif other == "strength":
        pipe.set_adapters("urae_2k", 0.5)
    elif other == "policy":
        policy = urae.ResolutionPolicy(ntk_factor=5.0)
        pipe = urae.adapt(load_pipe(), expected / "dev_2k_lora.safetensors", policy=policy)
    _, computed = draw(cached(pipe, "mag-cache"), **options)
    assert computed == options.get("steps", STEPS)
    assert len(files(cache_dir)) == 2


def test_a_picture_that_was_broken_off_measures_nothing(adapted, draw, cache_dir):
    pipe = cached(adapted(), "mag-cache")

    with pytest.raises(KeyboardInterrupt):
        draw(pipe, callback_on_step_end=break_off(3))
    assert files(cache_dir) == []
    assert draw(pipe)[1] == STEPS
    assert len(files(cache_dir)) == 1


# --- what is refused ------------------------------------------------------------------------------


def test_blocks_that_are_compiled_already(adapted, kind):
    pipe = adapted()
    pipe.transformer.compile_repeated_blocks(backend="eager")
    with pytest.raises(ValueError, match=r"blocks are compiled .* name the part 'compile'"):
        cached(pipe, kind)
    assert not pipe.transformer.is_cache_enabled


def test_a_preset_leaves_its_cache_out_where_blocks_are_compiled_already(adapted, caplog):
    pipe = adapted()
    pipe.transformer.compile_repeated_blocks(backend="eager")
    urae.optimize(pipe, speed="fast")
    assert (
        "taylorseer-cache is left out: the blocks are compiled with all their hooks" in caplog.text
    )
    assert not pipe.transformer.is_cache_enabled


def test_blocks_that_are_offloaded_already(adapted, kind):
    pipe = adapted()
    stream_blocks(pipe.transformer, CPU)
    with pytest.raises(ValueError, match=r"already offloaded .* urae.optimize first"):
        cached(pipe, kind)


def test_a_cache_of_the_user(adapted, kind):
    pipe = adapted()
    pipe.transformer.enable_cache(MagCacheConfig(calibrate=True))
    with pytest.raises(ValueError, match="already has a step cache"):
        cached(pipe, kind)
    assert pipe.transformer.is_cache_enabled


def test_pipelines_that_do_not_name_their_calls(adapted, kind):
    other = FluxImg2ImgPipeline.from_pipe(adapted(), dtype=torch.float32)
    with pytest.raises(ValueError, match=r"only works with FluxPipeline.* FluxImg2ImgPipeline"):
        cached(other, kind)


def test_another_loop_is_told(adapted, load_pipe, draw, kind):
    pipe = cached(adapted(), kind)
    draw(pipe)
    other = load_pipe()
    other.transformer = pipe.transformer
    with pytest.raises(ValueError, match=r"optimized for one pipeline, .* something else runs it"):
        draw(other, steps=5)


@pytest.fixture
def style():
    """A LoRA that acts on the last layer, which TaylorSeer predicts the output of."""

    def load(pipe):
        layer = pipe.transformer.proj_out
        layer = getattr(layer, "base_layer", layer)
        generator = torch.Generator().manual_seed(3)
        shapes = {"A": (4, layer.in_features), "B": (layer.out_features, 4)}
        factors = {
            f"transformer.proj_out.lora_{name}.weight": 0.3
            * torch.randn(shape, generator=generator)
            for name, shape in shapes.items()
        }
        pipe.load_lora_weights(factors, adapter_name="style")
        pipe.set_adapters(["urae_2k", "style"])

    return load


@pytest.mark.filterwarnings("ignore:While injecting the PEFT adapters")  # names that end alike
def test_an_adapter_on_the_last_layer_may_come_and_go(adapted, draw, style):
    taylor = ["taylorseer-cache=3"]
    plain, _ = draw(urae.optimize(adapted(), speed=None, parts=taylor))
    pipe = adapted()
    style(pipe)
    wanted, computed = draw(urae.optimize(pipe, speed=None, parts=taylor))
    later = urae.optimize(adapted(), speed=None, parts=taylor)
    draw(later)
    style(later)
    for _ in range(2):
        found, count = draw(later)
        assert count == computed < STEPS
        assert torch.equal(found, wanted)
    pipe.delete_adapters("style")
    for _ in range(2):
        assert torch.equal(draw(pipe)[0], plain)


def test_another_pipeline_that_runs_the_transformer_is_told(adapted, kind):
    pipe = cached(adapted(), kind)
    other = FluxImg2ImgPipeline.from_pipe(pipe, dtype=torch.float32)
    other.set_progress_bar_config(disable=True)
    with pytest.raises(ValueError, match="another pipeline runs this transformer; call ur"):
        other("a lake", image=torch.zeros(1, 3, 64, 64), height=64, width=64, num_inference_steps=4)
