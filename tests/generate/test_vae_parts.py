"""The VAE of a user's own pipeline, in exact stripes or in stock tiles."""

import pytest
import torch

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
