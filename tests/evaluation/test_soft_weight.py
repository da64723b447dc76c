"""The share of a teacher's probabilities: calibrated ones count whole, timid ones in part."""

import numpy as np
import pytest

from distillery.evaluation.soft_weight import calibrated_share


def drawn(rows: int, timid: float) -> tuple[list[list[float]], list[int]]:
    """Probabilities of three classes, and right answers drawn from them; what the teacher says of
    them is mixed with `timid` of equal shares."""
    random = np.random.default_rng(0)
    true = random.dirichlet([4, 1, 1], rows)
    right = [int(random.choice(3, p=row)) for row in true]
    return ((1 - timid) * true + timid / 3).tolist(), right


def test_calibrated_probabilities_count_whole() -> None:
    assert calibrated_share(*drawn(4000, 0.0)) == pytest.approx(1.0, abs=0.05)


def test_timid_probabilities_count_the_less_the_more_timid_they_are() -> None:
    little, much = (calibrated_share(*drawn(4000, timid)) for timid in (0.3, 0.6))
    assert 0.0 < much < little < 0.95
    best = min(np.linspace(0, 1, 101), key=lambda share: brier(share, *drawn(4000, 0.6)))
    assert much == pytest.approx(best, abs=0.02)


def brier(share: float, probabilities: list[list[float]], right: list[int]) -> float:
    p = np.asarray(probabilities)
    labels = np.eye(3)[p.argmax(1)]
    return float(((labels + share * (p - labels) - np.eye(3)[right]) ** 2).sum())


def test_few_rows_decide_little_and_none_nothing() -> None:
    probabilities, right = drawn(4000, 0.6)
    few = calibrated_share(probabilities[:3], right[:3])
    assert calibrated_share(probabilities, right) < few
    assert few > 0.8
    assert calibrated_share([], []) == 1.0
    assert calibrated_share([[1.0, 0.0], [0.0, 1.0]], [0, 0]) == 1.0


def test_it_is_a_share_whatever_the_rows() -> None:
    # Right on all rows, and never sure: the labels alone.
    assert calibrated_share([[0.6, 0.4]] * 500, [0] * 500) == pytest.approx(0.04, abs=0.05)
    # Wrong on all rows, and sure.
    assert calibrated_share([[0.9, 0.1]] * 500, [1] * 500) == 1.0
