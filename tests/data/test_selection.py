"""Which rows are chosen: the unsure and the different ones, the same ones each time."""

import itertools
from collections import Counter
from collections.abc import Sequence

import numpy as np
import pytest

from distillery.data.selection import (
    choose_rows,
    draw_distant,
    gradients,
    nearest_of,
    topics_of,
    uncertainty,
)
from distillery.records import Example

CLASSES = ("fruit", "metal", "weather")
WORDS = {
    "fruit": ["apple", "pear", "plum", "cherry", "grape"],
    "metal": ["iron", "copper", "zinc", "silver", "gold"],
    "weather": ["rain", "snow", "wind", "fog", "sun"],
}


def row(number: int, topic: str, classes: Sequence[str] = CLASSES) -> Example:
    words = WORDS[topic]
    text = f"{words[number % 5]} and {words[number // 5 % 5]}"
    return Example(example_id=f"{topic}-{number}", question=text, classes=tuple(classes))


def many_rows() -> list[Example]:
    """200 rows of fruit, 20 of metal, 20 of weather."""
    counts = {"fruit": 200, "metal": 20, "weather": 20}
    return [row(number, topic) for topic, count in counts.items() for number in range(count)]


def topic(chosen: str) -> str:
    return chosen.partition("-")[0]


def test_uncertainty_is_the_margin_between_the_two_likeliest() -> None:
    found = uncertainty([(0.5, 0.4, 0.1), (0.9, 0.05, 0.05), None, (1.0,)])
    assert found == pytest.approx([0.9, 0.15, 0.0, 0.0])


def test_the_most_unsure_rows_are_chosen_in_order() -> None:
    rows = many_rows()[:5]
    shares = [(0.9, 0.1), (0.5, 0.5), None, (0.6, 0.4), (0.5, 0.5)]
    chosen = choose_rows(rows, 3, "uncertainty", shares)
    assert list(chosen) == [1, 4, 3], "equally unsure rows stay in their order"
    assert chosen[1].model_dump(exclude_none=True) == {
        "example_id": "fruit-1",
        "why": "unsure",
        "uncertainty": 1.0,
    }


def test_many_rows_that_are_there_already_count_at_once() -> None:
    generator = np.random.default_rng(0)
    topics, weights = generator.normal(size=(3000, 8)), generator.normal(size=(3000, 3))
    lengths = (weights**2).sum(1) * (topics**2).sum(1)
    start = list(range(0, 3000, 2))[:700]
    found = lengths.copy()
    nearest_of(topics, weights, lengths, start, found)
    vectors = (weights[:, :, None] * topics[:, None, :]).reshape(3000, -1)
    for position in (1, 2047, 2999):
        squares = ((vectors[start] - vectors[position]) ** 2).sum(1)
        assert found[position] == pytest.approx(min(squares.min(), lengths[position]))
    shown: list[int] = []
    draw_distant(topics, weights, 120, start, 0, True, lambda done, of: shown.append(done))
    assert shown == [50, 100]


def test_diversity_takes_from_all_topics() -> None:
    chosen = choose_rows(many_rows(), 30, "diversity")
    taken = Counter(topic(each.example_id) for each in chosen.values())
    # By chance, 2.5 of 30 would be metal.
    assert min(taken["metal"], taken["weather"]) >= 6
    assert all(each.why == "different" and each.uncertainty is None for each in chosen.values())


def test_both_takes_unsure_rows_of_different_topics() -> None:
    rows = many_rows()
    # Nobody is sure of metal and weather, and all are of fruit but for ten rows.
    shares = []
    for number, each in enumerate(rows):
        sure = topic(each.example_id) == "fruit" and number >= 10
        shares.append((0.99, 0.005, 0.005) if sure else (0.4, 0.35, 0.25))
    chosen = choose_rows(rows, 20, "both", shares)
    taken = Counter(topic(each.example_id) for each in chosen.values())
    sure_ones = [at for at, each in chosen.items() if each.uncertainty and each.uncertainty < 0.5]
    assert set(taken) == {"fruit", "metal", "weather"}
    assert len(sure_ones) <= 2, "they would change little in a student"


def test_rows_that_could_not_be_asked_come_last() -> None:
    rows = [row(number, "fruit") for number in range(5)] + [row(0, "metal")]
    shares = [(0.5, 0.3, 0.2)] * 5 + [None]
    assert 5 not in choose_rows(rows, 4, "both", shares)
    assert set(choose_rows(rows, 6, "both", shares)) == set(range(6))


def test_rows_with_options_of_their_own_count_by_how_unsure_they_are() -> None:
    """A letter means another thing in each row, so that gradients by letter tell nothing."""
    rows = []
    for number in range(20):
        choices = (f"one {number}", f"two {number}")
        plain = row(number, "fruit", ())
        rows.append(plain.model_copy(update={"choices": choices}))
    shares = [(0.99, 0.01) if number % 2 else (0.5, 0.5) for number in range(20)]
    chosen = choose_rows(rows, 5, "both", shares)
    assert all(at % 2 == 0 for at in chosen)


def test_equal_arguments_give_equal_choices_and_no_row_twice() -> None:
    rows = many_rows()
    first = choose_rows(rows, 50, "diversity", seed=3)
    assert first == choose_rows(rows, 50, "diversity", seed=3)
    assert first != choose_rows(rows, 50, "diversity", seed=4)
    assert len(first) == 50
    assert len(choose_rows(rows, 10_000, "diversity")) == len(rows)


def test_learnt_rows_stay_and_what_is_like_them_is_not_chosen() -> None:
    rows = many_rows()
    learnt = frozenset(at for at, each in enumerate(rows) if topic(each.example_id) != "weather")
    chosen = choose_rows(rows, 10, "diversity", learnt=learnt)
    added = [each for at, each in chosen.items() if at not in learnt]
    assert len(added) == 10
    assert {topic(each.example_id) for each in added} == {"weather"}
    assert {chosen[at].why for at in learnt} == {"learnt"}


def test_texts_without_words_are_chosen_too() -> None:
    rows = [Example(example_id=str(n), question="?", classes=CLASSES) for n in range(4)]
    assert list(choose_rows(rows, 2, "diversity")) == [0, 1]
    assert topics_of(["?", "!"]).shape == (2, 1)


def test_distances_are_those_of_the_products() -> None:
    """Against the products of weights and topics, written out."""
    generator = np.random.default_rng(0)
    weights, topics = generator.normal(size=(12, 3)), generator.normal(size=(12, 4))
    whole = np.einsum("rc,rt->rct", weights, topics).reshape(12, -1)
    for from_zero in (False, True):
        before = [whole[2], np.zeros(12)] if from_zero else [whole[2]]
        picked = draw_distant(topics, weights, 6, [2], seed=1, from_zero=from_zero)
        for position, distance in picked:
            nearest = min(((whole[position] - other) ** 2).sum() for other in before)
            assert distance == pytest.approx(nearest, abs=1e-5)
            before.append(whole[position])


def test_rows_drawn_together_are_drawn_as_one_after_another() -> None:
    """How often each triple is drawn, against its probability when all distances are lowered after
    each row: 3.5 times the standard error for each of the 24."""
    places = [(2.0, 0.0), (2.0, 0.8), (0.0, 2.0), (-1.5, -1.5), (0.3, 0.2)]
    topics, weights = np.array(places, dtype=np.float32), np.ones((5, 1), dtype=np.float32)
    squared = ((topics[:, None] - topics[None]) ** 2).sum(2)
    expected = {}
    for triple in itertools.permutations([0, 1, 2, 3], 3):
        chance, nearest = 1.0, squared[4]
        for position in triple:
            chance *= nearest[position] / nearest.sum()
            nearest = np.minimum(nearest, squared[position])
        expected[triple] = chance
    draws = 4000
    found = Counter(
        tuple(at for at, _ in draw_distant(topics, weights, 3, [4], seed, from_zero=False))
        for seed in range(draws)
    )
    assert found.keys() <= expected.keys()
    for triple, chance in expected.items():
        error = (draws * chance * (1 - chance)) ** 0.5
        assert abs(found[triple] - draws * chance) < 3.5 * error


def test_equal_rows_are_drawn_once_as_long_as_there_are_others() -> None:
    generator = np.random.default_rng(0)
    topics = np.repeat(generator.normal(size=(300, 40)), 3, axis=0).astype(np.float32)
    weights = np.repeat(generator.normal(size=(300, 4)), 3, axis=0).astype(np.float32)
    picked = [at // 3 for at, _ in draw_distant(topics, weights, 320, [], 0, from_zero=False)]
    assert sorted(picked[:300]) == list(range(300))
    assert picked[300:] == sorted(picked[300:]), "the others in their order"


def test_gradients_lack_the_likeliest_answer() -> None:
    found = gradients([(0.7, 0.2, 0.1), None])
    assert found == pytest.approx(np.array([[-0.3, 0.2, 0.1], [0, 0, 0]]))


def test_what_uncertainty_needs_is_asked_for() -> None:
    for by in ("uncertainty", "both"):
        with pytest.raises(ValueError, match="needs the probabilities"):
            choose_rows(many_rows(), 3, by)
