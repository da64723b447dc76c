"""evaluation/statistics"""

import math
from collections import Counter
from collections.abc import Sequence
from statistics import NormalDist

from distillery.records import Interval

_Z = NormalDist().inv_cdf(0.975)

# Statistics


def wilson(correct: int, rows: int) -> Interval:
    """The 95 % score interval of a proportion of `rows` (1 or more), in [0, 1], without continuity correction.

    Wilson, Probable inference, the law of succession, and statistical inference, JASA 22 (1927); method 3 in Newcombe,
    Two-sided confidence intervals for the single proportion, Statistics in Medicine 17 (1998), 857-872."""
    share = correct / rows
    centre = share + _Z**2 / (2 * rows)
    half = _Z * math.sqrt(share * (1 - share) / rows + _Z**2 / (4 * rows**2))
    scale = 1 + _Z**2 / rows
    # Rounding must not leave the share itself outside: at 0 and at 1 it is an end of its interval.
    low, high = (
        min(max(0.0, (centre - half) / scale), share),
        max(min(1.0, (centre + half) / scale), share),
    )
    return Interval(low=low, high=high)


def paired_interval(a_correct: Sequence[bool], b_correct: Sequence[bool]) -> Interval:
    """The 95 % interval of a's accuracy less b's on the same rows (1 or more), in [-1, 1].

    Newcombe, Improved confidence intervals for the difference between binomial proportions based on paired data,
    Statistics in Medicine 17 (1998), 2635-2650, method 10: both Wilson intervals, squared and added less twice their
    product with the correlation phi, whose numerator is brought n/2 nearer to 0 where it is positive. It keeps a width
    where the two are right on the same rows."""
    n = len(a_correct)
    pairs = Counter(zip(a_correct, b_correct, strict=True))
    a, b = sum(a_correct), sum(b_correct)
    wilson_a, wilson_b = wilson(a, n), wilson(b, n)
    covariance: float = (
        pairs[True, True] * pairs[False, False] - pairs[True, False] * pairs[False, True]
    )
    if covariance > 0:
        covariance = max(covariance - n / 2, 0)
    spread = math.sqrt(a * (n - a) * b * (n - b))
    phi = covariance / spread if spread else 0.0
    difference = (a - b) / n
    return Interval(
        low=difference - _joint(a / n - wilson_a.low, wilson_b.high - b / n, phi),
        high=difference + _joint(wilson_a.high - a / n, b / n - wilson_b.low, phi),
    )


def _joint(one: float, other: float, phi: float) -> float:
    return math.sqrt(max(0.0, one**2 - 2 * phi * one * other + other**2))
