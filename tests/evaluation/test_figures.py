"""The further figures of the scoreboard: by hand, beside other ways of computing them, and in the
files that an evaluation leaves."""

import json
import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from still_clock import StillClock
from student_answers import score_row

from distillery.data.rows import content_of
from distillery.evaluation import scoring_process
from distillery.evaluation.evaluate import evaluate
from distillery.evaluation.figures import divergence_of, figures_of
from distillery.evaluation.figures_table import render_figures, render_figures_markdown
from distillery.evaluation.option_order import ORDER_ROWS, Reordered, reordered_rows
from distillery.evaluation.predictors import Predictor
from distillery.evaluation.scoreboard import headline
from distillery.evaluation.scoring import ModelToScore
from distillery.evaluation.scoring_process import FIRST_TOKEN_ROWS, ask_in_other_order
from distillery.evaluation.statistics import (
    calibration_interval,
    macro_f1_interval,
    mean_interval,
    rows_needed_for_limit,
    scaled_interval,
    wilson_interval,
)
from distillery.recipe import PromptRecipe
from distillery.records import (
    Estimate,
    Example,
    Figures,
    Interval,
    ScoreRow,
)
from distillery.report.page import key_figures
from distillery.training.rows import TrainingRow

Build = Callable[..., Path]

PROMPT = PromptRecipe(system="", user="{question}\n{choices}", max_tokens=128)
MOODS = ("pleased", "displeased", "neither")


def rows_of(gold: str, choices: tuple[str, ...] = MOODS) -> list[Example]:
    """A row for each letter."""
    rows = []
    for number, letter in enumerate(gold):
        rows.append(
            Example(
                example_id=f"r{number}",
                question=f"Question {number}",
                choices=choices,
                answer_key=letter,
            )
        )
    return rows


def figures(gold: str, given: Sequence[str | None]) -> Figures:
    return figures_of(rows_of(gold), given, None, None, None)


# Classes and confusion


def test_classes_and_confusion_by_hand() -> None:
    """B is answered once where gold is A, and a row of B gets no answer; no row is C."""
    found = figures("AAABB", ["A", "A", "B", "B", None])
    assert found.confusion is not None
    assert found.macro_f1 is not None
    assert found.confusion.labels == MOODS
    assert found.confusion.counts == ((2, 1, 0, 0), (0, 1, 0, 1), (0, 0, 0, 0))
    pleased, displeased = found.classes
    assert (pleased.label, pleased.rows, pleased.precision) == ("pleased", 3, 1)
    assert [pleased.recall, pleased.f1] == pytest.approx([2 / 3, 0.8])
    assert (displeased.precision, displeased.recall, displeased.f1) == (0.5, 0.5, 0.5)
    assert found.macro_f1.value == pytest.approx(0.65)
    interval = wilson_interval(2, 3)
    assert (pleased.recall_low, pleased.recall_high) == (interval.low, interval.high)
    assert found.calibration is None
    assert found.kl_from_teacher is None
    assert found.p99_ms is None


def test_a_class_is_the_option_s_text_wherever_it_stands() -> None:
    examples = [
        *rows_of("A", ("yes", "no")),
        *rows_of("B", ("no", "yes")),
        *rows_of("A", ("no", "yes")),
    ]
    found = figures_of(examples, ["A", "A", "A"], None, None, None)
    assert found.confusion is not None
    assert found.confusion.labels == ("yes", "no")
    assert found.confusion.counts == ((1, 1, 0), (0, 1, 0))


def test_classes_are_letters_where_the_options_differ() -> None:
    examples = [*rows_of("A", ("yes", "no")), *rows_of("C", MOODS)]
    found = figures_of(examples, ["C", "C"], None, None, None)
    assert found.confusion is not None
    assert found.confusion.labels == ("A", "B", "C")
    # The first row has no C.
    assert found.confusion.counts == ((0, 0, 0, 1), (0, 0, 0, 0), (0, 0, 1, 0))
    repeated = figures_of(rows_of("A", ("yes", "yes")), ["B"], None, None, None)
    assert repeated.confusion is not None
    assert repeated.confusion.labels == ("A", "B")


def confusions(rights: float, labels: int, seed: int) -> tuple[Any, float]:
    """Return shares of a table, [labels, labels + 1], and its macro-F1."""
    generator = np.random.default_rng(seed)
    shares = np.zeros((labels, labels + 1))
    for label, share in enumerate(generator.dirichlet(np.full(labels, 3))):
        wrong = generator.dirichlet(np.ones(labels + 1))
        shares[label] = share * (1 - rights) * wrong
        shares[label, label] += share * rights
    return shares, macro_f1(shares)


def macro_f1(table: Any) -> float:
    """Return the macro-F1 of a table, [labels, labels + 1]."""
    totals = table.sum(axis=1) + table[:, : len(table)].sum(axis=0)
    return float((2 * np.diag(table) / totals).mean())


@pytest.mark.parametrize(("rights", "rows", "labels"), [(0.8, 100, 5), (0.9, 500, 12)])
def test_the_macro_f1_interval_covers_as_promised(rights: float, rows: int, labels: int) -> None:
    """Within four standard errors of 95 %, of 400 tables whose rarest class has 10 rows or more."""
    shares, true = confusions(rights, labels, seed=5)
    generator = np.random.default_rng(4)
    covered = 0
    for drawn in generator.multinomial(rows, shares.ravel(), 400):
        interval = macro_f1_interval(list(map(list, drawn.reshape(shares.shape))))
        covered += interval.low <= true <= interval.high
    assert covered / 400 == pytest.approx(0.95, abs=4 * math.sqrt(0.95 * 0.05 / 400))


def test_the_macro_f1_interval_is_as_wide_as_a_bootstrap_of_rows() -> None:
    """Of a table that is far from symmetric."""
    table = np.array([[900, 20, 0, 80], [700, 300, 50, 0], [20, 10, 200, 0]])
    drawn = []
    for counts in np.random.default_rng(5).multinomial(2280, (table / 2280).ravel(), 2000):
        drawn.append(macro_f1(counts.reshape(table.shape)))
    interval = macro_f1_interval(table.tolist())
    assert interval.high - interval.low == pytest.approx(2 * 1.96 * np.std(drawn), rel=0.06)
    assert (interval.high + interval.low) / 2 == pytest.approx(macro_f1(table))


def test_the_macro_f1_interval_keeps_a_width_where_every_row_is_right() -> None:
    interval = macro_f1_interval([[50, 0, 0], [0, 50, 0]])
    assert 0.9 < interval.low < 0.99
    assert interval.high == 1


# Calibration


def test_calibration_by_hand() -> None:
    """Confidences 0.92 and 0.98, both right, and 0.65, wrong; the last row has no answer."""
    probabilities = [(0.92, 0.08, 0.0), (0.98, 0.01, 0.01), (0.3, 0.65, 0.05), None]
    found = figures_of(rows_of("AAAA"), ["A", "A", "B", None], probabilities, None, None)
    assert found.calibration is not None
    low, high = found.calibration.bins
    assert (low.low, low.high, low.rows, low.accuracy) == (0.6, 0.7, 1, 0)
    assert low.confidence == 0.65
    assert (high.rows, high.accuracy) == (2, 1)
    assert high.confidence == pytest.approx(0.95)
    assert found.calibration.error == pytest.approx((0.65 + 2 * 0.05) / 3)
    assert found.calibration.low <= found.calibration.error <= found.calibration.high


def drawn_gaps(
    rows: int, sure: float, generator: np.random.Generator
) -> tuple[list[int], list[float]]:
    """Bins and gaps of a model whose logits are `sure` times too large."""
    logits = abs(generator.normal(2, 1.5, rows))
    confidence = 1 / (1 + np.exp(-logits))
    right = generator.random(rows) < 1 / (1 + np.exp(-logits / sure))
    numbers = np.minimum((confidence * 10).astype(int), 9)
    return numbers.tolist(), (confidence - right).tolist()


@pytest.mark.parametrize("sure", [1.0, 2.0])
def test_the_calibration_interval_covers_as_promised(
    sure: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of a calibrated model, where a percentile interval never covers 0, and of one too sure."""
    monkeypatch.setattr("distillery.evaluation.statistics.RESAMPLES", 200)
    generator = np.random.default_rng(6)
    true = 0.0
    if sure != 1:
        numbers, gaps = drawn_gaps(1_000_000, sure, generator)
        true = float(np.abs(np.bincount(numbers, gaps)).sum() / 1_000_000)
    covered = 0
    for _ in range(100):
        interval = calibration_interval(*drawn_gaps(500, sure, generator))
        covered += interval.low <= true <= interval.high
    assert covered >= 88


def test_equal_rows_give_equal_intervals() -> None:
    bins, gaps = drawn_gaps(100, 1.5, np.random.default_rng(0))
    assert calibration_interval(bins, gaps) == calibration_interval(bins, gaps)


# Divergence from the teacher


def test_the_divergence_by_hand() -> None:
    """Two rows that both answered: log 2, and 0; a third one lacks the teacher's."""
    own = [(0.5, 0.5), (0.2, 0.8), (1.0, 0.0)]
    found = divergence_of(own, [(1.0, 0.0), (0.2, 0.8), None])
    assert found is not None
    assert found.value == pytest.approx(math.log(2) / 2)
    assert found.low == 0
    assert found.high == pytest.approx(2.95996 * math.log(2) / 2, abs=1e-4)
    assert divergence_of(own, [None, None, (0.5, 0.5)]) is None
    impossible = divergence_of([(1.0, 0.0)] * 2, [(0.0, 1.0)] * 2)
    assert impossible is not None
    assert impossible.value == pytest.approx(math.log(1e12))


def test_an_interval_at_another_confidence_is_that_of_a_normal_mean() -> None:
    values = np.random.default_rng(0).normal(1, 0.1, 200).tolist()
    at_95 = mean_interval(values)
    estimate = Estimate(value=float(np.mean(values)), low=at_95.low, high=at_95.high)
    at_80, scaled = mean_interval(values, 0.8), scaled_interval(estimate, 0.8)
    assert [scaled.low, scaled.high] == pytest.approx([at_80.low, at_80.high])


def test_the_rows_that_would_do_by_hand() -> None:
    """The power is 0.5 where the figure is a bound's width from the limit, and then n rows do."""
    interval = Interval(low=0.7, high=0.88)
    for limit in (0.75, 0.84):
        found = rows_needed_for_limit(100, 0.8, interval, limit, 0.95, power=0.5)
        assert found == pytest.approx(400, abs=1)
    assert rows_needed_for_limit(100, 0.8, interval, 0.8, 0.95) is None


# The order of options, and the time to the first token


def test_rows_are_reordered_by_their_content_alone() -> None:
    examples = rows_of("A" * 150, ("a", "b", "c", "d"))
    answers: list[str | None] = ["A"] * 149 + [None]
    found = reordered_rows(examples, answers)
    assert len(found) == ORDER_ROWS
    assert len({row.choices for _, row in found}) == 3
    for index, row in found:
        assert index != 149
        assert sorted(row.choices) == ["a", "b", "c", "d"]
        original = examples[index].choices
        assert all(new != old for new, old in zip(row.choices, original, strict=True))
    backwards = reordered_rows(examples[::-1], answers[::-1])
    assert [row for _, row in backwards] == [row for _, row in found]


def asked_again(
    ask: Callable[[Example], int], still: StillClock
) -> tuple[Reordered, float | None, list[int]]:
    """Ask 30 rows of three options, of which A is the answer; `ask` gives the option's number. The
    prompt's only long token is the row's number. A prompt takes 1 s for each token."""
    examples = rows_of("A" * 30)
    asked: list[int] = []

    def first_token(prompt: Sequence[int]) -> int:
        asked.append(len(prompt))
        still.now += len(prompt)
        return 0

    def probabilities(row: TrainingRow) -> list[float]:
        shares = [0.0, 0.0, 0.0]
        shares[ask(by_number[row.prompt[0]])] = 1.0
        return shares

    def render(example: Example) -> TrainingRow:
        number = int(example.question.split()[-1])
        by_number[number] = example
        return TrainingRow(prompt=(number, 0, 0, 0, 0), letters=(1, 2, 3), answer=0)

    by_number: dict[int, Example] = {}
    predictor = Predictor("here", render, probabilities, first_token=first_token)
    counted: list[int] = []
    found, first_ms = ask_in_other_order(predictor, examples, ["A"] * 30, counted.append)
    assert found
    assert sum(counted) == 30
    return found, first_ms, asked


@pytest.fixture
def still(monkeypatch: pytest.MonkeyPatch) -> StillClock:
    clock = StillClock()
    monkeypatch.setattr(scoring_process, "time", clock)
    return clock


def test_one_that_goes_by_the_text_is_robust_and_one_that_goes_by_the_letter_is_not(
    still: StillClock,
) -> None:
    by_text, first_ms, asked = asked_again(lambda row: row.choices.index("pleased"), still)
    assert (by_text.rows, by_text.alike) == (30, 30)
    by_letter, _, _ = asked_again(lambda _row: 0, still)
    assert (by_letter.rows, by_letter.alike) == (30, 0)
    assert asked == [2, 5] * FIRST_TOKEN_ROWS, "each prompt after one that shares nothing with it"
    assert first_ms == 5000
    assert by_text.seconds == 7 * FIRST_TOKEN_ROWS


# The files, the tables and the records


@pytest.fixture
def test_file(tmp_path: Path) -> Path:
    path = tmp_path / "test.jsonl"
    path.write_text("".join(f"{row.model_dump_json()}\n" for row in rows_of("ABC" * 8)))
    return path


@pytest.fixture
def student(tiny_onnx: Build) -> ModelToScore:
    return ModelToScore(name="student int4", kind="onnx", folder=str(tiny_onnx("llama")))


def test_an_evaluation_leaves_rows_and_figures(
    student: ModelToScore, test_file: Path, tmp_path: Path
) -> None:
    """The teacher is an endpoint, which gave probabilities for one row less than it answered."""
    out = tmp_path / "out"
    gold = {row.example_id: str(row.answer_key) for row in rows_of("ABC" * 8)}
    soft = {
        key: {letter: 0.75, "C" if letter != "C" else "A": 0.25} for key, letter in gold.items()
    }
    del soft["r0"]
    rows = evaluate(
        [student], gold, test_file, [], PROMPT, student.name, out, teacher_probabilities=soft
    )
    ours = rows[-1].figures
    assert ours is not None
    assert [row.figures for row in rows[:-1]] == [None, None]
    report = json.loads((out / "report.json").read_text())
    assert list(report["figures"]) == ["teacher", student.name]
    assert Figures.model_validate(report["figures"][student.name]) == ours
    assert ours.order_robustness is not None
    order = ours.order_robustness
    assert (order.rows, order.value, order.seconds > 0) == (24, order.alike / 24, True)
    assert (order.low, order.high) == tuple(wilson_interval(order.alike, 24).model_dump().values())
    assert ours.kl_from_teacher is not None
    assert ours.calibration is not None
    assert sum(group.rows for group in ours.calibration.bins) == 24
    assert ours.first_token_ms is not None
    assert ours.p50_ms is not None
    assert ours.p99_ms is not None
    assert ours.p50_ms == rows[-1].p50_ms
    assert ours.p50_ms <= ours.p99_ms
    teacher = Figures.model_validate(report["figures"]["teacher"])
    assert teacher.macro_f1 is not None
    assert (teacher.macro_f1.value, teacher.kl_from_teacher, teacher.load_s) == (1, None, None)
    assert teacher.calibration is not None
    assert teacher.calibration.error == pytest.approx(0.25)
    lines = [json.loads(line) for line in (out / "rows.jsonl").read_text().splitlines()]
    answers = [json.loads(line) for line in (out / "answers.jsonl").read_text().splitlines()]
    assert list(lines[0]) == [
        *("example_id", "content", "question", "choices", "gold", "answers", "probabilities")
    ]
    for line, answer in zip(lines, answers, strict=True):
        assert line["answers"] == {name: answer[name] for name in ("teacher", student.name)}
        assert (line["example_id"], line["gold"]) == (answer["example_id"], answer["gold"])
        assert line["content"] == content_of(line["question"], line["choices"])
        assert sum(line["probabilities"][student.name]) == pytest.approx(1, abs=1e-5)
    assert lines[0]["probabilities"]["teacher"] is None
    assert lines[2]["probabilities"]["teacher"] == [0.25, 0, 0.75]
    markdown = (out / "scoreboard.md").read_text()
    for text in (
        "macro-F1 [95 %]",
        "| displeased |",
        "same option in another order",
        "24 rows were",
    ):
        assert text in markdown, text


def test_tables_fit_and_a_label_breaks_none() -> None:
    label = "a | b\n" + "long " * 40
    examples = rows_of("AB" * 20, (label, "yes"))
    probabilities = [(0.1, 0.9)] * 40
    found = figures_of(examples, ["B", None] * 20, probabilities, probabilities[::-1], None)
    row = ScoreRow(
        name="student int4",
        kind="model",
        correct=0,
        rows=40,
        accuracy=0,
        interval=wilson_interval(0, 40),
        figures=found,
    )
    for line in render_figures([row, row.model_copy(update={"figures": None})]).splitlines():
        assert len(line) <= 110
    lines = render_figures_markdown({"student int4": found}, "student int4").splitlines()
    assert len(lines) == 3 + 1 + 6 + 1 + 4 + 1 + 4
    assert "| a \\| b long" in lines[13]


def test_rows_of_earlier_versions_still_load() -> None:
    old = (
        '{"name": "student", "kind": "model", "correct": 1, "rows": 1, "accuracy": 1.0,'
        ' "interval": {"low": 0.2, "high": 1.0}, "p95_ms": 3.0}'
    )
    assert ScoreRow.model_validate_json(old).figures is None


def test_macro_f1_comes_first_where_the_classes_are_uneven() -> None:
    """Ten rows of one class, two of another; with a third of the other it is even enough."""
    answers = ["A"] * 12
    uneven = score_row("student", 10, 12, figures=figures("A" * 10 + "BB", answers))
    assert headline([uneven], "student", "student").startswith(
        "student has macro-F1 0.455 (the first figure, because the classes are uneven: 10 test "
        "rows of 'pleased', 2 of 'displeased'); student is right on 10 of 12 rows"
    )
    assert [name for name, *_ in key_figures([uneven], "student", "student")][:2] == [
        "macro-F1",
        "accuracy",
    ]
    even = score_row("student", 10, 13, figures=figures("A" * 10 + "BBB", [*answers, "A"]))
    assert headline([even], "student", "student").startswith("student is right on 10 of 13 rows")
    assert key_figures([even], "student", "student")[0][0] == "accuracy"


def test_letters_of_rows_with_options_of_their_own_are_no_uneven_classes() -> None:
    rows = rows_of("A" * 10)
    rows += rows_of("BB", ("yes", "no", "perhaps"))
    assert figures_of(rows, ["A"] * 12, None, None, None).uneven_classes is None
