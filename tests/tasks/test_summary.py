"""The gate's verdicts as people see them: in the artifact that a run leaves and in the terminal."""

import io
from contextlib import nullcontext, redirect_stderr, redirect_stdout
from pathlib import Path
from typing import Any

import pytest
from prefect import flow
from prefect.artifacts import Artifact as PrefectArtifact
from student_answers import answers_file, first, further_figures, score_row

import flows.distill
from distillery.errors import GateRefused
from distillery.evaluation.gate import gate
from distillery.evaluation.report import ANSWERS_FILE, write_report
from distillery.evaluation.scoreboard import BASE
from distillery.labels.files import REJECTED_FILE
from distillery.labels.report import Tally
from distillery.recipe import BetterRule, GateRule, KeepsRule, LimitRule, NotWorseRule
from distillery.records import (
    CallTotal,
    EvaluationReport,
    OnnxModel,
    Outcome,
    PreparedDataset,
    RegisteredModel,
    Split,
    StudentCheckpoint,
    TeacherLabels,
    Usage,
)
from distillery.storage.artifacts import ArtifactStore, run_record
from flows.distill import REFUSED
from tasks.summary import publish, render

CANDIDATE = "student int4"
RULES = (
    BetterRule(kind="better", than="base model"),
    KeepsRule(kind="keeps", share=0.95, name="as good as the teacher"),
    NotWorseRule(kind="not_worse"),
    LimitRule(kind="limit", figure="peak_mib", maximum=500),
)
VERDICTS = [
    "| rule | figure | bound | McNemar p | verdict |",
    "| :-- | --: | --: | --: | --: |",
    "| better than base model | +2.0 points [-1.0, +5.1] | \\> 0 at 95 % | 0.500 "
    "| undecided, needs 449 rows |",
    "| as good as the teacher | 93.8 % | ≥ 95 % |  | refused |",
    "| at most 2 points worse than the champion |  | \\> -2 at 95 % |  | passed: no champion yet |",
    "| peak_mib at most 500 |  | ≤ 500 |  | undecided: not measured |",
]


def outcome_of(folder: Path, rules: tuple[GateRule, ...]) -> Outcome:
    """A run whose student is right on 75 of 100 rows, the teacher on 80 and the base model on
    73."""
    store = ArtifactStore()
    model, labels, report = folder / "model", folder / "labels", folder / "report"
    for path in (model, labels, report):
        path.mkdir(parents=True)
    (model / "genai_config.json").write_text("{}")
    Tally().write(labels)
    (labels / REJECTED_FILE).write_text("")
    right = {"teacher": 80, BASE: 73, CANDIDATE: 75}
    figures = further_figures()
    rows = (
        score_row("teacher", 80, 100),
        score_row(BASE, 73, 100),
        score_row(CANDIDATE, 75, 100, figures=figures),
    )
    write_report(report, rows, CANDIDATE, "teacher", {}, [], {CANDIDATE: figures})
    answers = {name: first(count) for name, count in right.items()}
    answers_file(report / ANSWERS_FILE, answers)
    kept = store.put(model)
    decision = gate(rows, CANDIDATE, rules=rules, answers=report / ANSWERS_FILE)
    registered = None
    if decision.passed:
        registered = RegisteredModel(
            artifact=kept, name="shop", version="1", registry="local", manifest_sha256="d" * 64
        )
    return Outcome(
        recipe="test",
        data=PreparedDataset(
            artifact=kept, splits={"test": Split(file="test.jsonl", rows=100, sha256="d" * 64)}
        ),
        teacher=None,
        labels=TeacherLabels(
            artifact=store.put(labels), teacher="t", accepted=0, rejected=0, soft=False
        ),
        student=StudentCheckpoint(artifact=kept, method="full", base="b", parameters=1, steps=1),
        model=OnnxModel(artifact=kept, precision="int4", algorithm="rtn", parameters=1),
        report=EvaluationReport(
            artifact=store.put(report),
            scoreboard=rows,
            candidate=CANDIDATE,
            answers_sha256="d" * 64,
        ),
        decision=decision,
        registered=registered,
        delivered=None,
    )


def published(outcome: Outcome) -> list[str]:
    """Publish the outcome in a run; return the lines of the artifact `distillation`."""

    @flow(persist_result=False)
    def run() -> None:
        publish(outcome)

    run()
    artifact: Any = PrefectArtifact.get("distillation")
    markdown: str = artifact.data
    return markdown.splitlines()


@pytest.mark.slow
@pytest.mark.usefixtures("prefect_api")
def test_the_artifact_shows_every_rule_s_verdict_before_the_decision(tmp_path: Path) -> None:
    outcome = outcome_of(tmp_path, RULES)
    lines = published(outcome)
    start = lines.index(VERDICTS[0])
    assert lines[start : start + len(VERDICTS)] == VERDICTS
    assert lines[-1].startswith("**gate: refused: student int4 does not pass: better than base")
    assert lines[-1].endswith("; nothing is registered**")


def test_the_terminal_shows_the_same_verdicts(tmp_path: Path) -> None:
    lines = [" ".join(line.split()) for line in render(outcome_of(tmp_path, RULES)).splitlines()]
    start = lines.index("rule figure bound McNemar p verdict")
    shown = lines[start + 2 : start + 2 + len(RULES)]
    assert shown == [
        " ".join(line.replace("|", " ").replace("\\", "").split()) for line in VERDICTS[2:]
    ]
    assert lines[-1].startswith("gate: refused: ")
    figures = lines.index("student int4 figure 95 %")
    assert lines[figures + 2].startswith("macro-F1 0.755 [0.670, 0.841]")


def test_the_terminal_tells_what_a_training_has_decided(tmp_path: Path) -> None:
    outcome = outcome_of(tmp_path, RULES)
    student = outcome.student.model_copy(update={"decisions": ("1 of 2 layers are kept",)})
    lines = render(outcome.model_copy(update={"student": student})).splitlines()
    assert "train student: 1 of 2 layers are kept" in lines
    assert "train student: " not in render(outcome)


def test_the_terminal_says_how_to_use_a_student_that_passed(tmp_path: Path) -> None:
    *_, gate_line, following = render(outcome_of(tmp_path / "passed", ())).splitlines()
    assert gate_line.startswith("gate: passed: ")
    assert following.startswith("next: `")
    assert "models download shop student" in following
    assert "next: " not in render(outcome_of(tmp_path / "refused", RULES))


def test_the_terminal_tells_that_other_work_slowed_the_models_down(tmp_path: Path) -> None:
    outcome = outcome_of(tmp_path, RULES)
    rows = [
        row.model_copy(update={"waited": 0.4} if row.name == CANDIDATE else {})
        for row in outcome.report.scoreboard
    ]
    report = outcome.report.model_copy(update={"scoreboard": tuple(rows)})
    lines = render(outcome.model_copy(update={"report": report})).splitlines()
    (said,) = [number for number, line in enumerate(lines) if "student int4 40 %." in line]
    assert lines[said].startswith("The machine was busy while the models were timed")
    assert lines[said - 1].startswith("student int4 is right on 75 of 100 rows")
    assert "busy" not in render(outcome)


def test_what_is_paid_in_this_run_is_what_the_ledger_has(tmp_path: Path) -> None:
    """The labels are an earlier run's. Test rows and a judge may be asked all the same."""
    outcome = outcome_of(tmp_path, RULES)
    labels = outcome.labels.model_copy(
        update={
            "asked": 1000,
            "usage": Usage(prompt_tokens=40_000, completion_tokens=1000),
            "cost": 0.25,
            "currency": "EUR",
            "produced_by": "last week's",
        }
    )
    earlier = "teacher: t: 1,000 calls, 40,000 tokens in, 1,000 out, 0.25 EUR, in last week's"
    outcome = outcome.model_copy(update={"labels": labels, "run": "this one"})

    def teacher_line(*paid: CallTotal) -> str:
        told = render(outcome.model_copy(update={"paid": paid})).splitlines()
        (line,) = [line for line in told if line.startswith("teacher: ")]
        return line

    assert teacher_line() == f"{earlier}; none in this run"
    judge = CallTotal(teacher="judge:t", purpose="judge", outcome="answer", calls=7)
    assert teacher_line(judge) == f"{earlier}; none in this run"
    usage = Usage(prompt_tokens=20_000, completion_tokens=500)
    same: dict[str, Any] = {"teacher": "t", "purpose": "test row", "currency": "EUR"}
    answers = CallTotal(outcome="answer", calls=500, usage=usage, cost=0.1, **same)
    failed = CallTotal(outcome="malformed", calls=2, estimated=2, cost=0.01, **same)
    assert teacher_line(judge, answers, failed) == (
        f"{earlier}; 502 calls, 20,000 tokens in, 500 out (2 calls estimated), 0.11 EUR, in this "
        "run (test row: answer 500, test row: malformed 2)"
    )
    known = outcome.model_copy(
        update={"labels": labels.model_copy(update={"asked": 0}), "paid": (answers,)}
    )
    assert "500 calls, 20,000 tokens in" in render(known), "the training rows' answers were known"
    assert earlier in render(outcome), "of earlier versions nobody knows"
    assert "none in this run" not in render(outcome)


@pytest.mark.slow
@pytest.mark.usefixtures("prefect_api")
def test_a_recipe_without_rules_has_no_table(tmp_path: Path) -> None:
    lines = published(outcome_of(tmp_path, ()))
    assert VERDICTS[0] not in lines
    assert lines[-1].startswith("**gate: passed: the recipe has no rules for the gate; ")


@pytest.mark.slow
@pytest.mark.usefixtures("prefect_api")
def test_the_artifact_names_the_page(tmp_path: Path) -> None:
    lines = published(outcome_of(tmp_path, RULES))
    (line,) = [line for line in lines if line.startswith("**Report:** ")]
    _, path, _, command, _ = line.split("`")
    page = Path(path).read_text()
    assert "<strong>Refused</strong>" in page
    assert "This evaluation is from an earlier version" in page
    assert command.startswith("distillery report ")


def test_a_refusal_stands_below_the_summary_in_a_file_of_both(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As in the log of a job of cron, of which people read the end."""
    monkeypatch.setenv("DISTILLERY_HOME", str(tmp_path / "home"))
    ArtifactStore().write_record(
        run_record("a-run"), outcome_of(tmp_path / "run", RULES).model_dump_json()
    )

    def refuse(*_arguments: Any, **_settings: Any) -> None:
        raise GateRefused("too few rows", "a-run")

    monkeypatch.setattr(flows.distill, "distill", refuse)
    # What needs a server of Prefect's.
    monkeypatch.setattr(flows.distill, "results_in_store", nullcontext)
    monkeypatch.setattr(flows.distill, "shown_in_terminal", nullcontext)
    log = tmp_path / "weekly.log"
    with log.open("ab", buffering=0) as file:
        buffered = io.TextIOWrapper(io.BufferedWriter(file), encoding="utf-8")
        by_line = io.TextIOWrapper(io.BufferedWriter(file), encoding="utf-8", line_buffering=True)
        with redirect_stdout(buffered), redirect_stderr(by_line):
            assert flows.distill.main(["demo"]) == REFUSED
        buffered.flush()
    lines = log.read_text(encoding="utf-8").splitlines()
    assert lines[-1] == "error: too few rows"
    assert any(line.startswith("gate: ") for line in lines)
