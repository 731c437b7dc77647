import pytest
import torch

from urae.evaluate.wasserstein import build_pyramid, enlarge, sliced_wasserstein
from urae.miniature.photograph import blur
from urae.miniature.render import render
from urae.miniature.world import sample_scene


def draw(seeds):
    return render([sample_scene(seed) for seed in seeds], 64, 96).float() / 255


# of one world, but other scenes
PICTURES, OTHERS = draw(range(6)), draw(range(100, 106))


def distance(pictures, others, seed=0):
    return sliced_wasserstein(pictures, others, torch.Generator().manual_seed(seed))


def test_a_set_is_at_no_distance_from_itself_in_any_order():
    assert distance(PICTURES, PICTURES).abs().max() == 0
    order = torch.randperm(len(PICTURES))
    torch.testing.assert_close(
        distance(PICTURES, PICTURES[order]), torch.zeros(3), atol=1e-5, rtol=0
    )
    torch.testing.assert_close(
        distance(PICTURES[order], OTHERS), distance(PICTURES, OTHERS), atol=1e-5, rtol=0
    )


def test_it_is_symmetric():
    torch.testing.assert_close(distance(PICTURES, OTHERS), distance(OTHERS, PICTURES))


def test_the_seed_decides():
    assert torch.equal(distance(PICTURES, OTHERS), distance(PICTURES, OTHERS))
    assert not torch.equal(distance(PICTURES, OTHERS), distance(PICTURES, OTHERS, seed=1))


def test_it_grows_with_blur_in_the_finest_level():
    found = [distance(PICTURES, blur(PICTURES, sigma)) for sigma in (0.5, 1.0, 2.0)]
    finest = [float(each[0]) for each in found]
    assert 0 < finest[0] < finest[1] < finest[2] < 1
    assert all(each[-1] < each[0] for each in found)


def test_the_same_world_is_nearer_than_noise():
    pictures, others = draw(range(16)), draw(range(100, 116))
    noise = torch.rand(others.shape, generator=torch.Generator().manual_seed(0))
    assert (distance(pictures, others) < distance(pictures, noise)).all()


def test_channels_may_be_scaled_and_shifted():
    changed = OTHERS * torch.tensor([0.5, 2.0, 255.0])[:, None, None] - 0.25
    torch.testing.assert_close(
        distance(PICTURES, changed), distance(PICTURES, OTHERS), atol=1e-4, rtol=1e-3
    )


def test_colourless_sets_are_equal():
    grey = torch.full((2, 3, 32, 32), 0.5)
    assert distance(grey, grey).isfinite().all()


@pytest.mark.parametrize(
    ("size", "levels"), [((16, 64), 1), ((31, 31), 1), ((64, 96), 3), ((90, 70), 3)]
)
def test_the_pyramid_adds_up(size, levels):
    picture = torch.rand(2, 3, *size)
    pyramid = build_pyramid(picture)
    assert len(pyramid) == levels
    assert min(pyramid[-1].shape[-2:]) >= 16
    whole = pyramid[-1]
    for detail in reversed(pyramid[:-1]):
        whole = detail + enlarge(whole, detail.shape)
    torch.testing.assert_close(whole, picture)


def test_flat_pictures_have_no_detail():
    *details, rest = build_pyramid(torch.full((1, 3, 64, 64), 0.7))
    assert all(detail[..., 4:-4, 4:-4].abs().max() < 1e-6 for detail in details)
    torch.testing.assert_close(rest, torch.full((1, 3, 16, 16), 0.7))


def test_sets_that_cannot_be_compared():
    with pytest.raises(ValueError, match="the same number of each, all of one size"):
        distance(PICTURES, OTHERS[:-1])
    with pytest.raises(ValueError, match="8 x 96 have no level of 16 pixels"):
        distance(PICTURES[:, :, :8], OTHERS[:, :, :8])
