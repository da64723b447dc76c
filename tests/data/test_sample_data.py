"""The shipped sample keeps what its data card promises; it is read as a user's run reads it."""

import re
from collections import Counter, defaultdict
from itertools import combinations
from pathlib import Path

import pytest

from distillery.data.examples import read_examples
from distillery.data.prepare import PreparedCounts, prepare
from distillery.recipe import DatasetRecipe
from distillery.records import Example

SIMILAR = 0.3
"""Jaccard similarity of word triples that makes messages of different splits near duplicates."""


@pytest.fixture(scope="module")
def prepared(
    tmp_path_factory: pytest.TempPathFactory,
) -> tuple[PreparedCounts, dict[str, list[Example]]]:
    out = tmp_path_factory.mktemp("sample")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("DISTILLERY_HOME", str(out / "home"))
        counts = prepare(DatasetRecipe(), out)
    return counts, {
        role: read_examples(Path(out) / split.file) for role, split in counts.splits.items()
    }


@pytest.fixture(scope="module")
def splits(prepared: tuple[PreparedCounts, dict[str, list[Example]]]) -> dict[str, list[Example]]:
    return prepared[1]


@pytest.fixture(scope="module")
def messages(splits: dict[str, list[Example]]) -> list[tuple[str, Example]]:
    return [(role, example) for role, examples in splits.items() for example in examples]


def words(text: str) -> list[str]:
    return re.findall(r"[\w']+", text.replace("’", "'").casefold())


def sequences(text: str, length: int) -> set[tuple[str, ...]]:
    found = words(text)
    return {tuple(found[i : i + length]) for i in range(len(found) - length + 1)}


def test_sizes(splits: dict[str, list[Example]]) -> None:
    assert 250 <= len(splits["gold"]) <= 350
    assert len(splits["train"]) >= 1000
    assert len(splits["validation"]) == 100
    assert len(splits["test"]) >= 400
    assert sum(map(len, splits.values())) >= 1800


def test_nothing_is_dropped(prepared: tuple[PreparedCounts, dict[str, list[Example]]]) -> None:
    assert (prepared[0].duplicates_dropped, prepared[0].near_duplicates_dropped) == (0, 0)


def test_ids_are_unique(messages: list[tuple[str, Example]]) -> None:
    assert len({example.example_id for _, example in messages}) == len(messages)


def test_every_row_has_the_same_options_in_the_same_order(
    messages: list[tuple[str, Example]],
) -> None:
    assert len({example.choices for _, example in messages}) == 1


def test_every_answer_has_a_quarter_of_each_split(splits: dict[str, list[Example]]) -> None:
    for role, examples in splits.items():
        counts = Counter(example.answer_key for example in examples)
        assert set(counts) == set(examples[0].keys), role
        assert min(counts.values()) >= 0.25 * len(examples), (role, counts)


def test_no_six_words_in_a_row_are_common(messages: list[tuple[str, Example]]) -> None:
    counts = Counter(
        sequence for _, example in messages for sequence in sequences(example.question, 6)
    )
    common = {
        " ".join(sequence): count
        for sequence, count in counts.items()
        if count > 0.01 * len(messages)
    }
    assert not common


def test_no_message_stands_twice(messages: list[tuple[str, Example]]) -> None:
    counts = Counter(" ".join(example.question.casefold().split()) for _, example in messages)
    assert not [question for question, count in counts.items() if count > 1]


def test_no_near_duplicates_across_splits(messages: list[tuple[str, Example]]) -> None:
    triples = [sequences(example.question, 3) for _, example in messages]
    holders = defaultdict(list)
    for number, found in enumerate(triples):
        for triple in found:
            holders[triple].append(number)
    pairs = {pair for numbers in holders.values() for pair in combinations(numbers, 2)}
    similar = [
        (messages[first][1].question, messages[second][1].question)
        for first, second in pairs
        if messages[first][0] != messages[second][0]
        and len(triples[first] & triples[second]) >= SIMILAR * len(triples[first] | triples[second])
    ]
    assert not similar


def test_counting_words_does_not_solve_it(splits: dict[str, list[Example]]) -> None:
    """TF-IDF with logistic regression, trained on the gold rows, stands in the demo's table."""
    from sklearn.feature_extraction.text import TfidfVectorizer
    from sklearn.linear_model import LogisticRegression
    from sklearn.pipeline import make_pipeline

    words = TfidfVectorizer(ngram_range=(1, 2), sublinear_tf=True)  # type: ignore[no-untyped-call]
    classifier = LogisticRegression(max_iter=1000)  # type: ignore[no-untyped-call]
    model = make_pipeline(words, classifier)  # type: ignore[no-untyped-call]
    (gold, gold_answers), (test, test_answers) = (
        (
            [example.question for example in splits[role]],
            [example.answer_key for example in splits[role]],
        )
        for role in ("gold", "test")
    )
    accuracy = model.fit(gold, gold_answers).score(test, test_answers)
    assert accuracy < 0.75
