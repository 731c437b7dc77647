from contextlib import ExitStack
from typing import get_args

import pytest
import torch
from diffusers import FluxTransformer2DModel
from torch import distributed
from torch.overrides import TorchFunctionMode
from torch.testing._internal.distributed.fake_pg import FakeStore

from urae.backbones.context_parallel import build_mesh, context_parallel
from urae.backbones.flux import build_meta_models, predict_velocity
from urae.backbones.vae_plan import plan_decode
from urae.choices import Tier
from urae.generate.chunks import token_chunks
from urae.generate.estimate import (
    _CHUNKED,
    AUTO_TIERS,
    Request,
    Seconds,
    count_bytes,
    count_operations,
    estimate,
    estimate_seconds,
)

GIB = 2**30
H200 = 140 * GIB
SIDES = (2048, 4096)
LORA = 190 * 2 * 3072 * 16 * 2  # rank 16 on each matrix, bfloat16


@pytest.fixture(scope="module")
def flux():
    return build_meta_models("flux-dev")


@pytest.mark.parametrize(
    ("adapter_bytes", "measured"),
    [
        (3 * LORA, 26.8),  # a picture, with 2K LoRA and 4K minor
        (LORA, 26.5),  # one forward
    ],
)
def test_sampling_is_what_was_measured(flux, adapter_bytes, measured):
    """The compiled rows of docs/performance.md at 4096 x 4096, in GiB on one H200."""
    request = Request(4096, 4096, 512, adapter_bytes, compiled=True)
    found = estimate(flux, request, "resident", H200).sample.peak / GIB
    assert found == pytest.approx(measured, rel=0.02)


@pytest.mark.parametrize(
    ("side", "limit", "measured"),
    [(2048, None, 9.701), (2048, 6, 5.467), (4096, None, 38.2), (4096, 10, 10.2), (4096, 6, 5.658)],
)
def test_decoding_is_what_was_measured(flux, side, limit, measured):
    """The rows of docs/performance.md, in GiB on one H200 with the VAE's weights."""
    plan = plan_decode(
        flux["vae"], side, side,
        max_bytes=limit and limit * GIB, dtype=torch.bfloat16, device=torch.device("cuda"),
    )  # fmt: skip
    found = (count_bytes(flux["vae"]) + plan.peak_bytes) / GIB
    assert found == pytest.approx(measured, rel=0.02)


@pytest.mark.parametrize(
    ("request_", "tier", "free_gib", "sample", "decode"),
    [
        (Request(2048, 2048, 512, 2 * LORA), "resident", 140, 24.1, 27.7),
        (Request(2048, 2048, 512, 2 * LORA), "streamed", 8, 2.9, 5.5),
        (Request(4096, 4096, 256, 2 * LORA), "resident", 140, 27.4, 29.2),  # schnell's
        (Request(4096, 4096, 512, 6 * LORA, compiled=True), "resident", 140, 26.9, 29.4),
        (Request(4096, 4096, 512, 6 * LORA, compiled=True), "streamed", 7, 5.2, None),
        (Request(4096, 4096, 512, 6 * LORA, True, bits="fp8"), "resident", 140, 19.1, 21.4),
        (Request(2048, 2048, 512, 2 * LORA, True, bits="fp8"), "resident", 140, 15.7, 19.8),
    ],
)
def test_pictures_take_what_was_measured(flux, request_, tier, free_gib, sample, decode):
    """The pictures of docs/performance.md; at 2048^2 those of before MLPs ran in chunks."""
    found = estimate(flux, request_, tier, free_gib * GIB)
    assert found.sample.peak / GIB == pytest.approx(sample, rel=0.1)
    if decode is not None:  # where memory ran out, it went on in thinner stripes
        assert found.decode.peak / GIB == pytest.approx(decode, rel=0.02)


# --- time -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("side", "compiled", "measured"),
    [
        (2048, True, 0.719), (4096, True, 6.45), (2048, False, 0.878),  # fitted to
        (1024, True, 0.137), (1024, False, 0.183), (4096, False, 7.06),
        (4096, False, 7.21),  # with a 4K minor too
    ],
)  # fmt: skip
def test_a_forward_takes_the_time_that_was_measured(flux, side, compiled, measured):
    request = Request(side, side, 512, LORA, compiled)
    found = estimate_seconds(flux["transformer"], request, "resident")
    assert found.step == pytest.approx(measured, rel=0.1)


@pytest.mark.parametrize(
    ("request_", "tier", "steps", "sampling", "decoding"),
    [
        (Request(2048, 2048), "resident", 28, 25.9, 0.8),
        (Request(2048, 2048), "streamed", 28, 34.8, None),  # decoded in 6 GiB
        (Request(4096, 4096, compiled=True), "resident", 28, 195.8, 2.75),
        (Request(4096, 4096, 256), "resident", 4, 32.1, None),  # attention was torch's own then
        (Request(4096, 4096, compiled=True), "streamed", 28, 213.8, None),
    ],
)
def test_a_picture_takes_the_time_that_was_measured(
    flux, request_, tier, steps, sampling, decoding
):
    found = estimate_seconds(flux["transformer"], request_, tier)
    assert found.first + steps * found.step == pytest.approx(sampling, rel=0.1)
    if decoding is not None:
        assert found.decode == pytest.approx(decoding, rel=0.1)


def test_streamed_weights_come_while_a_large_picture_computes(flux):
    resident, streamed = (
        [estimate_seconds(flux["transformer"], Request(side, side), tier).step for side in SIDES]
        for tier in ("resident", "streamed")
    )
    assert resident[1] == streamed[1] and resident[0] < streamed[0] < 1.3


def test_the_time_of_several_pictures():
    assert Seconds(first=10, step=2, decode=1).total(4) == 19
    assert Seconds(first=10, step=2, decode=1).total(4, num_pictures=2) == 28


def test_what_was_not_measured_has_no_time(flux, bases):
    transformer = flux["transformer"]
    for tier in ("offload", "8bit", "4bit"):
        assert estimate_seconds(transformer, Request(4096, 4096), tier) is None
    for changes in ({"num_ranks": 2}, {"bits": "8bit"}):
        assert estimate_seconds(transformer, Request(4096, 4096, **changes), "resident") is None
    assert estimate_seconds(transformer, Request(512, 512), "resident") is None
    small = build_meta_models(bases["dev"])["transformer"]
    assert estimate_seconds(small, Request(4096, 4096), "resident") is None


def test_operations_of_a_forward(flux):
    """418 TFLOP at 2048^2, 3,907 at 4096^2, of which attention 78%."""
    small, large = (count_operations(flux["transformer"], t) for t in (16_896, 66_048))
    assert sum(small) == pytest.approx(418e12, rel=0.001)
    assert sum(large) == pytest.approx(3_907e12, rel=0.001)
    assert large.attention / sum(large) == pytest.approx(0.78, abs=0.01)


# --- memory ---------------------------------------------------------------------------------------


def test_decoding_beside_the_transformer_is_counted(flux):
    found = estimate(flux, Request(2048, 2048, 512, LORA), "resident", H200).decode.peak
    weights = count_bytes(flux["transformer"]) + count_bytes(flux["vae"]) + LORA
    assert weights + 5 * GIB < found < weights + 7 * GIB


class FlashAttention(TorchFunctionMode):
    """Attention that holds nothing but its result, as on a GPU."""

    def __torch_function__(self, function, types, args=(), kwargs=None):
        if function is torch.nn.functional.scaled_dot_product_attention:
            return torch.empty_like(kwargs["query"])
        return function(*args, **(kwargs or {}))


@torch.no_grad()
def track_maps(tracker, dual, single, mesh=None):
    """Return the peak of FLUX.1's blocks at 4096 x 4096 on the meta device, in maps of tokens."""
    shapes = [(1, 16, 512, 512), (1,), (1, 512, 4096), (1, 768)]
    with torch.device("meta"), ExitStack() as stack:
        transformer = FluxTransformer2DModel(num_layers=dual, num_single_layers=single)
        torch.nn.Module.to(transformer, torch.bfloat16)
        inputs = [torch.empty(shape, dtype=torch.bfloat16) for shape in shapes]
        for tensor in [*inputs, *transformer.parameters()]:
            tracker.count(tensor.untyped_storage(), made=False)
        stack.enter_context(token_chunks(transformer))
        if mesh is not None:
            stack.enter_context(context_parallel(transformer, mesh))
        with FlashAttention(), tracker:
            predict_velocity(transformer, *inputs, 3.5)
    return tracker.peak / (66_048 * 3072 * 2)


@pytest.mark.parametrize(("kind", "blocks"), [(0, (3, 0)), (1, (0, 2))])
def test_the_maps_are_those_of_the_forward(tracker, kind, blocks):
    assert track_maps(tracker, *blocks) == pytest.approx(_CHUNKED[kind], abs=0.3)


@pytest.fixture
def two_ranks():
    """A process group whose other rank does not exist: what it sends means nothing."""
    distributed.init_process_group("fake", store=FakeStore(), rank=0, world_size=2)
    yield build_mesh(2, torch.device("cpu"))
    distributed.destroy_process_group()


@pytest.mark.filterwarnings("ignore:.*all_gather_tensor")  # diffusers' own
@pytest.mark.parametrize(("kind", "blocks"), [(0, (3, 0)), (1, (0, 2))])
def test_of_two_ranks_each_holds_half_the_maps(tracker, kind, blocks, two_ranks):
    found = 2 * track_maps(tracker, *blocks, two_ranks)
    assert found == pytest.approx(_CHUNKED[kind], abs=0.3)


def test_less_memory_tier_by_tier(flux):
    ways = {tier: estimate(flux, Request(4096, 4096), tier, H200) for tier in get_args(Tier)}
    peaks = [ways[tier].sample.peak for tier in ("resident", "8bit", "4bit", "streamed")]
    assert peaks == sorted(peaks, reverse=True)
    assert ways["streamed"].sample.peak < 8 * GIB  # 22 of weights stay on the host
    assert ways["streamed"].host_bytes == count_bytes(flux["transformer"])


def test_quantised_weights_by_their_formats(flux):
    request = Request(1024, 1024)
    eight, four = (estimate(flux, request, tier, H200).sample.weights for tier in ("8bit", "4bit"))
    rest = count_bytes(flux["vae"])
    whole = count_bytes(flux["transformer"])
    assert (eight - rest) / whole == pytest.approx(0.5, abs=0.005)
    assert (four - rest) / whole == pytest.approx(0.5625 / 2, abs=0.005)


def test_a_part_quantises_the_blocks_and_keeps_no_others(flux):
    def find(bits, tier="resident"):
        return estimate(flux, Request(1024, 1024, bits=bits), tier, H200)

    whole = find(None)
    for bits, share in (("8bit", 0.5), ("4bit", 0.5625 / 2), ("fp8", 0.64)):
        found = find(bits)  # fp8 leaves the modulation, 3.3 B of 11.9, as it is
        assert found.sample.weights / whole.sample.weights == pytest.approx(share, abs=0.01)
        assert found.decode.peak < whole.decode.peak
        assert found.host_bytes == 0
    streamed = find("8bit", "streamed")
    assert streamed.sample.weights < find(None, "streamed").sample.weights
    assert streamed.host_bytes < find(None, "streamed").host_bytes - 10 * GIB
    assert find("4bit", "streamed").sample.peak > find("8bit", "streamed").sample.peak


def test_quantised_blocks_are_not_compiled(flux):
    for tier, same in (("resident", False), ("8bit", True)):
        peaks = {
            estimate(flux, Request(4096, 4096, compiled=compiled), tier, H200).sample.peak
            for compiled in (True, False)
        }
        assert (len(peaks) == 1) == same


def test_what_fits(flux):
    def first(gib, host_gib=64, side=4096):
        request, room = Request(side, side), (gib * GIB, host_gib * GIB)
        fitting = (t for t in AUTO_TIERS if estimate(flux, request, t, gib * GIB).fits(*room))
        return next(fitting, None)

    assert first(80) == "resident"
    assert first(31) == "resident"
    assert first(24) == "streamed"
    assert first(8) == "streamed"
    assert first(24, host_gib=16) == "8bit"
    assert first(16, host_gib=8) == "4bit"
    assert first(6) is None


def test_a_model_in_a_folder(bases):
    models = build_meta_models(bases["dev"])
    assert {m.device.type for m in models.values()} == {"meta"}
    assert estimate(models, Request(64, 64), "resident", GIB).peak > 0


def test_two_gpus_hold_half_the_activations_each(flux):
    one, two = (estimate(flux, Request(4096, 4096, num_ranks=n), "resident", H200) for n in (1, 2))
    assert two.sample.weights == one.sample.weights
    assert two.sample.working == pytest.approx(one.sample.working / 2, rel=0.01)
    assert two.decode.working <= 7 * GIB
