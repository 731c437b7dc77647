from contextlib import ExitStack

import pytest
import torch
from diffusers import FluxTransformer2DModel
from torch import distributed
from torch.overrides import TorchFunctionMode
from torch.testing._internal.distributed.fake_pg import FakeStore

from urae.backbones.context_parallel import build_mesh, context_parallel
from urae.backbones.flux import build_meta_models, predict_velocity
from urae.backbones.vae_plan import plan_decode
from urae.generate.chunks import token_chunks
from urae.generate.estimate import (
    _CHUNKED,
    TIERS,
    Request,
    count_bytes,
    estimate,
    list_estimates,
)

GIB = 2**30
H200 = 140 * GIB
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
    ways = {e.tier: e for e in list_estimates(flux, Request(4096, 4096), H200, TIERS)}
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


def test_quantised_blocks_are_not_compiled(flux):
    for tier, same in (("resident", False), ("8bit", True)):
        peaks = {
            estimate(flux, Request(4096, 4096, compiled=compiled), tier, H200).sample.peak
            for compiled in (True, False)
        }
        assert (len(peaks) == 1) == same


def test_what_fits(flux):
    def first(gib, host_gib=64, side=4096):
        estimates = list_estimates(flux, Request(side, side), gib * GIB)
        fitting = [e.tier for e in estimates if e.fits(gib * GIB, host_gib * GIB)]
        return fitting[0] if fitting else None

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
