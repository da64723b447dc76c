"""What to do after a run: each case gets the advice that its figures call for, and no other."""

import shlex
from pathlib import Path
from typing import Any

import pytest
import typer
from finished_run import ARTIFACT, STUDENT, finished_run

from distillery.cli import app
from distillery.evaluation.advice import (
    advice_of,
    advise_on_models,
    advise_on_rows,
    advise_on_training,
    advise_on_words,
    next_step,
)
from distillery.evaluation.statistics import wilson_interval
from distillery.recipe import BetterRule, LimitRule
from distillery.records import (
    CurvePoint,
    GateDecision,
    Outcome,
    PreparedDataset,
    Promotion,
    RegisteredModel,
    RuleVerdict,
    ScoreRow,
)

TFIDF, ON_GOLD = "TF-IDF + logistic regression", "TF-IDF on gold rows"


def board(**correct: int) -> list[ScoreRow]:
    """Return a scoreboard of 100 rows; `ships`, `on_gold`, `tfidf` and `probe` stand for longer
    names."""
    names = {"ships": STUDENT, "on_gold": ON_GOLD, "tfidf": TFIDF, "probe": "linear probe"}
    rows = []
    for name, count in correct.items():
        rows.append(
            ScoreRow(
                name=names.get(name, name),
                kind="model",
                correct=count,
                rows=100,
                accuracy=count / 100,
                interval=wilson_interval(count, 100),
            )
        )
    return rows


@pytest.mark.parametrize(
    ("correct", "begins", "figures"),
    [
        ({"ships": 80, "student": 88, "teacher": 95}, "A gentler form", ["0.800", "0.880"]),
        ({"ships": 80, "student": 80, "teacher": 83}, "A student that", ["0.800", "0.830"]),
        (
            {"ships": 60, "student": 60, "teacher": 62, "probe": 78, "on_gold": 70},
            "A better teacher: teacher has 0.620, and linear probe",
            ["0.620", "0.780"],
        ),
        (
            {"ships": 80, "student": 80, "teacher": 82, "on_gold": 70},
            "A better teacher: student",
            ["0.800", "0.820"],
        ),
    ],
)
def test_accuracy_is_looked_for_where_it_is_lost(
    correct: dict[str, int], begins: str, figures: list[str]
) -> None:
    advice = advise_on_models(board(**correct), STUDENT, is_local=True)[0]
    assert advice.startswith(begins)
    assert all(figure in advice for figure in figures)


def test_what_loses_more_comes_first() -> None:
    rows = board(ships=60, student=66, teacher=70, probe=90)
    teacher, export = advise_on_models(rows, STUDENT, is_local=True)
    assert (teacher[:16], export[:14]) == ("A better teacher", "A gentler form")
    rows = board(ships=50, student=66, teacher=70, probe=72)
    assert advise_on_models(rows, STUDENT, is_local=True)[0].startswith("A gentler form")


def test_a_student_as_good_as_a_good_teacher_needs_neither() -> None:
    rows = board(ships=94, student=94, teacher=95, probe=80)
    assert advise_on_models(rows, STUDENT, is_local=True) == []


def test_an_endpoint_has_no_base_model_to_enlarge() -> None:
    rows = board(ships=60, student=60, teacher=62, probe=78)
    assert "larger base" in advise_on_models(rows, STUDENT, is_local=True)[0]
    assert "larger base" not in advise_on_models(rows, STUDENT, is_local=False)[0]


def losses(*values: float | None) -> list[CurvePoint]:
    return [CurvePoint(step=n, loss=0.1, validation_loss=each) for n, each in enumerate(values)]


def test_a_validation_loss_that_rises_asks_for_rows() -> None:
    (advice,) = advise_on_training("teacher", losses(None, 0.8, 0.5, 0.9))
    assert "More gold rows help" in advice
    assert "from 0.500 to 0.900" in advice
    assert "More unlabelled rows" in advise_on_training("student", losses(0.5, 0.9))[0]
    assert advise_on_training("student", losses(0.8, 0.5, 0.52)) == []
    assert advise_on_training("student", losses(0.3, 0.0001, 0.04)) == [], "all answers are right"
    assert advise_on_training("student", losses(None)) == []


@pytest.mark.parametrize(
    ("tfidf", "begins"), [(80, "More unlabelled rows"), (71, "Gold rows rather than unlabelled")]
)
def test_the_runs_own_two_points_tell_which_rows_help(tfidf: int, begins: str) -> None:
    (advice,) = advise_on_rows(board(tfidf=tfidf, on_gold=70))
    assert advice.startswith(begins)
    assert "0.700" in advice
    assert advise_on_rows(board(tfidf=tfidf)) == []


def test_words_alone_may_do_but_only_where_they_are_good() -> None:
    (advice,) = advise_on_words(board(ships=94, tfidf=95), STUDENT)
    assert "0.950" in advice
    assert "0.940" in advice
    assert advise_on_words(board(ships=60, tfidf=70), STUDENT) == []
    assert advise_on_words(board(ships=96, tfidf=95), STUDENT) == []


def run(rows: list[ScoreRow], decision: GateDecision, classes: tuple[str, ...]) -> Outcome:
    made: dict[str, Any] = {
        "data": PreparedDataset(artifact=ARTIFACT, splits={}, classes=classes),
        "decision": decision,
    }
    outcome = finished_run(**made)
    report = outcome.report.model_copy(update={"scoreboard": tuple(rows)})
    return outcome.model_copy(update={"report": report})


def test_labels_that_help_the_rival_as_much_are_not_asked_for() -> None:
    """Where TF-IDF is as good with the teacher's labels, and a tie that no row decides."""
    tied = board(ships=99, student=99, teacher=99, tfidf=99, on_gold=80)
    undecided = RuleVerdict(rule=BetterRule(kind="better", than=TFIDF), verdict="undecided")
    decision = GateDecision(passed=False, reason="refused: x", verdicts=(undecided,))
    advice = advice_of(run(tied, decision, ("a", "b")))
    assert "No number of test rows" in advice
    assert "It needs the teacher's labels, which `distillery labels export` writes." in advice
    assert "More unlabelled rows" not in advice


def decided(rule: BetterRule | LimitRule, rows_needed: int | None = None) -> GateDecision:
    verdict = RuleVerdict(
        rule=rule, verdict="undecided" if rows_needed else "refused", rows_needed=rows_needed
    )
    return GateDecision(passed=False, reason="refused: x", verdicts=(verdict,))


def test_it_is_given_to_a_refused_classifier_and_to_one_no_better_than_tfidf() -> None:
    classes = ("a", "b")
    better = BetterRule(kind="better", than="majority class")
    passed = GateDecision(passed=True, reason="passed: x")
    good = board(ships=94, student=94, teacher=95, tfidf=90, on_gold=70)
    beaten = board(ships=94, student=94, teacher=95, tfidf=95)
    assert advice_of(run(good, passed, classes)) == ""
    assert "no language model at all" in advice_of(run(beaten, passed, classes))
    assert advice_of(run(beaten, passed, ())) == ""
    few = advice_of(run(good, decided(better, 450), classes))
    assert "More test rows: about 450" in few
    assert "unlabelled" not in few, "nothing but the number of test rows is against it"
    assert "More unlabelled rows" in advice_of(run(good, decided(better), classes))
    # Not for a rule that accuracy does not help with.
    slow = LimitRule(kind="limit", figure="p50_ms", maximum=1)
    assert advice_of(run(good, decided(slow), classes)) == ""


PASSED = GateDecision(passed=True, reason="passed: x")


def passed(
    classes: tuple[str, ...] = ("a", "b"), champion: str | None = "2", registry: str = "local"
) -> Outcome:
    """Return a run whose student is version 2 of the model desk."""
    registered = RegisteredModel.model_validate(
        {
            "artifact": ARTIFACT,
            "name": "desk",
            "version": "2",
            "registry": registry,
            "manifest_sha256": "d" * 64,
        }
    )
    promotion = Promotion(result="promoted", champion=champion, reason="x")
    outcome = run(board(ships=94, teacher=95), PASSED, classes)
    return outcome.model_copy(update={"registered": registered, "promotion": promotion})


def test_a_student_that_passed_is_followed_by_the_commands_that_use_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    assert next_step(passed()) == (
        "next: `distillery models download desk student`, then ask it by `distillery ask student "
        '"your text"` or serve it by `distillery serve student`'
    )
    choice = passed(classes=(), champion="1", registry="azureml")
    assert " desk student --version 2 --registry azureml`" in next_step(choice)
    assert '"your question" --options one another`' in next_step(choice)
    written = [row.model_copy(update={"metric": "field_f1"}) for row in choice.report.scoreboard]
    report = choice.report.model_copy(update={"scoreboard": tuple(written)})
    assert ' student "your text"`' in next_step(choice.model_copy(update={"report": report}))
    own = tmp_path / ".venv" / "bin" / "distillery"
    own.parent.mkdir(parents=True)
    own.touch()
    assert next_step(passed()).count("`.venv/bin/distillery ") == 3


def test_these_commands_exist() -> None:
    for outcome in (passed(), passed(classes=(), champion=None, registry="azureml")):
        for line in next_step(outcome).split("`")[1::2]:
            _, *arguments = shlex.split(line)
            command: Any = typer.main.get_command(app)
            while hasattr(command, "commands"):
                command = command.commands[arguments.pop(0)]
            command.make_context("distillery", arguments)


def test_what_follows_where_the_gate_has_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    refused = passed().model_copy(
        update={"decision": GateDecision(passed=False, reason="refused: x")}
    )
    assert next_step(refused) == ""
    assert next_step(passed().model_copy(update={"registered": None})) == ""
    kept = passed().registered
    assert kept
    kept = kept.model_copy(update={"role": "rejected"})
    refused = refused.model_copy(update={"registered": None, "promotion": None, "rejected": kept})
    assert next_step(refused) == (
        "to look at the refused student all the same: `distillery models download desk student "
        '--version 2`, then `distillery ask student "your text"`'
    )
