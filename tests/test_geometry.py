import pytest
import torch
from diffusers import FluxPipeline

from urae.geometry import (
    build_image_ids,
    check_size,
    num_image_tokens,
    pack,
    parse_size,
    unpack,
    widen_ids,
)


def test_unpack_undoes_pack():
    latents = torch.randn(2, 16, 6, 10)
    assert torch.equal(unpack(pack(latents), 6, 10), latents)


def test_pack_is_that_of_diffusers():
    latents = torch.randn(2, 16, 6, 10)
    assert torch.equal(pack(latents), FluxPipeline._pack_latents(latents, 2, 16, 6, 10))


def test_image_ids_are_those_of_diffusers():
    stock = FluxPipeline._prepare_latent_image_ids(1, 3, 5, "cpu", torch.float32)
    assert torch.equal(build_image_ids(3, 5), stock)


def test_tokens_of_a_2k_picture():
    assert num_image_tokens(2048, 2048) == 128 * 128


@pytest.mark.parametrize(
    ("text", "height", "width"),
    [
        ("1k", 1024, 1024),
        ("2k", 2048, 2048),
        ("4K", 4096, 4096),
        ("512", 512, 512),
        ("3840x2160", 2160, 3840),
    ],
)
def test_sizes_are_width_by_height(text, height, width):
    assert parse_size(text) == (height, width)


def test_named_sizes_are_the_models_own():
    assert [parse_size(name, 256) for name in ("1k", "2k", "4k")] == [
        (256,) * 2,
        (512,) * 2,
        (1024,) * 2,
    ]
    assert parse_size("512", 256) == (512, 512)


@pytest.mark.parametrize("text", ["", "8k", "2048x", "axb", "1x2x3", "-16x32", "20.5x16"])
def test_no_size(text):
    with pytest.raises(ValueError, match="is not 1k, 2k, 4k"):
        parse_size(text)


def test_size_off_the_grid_names_the_nearest():
    with pytest.raises(ValueError, match=r"height 2050 is not .* 16 .* try 2048 or 2064"):
        parse_size("1024x2050")
    with pytest.raises(ValueError, match=r"width 8 .* try 16$"):
        check_size(16, 8)


def test_ids_in_half_precision_are_widened():
    ids = build_image_ids(270, 300)
    assert not torch.equal(ids.bfloat16().float(), ids)
    assert torch.equal(widen_ids(ids.bfloat16()), ids)
    assert torch.equal(widen_ids(ids), ids)
    assert torch.equal(widen_ids(ids[None].bfloat16()), ids[None])
    second_picture = ids + torch.tensor([1.0, 0, 0])
    assert torch.equal(widen_ids(second_picture.bfloat16()), second_picture)
    no_grid = torch.randint(1, 200, (10, 3)).bfloat16()
    assert torch.equal(widen_ids(no_grid), no_grid.float())
