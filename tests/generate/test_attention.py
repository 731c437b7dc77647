from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from diffusers import ContextParallelConfig, ParallelConfig
from diffusers.models import attention_dispatch
from diffusers.models.attention_dispatch import AttentionBackendName, _AttentionBackendRegistry

import urae
from urae.backbones import attention as backbone_attention
from urae.backbones.attention import FORWARD_ONLY, backend, find_lack, pick_attention
from urae.backbones.context_parallel import check_backend_can_share
from urae.generate import attention
from urae.generate.optimize import check_machine

CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def _forget():
    """Choices and candidates are those of a process."""
    for function in (attention.list_candidates, attention._find_fastest):
        function.cache_clear()
    yield
    for function in (attention.list_candidates, attention._find_fastest):
        function.cache_clear()


@pytest.fixture
def adapted(load_pipe, expected):
    return lambda **options: urae.adapt(
        load_pipe(), expected / "dev_2k_lora.safetensors", **options
    )


@pytest.fixture
def choose(monkeypatch, sample):
    """Let a CPU stand in for the GPU; return the shapes that were timed."""
    shapes = []

    def pick(candidates, shape, *_, backward):
        assert not backward
        shapes.append(shape)
        return ("_native_math", "native")[len(shapes) - 1]

    monkeypatch.setattr(attention, "pick_attention", pick)

    def run(pipe, on_gpu=True, parts=()):
        monkeypatch.setattr(attention, "_decides", lambda _: on_gpu)
        urae.optimize(pipe, speed=None, parts=["attention-backend", *parts])
        for _ in range(2):
            sample(pipe, 64, 96)
        return shapes

    return run


def backends(pipe):
    return {each._attention_backend for each in pipe.transformer.attn_processors.values()}


WIDE = (1, 4 * 6 + 64, 2, 32)


def test_each_shape_is_timed_once(adapted, sample, choose):
    pipe = adapted()
    assert choose(pipe) == [WIDE]
    assert backends(pipe) == {AttentionBackendName._NATIVE_MATH}
    sample(pipe, 96, 96)
    assert choose(pipe) == [WIDE, (1, 6 * 6 + 64, 2, 32)]
    assert backends(pipe) == {AttentionBackendName._NATIVE_MATH}  # of the size that came last
    sample(pipe, 96, 96)
    assert backends(pipe) == {AttentionBackendName.NATIVE}
    urae.restore(pipe)
    assert backends(pipe) == {None}
    assert len(choose(adapted())) == 2  # another pipe of this process


def test_both_shapes_of_a_progressive_picture_are_timed(adapted, choose):
    pipe = adapted(policy=urae.ResolutionPolicy(native_sequence_length=2 * 3 + 64))
    assert choose(pipe, parts=["progressive=0.5"]) == [(1, 2 * 3 + 64, 2, 32), WIDE]


def test_a_gpu_that_comes_later_is_chosen_for(adapted, sample, choose, monkeypatch):
    pipe = adapted()
    assert choose(pipe, on_gpu=False) == []
    monkeypatch.setattr(attention, "_decides", lambda _: True)
    sample(pipe, 64, 96)
    assert backends(pipe) == {AttentionBackendName._NATIVE_MATH}
    monkeypatch.setattr(attention, "_decides", lambda _: False)
    sample(pipe, 64, 96)  # which may have no such kernel
    assert backends(pipe) == {None}


def test_a_backend_of_the_user_or_of_local_attention_is_kept(adapted, sample, choose):
    pipe = adapted()
    for processor in pipe.transformer.attn_processors.values():
        processor._attention_backend = AttentionBackendName.NATIVE
    assert choose(pipe) == []
    urae.restore(pipe)
    assert backends(pipe) == {AttentionBackendName.NATIVE}
    tiny = urae.ResolutionPolicy(native_sequence_length=64 + 64, attention="local")
    local = adapted(policy=tiny)
    assert choose(local) == [WIDE]  # within the native size it is full
    sample(local, 512, 512)
    assert len(choose(local)) == 1


def test_a_ring_has_backends_that_see_other_ranks_keys(adapted, choose, monkeypatch):
    pipe, offered = adapted(), []

    def find(names, *_):
        offered.extend(names)
        return AttentionBackendName.NATIVE

    monkeypatch.setattr(attention, "_find_fastest", find)
    ring = ContextParallelConfig(ring_degree=2)
    pipe.transformer._parallel_config = ParallelConfig(context_parallel_config=ring)
    choose(pipe)
    assert "_native_flash" in offered
    assert "_native_efficient" not in offered  # which takes no notice of them


def test_a_backend_with_wrong_outputs_is_named():
    def attend(query, key, value):
        return value * torch.nan

    with pytest.raises(FloatingPointError, match=r"correct outputs .*broken: outputs are"):
        pick_attention({"broken": attend}, (1, 8, 2, 4), torch.float32, CPU, backward=False)


def test_outputs_are_checked_on_one_sample_and_timed_on_all():
    batches = []

    def attend(query, key, value):
        batches.append(len(query))
        return backend("native")(query, key, value)

    shape = (8, 16, 2, 4)
    assert pick_attention({"one": attend}, shape, torch.float32, CPU, backward=False) == "one"
    assert batches == [1, 8, 8]


def test_a_dtype_that_a_backend_refuses_leaves_it_out(monkeypatch):
    monkeypatch.setattr(_AttentionBackendRegistry, "_checks_enabled", True)
    candidates = {name: backend(name) for name in ("_native_flash", "native")}
    shape = (1, 16, 2, 4)
    assert pick_attention(candidates, shape, torch.float32, CPU, backward=False) == "native"


# --- what other packages bring --------------------------------------------------------------------


def test_packages_that_can_be_used_are_candidates(monkeypatch):
    monkeypatch.setattr(attention, "find_spec", lambda name: name == "flash_attn" or None)
    monkeypatch.setattr(attention_dispatch, "_CAN_USE_FLASH_ATTN", True)
    assert attention.list_candidates()[-1] == "flash"


def test_a_package_that_is_too_old_is_left_out_and_named_once(monkeypatch, caplog):
    monkeypatch.setattr(attention, "find_spec", lambda name: name == "flash_attn" or None)
    for _ in range(2):
        assert "flash" not in attention.list_candidates()
    assert caplog.text.count("flash_attn is installed but not used: Flash Attention backend") == 1
    assert "`flash-attn>=2.6.3`" in caplog.text


@pytest.fixture
def pypi(monkeypatch):
    """Install fa3-fwd, or a build of it that does not import; diffusers forgets it afterwards."""
    monkeypatch.setattr(attention_dispatch, "_CAN_USE_FLASH_ATTN_3", False)
    monkeypatch.setattr(attention_dispatch, "flash_attn_3_func", None)

    def install(attend=None):
        def load(_name):
            if attend is None:
                raise OSError("libcudart.so.13 is missing")
            return SimpleNamespace(flash_attn_func=attend)

        for module in (attention, backbone_attention):
            monkeypatch.setattr(module, "find_spec", lambda name: name == FORWARD_ONLY or None)
        monkeypatch.setattr(backbone_attention, "import_module", load)

    return install


def test_the_flash_attention_of_pypi_is_what_diffusers_calls(pypi):
    def attend(*, q, k, v, softmax_scale, **_options):
        heads_first = [each.transpose(1, 2) for each in (q, k, v)]
        found = F.scaled_dot_product_attention(*heads_first, scale=softmax_scale)
        return found.transpose(1, 2), torch.zeros(q.shape[0], q.shape[2], q.shape[1])

    assert find_lack("_flash_3") is not None
    pypi(attend)
    assert attention.list_candidates()[-1] == "_flash_3"
    inputs = torch.randn(3, 1, 5, 2, 4).unbind()
    # the operation itself is for GPUs, so what it calls is called
    out, lse = attention_dispatch._wrapped_flash_attn_3._init_fn(*inputs)
    assert torch.allclose(out, backend("_native_math")(*inputs), atol=1e-6)
    assert lse.shape == (1, 5, 2)


def test_one_of_another_torch_is_left_out_and_named(pypi, caplog):
    pypi()
    assert "_flash_3" not in attention.list_candidates()
    assert "fa3-fwd is installed but not used: libcudart.so.13 is missing" in caplog.text


def test_sage_attention_is_named_as_an_approximation(monkeypatch, caplog):
    monkeypatch.setattr(_AttentionBackendRegistry, "_active_backend", AttentionBackendName.SAGE)
    monkeypatch.setattr(attention_dispatch, "_CAN_USE_SAGE_ATTN", True)
    check_machine([], CPU)
    assert "attention sage: the pictures are approximations" in caplog.text


def test_packages_that_are_missing_need_no_word(caplog):
    assert "flash" not in attention.list_candidates()
    assert not caplog.text


def test_a_backend_without_its_package_is_refused(load_pipe, monkeypatch):
    message = r"Please install `flash-attn.* Install it with pip .* unset DIFFUSERS_ATTN_BACKEND"
    with pytest.raises(ModuleNotFoundError, match=message):
        backend("flash")
    monkeypatch.setattr(_AttentionBackendRegistry, "_active_backend", AttentionBackendName.FLASH)
    with pytest.raises(ModuleNotFoundError, match=message):
        check_machine([], CPU)
    with pytest.raises(ModuleNotFoundError, match=message):
        urae.optimize(load_pipe())


def test_a_backend_that_cannot_share_is_refused_without_weights(monkeypatch):
    check_backend_can_share()
    monkeypatch.setattr(
        _AttentionBackendRegistry, "_active_backend", AttentionBackendName._NATIVE_MATH
    )
    with pytest.raises(
        ValueError, match="_native_math cannot be combined with several GPUs on one"
    ):
        check_backend_can_share()
