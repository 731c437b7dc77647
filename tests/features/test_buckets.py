import math

import numpy as np
import pytest
from PIL import Image

from urae.features.buckets import build_buckets, covers, fit, pick_bucket


@pytest.mark.parametrize("resolution", [16, 240, 256, 1024, 2048, 4096])
def test_buckets_keep_the_budget(resolution):
    buckets = build_buckets(resolution)
    assert (resolution, resolution) in buckets
    for height, width in buckets:
        assert height % 16 == width % 16 == 0
        assert height * width <= resolution**2
        assert (width, height) in buckets
        # nothing of the budget is left for one more token on the long side
        assert (max(height, width) + 16) * min(height, width) > resolution**2


@pytest.mark.parametrize("resolution", [1024, 2048, 4096])
def test_buckets_reach_from_1_4_to_4_1(resolution):
    buckets = build_buckets(resolution)
    assert len(buckets) == 17
    assert buckets[0] == (2 * resolution, resolution // 2)
    assert buckets[-1] == (resolution // 2, 2 * resolution)
    for height, width in buckets:
        assert height * width > 0.97 * resolution**2


def test_the_nearest_bucket_is_picked():
    for height, width in [(1000, 1000), (1080, 1920), (1500, 1000), (100, 1000), (997, 1301)]:
        bucket = pick_bucket(height, width, 1024)
        assert pick_bucket(width, height, 1024) == bucket[::-1]
        distance = abs(math.log(bucket[1] / bucket[0] / (width / height)))
        for other in build_buckets(1024):
            assert distance <= abs(math.log(other[1] / other[0] / (width / height))) + 1e-12


def test_fit_crops_the_centre_without_squeezing():
    # a disc stays round: as high as wide
    y, x = np.mgrid[:400, :600]
    disc = ((y - 199.5) ** 2 + (x - 299.5) ** 2 < 150**2).astype(np.uint8) * 255
    fitted = np.array(fit(Image.fromarray(disc), (160, 320)))
    assert fitted.shape == (160, 320)
    assert abs(int((fitted[80] > 127).sum()) - 160) <= 1  # 300 * 320 / 600
    picture = Image.fromarray(disc[:320, :320])
    assert np.array_equal(np.array(fit(picture, (320, 320))), np.array(picture))


def test_covering_needs_both_sides():
    assert covers(256, 256, (256, 256))
    assert not covers(255, 300, (256, 256))
    assert not covers(300, 255, (256, 256))


@pytest.mark.parametrize(
    ("resolution", "remedy"), [(2050, "try 2048 or 2064"), (8, "try 16"), (0, "try 16"), (-5, "16")]
)
def test_resolution_off_the_grid(resolution, remedy):
    with pytest.raises(ValueError, match=f"resolution {resolution} is not a positive.*{remedy}"):
        build_buckets(resolution)
