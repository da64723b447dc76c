"""Comparisons of paired answers, beside references that are computed in another way."""

import math
from itertools import product

import numpy as np
import pytest
from scipy.optimize import brentq
from scipy.stats import norm

from distillery.evaluation import statistics
from distillery.evaluation.statistics import (
    Pairs,
    count_pairs,
    difference_interval,
    margins_of,
    mcnemar_p,
    one_sided,
    paired_interval,
    ratio_interval,
    rows_needed,
    wilson_interval,
)

SMALL = [Pairs(*cells) for cells in product(range(5), repeat=4) if sum(cells)]
"""All tables with up to four rows in a cell."""

LARGE = [Pairs(*map(int, cells)) for cells in np.random.default_rng(0).integers(0, 400, (100, 4))]

CONFIDENCES = (0.8, 0.9, 0.95, 0.99)


def wilson(correct: int, rows: int, confidence: float) -> tuple[float, float]:
    """Wilson's interval as the two shares p at which |share - p| is z standard errors of p."""
    z, share = float(norm.ppf((1 + confidence) / 2)), correct / rows
    roots = np.roots([1 + z**2 / rows, -(2 * share + z**2 / rows), share**2])
    low, high = sorted(float(root.real) for root in roots)
    return low, high


@pytest.mark.parametrize("confidence", CONFIDENCES)
def test_wilson_interval_solves_the_score_equation(confidence: float) -> None:
    for rows in (1, 2, 7, 40, 1000):
        for correct in {0, 1, rows // 2, rows}:
            found = wilson_interval(correct, rows, confidence)
            assert (found.low, found.high) == pytest.approx(
                wilson(correct, rows, confidence), abs=1e-7
            )


def newcombe(pairs: Pairs, confidence: float, weight: float) -> tuple[float, float]:
    """The interval of first - weight * second by squaring and adding, as a matrix product."""
    rows = pairs.rows
    a, b, c, d = pairs
    first, second = (a + b) / rows, (a + c) / rows
    first_low, first_high = wilson(a + b, rows, confidence)
    second_low, second_high = wilson(a + c, rows, confidence)
    numerator = float(a * d - b * c)
    if numerator > 0:
        numerator = max(numerator - rows / 2, 0)
    denominator = math.sqrt((a + b) * (c + d) * (a + c) * (b + d))
    phi = numerator / denominator if denominator else 0
    correlation = np.array([[1, -phi], [-phi, 1]])
    below = np.array([first - first_low, weight * (second_high - second)])
    above = np.array([first_high - first, weight * (second - second_low)])
    difference = first - weight * second
    return (
        difference - math.sqrt(max(below @ correlation @ below, 0)),
        difference + math.sqrt(max(above @ correlation @ above, 0)),
    )


@pytest.mark.parametrize("confidence", CONFIDENCES)
def test_difference_interval_squares_and_adds(confidence: float) -> None:
    for pairs in (*SMALL, *LARGE):
        found = difference_interval(pairs, confidence)
        reference = newcombe(pairs, confidence, weight=1)
        assert (found.low, found.high) == pytest.approx(reference, abs=1e-6), pairs


def test_difference_interval_turns_round_with_the_two_predictors() -> None:
    for pairs in (*SMALL, *LARGE):
        one = difference_interval(pairs)
        other = difference_interval(Pairs(pairs.both, pairs.second, pairs.first, pairs.neither))
        assert (one.low, one.high) == pytest.approx((-other.high, -other.low))
        assert -1 - 1e-9 <= one.low <= pairs.difference <= one.high <= 1 + 1e-9


def test_a_higher_confidence_gives_a_wider_interval() -> None:
    for pairs in (*SMALL, *LARGE):
        narrow, wide = difference_interval(pairs, 0.8), difference_interval(pairs, 0.99)
        assert wide.low <= narrow.low + 1e-12
        assert narrow.high <= wide.high + 1e-12


@pytest.mark.parametrize("confidence", [0.8, 0.9, 0.95])
def test_a_bound_of_the_ratio_is_where_the_weighted_difference_may_be_zero(
    confidence: float,
) -> None:
    for pairs in (*SMALL[::7], *LARGE):
        if not pairs.both + pairs.second:
            continue
        found = ratio_interval(pairs, confidence)

        def lower(ratio: float, pairs: Pairs = pairs) -> float:
            return newcombe(pairs, confidence, ratio)[0]

        def upper(ratio: float, pairs: Pairs = pairs) -> float:
            return newcombe(pairs, confidence, ratio)[1]

        if lower(0) <= 1e-7:
            assert found.low == pytest.approx(0, abs=1e-6)
        else:
            assert found.low == pytest.approx(brentq(lower, 0, 1e4), rel=1e-5), pairs
        assert found.high == pytest.approx(brentq(upper, 0, 1e6), rel=1e-5), pairs
        assert found.low <= (pairs.both + pairs.first) / (pairs.both + pairs.second) <= found.high


def test_another_implementation_gives_the_same_ratio_interval_but_for_the_corrected_phi(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The MOVER Wilson score interval for the ratio of paired probabilities in the R package
    contingencytables, for the data of Cavo (2012). It takes the plain phi."""
    cavo = Pairs(59, 6, 16, 80)
    ours = ratio_interval(cavo)
    assert (round(ours.low, 4), round(ours.high, 4)) == (0.757, 0.9895)
    plain = (59 * 80 - 6 * 16) / math.sqrt(65 * 96 * 75 * 86)
    monkeypatch.setattr(
        statistics,
        "margins_of",
        lambda pairs, confidence: margins_of(pairs, confidence)._replace(phi=plain),
    )
    theirs = ratio_interval(cavo)
    assert (round(theirs.low, 4), round(theirs.high, 4)) == (0.7592, 0.9866)


def exact_mcnemar(pairs: Pairs) -> float:
    """Add the probabilities of all splits of the discordant rows that are no likelier."""
    discordant = pairs.first + pairs.second
    chances = [math.comb(discordant, k) / 2**discordant for k in range(discordant + 1)]
    return math.fsum(chance for chance in chances if chance <= chances[pairs.first] * (1 + 1e-9))


def test_mcnemar_p_adds_up_the_binomial() -> None:
    for pairs in SMALL:
        assert mcnemar_p(pairs) == pytest.approx(exact_mcnemar(pairs)), pairs
    assert mcnemar_p(Pairs(50, 0, 0, 50)) == 1
    # The data of Cavo (2012) in the R package contingencytables.
    assert round(mcnemar_p(Pairs(59, 6, 16, 80)), 6) == 0.052479
    assert mcnemar_p(Pairs(5, 10, 0, 5)) == pytest.approx(2 / 2**10)


def test_count_pairs_goes_row_by_row() -> None:
    pairs = count_pairs([True, True, False, False, True], [True, False, True, False, True])
    assert pairs == (2, 1, 1, 1)
    assert pairs.difference == 0
    assert paired_interval([True, False], [False, False]) == difference_interval(Pairs(0, 1, 0, 1))
    with pytest.raises(ValueError, match="zip"):
        count_pairs([True], [])


@pytest.mark.parametrize("weight", [1.0, 0.9, 0.5])
def test_rows_needed_is_where_a_normal_test_has_its_power(weight: float) -> None:
    """The power of the test at that many rows, from the variance of the rows themselves."""
    pairs = Pairs(700, 80, 50, 170)
    values = np.repeat([1 - weight, 1, -weight, 0], pairs)
    limit = float(values.mean()) - 0.03
    for confidence in (0.9, 0.95):
        needed = rows_needed(pairs, limit, confidence, weight)
        assert needed is not None
        distance = abs(values.mean() - limit)
        error = values.std() / math.sqrt(needed)
        power = norm.sf(norm.ppf(confidence) - distance / error)
        assert power == pytest.approx(0.8, abs=0.01)


def test_more_rows_are_needed_nearer_to_the_limit_and_none_decide_at_it() -> None:
    pairs = Pairs(80, 5, 5, 10)
    far, near = rows_needed(pairs, -0.05, 0.95), rows_needed(pairs, -0.01, 0.95)
    assert far is not None
    assert near is not None
    assert far < near
    assert rows_needed(pairs, 0.0, 0.95) is None
    none_differs = rows_needed(Pairs(90, 0, 0, 10), -0.02, 0.95)
    assert none_differs is not None
    assert none_differs > 100


def test_a_one_sided_bound_is_that_of_a_narrower_interval() -> None:
    assert one_sided(0.95) == pytest.approx(0.9)
    assert margins_of(Pairs(1, 0, 0, 1), 0.9).phi == 0
