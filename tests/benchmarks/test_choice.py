"""What a cheap teacher and chosen rows save: how the figures are taken together, and the teachers
that are played."""

from pathlib import Path
from statistics import correlation, mean
from typing import Any

import pytest

from benchmarks.choice import BOUNDS, WAYS, cascade_summary, curves, plot, selection_summary
from benchmarks.noisy_teacher import NoisyTeacher


def cascade_points(task: str = "moods") -> list[dict[str, Any]]:
    """Two seeds, between which all accuracies differ by 0.02. The lowest bound loses five points,
    the next one none."""
    points = []
    for seed in (0, 1):
        about = {"part": "cascade", "task": task, "seed": seed}
        for way, right, cost in (("dear alone", 0.9, 1.0), ("cheap alone", 0.8, 0.1)):
            points.append({**about, "way": way, "accuracy": right + 0.02 * seed, "cost": cost})
        for number, below in enumerate(BOUNDS):
            right = (0.85 if number == 0 else 0.9) + 0.02 * seed
            line = {**about, "below": below, "cost": 0.2 + 0.2 * number}
            points.append({**line, "way": "cascade", "accuracy": right})
            points.append({**line, "way": "random", "accuracy": right - 0.03})
    return points


def selection_points() -> list[dict[str, Any]]:
    points: list[dict[str, Any]] = []
    about = {"part": "selection", "task": "moods", "seed": 0}
    for way, right in (("gold alone", 0.5), ("all", 0.8)):
        points.append({**about, "way": way, "rows": 0, "accuracy": right, "cost": 0.0})
    for way in WAYS:
        for number in range(4):
            right = 0.6 + 0.05 * number + (0.01 if way == "both" else 0)
            rows = 60 * (number + 1)
            line = {"way": way, "rows": rows, "accuracy": right, "cost": 0.1 * rows}
            points.append({**about, **line})
    return points


def test_a_curve_has_the_mean_and_the_range_of_the_seeds() -> None:
    found = curves(cascade_points(), "cascade", "moods")
    assert found["dear alone"] == [pytest.approx((1.0, 0.91, 0.9, 0.92))]
    assert found["cascade"][0] == pytest.approx((0.2, 0.86, 0.85, 0.87))
    assert len(found["cascade"]) == len(found["random"]) == len(BOUNDS)
    assert curves(cascade_points(), "selection", "moods") == {}


def test_the_cheapest_bound_that_loses_at_most_a_point_is_told() -> None:
    found = cascade_summary(cascade_points(), "moods")
    assert (found["below"], found["accuracy"], found["saved"]) == (BOUNDS[1], 0.91, 0.6)
    worse = [
        {**point, "accuracy": 0.7} if point["way"] == "cascade" else point
        for point in cascade_points()
    ]
    assert cascade_summary(worse, "moods")["saved"] is None


def test_what_a_choice_gains_is_told_beside_rows_at_random() -> None:
    found = selection_summary(selection_points(), "moods")
    assert (found["gold alone"], found["all"]) == (0.5, 0.8)
    assert (found["both_half"], found["both_half_gain"]) == (0.66, 1.0)
    assert (found["uncertainty_end"], found["uncertainty_end_gain"]) == (0.75, 0.0)
    assert "random_half_gain" not in found


def test_a_plot_is_drawn(tmp_path: Path) -> None:
    plot([*cascade_points(), *selection_points()], tmp_path / "new" / "choice.png")
    assert (tmp_path / "new" / "choice.png").read_bytes().startswith(b"\x89PNG")


def test_teachers_find_like_texts_hard_and_err_otherwise() -> None:
    gold = {f"text {number}": "abc"[number % 3] for number in range(2000)}
    dear, cheap = NoisyTeacher(gold, "dear", 0.9), NoisyTeacher(gold, "cheap", 0.8)
    right: dict[str, list[bool]] = {"dear": [], "cheap": []}
    sure: dict[str, list[float]] = {"dear": [], "cheap": []}
    for text, answer in gold.items():
        for teacher in (dear, cheap):
            shares = teacher.probabilities(text)
            said = max(shares, key=lambda name: shares[name])
            right[teacher.name].append(said == answer)
            sure[teacher.name].append(shares[said])
    for name, share in (("dear", 0.9), ("cheap", 0.8)):
        assert mean(right[name]) == pytest.approx(share, abs=0.02)
        assert mean(sure[name]) == pytest.approx(share, abs=0.02), "it knows how sure it may be"
    assert 0.3 < correlation(sure["dear"], sure["cheap"]) < 0.6
    both_wrong = mean(not a and not b for a, b in zip(right["dear"], right["cheap"], strict=True))
    assert both_wrong > 1.15 * 0.1 * 0.2, "more often than by chance"
    assert both_wrong < 0.1, "and not always"
