"""The threshold below which a student abstains: by hand, and whether what is proven holds."""

import numpy as np
import pytest
from scipy.stats import beta
from student_answers import further_figures

from distillery.evaluation.evaluate import score_row
from distillery.evaluation.figures import confidence_figures
from distillery.evaluation.figures_table import candidate_cells, coverage_cells
from distillery.evaluation.gold import Gold
from distillery.evaluation.selective import (
    TESTS,
    AskedRow,
    asked_rows,
    choose_threshold,
    coverage_curve,
    given_answers,
    rows_needed,
)
from distillery.records import Example, Figures


def rows_of(*groups: tuple[float, int, int]) -> list[AskedRow]:
    """Groups of (confidence, rows, how many of them are right)."""
    rows = []
    for confidence, count, right in groups:
        rows += [AskedRow(confidence, number < right) for number in range(count)]
    return rows


def test_the_lowest_threshold_that_is_proven_is_chosen() -> None:
    """Ten tests, each with a tenth of the risk."""
    rows = rows_of((0.9, 100, 100), (0.8, 150, 149), (0.6, 100, 60), (0.4, 100, 20))
    chosen = choose_threshold(rows, 0.95, 0.95)
    assert (chosen.threshold, chosen.proven) == (0.8, True)
    proof = chosen.proof
    assert (proof.rows, proof.given, proof.correct) == (450, 250, 249)
    # The exact bound of 249 right answers of 250, as the quantile of a beta distribution.
    assert proof.bound == pytest.approx(beta.ppf(0.05 / TESTS, 249, 2))
    assert not choose_threshold(rows, 0.99, 0.95).proven


def test_a_student_that_is_right_enough_on_all_rows_never_abstains() -> None:
    chosen = choose_threshold(rows_of((0.9, 100, 100), (0.5, 100, 99)), 0.9, 0.95)
    assert (chosen.threshold, chosen.proof.given) == (0, 200)


def test_the_threshold_is_no_lower_than_the_recipe_says() -> None:
    rows = rows_of((0.9, 100, 100), (0.6, 100, 100))
    chosen = choose_threshold(rows, 0.9, 0.95, floor=0.7)
    assert (chosen.threshold, chosen.proof.given) == (0.7, 100)


def test_what_comes_closest_is_told_if_nothing_is_proven() -> None:
    chosen = choose_threshold(rows_of((0.9, 20, 20), (0.5, 20, 5)), 0.95, 0.95)
    assert not chosen.proven
    assert (chosen.threshold, chosen.proof.correct, chosen.proof.given) == (0, 25, 40)
    chosen = choose_threshold(rows_of((0.9, 105, 103), (0.5, 105, 5)), 0.95, 0.95)
    assert not chosen.proven
    assert (chosen.threshold, chosen.proof.correct, chosen.proof.given) == (0.9, 103, 105)


def test_without_a_row_nothing_is_proven() -> None:
    assert not choose_threshold([], 0.95, 0.95).proven


@pytest.mark.parametrize("accuracy", [0.8, 0.95, 0.99])
def test_the_rows_that_are_needed_are_the_fewest_that_can_prove_it(accuracy: float) -> None:
    needed = rows_needed(accuracy, 0.95)
    for count, proven in ((needed, True), (needed - 1, False)):
        rows = [AskedRow(0.5 + number / 10_000, True) for number in range(count)]
        assert choose_threshold(rows, accuracy, 0.95).proven == proven


def test_what_is_proven_holds_more_often_than_its_confidence() -> None:
    """A student that is right with the square root of its confidence as probability, whose accuracy
    above a threshold t is the mean of that over [t, 1]."""
    generator = np.random.default_rng(0)
    proven = broken = 0
    for _ in range(100):
        confidences = generator.uniform(0.3, 1, 1000)
        rights = generator.random(1000) < np.sqrt(confidences)
        rows = [AskedRow(*pair) for pair in zip(confidences.tolist(), rights.tolist(), strict=True)]
        chosen = choose_threshold(rows, 0.9, 0.95)
        lowest = max(0.3, chosen.threshold)
        true = (1 - lowest**1.5) / 1.5 / (1 - lowest)
        proven += chosen.proven
        broken += chosen.proven and true < 0.9
    assert proven > 50
    assert broken <= 5


def test_coverage_counts_equal_confidences_together_and_all_rows() -> None:
    """Of five rows, one was not asked; two have the same confidence."""
    rows = rows_of((0.9, 1, 1), (0.8, 2, 1), (0.5, 1, 0))
    points = [tuple(point.model_dump().values()) for point in coverage_curve(rows, 5)]
    assert points == [
        (0.9, 1, 0.2, 1),
        (0.8, 3, 0.6, pytest.approx(2 / 3)),
        (0.5, 4, 0.8, 0.5),
    ]
    assert coverage_curve([], 5) == ()
    many = coverage_curve([AskedRow(number / 1000, True) for number in range(1000)], 1000)
    assert [point.rows for point in many] == list(range(50, 1001, 50))


def test_under_a_threshold_no_answer_has_no_accuracy() -> None:
    rows = rows_of((0.9, 3, 3), (0.5, 1, 0))
    found = given_answers(rows, 5, 0.9)
    assert (found.coverage.value, found.accuracy and found.accuracy.value) == (0.6, 1)
    none = given_answers(rows, 5, 0.95)
    assert (none.coverage.value, none.accuracy) == (0, None)


CLASSES = ("pleased", "displeased")


def test_the_figures_tell_what_the_threshold_does_and_the_scoreboard_does_not_heed_it() -> None:
    examples = [
        Example(example_id=str(n), question=str(n), answer_key="pleased", classes=CLASSES)
        for n in range(4)
    ]
    answers = ["pleased", "pleased", "displeased", None]
    probabilities = [(0.9, 0.1), (0.6, 0.4), (0.3, 0.7), None]
    assert asked_rows(examples, answers, probabilities) == [(0.9, True), (0.6, True), (0.7, False)]
    found = confidence_figures(examples, answers, probabilities, 0.65)
    board = score_row(
        "student",
        {"gold": ["pleased"] * 4, "student": answers},
        "student",
        Gold([("pleased",)] * 4),
    )
    assert board.accuracy == 0.5
    figures = Figures.model_validate_json(further_figures(**found).model_dump_json())
    cells = {title: value for title, value, _ in candidate_cells(figures)}
    assert cells["rows answered, with a confidence of 0.650 or more"] == "0.500"
    assert cells["of these answers right"] == "0.500"
    assert coverage_cells(figures)[-1] == ["3", "0.750", "0.600", "0.667"]
    assert "given" not in confidence_figures(examples, answers, probabilities, None)


def test_figures_of_earlier_versions_are_read() -> None:
    values = further_figures().model_dump()
    del values["coverage"], values["given"]
    assert Figures.model_validate(values).coverage == ()
