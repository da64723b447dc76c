"""The records of a small finished run and the folder of its evaluation, from which its page is
made."""

import json
from pathlib import Path
from typing import Any

from distillery.evaluation.doubtful import DOUBTFUL_ROWS_FILE, Doubtful, Opinion
from distillery.evaluation.report import ANSWERS_FILE, REPORT_FILE, ROWS_FILE
from distillery.evaluation.statistics import wilson_interval
from distillery.labels.report import LabelReport
from distillery.recipe import BetterRule, RowsRule
from distillery.records import (
    Artifact,
    CurvePoint,
    EvaluationReport,
    Example,
    GateDecision,
    Interval,
    OnnxModel,
    Outcome,
    PreparedDataset,
    RuleVerdict,
    ScoreRow,
    StudentCheckpoint,
    TeacherLabels,
    Usage,
)
from distillery.report.page import PAGE_FILE, StageLine, write_page

STUDENT = "student int4"
OPTIONS = ("pleased", "displeased", "neither")
HOSTILE = '<script>document.title = "owned"</script><img src="http://example.com/x.png">'
ROWS = 12

ARTIFACT = Artifact(uri="store/0", sha256="0" * 64, bytes=1)


def evaluation(folder: Path, rows: int = ROWS) -> Path:
    """Write the folder of an evaluation of `rows` rows and return it.

    Row 1 is a script, row 2 is wrong, row 3 has no answer, row 4 is the teacher's error alone."""
    folder.mkdir(parents=True, exist_ok=True)
    lines = []
    for number in range(rows):
        gold = "ABC"[number % 3]
        student, teacher = gold, gold
        if number == 2:
            student = "A"
        if number == 4:
            teacher = "C"
        confidence = 0.5 + number / 2 / rows
        rest = (1 - confidence) / 2
        probabilities = [confidence if letter == student else rest for letter in "ABC"]
        row = {
            "example_id": f"row-{number}",
            "content": f"content-{number}",
            "question": HOSTILE if number == 1 else f"message {number}",
            "choices": list(OPTIONS),
            "gold": gold,
            "answers": {"teacher": teacher, STUDENT: None if number == 3 else student},
            "probabilities": {"teacher": None, STUDENT: None if number == 3 else probabilities},
        }
        lines.append(json.dumps(row) + "\n")
    (folder / ROWS_FILE).write_text("".join(lines))
    bins = [
        {"low": 0.4, "high": 0.7, "rows": 5, "confidence": 0.6, "accuracy": 0.8},
        {"low": 0.7, "high": 1.0, "rows": 6, "confidence": 0.8, "accuracy": 1.0},
    ]
    classes = []
    for label in OPTIONS:
        figures = {"precision": 0.9, "recall": 0.75, "f1": 0.82}
        classes.append(
            {"label": label, "rows": 4, **figures, "recall_low": 0.3, "recall_high": 0.95}
        )
    student_figures: dict[str, Any] = {
        "macro_f1": {"value": 0.83, "low": 0.6, "high": 0.97},
        "classes": classes,
        "confusion": {
            "labels": list(OPTIONS),
            "counts": [[3, 0, 0, 1], [0, 4, 0, 0], [1, 0, 3, 0]],
        },
        "calibration": {"error": 0.19, "low": 0.1, "high": 0.3, "bins": bins},
        "kl_from_teacher": None,
        "order_robustness": {
            "rows": 10,
            "alike": 9,
            "value": 0.9,
            "low": 0.6,
            "high": 0.98,
            "seconds": 1.0,
        },
        "first_token_ms": 11.5,
        "p50_ms": 10.0,
        "p95_ms": 14.0,
        "p99_ms": 21.0,
        "load_s": 0.4,
    }
    unknown = ("calibration", "order_robustness", "first_token_ms", "p99_ms")
    teacher_figures = student_figures | dict.fromkeys(unknown)
    report = {
        "teacher": "teacher",
        "notes": ["Measured one row at a time."],
        "figures": {STUDENT: student_figures, "teacher": teacher_figures},
    }
    (folder / REPORT_FILE).write_text(json.dumps(report))
    doubtful = Doubtful(
        example=Example(
            example_id="row-1", question=f"{HOSTILE} doubted", choices=OPTIONS, answer_key="B"
        ),
        split="test",
        suggested="A",
        confidence=0.97,
        label_confidence=0.01,
        opinions={
            STUDENT: Opinion(answer="A", confidence=0.97, contradicts=True),
            "teacher": Opinion(answer="C"),
        },
    )
    (folder / DOUBTFUL_ROWS_FILE).write_text(doubtful.model_dump_json() + "\n")
    return folder


def older_evaluation(folder: Path) -> Path:
    """Write what an earlier version left of an evaluation."""
    folder.mkdir(parents=True)
    (folder / REPORT_FILE).write_text(json.dumps({"teacher": "teacher", "notes": []}))
    return folder


def champion_answers(folder: Path) -> Path:
    """Write a champion's answers.jsonl: row 2 right, row 5 wrong, row 6 not asked."""
    lines = []
    for number in range(ROWS):
        gold = "ABC"[number % 3]
        answer = "B" if number == 5 else gold
        if number != 6:
            line = {"example_id": f"row-{number}", "gold": gold, "student int8": answer}
            lines.append(json.dumps(line) + "\n")
    (folder / ANSWERS_FILE).write_text("".join(lines))
    return folder / ANSWERS_FILE


def score_row(name: str, correct: int, **figures: Any) -> ScoreRow:
    return ScoreRow(
        name=name,
        kind=figures.pop("kind", "model"),
        correct=correct,
        rows=ROWS,
        accuracy=correct / ROWS,
        interval=wilson_interval(correct, ROWS),
        **figures,
    )


def finished_run(**changed: Any) -> Outcome:
    """Return the records of a run that the gate refused. `changed` replaces some of them."""
    better = RuleVerdict(
        rule=BetterRule(kind="better", than="majority class"),
        verdict="passed",
        figure=0.5,
        interval=Interval(low=0.2, high=0.7),
        p_value=0.01,
    )
    rows = RuleVerdict(rule=RowsRule(kind="rows", minimum=400), verdict="undecided", figure=12)
    board = (
        score_row("gold", ROWS, kind="reference"),
        score_row("majority class", 4, kind="baseline"),
        score_row("teacher", 11, bytes=161_000_000, rows_per_second=22.0, p50_ms=43.0, p95_ms=58.0),
        score_row(STUDENT, 10, bytes=55_000_000, rows_per_second=59.0, p50_ms=16.0, p95_ms=22.0),
    )
    values: dict[str, Any] = {
        "recipe": "desk",
        "data": PreparedDataset(artifact=ARTIFACT, splits={}),
        "teacher": None,
        "labels": TeacherLabels(
            artifact=ARTIFACT,
            produced_by="desk-0",
            teacher="gpt",
            accepted=90,
            rejected=10,
            soft=True,
            asked=100,
            usage=Usage(prompt_tokens=12_345, completion_tokens=100),
            cost=1.25,
            currency="EUR",
        ),
        "student": StudentCheckpoint(
            artifact=ARTIFACT,
            method="full",
            base="SmolLM2",
            parameters=70_800_000,
            steps=20,
            curve=(
                CurvePoint(step=10, loss=1.5),
                CurvePoint(step=20, loss=0.7, validation_accuracy=0.8, validation_loss=0.6),
            ),
        ),
        "model": OnnxModel(
            artifact=ARTIFACT, precision="int4", algorithm="rtn", parameters=70_800_000
        ),
        "report": EvaluationReport(
            artifact=ARTIFACT, scoreboard=board, candidate=STUDENT, answers_sha256="0" * 64
        ),
        "decision": GateDecision(
            passed=False, reason="refused: too few rows", verdicts=(better, rows)
        ),
        "registered": None,
        "delivered": None,
        "run": "desk-1",
    }
    return Outcome(**values | changed)


def page_of(
    out: Path,
    outcome: Outcome,
    evaluation: Path,
    champion: Path | None = None,
    preferences: Path | None = None,
) -> Path:
    """Write the page of a run and return its path."""
    labels = LabelReport(
        accepted=90, rejected={"no letter": 10}, letters={"A": 45, "B": 45}, gold_rows=0, right=0
    )
    stages = [StageLine("label", "90 accepted", 12.0, "desk-0")]
    verdict = "gate: refused: too few rows; nothing is registered"
    write_page(out, outcome, evaluation, labels, verdict, stages, champion, preferences)
    return out / PAGE_FILE
