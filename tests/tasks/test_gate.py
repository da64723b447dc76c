"""The gate against a champion that an earlier release registered, whose answers have ids alone, in
a real local registry: MLflow on SQLite, files on this machine."""

from pathlib import Path

import pytest
from student_answers import answers_file, first, score_row

from distillery.evaluation.report import REGISTERED_ANSWERS
from distillery.recipe import GateRule, LimitRule, NotWorseRule, RegistryRecipe
from distillery.records import EvaluationReport, Example, GateDecision, OnnxModel, Rows
from distillery.registry.history import Actor
from distillery.registry.local import LocalRegistry
from distillery.storage.artifacts import ArtifactStore
from distillery.storage.digests import sha256_of
from tasks.registry import apply_gate

CANDIDATE = "student int4"
NOT_WORSE = NotWorseRule(kind="not_worse")

pytestmark = pytest.mark.usefixtures("one_registry")


def register(folder: Path, name: str, right: int, rows: int) -> str:
    """Register a version that is right on the first `right` of the rows; return its number."""
    content = folder / f"right-on-{right}"
    (content / REGISTERED_ANSWERS).parent.mkdir(parents=True)
    (content / "genai_config.json").write_text("{}")
    answers_file(
        content / REGISTERED_ANSWERS, {"teacher": first(rows, rows), "fp16": first(right, rows)}
    )
    registry = LocalRegistry()
    before = [model.version for model in registry.list(name)]
    version = registry.register(content, name, {}, {})
    registry.promote(version, before[0] if before else None, Actor("run-7"))
    return version.version


def judged(folder: Path, name: str, right: int, rows: int, *rules: GateRule) -> GateDecision:
    """Judge a student that is right on the first `right` of the rows."""
    answers = {"teacher": first(rows, rows), CANDIDATE: first(right, rows)}
    report = folder / "report"
    report.mkdir()
    file = answers_file(report / "answers.jsonl", answers)
    evaluation = EvaluationReport(
        artifact=ArtifactStore().put(report),
        scoreboard=(score_row("teacher", rows, rows), score_row(CANDIDATE, right, rows)),
        candidate=CANDIDATE,
        answers_sha256=sha256_of(file),
    )
    test, model = folder / "test", folder / "model"
    for made in (test, model):
        made.mkdir()
    lines = []
    for number in range(rows):
        row = Example(example_id=f"r{number}", question=f"question {number}", choices=("x", "y"))
        lines.append(row.model_dump_json() + "\n")
    (test / "test.jsonl").write_text("".join(lines))
    (model / "genai_config.json").write_text("{}")
    asked = Rows(artifact=ArtifactStore().put(test), file="test.jsonl", rows=rows, sha256="d" * 64)
    exported = OnnxModel(
        artifact=ArtifactStore().put(model), precision="int4", algorithm="rtn", parameters=1
    )
    recipe = RegistryRecipe(kind="local", model_name=name)
    return apply_gate.fn(evaluation, exported, asked, rules, recipe)


def test_without_a_champion(tmp_path: Path) -> None:
    decision = judged(tmp_path, "new", 60, 100, NOT_WORSE)
    assert decision.passed
    assert decision.champion is None
    assert decision.verdicts[0].note == "no champion yet"


@pytest.mark.parametrize(
    ("name", "right", "rows", "verdict"),
    [
        ("better", 900, 1000, "passed"),
        ("worse", 600, 1000, "refused"),
        ("too-few-rows", 79, 100, "undecided"),
    ],
)
def test_against_a_champion_that_is_right_on_four_rows_of_five(
    name: str, right: int, rows: int, verdict: str, tmp_path: Path
) -> None:
    register(tmp_path, name, rows // 2, rows)
    champion = register(tmp_path, name, rows * 4 // 5, rows)
    decision = judged(tmp_path, name, right, rows, NOT_WORSE)
    (found,) = decision.verdicts
    assert decision.champion == f"{name} version {champion}"
    assert found.note.startswith(f"against {name} version {champion} on {rows:,} shared rows; ")
    assert "known by their ids alone" in found.note
    assert found.verdict == verdict
    assert decision.passed is (verdict == "passed")
    assert found.figure == pytest.approx(right / rows - 0.8)
    if verdict == "undecided":
        assert found.rows_needed is not None
        assert found.rows_needed > rows


def test_every_rule_gives_a_verdict_and_one_refusal_refuses(tmp_path: Path) -> None:
    register(tmp_path, "several", 400, 1000)
    accurate = LimitRule(kind="limit", figure="accuracy", minimum=0.95)
    decision = judged(tmp_path, "several", 900, 1000, NOT_WORSE, accurate)
    assert [verdict.verdict for verdict in decision.verdicts] == ["passed", "refused"]
    assert not decision.passed
    assert decision.reason == (
        "refused: student int4 does not pass: accuracy at least 0.95 (0.9, must be ≥ 0.95)"
    )
