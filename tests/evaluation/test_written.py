"""Written answers on the scoreboard, in its files, and before the gate."""

import json
import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
from pydantic import TypeAdapter
from written_run import STUDENT, booking, description, evaluated

from distillery.evaluation.bootstrap import PairedSums
from distillery.evaluation.figures_table import candidate_cells, render_figures
from distillery.evaluation.gate import EarlierVersion, compare, gate
from distillery.evaluation.metrics import metric_of
from distillery.evaluation.report import (
    parse_answers,
    read_answers,
    row_contents,
    rows_digest,
    write_own_answers,
)
from distillery.evaluation.scoreboard import headline, render_table, row_named
from distillery.evaluation.verdicts import render_verdicts
from distillery.evaluation.written_baselines import DICTIONARY, NEAREST, written_baselines
from distillery.evaluation.written_figures import field_figures
from distillery.recipe import GateRule
from distillery.records import (
    Example,
    FieldFigures,
    Figures,
    GateDecision,
    RuleVerdict,
    ScoreRow,
)

Board = tuple[ScoreRow, ...]
RULE: TypeAdapter[GateRule] = TypeAdapter(GateRule)
ROWS = [booking(number) for number in range(120)]
LEARNT = [booking(number) for number in range(1000, 1030)]


def wrong_on(
    rows: Sequence[Example], some: Callable[[int], bool], text: str | None
) -> list[str | None]:
    """Return the gold answers, but `text` for the rows whose position `some` names."""
    return [text if some(number) else row.answer_key for number, row in enumerate(rows)]


@pytest.fixture(scope="module")
def out(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("written") / "evaluation"


@pytest.fixture(scope="module")
def board(out: Path) -> Board:
    """The teacher has 6 rows wrong, the float student 9, the exported one 12 and no answer to 2."""
    student = wrong_on(ROWS, lambda number: number % 10 == 0, '{"city": "Rome"}')
    student[1] = student[2] = None
    answers = {
        "base model": wrong_on(ROWS, lambda number: True, None),
        "teacher": wrong_on(ROWS, lambda number: number % 20 == 0, '{"city": "Rome"}'),
        "student": wrong_on(ROWS, lambda number: number % 14 == 0, '{"city": "Rome"}'),
        STUDENT: student,
    }
    with pytest.MonkeyPatch.context() as monkeypatch:
        return evaluated(out, monkeypatch, ROWS, LEARNT, answers)


def test_the_scoreboard_goes_by_the_primary_metric(board: Board) -> None:
    names = ["gold", NEAREST, DICTIONARY, "base model", "teacher", "student", STUDENT]
    assert [row.name for row in board] == names
    gold = row_named(board, "gold")
    assert (gold.accuracy, gold.correct, gold.metric) == (1, 120, "field_f1")
    ours, teacher = row_named(board, STUDENT), row_named(board, "teacher")
    answers = wrong_on(ROWS, lambda number: number % 10 == 0, '{"city": "Rome"}')
    answers[1] = answers[2] = None
    expected = metric_of("field_f1", answers, [(str(row.answer_key),) for row in ROWS])
    assert ours.accuracy == pytest.approx(expected)
    assert ours.correct == 106
    assert ours.interval.low < ours.accuracy < ours.interval.high
    assert ours.versus_teacher is not None
    assert ours.versus_teacher.low < ours.accuracy - teacher.accuracy < ours.versus_teacher.high
    assert ours.departure is not None
    assert ours.departure.mean is None
    # 9 and 12 rows are wrong, of which 2 are in both, and 2 more have no answer.
    assert ours.departure.changed == 9 + 12 - 2 * 2 + 2
    table = render_table(board)
    assert "field F1" in table
    assert "accuracy" not in table
    assert headline(board, STUDENT).startswith(f"{STUDENT} has field F1 {ours.accuracy:.3f} on 120")
    assert "of the teacher's field F1" in headline(board, STUDENT)
    assert "19 answers change from the float student's" in headline(board, STUDENT)


def test_figures_are_those_of_fields(board: Board) -> None:
    figures = row_named(board, STUDENT).figures
    assert figures is not None
    assert figures.written is not None
    assert (figures.macro_f1, figures.classes, figures.confusion, figures.coverage) == (
        None,
        (),
        None,
        (),
    )
    written = figures.written
    assert set(written.metrics) == {"exact_match", "field_f1"}
    assert written.metrics["exact_match"].value == pytest.approx(106 / 120)
    assert written.valid.value == pytest.approx(118 / 120)
    city, people = written.fields
    assert (city.field, city.rows, people.field, people.rows) == ("city", 120, "people", 80)
    assert city.recall == pytest.approx(106 / 120)
    assert city.precision == pytest.approx(106 / 118)
    assert people.precision == 1
    text = render_figures(board)
    for said in ("field F1", "exact match", "rows with a valid answer"):
        assert said in text


def test_the_field_with_the_lowest_f1_is_named_among_those_with_enough_rows(board: Board) -> None:
    figures = row_named(board, STUDENT).figures
    assert figures is not None
    assert figures.written is not None
    written, found = figures.written, figures.written.fields

    def named(rows: int, f1: float) -> list[list[str]]:
        rare = FieldFigures(field="a\nnote", rows=rows, precision=f1, recall=f1, f1=f1)
        own = written.model_copy(update={"fields": (*found, rare)})
        cells = candidate_cells(Figures(written=own))
        return [line for line in cells if line[0].startswith("lowest F1: ")]

    assert named(10, 0.2) == [["lowest F1: a note, 10 rows", "0.200", ""]]
    assert named(10, 1.0) == named(9, 0.2) == [["lowest F1: city, 120 rows", "0.891", ""]]
    found = found[:1]
    assert named(9, 0.2) == [], "of one field, its F1 is the field F1"
    assert re.search(r"lowest F1: city, 120 rows +0\.891\n", render_figures(board))


def test_fields_of_two_references_are_those_of_the_better_one() -> None:
    gold = [('{"a": "x"}', '{"b": "y", "c": ["z", "z"]}')]
    found = {each.field: each for each in field_figures(['{"b": "y", "c": ["z"], "d": 1}'], gold)}
    assert set(found) == {"b", "c", "d"}
    assert (found["b"].f1, found["c"].recall, found["c"].precision) == (1, 0.5, 1)
    assert (found["d"].rows, found["d"].precision, found["d"].recall) == (0, 0, 0)


def test_the_files_hold_texts_and_what_judges_them(board: Board, out: Path) -> None:
    answers = read_answers(out / "answers.jsonl")
    assert list(answers["r0"])[:3] == ["example_id", "metric", "gold"]
    assert list(answers["r0"])[-1] == STUDENT
    assert answers["r0"]["teacher"] == '{"city": "Rome"}'
    row = json.loads((out / "rows.jsonl").read_text().split("\n")[0])
    assert row["scores"][STUDENT] == 0
    assert row["scores"]["student"] == 0
    assert not (out / "doubtful.jsonl").exists()
    second = json.loads((out / "rows.jsonl").read_text().split("\n")[1])
    assert second["no_answer"] == {"base model": "no JSON", STUDENT: "no JSON"}
    page = (out / "scoreboard.md").read_text()
    assert "| city | 120 |" in page
    assert "2 rows have no answer and count as wrong: 2 no JSON." in page
    for absent in ("calibration", "macro-F1", "coverage", "accuracy"):
        assert absent not in page
    report = json.loads((out / "report.json").read_text())
    assert Figures.model_validate(report["figures"]["teacher"]).written is not None


def test_text_has_several_references(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rows = [description(number) for number in range(40)]
    learnt = [description(number) for number in range(100, 140)]
    student = [
        row.references[0] if number % 2 else str(row.answer_key) for number, row in enumerate(rows)
    ]
    student[0] = "There are no seats."
    answers: dict[str, Sequence[str | None]] = {
        "teacher": [row.answer_key for row in rows],
        "student": student,
        STUDENT: student,
    }
    board = evaluated(tmp_path / "out", monkeypatch, rows, learnt, answers)
    ours = row_named(board, STUDENT)
    assert (ours.correct, ours.metric) == (39, "rouge_l")
    assert 0.97 < ours.accuracy < 1
    assert [row.name for row in board if row.kind == "baseline"] == [NEAREST]
    assert ours.figures is not None
    assert ours.figures.written is not None
    assert set(ours.figures.written.metrics) == {"exact_match", "rouge_l", "chrf", "bleu"}
    assert ours.figures.written.fields == ()
    assert read_answers(tmp_path / "out" / "answers.jsonl")["r1"]["references"] == list(
        rows[1].references
    )
    other = [rows[0].model_copy(update={"references": ()}), *rows[1:]]
    assert rows_digest(rows) != rows_digest(other)


# Baselines


def test_the_nearest_answer_is_that_of_the_most_similar_row() -> None:
    asked = ROWS[0].model_copy(update={"question": f"{LEARNT[7].question} Thanks!"})
    answers, notes = written_baselines([asked], LEARNT, [], None)
    assert answers == {NEAREST: [LEARNT[7].answer_key]}
    assert notes == []


def test_the_dictionary_gives_the_longest_whole_words() -> None:
    texts = {
        "York is for 4 people": {"city": "York"},
        "NEW  YORK, for 4 people": {"city": "New York"},
        "Yorkshire, 40 people": {"city": "Ulm"},
    }
    gold = [
        Example(example_id=f"g{n}", question="x", answer_key=json.dumps({"city": city}))
        for n, city in enumerate(("York", "New York", "Ulm", "Ulm"))
    ]
    schema = {"type": "object", "required": ["city"]}
    asked = [Example(example_id=text, question=text) for text in texts]
    answers, _ = written_baselines(asked, gold[:1], gold[1:], schema)
    assert [json.loads(str(each)) for each in answers[DICTIONARY]] == list(texts.values())


def test_the_dictionary_keeps_the_kinds_of_values() -> None:
    gold = [
        Example(
            example_id="g",
            question="x",
            answer_key=json.dumps({"tags": ["hot", "cold"], "people": 4, "nested": {"a": "hot"}}),
        )
    ]
    asked = [Example(example_id="a", question="cold and hot for 4")]
    answers, _ = written_baselines(asked, gold, [], {"type": "object"})
    assert json.loads(str(answers[DICTIONARY][0])) == {"tags": ["cold", "hot"], "people": 4}


def test_without_an_answered_row_the_baselines_are_left_out() -> None:
    answers, notes = written_baselines(ROWS[:2], [], [], {"type": "object"})
    assert answers == {}
    assert [note.partition(" is")[0] for note in notes] == [NEAREST, DICTIONARY]


# The gate


def decide(board: Board, out: Path, *rules: dict[str, Any], **more: Any) -> GateDecision:
    decision = gate(
        board,
        STUDENT,
        rules=[RULE.validate_python(rule) for rule in rules],
        answers=out / "answers.jsonl",
        **more,
    )
    assert GateDecision.model_validate_json(decision.model_dump_json()) == decision
    return decision


def only(decision: GateDecision) -> RuleVerdict:
    (verdict,) = decision.verdicts
    return verdict


@pytest.mark.parametrize(("than", "verdict"), [(NEAREST, "passed"), ("base model", "passed")])
def test_better_goes_by_the_primary_metric(
    board: Board, out: Path, than: str, verdict: str
) -> None:
    found = only(decide(board, out, {"kind": "better", "than": than}))
    assert found.verdict == verdict
    difference = row_named(board, STUDENT).accuracy - row_named(board, than).accuracy
    assert found.figure == pytest.approx(difference)
    assert (found.metric, found.p_value) == ("field_f1", None)


def test_a_baseline_of_words_is_not_on_the_scoreboard(board: Board, out: Path) -> None:
    found = only(decide(board, out, {"kind": "better", "than": "majority class"}))
    assert (found.verdict, found.note) == ("undecided", "not on the scoreboard")


@pytest.mark.parametrize(
    ("share", "verdict"), [(0.8, "passed"), (0.95, "undecided"), (0.999, "refused")]
)
def test_keeps_goes_by_the_ratio_of_the_primary_metric(
    board: Board, out: Path, share: float, verdict: str
) -> None:
    decision = decide(board, out, {"kind": "keeps", "share": share, "confidence": 0.95})
    found = only(decision)
    kept = row_named(board, STUDENT).accuracy / row_named(board, "teacher").accuracy
    assert found.figure == pytest.approx(kept)
    assert found.verdict == verdict
    if verdict == "undecided":
        assert found.rows_needed is not None
        assert found.rows_needed > 120
    assert "of the teacher's field F1" in render_verdicts([found])
    assert "accuracy" not in decision.reason


@pytest.mark.parametrize(
    ("figure", "minimum", "verdict"),
    [
        ("accuracy", 0.8, "passed"),
        ("accuracy", 0.99, "refused"),
        ("field_f1", 0.8, "passed"),
        ("exact_match", 0.95, "refused"),
        ("valid", 0.98, "undecided"),
        ("bleu", 0.5, "undecided"),
        ("macro_f1", 0.5, "undecided"),
    ],
)
def test_a_limit_goes_by_the_figures_of_written_answers(
    board: Board, out: Path, figure: str, minimum: float, verdict: str
) -> None:
    rule = {"kind": "limit", "figure": figure, "minimum": minimum, "confidence": 0.95}
    found = only(decide(board, out, rule))
    assert found.verdict == verdict
    assert (found.note == "not measured") == (figure in ("bleu", "macro_f1"))


def test_an_earlier_version_is_compared_on_shared_rows_by_their_references(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The champion was registered with other references; those of today judge both."""
    rows = [description(number) for number in range(60)]
    answers: dict[str, list[str | None]] = {
        "teacher": [row.answer_key for row in rows],
        "student": [row.answer_key for row in rows],
        STUDENT: [row.references[0] for row in rows],
    }
    evaluated(tmp_path / "champion", monkeypatch, rows, [], answers)
    registered = tmp_path / "answers.jsonl"
    write_own_answers(tmp_path / "champion" / "answers.jsonl", STUDENT, rows, registered)
    champion = EarlierVersion("3", "desk:3", read_answers(registered), is_champion=True)
    answers[STUDENT] = [row.answer_key if n % 2 else "no" for n, row in enumerate(rows)]
    board = evaluated(
        tmp_path / "now",
        monkeypatch,
        rows[:40],
        [],
        {name: each[:40] for name, each in answers.items()},
    )
    contents = row_contents(rows)
    own = read_answers(tmp_path / "now" / "answers.jsonl")
    comparison = compare(own, STUDENT, contents, champion)
    assert isinstance(comparison.pairs, PairedSums)
    assert comparison.pairs.values == pytest.approx((0.5, 1))
    assert comparison.note == "against desk:3 on 40 shared rows"
    found = only(
        decide(
            board, tmp_path / "now", {"kind": "not_worse"}, contents=contents, earlier=[champion]
        )
    )
    assert found.verdict == "refused"
    assert found.figure == pytest.approx(-0.5)
    assert parse_answers(registered.read_bytes(), "it") == champion.answers


def test_records_of_choices_say_nothing_of_metrics() -> None:
    """So that records and folders of earlier versions keep their bytes."""
    row = ScoreRow(
        name="a", kind="model", correct=1, rows=1, accuracy=1, interval={"low": 0, "high": 1}
    )
    assert "metric" not in row.model_dump()
    verdict = RuleVerdict(
        rule=RULE.validate_python({"kind": "rows", "minimum": 1}), verdict="passed"
    )
    assert "metric" not in verdict.model_dump()
