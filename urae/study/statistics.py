"""Means over seeds with 95% intervals, from Student's t distribution, and paired differences."""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

from urae.miniature.check import find_interval

_COVERAGE = 0.95
_ROUNDING = 1e-9


@dataclass(frozen=True)
class Estimate:
    """A mean and its 95% interval."""

    mean: float
    low: float
    """Minus infinity if one value was given: nothing says how far it spreads."""
    high: float
    count: int
    """Of values."""
    varies: bool = True
    """False of what every seed measures alike: its interval would have no width."""

    @property
    def is_positive(self) -> bool:
        """Whether the whole interval lies above zero."""
        return self.low > 0

    @property
    def is_negative(self) -> bool:
        """Whether the whole interval lies below zero."""
        return self.high < 0


def estimate(values: Sequence[float]) -> Estimate:
    """Return the mean of independent values, and its interval if they are normally distributed.

    Values that are all alike have an interval of no width; `estimate_share` and `compare_shares`
    know better.

    Raises:
        ValueError: If there is no value.
    """
    if not values:
        raise ValueError("there is no value to take the mean of; give at least one")
    count = len(values)
    mean = sum(values) / count
    if count == 1:
        return Estimate(mean, -math.inf, math.inf, 1)
    variance = sum((value - mean) ** 2 for value in values) / (count - 1)
    half = find_quantile(count - 1) * math.sqrt(variance / count)
    return Estimate(mean, mean - half, mean + half, count)


def estimate_share(shares: Sequence[float], num_pictures: int) -> Estimate:
    """Return the mean of independent shares with its interval, within 0 and 1.

    Where two seeds or more have the same share, 0 of all pictures mostly, their spread says
    nothing: the interval is then Wilson's, over all pictures.

    Args:
        shares: Of as many pictures each.
        num_pictures: Of all shares together.
    """
    found = estimate(shares)
    if found.count == 1:
        return found
    if len(set(shares)) == 1:
        low, high = find_interval(shares[0], num_pictures)
        return Estimate(shares[0], low, high, found.count)
    return replace(found, low=max(0.0, found.low), high=min(1.0, found.high))


def compare(first: Sequence[float], second: Sequence[float]) -> Estimate:
    """Return the mean of `first` minus `second`, value by value, with its interval.

    Raises:
        ValueError: If there are not as many of each.
    """
    return estimate([a - b for a, b in zip(first, second, strict=True)])


def compare_shares(first: Sequence[float], second: Sequence[float], num_pictures: int) -> Estimate:
    """As `compare`, for shares of pictures.

    Where two seeds or more differ by the same, their spread says nothing: the interval is then
    Newcombe's, from Wilson's over all pictures of either (Statistics in Medicine 17, 1998, method
    10).

    Args:
        first: Of as many pictures each.
        second: The same.
        num_pictures: Of all shares of `first` together, and of `second` likewise.
    """
    found = compare(first, second)
    if found.count == 1 or found.high - found.low > _ROUNDING:
        return found
    shares = sum(first) / found.count, sum(second) / found.count
    (low, high), (other_low, other_high) = (find_interval(each, num_pictures) for each in shares)
    return replace(
        found,
        low=found.mean - math.hypot(shares[0] - low, other_high - shares[1]),
        high=found.mean + math.hypot(high - shares[0], shares[1] - other_low),
    )


def find_quantile(freedom: int) -> float:
    """Return t such that a t-distributed number lies within -t and t with a probability of 95%.

    Args:
        freedom: Degrees of freedom, 1 or more.
    """
    low, high = 0.0, 1.0
    while _cover(high, freedom) < _COVERAGE:
        high *= 2
    for _ in range(80):  # halves the bracket to the last bit
        middle = (low + high) / 2
        low, high = (middle, high) if _cover(middle, freedom) < _COVERAGE else (low, middle)
    return (low + high) / 2


def _cover(t: float, freedom: int) -> float:
    """Return the probability between -t and t, in closed form.

    Abramowitz and Stegun, "Handbook of Mathematical Functions", 26.7.3 and 26.7.4.
    """
    angle = math.atan(t / math.sqrt(freedom))
    odd = freedom % 2 == 1
    term = math.cos(angle) if odd else 1.0
    total = 0.0 if freedom == 1 else term
    for k in range(3 if odd else 2, freedom - 1, 2):
        term *= math.cos(angle) ** 2 * (k - 1) / k
        total += term
    total *= math.sin(angle)
    return 2 / math.pi * (angle + total) if odd else total
