"""Split encoding and decoding against the stock VAE, and planned memory against what is used."""

from types import SimpleNamespace

import pytest
import torch
from diffusers import AutoencoderKL
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from urae.backbones import vae as vae_module
from urae.backbones.vae import decode, encode
from urae.backbones.vae_chain import Op, find_source_rows, split_rows
from urae.backbones.vae_plan import plan_decode, plan_encode

PLAIN = {"use_quant_conv": False, "use_post_quant_conv": False}
FLUX = PLAIN | {
    "block_out_channels": (128, 256, 512, 512), "layers_per_block": 2, "norm_num_groups": 32,
}  # fmt: skip
TINY = {"block_out_channels": (4, 4, 8, 8), "norm_num_groups": 2}
BUILDS = {
    "flux": TINY | PLAIN,
    "quant": TINY | {"layers_per_block": 2},
    "no attention": TINY | {"mid_block_add_attention": False},
    "groups of 32": {"block_out_channels": (32, 32, 64), "norm_num_groups": 32},
    "shallow": PLAIN | {"block_out_channels": (8, 16), "norm_num_groups": 4},
}
# height, width: rows that no number of stripes divides, and both ways of being narrow
SIZES = [(176, 112), (80, 208), (432, 32)]
SHARES = (0.5, 0.35, 0.25)  # of what the stock model takes


def build(device="cpu", **settings) -> AutoencoderKL:
    depth = len(settings["block_out_channels"])
    torch.manual_seed(1)
    with torch.device(device):
        return AutoencoderKL(
            down_block_types=("DownEncoderBlock2D",) * depth,
            up_block_types=("UpDecoderBlock2D",) * depth,
            latent_channels=16,
            **settings,
        ).requires_grad_(False)


@pytest.fixture(scope="module", params=BUILDS)
def vae(request) -> AutoencoderKL:
    return build(**BUILDS[request.param])


@pytest.fixture(scope="module")
def flux() -> AutoencoderKL:
    """FLUX's own shape, without weights."""
    return build("meta", **FLUX)


class Job:
    """Encoding or decoding at a size: ours, stock's, and the plan."""

    def __init__(self, vae, name, height, width, batch=1):
        factor = 2 ** (len(vae.config.block_out_channels) - 1)
        self.vae, self.name, self.size, self.batch = vae, name, (height, width), batch
        shape = (3, height, width) if name == "encode" else (16, height // factor, width // factor)
        generator = torch.Generator().manual_seed(0)
        self.given = torch.randn(batch, *shape, generator=generator, dtype=vae.dtype)

    def run(self, max_bytes=None):
        run = encode if self.name == "encode" else decode
        return run(self.vae, self.given, max_bytes=max_bytes)

    def stock(self):
        if self.name == "encode":
            return self.vae.encode(self.given).latent_dist.parameters
        return self.vae.decode(self.given).sample

    def plan(self, max_bytes=None):
        plan = plan_encode if self.name == "encode" else plan_decode
        return plan(self.vae, *self.size, max_bytes=max_bytes, batch=self.batch)

    def splits(self):
        """List the plans for a falling number of bytes, as long as there is one."""
        whole = self.plan().peak_bytes
        for share in SHARES:
            try:
                yield int(share * whole), self.plan(int(share * whole))
            except MemoryError:
                return


class LiveBytes(TorchDispatchMode):
    """The most bytes that tensors made within it hold at once."""

    def __init__(self):
        super().__init__()
        self.peak, self._live = 0, {}

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        given = {storage._cdata for storage in self._storages((args, kwargs))}
        result = function(*args, **(kwargs or {}))
        for storage in self._storages(result):
            if storage._cdata not in given:
                self._live[storage._cdata] = StorageWeakRef(storage), storage.nbytes()
        self._live = {key: held for key, held in self._live.items() if not held[0].expired()}
        self.peak = max(self.peak, sum(size for _, size in self._live.values()))
        return result

    @staticmethod
    def _storages(tree):
        return [x.untyped_storage() for x in tree_leaves(tree) if isinstance(x, torch.Tensor)]


@pytest.mark.parametrize("name", ["encode", "decode"])
@pytest.mark.parametrize(("height", "width"), SIZES)
def test_split_equals_stock(vae, name, height, width, rel):
    job = Job(vae, name, height, width)
    wanted = job.stock()
    plans = list(job.splits())
    assert plans
    for max_bytes, plan in plans:
        assert not plan.whole
        assert plan.peak_bytes <= max_bytes
        assert rel(job.run(max_bytes), wanted) < 1e-5


@pytest.mark.parametrize("num_ranks", [1, 2])
def test_the_fewest_stripes_that_fit_are_the_least_work(monkeypatch, num_ranks):
    """Plans are those of a search among all numbers of stripes."""
    flux = build("meta", **FLUX)

    def find():
        sizes = ((1024, 1008), (2048, 2048))
        return [
            plan_decode(flux, *size, max_bytes=int(gib * 2**30), num_ranks=num_ranks)
            for size in sizes
            for gib in (1.5, 3)
        ]

    found = find()
    assert any(segment.stripes > 2 for plan in found for segment in plan.segments)
    monkeypatch.setattr("urae.backbones.vae_plan.islice", lambda ways, _: ways)
    assert find() == found


@pytest.mark.parametrize("name", ["encode", "decode"])
def test_every_kind_of_segment_was_among_them(name):
    """Whole maps, stripes of several units, in place and not, attention in stripes."""
    jobs = [Job(build(**BUILDS[key]), name, 176, 112) for key in ("quant", "shallow")]
    segments = [segment for job in jobs for _, plan in job.splits() for segment in plan.segments]
    striped = [segment for segment in segments if segment.stripes > 1]
    assert len(striped) < len(segments)
    assert {segment.in_place for segment in striped} == {True, False}
    assert max(sum(op.kind == "norm" for op in segment.ops) for segment in striped) > 3
    assert any(segment.ops[0].kind == "attention" for segment in striped)


@pytest.mark.parametrize("name", ["encode", "decode"])
@pytest.mark.parametrize("key", ["flux", "shallow"])
def test_the_plan_knows_the_peak(key, name):
    job = Job(build(**BUILDS[key]), name, 176, 112)
    for max_bytes, plan in job.splits():
        with LiveBytes() as memory:
            job.run(max_bytes)
        assert memory.peak == pytest.approx(plan.peak_bytes, rel=0.05)


@pytest.mark.parametrize("name", ["encode", "decode"])
def test_where_all_fits_it_is_the_stock_model(vae, name):
    job = Job(vae, name, 80, 48)
    wanted, plan = job.stock(), job.plan()
    assert plan.whole
    assert plan.work == 1
    vae.enable_tiling()
    vae.tile_sample_min_size, vae.tile_latent_min_size = 32, 8
    try:
        with LiveBytes() as memory:
            found = job.run(plan.peak_bytes)
        assert torch.equal(found, wanted)
        assert torch.equal(job.run(), wanted)
        assert not torch.equal(job.stock(), wanted)
    finally:
        vae.disable_tiling()
    assert memory.peak == pytest.approx(plan.peak_bytes, rel=0.05)


@pytest.mark.parametrize("name", ["encode", "decode"])
def test_a_batch(name, rel):
    job = Job(build(**BUILDS["quant"]), name, 80, 64, batch=3)
    max_bytes, plan = list(job.splits())[-1]
    with LiveBytes() as memory:
        found = job.run(max_bytes)
    assert rel(found, job.stock()) < 1e-5
    assert memory.peak == pytest.approx(plan.peak_bytes, rel=0.1)


def test_a_size_that_strides_do_not_divide(rel):
    job = Job(build(**BUILDS["flux"]), "encode", 203, 61)
    for max_bytes, _ in job.splits():
        assert rel(job.run(max_bytes), job.stock()) < 1e-5


@pytest.mark.parametrize("name", ["encode", "decode"])
def test_bfloat16(name, rel):
    vae = build(**BUILDS["flux"])
    wanted = Job(vae, name, 208, 144).stock()
    job = Job(vae.to(torch.bfloat16), name, 208, 144)
    job.given = Job(build(**BUILDS["flux"]), name, 208, 144).given.bfloat16()
    stock = job.stock()
    for max_bytes, _ in job.splits():
        found = job.run(max_bytes)
        assert found.dtype == torch.bfloat16
        assert rel(found, stock) < 1e-2
        assert rel(found, wanted) < 1.05 * rel(stock, wanted)


def test_large_means_do_not_cancel(rel):
    """Maps far from zero: as close to float64 as the stock group norm is."""
    vae = build(**BUILDS["flux"])
    vae.decoder.conv_in.bias += 300
    vae.decoder.up_blocks[2].upsamplers[0].conv.bias += 1000
    job = Job(vae, "decode", 208, 144)
    stock, (max_bytes, _) = job.stock(), list(job.splits())[-1]
    found = job.run(max_bytes)
    job.vae, job.given = vae.double(), job.given.double()
    exact = job.stock()
    assert rel(found, exact) < 2 * rel(stock, exact)


@pytest.mark.parametrize("name", ["encode", "decode"])
def test_norms_of_whole_maps_where_torchs_are_slow(name, rel, monkeypatch):
    job = Job(build(**BUILDS["quant"]), name, 80, 64, batch=3)
    wanted, (max_bytes, plan) = job.stock(), next(iter(job.splits()))
    whole = [segment for segment in plan.segments if segment.stripes == 1]
    assert any(op.kind == "norm" for segment in whole for op in segment.ops)
    found = job.run(max_bytes)
    monkeypatch.setattr(vae_module, "_SLOW_NORMS", ("cpu",))
    own = job.run(max_bytes)
    assert not torch.equal(own, found)  # another way, to rounding
    assert rel(own, wanted) < 1e-5


def test_rows_that_rows_depend_on():
    conv, up, down = Op("conv", reach=1), Op("up"), Op("down")
    assert find_source_rows((conv, conv), 8, 12) == (6, 14)
    assert find_source_rows((Op("conv"),), 8, 12) == (8, 12)  # 1 x 1
    assert find_source_rows((conv, up), 8, 12) == (2, 8)  # 7 to 12 of the doubled rows, so 3 to 6
    assert find_source_rows((conv, down), 8, 12) == (14, 26)  # 16 to 24; 15 to 25; even rows
    assert find_source_rows((down, down), 0, 1) == (0, 8)  # 0 to 2, so 0 to 6
    assert list(split_rows(10, 4)) == [(0, 3), (3, 6), (6, 9), (9, 10)]
    assert list(split_rows(9, 5)) == [(0, 2), (2, 4), (4, 6), (6, 8), (8, 9)]


def test_an_offloaded_vae_is_brought_to_the_device():
    job = Job(build(**BUILDS["flux"]), "decode", 80, 48)
    called = []
    job.vae._hf_hook = SimpleNamespace(pre_forward=called.append)
    for max_bytes in (None, next(job.splits())[0]):
        job.run(max_bytes)
        assert called.pop() is job.vae


@pytest.mark.parametrize(
    ("plan", "stock_gib", "within"),
    [(plan_decode, 38.3, {10: 1.5, 8: 1.5, 6: 3}), (plan_encode, 24.3, {10: 1.2, 8: 1.2, 6: 1.2})],
)
def test_flux_at_4096(flux, plan, stock_gib, within):
    """Stock's peaks with weights, measured on an H200; what to expect of a split."""
    options = {"dtype": torch.bfloat16, "device": torch.device("cuda")}
    weights = 2 * sum(weight.numel() for weight in flux.parameters())
    assert (plan(flux, 4096, 4096, **options).peak_bytes + weights) / 2**30 == pytest.approx(
        stock_gib, rel=0.01
    )
    for gib, work in within.items():
        found = plan(flux, 4096, 4096, max_bytes=gib * 2**30, **options)
        assert found.peak_bytes <= gib * 2**30
        assert found.work < work
    for size in ((8192, 8192), (2048, 8192), (8192, 4096)):
        assert plan(flux, *size, max_bytes=10 * 2**30, **options).work < 3


@pytest.mark.parametrize("name", ["encode", "decode"])
def test_too_little_memory_says_how_much_it_takes(name):
    job = Job(build(**BUILDS["quant"]), name, 496, 432)
    message = rf"{name[:-1]}ing 432 x 496 pixels needs at least 0\.\d\d GiB .* than the 0\.00 GiB"
    with pytest.raises(MemoryError, match=message) as caught:
        job.run(1000)
    least = float(str(caught.value).split("at least ")[1].split()[0])
    assert job.plan(int((least + 0.005) * 2**30)).peak_bytes <= (least + 0.005) * 2**30
    with pytest.raises(MemoryError):
        job.plan(int((least - 0.005) * 2**30))


def test_other_architectures_are_refused():
    vae = AutoencoderKL(
        down_block_types=("AttnDownEncoderBlock2D",), block_out_channels=(4,), norm_num_groups=2
    )
    with pytest.raises(ValueError, match="VAE block AttnDownEncoderBlock2D has attention, which"):
        encode(vae, torch.zeros(1, 3, 16, 16))
