import math

import pytest

from urae.study.statistics import compare, compare_shares, estimate, estimate_share, find_quantile


@pytest.mark.parametrize(
    ("freedom", "quantile"),  # of 97.5%, from the tables of any textbook
    [(1, 12.7062), (2, 4.3027), (3, 3.1824), (4, 2.7764), (5, 2.5706), (10, 2.2281), (30, 2.0423)],
)
def test_quantiles_of_t(freedom, quantile):
    assert find_quantile(freedom) == pytest.approx(quantile, abs=5e-5)


def test_the_quantile_nears_that_of_the_normal_distribution():
    assert find_quantile(1000) == pytest.approx(1.96234, abs=5e-5)


def test_a_mean_and_its_interval():
    # mean 2, standard deviation 1, half width 4.3027 / sqrt(3)
    found = estimate([1.0, 2.0, 3.0])
    assert (found.mean, found.count) == (2.0, 3)
    assert found.high - found.mean == pytest.approx(2.4841, abs=1e-4)
    assert found.mean - found.low == pytest.approx(found.high - found.mean)
    assert not found.is_positive and not found.is_negative


def test_one_value_has_no_interval():
    found = estimate([0.5])
    assert (found.low, found.high) == (-math.inf, math.inf)
    assert not found.is_positive and not found.is_negative
    with pytest.raises(ValueError, match="no value to take the mean of"):
        estimate([])


def test_shares_stay_within_their_bounds():
    found = estimate_share([0.0, 0.01, 0.06], 300)
    assert found.low == 0 and found.high == estimate([0.0, 0.01, 0.06]).high
    assert estimate_share([1.0, 0.99, 0.94], 300).high == 1
    assert estimate_share([0.5], 100) == estimate([0.5])


@pytest.mark.parametrize(
    ("share", "low", "high"),  # Wilson's interval, z = 1.96, by its formula
    [(0.0, 0.0, 0.01264), (1.0, 0.98736, 1.0), (0.02, 0.00920, 0.04294)],
)
def test_alike_shares_have_the_interval_of_all_pictures(share, low, high):
    found = estimate_share([share] * 3, 300)
    assert (found.mean, found.count) == (share, 3)
    assert (found.low, found.high) == pytest.approx((low, high), abs=1e-5)


def test_pairs_are_told_apart_where_means_are_not():
    worse, better = [0.1, 0.5, 0.9], [0.15, 0.56, 0.95]
    assert estimate(better).low < estimate(worse).mean
    assert compare(better, worse).is_positive
    assert compare(worse, better).is_negative
    with pytest.raises(ValueError):
        compare([1.0], [1.0, 2.0])


def test_the_interval_covers_as_often_as_it_says():
    import random

    rng = random.Random(0)
    drawn = [estimate([rng.gauss(3, 2) for _ in range(4)]) for _ in range(2000)]
    covered = sum(each.low < 3 < each.high for each in drawn) / len(drawn)
    assert 0.935 < covered < 0.965


def test_shares_that_differ_alike_have_an_interval_of_their_pictures():
    one_point = compare_shares([0.03, 0.02, 0.04], [0.02, 0.01, 0.03], 300)
    assert one_point.mean == pytest.approx(0.01)
    assert one_point.low < -0.01 and one_point.high > 0.03
    assert compare_shares([0.0] * 3, [0.0] * 3, 300).high > 0.01
    # Newcombe's own example is 56 of 70 and 48 of 80; here they are 75 of each
    found = compare_shares([0.8] * 2, [0.6] * 2, 75)
    assert (found.low, found.high) == pytest.approx((0.0524, 0.3339), abs=0.002)
    first, second = [0.3, 0.5, 0.4], [0.2, 0.3, 0.3]
    assert compare_shares(first, second, 300) == compare(first, second)
    assert compare_shares([0.5], [0.4], 100) == compare([0.5], [0.4])
