"""95 % intervals of an accuracy, and of the difference of two accuracies on the same rows."""

import math
from collections import Counter
from collections.abc import Sequence

from distillery.records import Interval


def wilson_interval(correct: int, rows: int) -> Interval:
    """Return the 95 % score interval of a share of `rows` (1 or more), in [0, 1].

    Wilson, Probable inference, the law of succession, and statistical inference, JASA 22 (1927);
    method 3 in Newcombe, Two-sided confidence intervals for the single proportion, Statistics in
    Medicine 17 (1998), 857-872."""
    from scipy.stats import binomtest

    interval = binomtest(correct, rows).proportion_ci(method="wilson")
    return Interval(low=float(interval.low), high=float(interval.high))


def paired_interval(first: Sequence[bool], second: Sequence[bool]) -> Interval:
    """Return the 95 % interval of the first's accuracy minus the second's, in [-1, 1].

    Both tell row by row, for the same rows (1 or more), whether the answer is right.

    Newcombe, Improved confidence intervals for the difference between binomial proportions based
    on paired data, Statistics in Medicine 17 (1998), 2635-2650, method 10: the distances to both
    Wilson bounds are squared and added, less twice their product times the correlation phi. Where
    the numerator of phi is positive, it is brought n/2 nearer to 0. The interval keeps a width
    where the two are right on the same rows."""
    rows = len(first)
    pairs = Counter(zip(first, second, strict=True))
    first_right, second_right = sum(first), sum(second)
    covariance = float(
        pairs[True, True] * pairs[False, False] - pairs[True, False] * pairs[False, True]
    )
    if covariance > 0:
        covariance = max(covariance - rows / 2, 0)
    spread = math.sqrt(first_right * (rows - first_right) * second_right * (rows - second_right))
    phi = 0.0
    if spread > 0:
        phi = covariance / spread

    def half_width(a: float, b: float) -> float:
        return math.sqrt(max(0.0, a**2 - 2 * phi * a * b + b**2))

    first_interval = wilson_interval(first_right, rows)
    second_interval = wilson_interval(second_right, rows)
    first_share, second_share = first_right / rows, second_right / rows
    difference = (first_right - second_right) / rows
    return Interval(
        low=difference
        - half_width(first_share - first_interval.low, second_interval.high - second_share),
        high=difference
        + half_width(first_interval.high - first_share, second_share - second_interval.low),
    )
