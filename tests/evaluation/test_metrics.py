"""Metrics of written answers against sacrebleu's and rouge-score's own figures, and the bootstrap's
intervals."""

import json
import random
from typing import Any

import pytest
import sacrebleu
from rouge_score.rouge_scorer import RougeScorer

from distillery.evaluation.bootstrap import PairedSums
from distillery.evaluation.gold import Gold
from distillery.evaluation.metrics import field_pairs, metric_of, row_statistics, value
from distillery.evaluation.statistics import (
    difference_interval,
    p_value_of,
    ratio_interval,
    rows_needed,
)
from distillery.recipe import Metric

ANSWERS = ["The cat sat on the mat today.", "a dog", None, "hello there world, again my friend"]
GOLD = [
    ("the cat sat on a mat today.", "Cats sit on mats."),
    ("a dog barks",),
    ("x y",),
    ("hello world, again my friend", "hello there, my friend", "hi"),
]
WORDS = ["red", "green", "blue", "small", "large", "old", "new", "fast", "slow", "near", "far"]


def test_bleu_and_chrf_are_those_of_sacrebleu() -> None:
    """Sums of rows' statistics give the corpus's figure, with several references a row."""
    texts = [answer or "" for answer in ANSWERS]
    most = max(map(len, GOLD))
    references: Any = [
        [row[number] if number < len(row) else None for row in GOLD] for number in range(most)
    ]
    bleu = sacrebleu.corpus_bleu(texts, references).score
    chrf = sacrebleu.corpus_chrf(texts, references).score
    assert 0 < bleu < 100
    assert metric_of("bleu", ANSWERS, GOLD) == pytest.approx(bleu / 100)
    assert metric_of("chrf", ANSWERS, GOLD) == pytest.approx(chrf / 100)


def test_bleu_of_short_answers_goes_by_the_words_that_they_have() -> None:
    assert metric_of("bleu", ["yes", "no"], [("yes",), ("no",)]) == pytest.approx(1)
    assert metric_of("bleu", ["yes", "no"], [("yes",), ("yes",)]) == pytest.approx(0.5)


def test_rouge_l_is_the_mean_of_rouge_scores_best_reference() -> None:
    scorer: Any = RougeScorer(["rougeL"])
    rows = [
        scorer.score_multi(references, answer or "")["rougeL"].fmeasure
        for answer, references in zip(ANSWERS, GOLD, strict=True)
    ]
    assert metric_of("rouge_l", ANSWERS, GOLD) == pytest.approx(sum(rows) / len(rows))


def test_rouge_l_knows_words_of_any_script() -> None:
    assert metric_of("rouge_l", ["Кошка сидит дома"], [("кошка сидит, дома",)]) == 1


def test_exact_match_takes_any_reference_and_no_near_one() -> None:
    answers = ["Cats sit on mats.", "A dog barks", None, "hi"]
    assert metric_of("exact_match", answers, GOLD) == 0.5


@pytest.mark.parametrize(
    ("answer", "shared", "both"),
    [
        ('{"city": "Bonn", "days": [1, 2]}', 6, 6),
        ('{"days": [2, 1.0], "city": " ＢＯＮＮ "}', 6, 6),
        ('{"city": "Bonn", "days": [2, 2]}', 4, 6),
        ('{"city": "Cologne"}', 0, 4),
        ('{"days": [1, 2], "city": null}', 4, 5),
        ('{"town": "Bonn"}', 0, 4),
        ("{}", 0, 3),
        ("no JSON", 0, 3),
        (None, 0, 3),
    ],
)
def test_field_f1_counts_pairs_of_field_and_value(
    answer: str | None, shared: float, both: float
) -> None:
    gold = '{"city": "bonn", "days": [1, 2]}'
    assert row_statistics("field_f1", answer, [gold]) == (shared, both)


def test_fields_are_known_by_their_paths() -> None:
    text = json.dumps({"to": {"city": "Bonn"}, "from": [{"city": "Ulm"}, {"city": True}], "at": ""})
    assert set(field_pairs(text)) == {
        ("to/city", "bonn"),
        ("from/city", "ulm"),
        ("from/city", "true"),
    }


def test_field_f1_goes_by_the_best_reference_and_over_all_rows_together() -> None:
    """Micro: a row with three fields counts three times as much as one with one field."""
    gold = [('{"a": "x"}', '{"a": "y"}'), ('{"a": "1", "b": "2", "c": "3"}',)]
    assert metric_of("field_f1", ['{"a": "y"}', None], gold) == pytest.approx(2 / 5)
    assert metric_of("field_f1", ["{}"], [("{}",)]) == 1


def objects(rows: int, seed: int) -> list[tuple[str, ...]]:
    chance = random.Random(seed)
    return [
        (json.dumps({"a": chance.choice(WORDS), "b": chance.choice(WORDS)}),) for _ in range(rows)
    ]


def noisy(gold: list[tuple[str, ...]], wrong: float, seed: int) -> list[str]:
    chance = random.Random(seed)
    return [chance.choice(gold)[0] if chance.random() < wrong else each for (each,) in gold]


@pytest.mark.parametrize("metric", ["field_f1", "rouge_l", "chrf", "bleu"])
def test_the_bootstrap_tells_better_from_worse_and_not_from_equal(metric: Metric) -> None:
    gold = objects(300, seed=1)
    judge = Gold(gold, metric)
    good, bad = noisy(gold, 0.05, seed=2), noisy(gold, 0.3, seed=3)
    pairs = judge.paired(good, bad)
    assert isinstance(pairs, PairedSums)
    assert pairs.difference == pytest.approx(
        metric_of(metric, good, gold) - metric_of(metric, bad, gold)
    )
    assert difference_interval(pairs).low > 0.03
    assert ratio_interval(pairs).low > 1.03
    assert p_value_of(pairs) is None
    like = difference_interval(judge.paired(good, noisy(gold, 0.05, seed=5)))
    assert like.low < 0 < like.high
    # Wider at more confidence, and the same for the same rows.
    assert difference_interval(pairs, 0.99).low < difference_interval(pairs, 0.9).low
    assert difference_interval(pairs) == difference_interval(judge.paired(good, bad))


def test_more_rows_are_needed_the_smaller_the_difference() -> None:
    gold = objects(200, seed=1)
    pairs = Gold(gold, "field_f1").paired(noisy(gold, 0.1, seed=2), noisy(gold, 0.12, seed=3))
    near, far = (rows_needed(pairs, pairs.difference - gap, 0.95) for gap in (0.01, 0.02))
    assert near is not None
    assert far is not None
    assert near > 3.5 * far


@pytest.mark.parametrize("metric", ["field_f1", "rouge_l", "chrf", "bleu"])
def test_an_interval_keeps_a_width_where_all_answers_are_right(metric: Metric) -> None:
    """Twenty right answers don't prove that all are right, nor that two predictors are equal."""
    gold = objects(20, seed=1)
    right = [each for (each,) in gold]
    judge = Gold(gold, metric)
    estimate = judge.estimate(right, metric)
    assert estimate.value == estimate.high == pytest.approx(1)
    assert 0.8 < estimate.low < 0.97
    interval = difference_interval(judge.paired(right, right))
    assert interval.low == pytest.approx(-interval.high, abs=0.04)
    assert -0.15 < interval.low < -0.03


def test_a_ratio_to_a_figure_that_may_be_0_has_a_bound_that_people_can_read() -> None:
    gold = objects(20, seed=1)
    right = [each for (each,) in gold]
    pairs = Gold(gold, "field_f1").paired(right, [right[0], *[None] * 19])
    assert ratio_interval(pairs).high == 100


def test_statistics_and_values_belong_together() -> None:
    for metric in ("exact_match", "field_f1", "rouge_l", "chrf", "bleu"):
        statistics = row_statistics(
            metric, '{"a": "one two three four"}', ['{"a": "one two three four"}']
        )
        assert value(metric, statistics) == pytest.approx(1)
