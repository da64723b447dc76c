"""The gate against a champion in a real local registry: MLflow on SQLite, files on this machine."""

from pathlib import Path

import pytest
from student_answers import answers_file, first, score_row

from distillery.recipe import GateRule, LimitRule, NotWorseRule, RegistryRecipe
from distillery.records import EvaluationReport, GateDecision
from distillery.registry.local import LocalRegistry
from distillery.storage.artifacts import ArtifactStore
from distillery.storage.digests import sha256_of
from tasks.registry import ANSWERS, judge

CANDIDATE = "student int4"
NOT_WORSE = NotWorseRule(kind="not_worse")

pytestmark = pytest.mark.usefixtures("one_registry")


def register(folder: Path, name: str, right: int, rows: int) -> str:
    """Register a version that is right on the first `right` of the rows; return its number."""
    content = folder / f"right-on-{right}"
    (content / ANSWERS).parent.mkdir(parents=True)
    (content / "genai_config.json").write_text("{}")
    answers_file(content / ANSWERS, {"teacher": first(rows, rows), "fp16": first(right, rows)})
    registry = LocalRegistry()
    version = registry.register(content, name, {}, {})
    registry.promote(version)
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
    return judge(evaluation, rules, RegistryRecipe(kind="local", model_name=name))


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
    assert found.note == f"against {name} version {champion} on {rows:,} shared rows"
    assert found.verdict == verdict
    assert decision.passed is (verdict == "passed")
    assert found.figure == pytest.approx(right / rows - 0.8)
    # The run's page shows what has changed since the champion.
    assert decision.champion_answers
    kept = ArtifactStore().fetch(decision.champion_answers) / "answers.jsonl"
    registered = tmp_path / f"right-on-{rows * 4 // 5}" / ANSWERS
    assert kept.read_bytes() == registered.read_bytes()
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
