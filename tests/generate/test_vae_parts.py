"""The VAE of a user's own pipeline, in exact stripes or in stock tiles."""

import accelerate
import pytest
import torch
from diffusers import AutoencoderTiny

import urae
from urae.backbones import free_memory, vae


@pytest.fixture
def pipe(load_pipe):
    return load_pipe()


def latents_of(pipe, rows=24, columns=16):
    generator = torch.Generator().manual_seed(0)
    return torch.randn(1, pipe.vae.config.latent_channels, rows, columns, generator=generator)


def test_stripes_are_the_same_pixels_in_less_memory(pipe, monkeypatch, rel):
    latents = latents_of(pipe)
    whole = pipe.vae.decode(latents).sample
    urae.optimize(pipe, speed=None, parts=["striped-vae"])
    budgets = []
    decode = vae.decode

    def watch(*args, max_bytes, group):
        budgets.append(max_bytes)
        return decode(*args, max_bytes=max_bytes, group=group)

    monkeypatch.setattr(vae, "decode", watch)
    need = vae.plan_decode(
        pipe.vae, 192, 128, max_bytes=None, batch=1, device=latents.device, dtype=latents.dtype
    ).peak_bytes
    monkeypatch.setattr(vae, "free_bytes", lambda device: need // 2)
    striped = pipe.vae.decode(latents).sample
    assert budgets == [int(free_memory.USABLE * (need // 2))]
    assert rel(striped, whole) < 1e-5
    assert torch.equal(pipe.vae.decode(latents, return_dict=False)[0], striped)
    urae.restore(pipe)
    assert "decode" not in vars(pipe.vae)
    assert torch.equal(pipe.vae.decode(latents).sample, whole)


def test_a_vae_that_pipelines_share_is_given_back_by_the_last(pipe, load_pipe):
    other = load_pipe()
    other.vae = pipe.vae
    pipe.vae.decode = own = pipe.vae.decode  # such as a compiled one
    for each in (pipe, other):
        urae.optimize(each, speed=None, parts=["striped-vae"])
    urae.restore(pipe)
    assert pipe.vae.decode is not own
    urae.restore(other)
    assert pipe.vae.decode is own


def test_a_decode_that_came_later_stays(pipe):
    urae.optimize(pipe, speed=None, parts=["striped-vae"])
    pipe.vae.decode = later = pipe.vae.decode.__call__
    urae.restore(pipe)
    assert pipe.vae.decode is later


def test_tiles_are_stock_diffusers_own(pipe):
    pipe.vae.tile_latent_min_size, pipe.vae.tile_sample_min_size = 8, 64
    latents = latents_of(pipe)
    whole = pipe.vae.decode(latents).sample
    pipe.vae.enable_tiling()
    stock = pipe.vae.decode(latents).sample
    pipe.vae.disable_tiling()
    urae.optimize(pipe, speed=None, parts=["tiled-vae"])
    tiled = pipe.vae.decode(latents).sample
    assert torch.equal(tiled, stock) and not torch.equal(tiled, whole)
    urae.restore(pipe)
    assert torch.equal(pipe.vae.decode(latents).sample, whole)


def test_one_or_the_other(pipe):
    with pytest.raises(ValueError, match="striped-vae and tiled-vae"):
        urae.optimize(pipe, speed=None, parts=["striped-vae", "tiled-vae"])


def test_stripes_of_a_vae_that_is_offloaded_layer_by_layer(pipe, monkeypatch, rel):
    """As `enable_sequential_cpu_offload` leaves it: norms are read, not called."""
    latents = latents_of(pipe)
    whole = pipe.vae.decode(latents).sample
    urae.optimize(pipe, speed=None, parts=["striped-vae"])
    accelerate.cpu_offload(pipe.vae, torch.device("cpu"), offload_buffers=True)
    norm = pipe.vae.decoder.conv_norm_out
    assert norm.weight.device.type == "meta"
    monkeypatch.setattr(vae, "vae_bytes", lambda *_: 1_000_000)
    assert rel(pipe.vae.decode(latents).sample, whole) < 1e-5
    assert norm.weight.device.type == "meta"


def test_a_compiled_vae_decodes_in_stripes_too(pipe):
    vae = pipe.vae
    pipe.vae = torch.compile(vae, backend="eager")
    urae.optimize(pipe, speed=None, parts=["striped-vae"])
    assert type(vars(vae)["decode"]).__name__ == "_StripedDecode"
    urae.restore(pipe)
    assert "decode" not in vars(vae)


def test_a_vae_of_another_kind_decodes_as_it_does(pipe):
    """AutoencoderTiny is what many put in for previews."""
    channels = pipe.vae.config.latent_channels
    tiny = AutoencoderTiny(
        latent_channels=channels,
        encoder_block_out_channels=(4, 4),
        decoder_block_out_channels=(4, 4),
        num_encoder_blocks=(1, 1),
        num_decoder_blocks=(1, 1),
    )
    latents = torch.randn(1, channels, 8, 8)
    wanted = tiny.decode(latents).sample
    pipe.vae = tiny
    urae.optimize(pipe)
    assert torch.equal(tiny.decode(latents).sample, wanted)
    urae.restore(pipe)
