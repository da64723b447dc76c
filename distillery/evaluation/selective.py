"""Choose the confidence below which a student abstains, and show what that costs.

Confidence is the probability of the likeliest answer. Of a threshold, *coverage* is the share of
rows whose confidence reaches it, so that they get an answer.
"""

import math
from collections.abc import Sequence
from typing import NamedTuple

from distillery.evaluation.scoring import Answers, Probabilities
from distillery.evaluation.statistics import wilson_interval
from distillery.records import CoveragePoint, Estimate, Example, GivenAnswers, Proof

TESTS = 10
"""Thresholds that are tested. More of them come closer to the lowest one that could be proven, and
leave less risk for each. Simulated with 120, 300 and 1000 rows, 8 to 12 give the most answers."""

CURVE_POINTS = 20
"""Points of the curve of accuracy against coverage: one for every 5 % of the rows."""


class AskedRow(NamedTuple):
    """A row's confidence (0 to 1), and whether its answer is right."""

    confidence: float
    right: bool


class Chosen(NamedTuple):
    """A threshold and what the rows prove of it. `proven`: the accuracy asked for is reached."""

    threshold: float
    proof: Proof
    proven: bool


def asked_rows(
    examples: Sequence[Example], answers: Answers, probabilities: Sequence[Probabilities]
) -> list[AskedRow]:
    """Return the rows that could be asked, in order."""
    rows = []
    for example, answer, shares in zip(examples, answers, probabilities, strict=True):
        if answer is not None and shares is not None and answer in example.keys:
            confidence = shares[example.keys.index(answer)]
            rows.append(AskedRow(confidence, answer == example.answer_key))
    return rows


def choose_threshold(
    rows: Sequence[AskedRow], accuracy: float, confidence: float, floor: float = 0.0
) -> Chosen:
    """Return the lowest of TESTS thresholds, all at `floor` or above, at which the answers are
    proven to have `accuracy`; where none is, the one with the highest bound.

    The bound is that of Geifman, El-Yaniv, Selective Classification for Deep Neural Networks,
    NeurIPS 2017: by the binomial tail, with an equal part of the risk 1 - `confidence` for each
    test. Their binary search begins with half of the rows; in a small set these are too few to
    prove anything, and it misses the thresholds that more rows prove. Here the thresholds are
    evenly spaced in coverage, from the fewest rows that can prove `accuracy` to all of them, and
    all are tested. Which ones they are does not depend on which answers are right, so that one of
    the bounds fails with probability 1 - `confidence` at most (the union bound, as in Angelopoulos
    et al., Learn then Test: Calibrating Predictive Algorithms to Achieve Risk Control, 2021)."""
    confidences = sorted((row.confidence for row in rows if row.confidence >= floor), reverse=True)
    risk = (1 - confidence) / TESTS
    most = len(confidences)
    fewest = min(most, rows_needed(accuracy, confidence))
    tested = []
    for number in range(TESTS):
        count = most - round((most - fewest) * number / (TESTS - 1))
        threshold = floor if count == most else confidences[count - 1]
        proof = proof_of(rows, threshold, confidence, risk)
        chosen = Chosen(threshold, proof, proof.bound >= accuracy)
        if chosen.proven:
            return chosen
        tested.append(chosen)
    return max(tested, key=lambda chosen: chosen.proof.bound)


def proof_of(rows: Sequence[AskedRow], threshold: float, confidence: float, risk: float) -> Proof:
    """Return what the rows prove of a threshold, with a bound that fails with probability `risk`
    at most."""
    from scipy.stats import binomtest

    rights = [row.right for row in rows if row.confidence >= threshold]
    given, correct = len(rights), sum(rights)
    bound = 0.0
    if given:
        test = binomtest(correct, given, alternative="greater")
        bound = float(test.proportion_ci(confidence_level=1 - risk, method="exact").low)
    return Proof(rows=len(rows), given=given, correct=correct, bound=bound, confidence=confidence)


def rows_needed(accuracy: float, confidence: float) -> int:
    """Return the fewest rows that could prove `accuracy`, if all answers were right: the bound of n
    right answers is the n-th root of a test's risk."""
    return math.ceil(math.log((1 - confidence) / TESTS) / math.log(accuracy))


def coverage_curve(rows: Sequence[AskedRow], of: int) -> tuple[CoveragePoint, ...]:
    """Return the accuracy of the most confident answers, from few of the `of` rows to all that were
    asked: the risk-coverage curve (El-Yaniv, Wiener, On the Foundations of Noise-free Selective
    Classification, JMLR 11, 2010)."""
    confidences = sorted((row.confidence for row in rows), reverse=True)
    points: list[CoveragePoint] = []
    for number in range(1, CURVE_POINTS + 1):
        count = math.ceil(len(rows) * number / CURVE_POINTS)
        if not count or (points and points[-1].rows >= count):
            continue
        threshold = confidences[count - 1]
        rights = [row.right for row in rows if row.confidence >= threshold]
        points.append(
            CoveragePoint(
                threshold=threshold,
                rows=len(rights),
                coverage=len(rights) / of,
                accuracy=sum(rights) / len(rights),
            )
        )
    return tuple(points)


def given_answers(rows: Sequence[AskedRow], of: int, threshold: float) -> GivenAnswers:
    """Return coverage and accuracy under a threshold, of `of` rows (1 or more), with their 95 %
    intervals."""
    rights = [row.right for row in rows if row.confidence >= threshold]
    accuracy = share(sum(rights), len(rights)) if rights else None
    return GivenAnswers(threshold=threshold, coverage=share(len(rights), of), accuracy=accuracy)


def share(count: int, rows: int) -> Estimate:
    """Return a share of rows with its interval."""
    interval = wilson_interval(count, rows)
    return Estimate(value=count / rows, low=interval.low, high=interval.high)
