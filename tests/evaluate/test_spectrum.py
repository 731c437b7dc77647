import math

import pytest
import torch

from urae.evaluate.spectrum import radial_spectrum, spectrum_distance
from urae.miniature.photograph import blur
from urae.miniature.render import render
from urae.miniature.world import sample_scene

PICTURES = render([sample_scene(seed) for seed in range(16)], 64, 96).float() / 255


def test_a_set_is_at_no_distance_from_itself_in_any_order():
    assert spectrum_distance(PICTURES, PICTURES) == 0
    shuffled = PICTURES[torch.randperm(len(PICTURES))]
    assert spectrum_distance(PICTURES, shuffled) < 1e-4
    assert spectrum_distance(PICTURES, PICTURES.repeat(2, 1, 1, 1)) < 1e-4


def test_it_is_symmetric():
    other = blur(PICTURES, 1.0)
    assert spectrum_distance(PICTURES, other) == spectrum_distance(other, PICTURES)


def test_it_grows_with_blur_and_with_noise():
    blurred = [spectrum_distance(PICTURES, blur(PICTURES, sigma)) for sigma in (0.5, 1.0, 2.0)]
    assert 0 < blurred[0] < blurred[1] < blurred[2]
    noise = torch.randn(PICTURES.shape, generator=torch.Generator().manual_seed(0))
    noisy = [spectrum_distance(PICTURES, PICTURES + level * noise) for level in (0.02, 0.1)]
    assert 0 < noisy[0] < noisy[1]


def test_twice_the_power_is_three_decibels():
    loud = PICTURES * math.sqrt(2)
    assert spectrum_distance(PICTURES, loud) == pytest.approx(10 * math.log10(2), abs=0.01)


@pytest.mark.parametrize("axis", [-1, -2])
def test_a_wave_has_its_power_in_its_ring(axis):
    length = 64
    wave = torch.sin(2 * math.pi * 8 * torch.arange(length) / length)
    picture = wave.expand(3, length, length)
    picture = (picture if axis == -1 else picture.mT)[None]
    power = radial_spectrum(picture)[0]
    assert power.shape == (32,)
    assert power.argmax() == 8 - 1
    assert power[6:9].sum() > 0.99 * power.sum()


def test_all_directions_count_alike():
    square = render([sample_scene(seed) for seed in range(4)], 64, 64).float() / 255
    assert spectrum_distance(square, square.mT) < 1e-4


def test_the_ring_counts_periods_of_the_shorter_side():
    wave = torch.sin(2 * math.pi * torch.arange(128) / 8)  # 8 pixels a period
    assert radial_spectrum(wave.expand(1, 1, 64, 128)).argmax() == 8 - 1
    assert radial_spectrum(wave.expand(1, 1, 128, 128)).argmax() == 16 - 1


def test_white_noise_is_flat_at_its_variance():
    noise = 0.1 * torch.randn(64, 1, 64, 64, generator=torch.Generator().manual_seed(0))
    power = radial_spectrum(noise).mean(0)
    torch.testing.assert_close(power[2:], torch.full((30,), 0.01), rtol=0.15, atol=0)


def test_a_constant_picture_has_no_power():
    assert radial_spectrum(torch.full((1, 3, 32, 32), 0.3)).max() < 1e-10
    assert spectrum_distance(torch.zeros(1, 3, 32, 32), torch.ones(2, 3, 32, 32)) == 0


def test_other_sizes_have_no_common_frequencies():
    with pytest.raises(ValueError, match="64 x 96 and of 64 x 64 have no common frequencies"):
        spectrum_distance(PICTURES, PICTURES[..., :64])
