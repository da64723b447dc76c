"""Answers: their probabilities, other orders of the options, and several of them for a row."""

import math

import pytest

from distillery.teacher.answers import (
    Answer,
    CombinedAnswer,
    combine_answers,
    distribution,
    in_own_order,
    letter_of,
    rotated_order,
)

CHOICES = ("bank", "vitamin C", "A dog")
LETTERS = ("A", "B", "C")


def test_a_distribution_sums_spellings_and_normalises_over_the_letters() -> None:
    listed = [
        ("A", math.log(0.5)),
        (" A", math.log(0.1)),
        ("B", math.log(0.2)),
        ("The", math.log(0.2)),
    ]
    found = distribution(listed, ("A", "B"))
    assert found == pytest.approx({"A": 0.75, "B": 0.25})


def test_a_letter_that_is_not_listed_gets_the_floor() -> None:
    listed = [("A", math.log(0.9)), ("x", math.log(0.05))]
    found = distribution(listed, ("A", "B", "C"))
    assert found is not None
    share = (1 - 0.95) / 2
    assert found["B"] == found["C"] == pytest.approx(share / (0.9 + 2 * share))
    tight = distribution([("A", math.log(0.6)), ("x", math.log(0.001))], ("A", "B"))
    assert tight == pytest.approx({"A": 0.6 / 0.601, "B": 0.001 / 0.601})
    assert sum(found.values()) == pytest.approx(1)


def test_a_token_outside_the_list_is_no_probability() -> None:
    assert distribution([("A", -0.1), ("B", -9999.0)], ("A", "B")) == distribution(
        [("A", -0.1)], ("A", "B")
    )
    assert distribution([("A", -9999.0), ("The", -0.1)], ("A", "B")) is None
    assert distribution([], ("A", "B")) is None

    assert distribution([("B", -9999.0), ("A", -0.1)], ("A", "B")) == distribution(
        [("A", -0.1)], ("A", "B")
    ), "whatever comes before"


@pytest.mark.parametrize(
    "token",
    ["X", " X", "\tX\n", "▁X", "ĠX", "ĊX", '"X"', "(X)", "[X]", '{"X', "**X**", "X.", "X:,"],
)
def test_a_token_is_its_letter_whatever_surrounds_it(token: str) -> None:
    assert letter_of(token) == "X"


def test_a_probability_above_one_counts_as_one() -> None:
    """Rounding in an endpoint makes some log-probabilities positive."""
    assert distribution([("A", 0.5), ("B", 0.0)], ("A", "B")) == {"A": 0.5, "B": 0.5}


@pytest.mark.parametrize("count", [2, 3, 5, 26])
def test_over_all_orders_each_option_is_shown_at_each_position_once(count: int) -> None:
    options = list(range(count))
    orders = [rotated_order(count, number) for number in range(count)]
    assert list(orders[0]) == options
    for order in orders:
        assert sorted(order) == options
    for shown_at_one_position in zip(*orders, strict=True):
        assert sorted(shown_at_one_position) == options


def test_a_letter_comes_back_as_that_of_the_option_shown() -> None:
    order = rotated_order(3, 1)
    assert [CHOICES[option] for option in order] == ["vitamin C", "A dog", "bank"]
    assert in_own_order("A", None, order, "ABC") == Answer("B")
    assert in_own_order("C", None, order, "ABC") == Answer("A")
    shown = {"A": 0.7, "B": 0.2, "C": 0.1}
    found = in_own_order("A", shown, order, "ABC")
    assert found == Answer("B", {"A": 0.1, "B": 0.7, "C": 0.2})
    assert list(found.distribution or {}) == ["A", "B", "C"]
    assert in_own_order("A", shown, rotated_order(3, 0), "ABC") == Answer("A", shown)


def test_one_answer_is_the_label_and_its_probability_the_confidence() -> None:
    own = {"A": 0.2, "B": 0.7, "C": 0.1}
    assert combine_answers([Answer("B", own)], LETTERS, soft=True) == CombinedAnswer("B", own, 0.7)
    assert combine_answers([Answer("B")], LETTERS, soft=True) == CombinedAnswer("B", None, None)


def votes(letters: str) -> list[Answer]:
    return [Answer(letter) for letter in letters]


def test_the_majority_is_the_label_and_its_share_the_confidence() -> None:
    assert combine_answers(votes("BBA"), LETTERS, soft=False) == CombinedAnswer("B", None, 2 / 3)
    assert combine_answers(votes("CABACC"), LETTERS, soft=False) == CombinedAnswer("C", None, 0.5)


def test_shares_of_votes_are_the_distribution_where_soft_labels_are_wanted() -> None:
    found = combine_answers(votes("BBBAC"), LETTERS, soft=True)
    assert found == CombinedAnswer("B", {"A": 0.2, "B": 0.6, "C": 0.2}, 0.6)
    assert combine_answers(votes("BB"), LETTERS, soft=True) == CombinedAnswer(
        "B", {"A": 0.0, "B": 1.0, "C": 0.0}, 1.0
    )


@pytest.mark.parametrize("soft", [False, True])
def test_a_tie_of_votes_is_no_label(soft: bool) -> None:
    assert combine_answers(votes("AB"), LETTERS, soft) is None
    assert combine_answers(votes("ABC"), LETTERS, soft) is None
    assert combine_answers(votes("ABCAB"), LETTERS, soft) is None


def test_a_tie_goes_to_the_more_probable() -> None:
    sure = Answer("B", {"A": 0.1, "B": 0.9, "C": 0.0})
    unsure = Answer("A", {"A": 0.5, "B": 0.4, "C": 0.1})
    found = combine_answers([unsure, sure], LETTERS, soft=False)
    assert found is not None
    assert (found.letter, found.confidence) == ("B", 0.5)
    assert found.distribution == pytest.approx({"A": 0.3, "B": 0.65, "C": 0.05})
    sure = Answer("A", {"A": 0.9, "B": 0.1, "C": 0.0})
    unsure = Answer("B", {"A": 0.4, "B": 0.5, "C": 0.1})
    found = combine_answers([unsure, sure], LETTERS, soft=False)
    assert found is not None
    assert found.letter == "A"


def test_a_tie_of_equal_probabilities_is_no_label() -> None:
    answers = [
        Answer("A", {"A": 0.6, "B": 0.4, "C": 0.0}),
        Answer("B", {"A": 0.4, "B": 0.6, "C": 0.0}),
    ]
    assert combine_answers(answers, LETTERS, soft=True) is None


def test_the_majority_stands_whatever_the_probabilities() -> None:
    answers = [Answer("A", {"A": 0.4, "B": 0.35, "C": 0.25})] * 2 + [
        Answer("B", {"A": 0.0, "B": 1.0, "C": 0.0})
    ]
    found = combine_answers(answers, LETTERS, soft=True)
    assert found is not None
    assert (found.letter, found.confidence) == ("A", 2 / 3)
    assert found.distribution == pytest.approx({"A": 0.8 / 3, "B": 1.7 / 3, "C": 0.5 / 3})


def test_probabilities_that_some_answers_lack_are_not_averaged() -> None:
    some = [Answer("B", {"A": 0.0, "B": 1.0, "C": 0.0}), Answer("B"), Answer("A")]
    shares = {"A": 1 / 3, "B": 2 / 3, "C": 0.0}
    assert combine_answers(some, LETTERS, soft=True) == CombinedAnswer("B", shares, 2 / 3)
    assert combine_answers(some, LETTERS, soft=False) == CombinedAnswer("B", None, 2 / 3)
    assert combine_answers([some[0], some[2]], LETTERS, soft=True) is None, (
        "one sure answer breaks no tie of votes"
    )
