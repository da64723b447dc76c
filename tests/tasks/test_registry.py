"""Judging, registering and promoting, from the records of a run to a real registry (MLflow on
SQLite), without Prefect around them."""

import json
import uuid
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
from registered_student import provenance

import flows.distill
import tasks.registry
from distillery.errors import RegistryError
from distillery.evaluation.statistics import wilson_interval
from distillery.recipe import GateRule, NotWorseRule, RegistryRecipe
from distillery.records import (
    EvaluationReport,
    Example,
    GateDecision,
    OnnxModel,
    Outcome,
    RegisteredModel,
    Rows,
    ScoreRow,
)
from distillery.registry.history import Actor
from distillery.registry.local import LocalRegistry
from distillery.storage.artifacts import ArtifactStore
from distillery.storage.digests import sha256_of
from tasks.summary import verdict

RECIPE = RegistryRecipe(model_name="student")
CHAMPION = NotWorseRule(kind="not_worse", margin=0.1, confidence=None)
BEST = NotWorseRule(kind="not_worse", than="best", margin=0.05, confidence=None)
NAME = "student int4"
ROWS = 40
USER = Actor("somebody")


pytestmark = pytest.mark.usefixtures("own_registry")


@pytest.fixture(autouse=True)
def without_prefect(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tasks.registry, "conclude", print)
    monkeypatch.setattr(flows.distill, "promote", tasks.registry.promote.fn)


class Made:
    """A student with `right` right answers to the rows, as a run made it."""

    def __init__(self, folder: Path, right: int, rows: Rows, speed: float = 1.0) -> None:
        self.rows = rows
        store = ArtifactStore()
        model, report = folder / f"model-{right}", folder / f"report-{right}-{speed}"
        for made in (model, report):
            made.mkdir(exist_ok=True)
        (model / "model.onnx").write_text(f"weights of {right}")
        lines = []
        for number in range(ROWS):
            letter = "A" if number < right else "B"
            # Another processor rounds the teacher's probabilities differently.
            line = {"example_id": f"r{number}", "gold": "A", "teacher": "AB"[speed > 1]}
            lines.append(json.dumps(line | {NAME: letter}) + "\n")
        (report / "answers.jsonl").write_text("".join(lines))
        row = ScoreRow(
            name=NAME,
            kind="model",
            correct=right,
            rows=ROWS,
            accuracy=right / ROWS,
            interval=wilson_interval(right, ROWS),
            rows_per_second=speed,
        )
        self.folder = folder
        self.model = OnnxModel(
            artifact=store.put(model), precision="int4", algorithm="rtn", parameters=1
        )
        self.report = EvaluationReport(
            artifact=store.put(report),
            scoreboard=(row,),
            candidate=NAME,
            answers_sha256=sha256_of(report / "answers.jsonl"),
        )

    def judged(self, *rules: GateRule) -> GateDecision:
        return tasks.registry.apply_gate.fn(
            self.report, self.model, self.rows, rules or (CHAMPION,), RECIPE
        )

    def registered(self, refused: str | None = None) -> RegisteredModel:
        made = provenance(self.folder / f"made-{uuid.uuid4().hex}")
        made |= {"evaluation": self.report, "model": self.model}
        return tasks.registry.register.fn(self.model, self.report, self.rows, RECIPE, made, refused)

    def run(self, *rules: GateRule) -> str:
        """Judge, register and promote, as the flow does; return what became of it."""
        decision = self.judged(*rules)
        if not decision.passed:
            return "refused"
        return flows.distill.promoted(self.registered(), decision, self.judged)[1].result


def write_rows(folder: Path, start: int = 0) -> Rows:
    """Write test rows whose contents begin with number `start`; the ids always begin at r0."""
    (folder / f"rows-{start}").mkdir()
    file = folder / f"rows-{start}" / "test.jsonl"
    lines = []
    for number in range(ROWS):
        row = Example(
            example_id=f"r{number}",
            question=f"question {start + number}",
            choices=("oven", "bridge"),
            answer_key="A",
        )
        lines.append(row.model_dump_json() + "\n")
    file.write_text("".join(lines))
    return Rows(
        artifact=ArtifactStore().put(file.parent),
        file="test.jsonl",
        rows=ROWS,
        sha256=sha256_of(file),
    )


@pytest.fixture
def make(tmp_path: Path, home: Path) -> Callable[..., Made]:
    """`make(right, start=0, speed=1)`: a student and its test rows."""
    rows: dict[int, Rows] = {}

    def made(right: int, start: int = 0, speed: float = 1.0) -> Made:
        if start not in rows:
            rows[start] = write_rows(tmp_path, start)
        return Made(tmp_path, right, rows[start], speed)

    return made


def champion() -> str:
    return LocalRegistry().get("student").version


def test_what_is_registered_holds_the_students_own_answers_alone(
    make: Callable[..., Made], tmp_path: Path
) -> None:
    model = make(30).registered()
    folder = LocalRegistry().download(model, tmp_path / "down")
    files = sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*.*"))
    assert files == ["README.md", "evaluation/answers.jsonl", "manifest.json", "model.onnx"]
    lines = (folder / "evaluation" / "answers.jsonl").read_text().splitlines()
    assert len(lines) == ROWS
    assert list(json.loads(lines[0])) == ["example_id", "asked", "content", "gold", NAME]


def test_the_same_student_on_another_processor_is_the_same_version(
    make: Callable[..., Made],
) -> None:
    slow, fast = make(30), make(30, speed=9.5)
    assert slow.report.answers_sha256 != fast.report.answers_sha256
    assert slow.registered().version == fast.registered().version == "1"
    assert make(31).registered().version == "2"
    assert make(30, start=5).registered().version == "3"


def test_the_champions_answers_are_kept_for_the_page(make: Callable[..., Made]) -> None:
    assert make(30).judged().champion_answers is None
    make(30).run()
    kept = make(31).judged().champion_answers
    assert kept is not None
    lines = (ArtifactStore().fetch(kept) / "answers.jsonl").read_text().splitlines()
    assert [json.loads(line)[NAME] for line in lines] == ["A"] * 30 + ["B"] * 10


def test_a_cached_run_does_not_undo_a_rollback(make: Callable[..., Made]) -> None:
    assert (make(30).run(), make(31).run()) == ("promoted", "promoted")
    assert make(31).run() == "stands"
    LocalRegistry().pin("student", None, USER, "complaints", "rolled back")
    assert champion() == "1"
    assert make(31).run() == "barred"
    assert make(30).run() == "stands"
    assert champion() == "1"
    assert make(32).run() == "promoted"
    assert champion() == "3"
    assert make(31).run() == "barred"
    LocalRegistry().unpin("student", USER)
    assert make(31).run() == "promoted"


def test_a_student_is_judged_again_against_a_champion_promoted_meanwhile(
    make: Callable[..., Made],
) -> None:
    first, second, worse = make(30), make(38), make(29)
    decision = first.judged()
    assert (decision.passed, decision.champion_version) == (True, None)
    worse_decision = worse.judged()
    assert second.run() == "promoted"
    # 30 of 40 is 20 points below the champion of now.
    decision, promotion = flows.distill.promoted(first.registered(), decision, first.judged)
    assert (decision.passed, decision.champion_version) == (False, "1")
    assert promotion.result == "outpaced"
    assert champion() == "1"
    # By a wider margin it passes, and is promoted.
    wide = NotWorseRule(kind="not_worse", margin=0.5, confidence=None)
    decision, promotion = flows.distill.promoted(
        worse.registered(), worse_decision, lambda: worse.judged(wide)
    )
    assert (promotion.result, decision.champion_version, champion()) == ("promoted", "1", "3")
    # Champions that change faster than one can judge end it.
    fixed = GateDecision(passed=True, reason="passed", champion_version="9")
    _, promotion = flows.distill.promoted(first.registered(), fixed, lambda: fixed)
    assert promotion.result == "outpaced"


def test_the_best_version_so_far_is_an_anchor(make: Callable[..., Made]) -> None:
    """Each is within the margin of the champion, 10 points; the last is below the best by more
    than 5."""
    assert [make(right).run(CHAMPION, BEST) for right in (36, 35)] == ["promoted", "promoted"]
    assert make(33).run(CHAMPION) == "promoted"
    decision = make(32).judged(CHAMPION, BEST)
    assert decision.verdicts[0].passes
    assert "student version 1 on 40 shared rows" in decision.verdicts[1].note
    assert not decision.passed
    # A version that was rolled back is no anchor.
    LocalRegistry().pin("student", "1", USER)
    LocalRegistry().pin("student", "3", USER)
    note = make(32).judged(CHAMPION, BEST).verdicts[1].note
    assert "student version 2 on 40 shared rows" in note


def test_other_test_rows_are_noticed_although_their_ids_are_the_same(
    make: Callable[..., Made],
) -> None:
    assert make(36).run() == "promoted"
    verdict = make(36, start=10).judged(CHAMPION).verdicts[0]
    assert verdict.note == "the student is the champion"
    note = make(35, start=10).judged(CHAMPION).verdicts[0].note
    assert note == (
        "against student version 1 on 30 shared rows of 40; left out, id used for other content: 10"
    )


def test_a_refused_student_is_kept_if_the_recipe_says_so(make: Callable[..., Made]) -> None:
    assert make(36).run() == "promoted"
    refused = make(30)
    assert refused.run() == "refused"
    rejected = refused.registered("refused: it is worse")
    assert (rejected.version, rejected.role) == ("2", "rejected")
    assert LocalRegistry().history("student")[-1].reason == "refused: it is worse"
    assert [version.version for version in earlier(make(31), CHAMPION, BEST)] == ["1"]
    named = NotWorseRule(kind="not_worse", than="2")
    assert make(31).judged(named).verdicts[0].note == "no version 2 is registered"


def earlier(made: Made, *rules: GateRule) -> Sequence[Any]:
    return tasks.registry.earlier_versions(LocalRegistry(), "student", rules, made.model)


def test_a_damaged_version_is_no_anchor_and_a_damaged_champion_is_an_error(
    make: Callable[..., Made], caplog: pytest.LogCaptureFixture
) -> None:
    assert [make(right).run() for right in (36, 35)] == ["promoted", "promoted"]
    second, first = LocalRegistry().list("student")
    (Path(first.artifact.uri) / "evaluation" / "answers.jsonl").write_text("")
    assert [version.version for version in earlier(make(34), CHAMPION, BEST)] == ["2"]
    assert "the gate leaves out a version: student version 1: evaluation/" in caplog.text
    (Path(second.artifact.uri) / "evaluation" / "answers.jsonl").write_text("")
    with pytest.raises(RegistryError, match=r"version 2: evaluation/answers\.jsonl: "):
        make(34).judged(CHAMPION, BEST)


def test_the_verdict_says_what_became_of_the_student(make: Callable[..., Made]) -> None:
    assert make(36).run() == "promoted"
    passed = make(35)
    decision, registered = passed.judged(), passed.registered()
    LocalRegistry().pin("student", "1", USER)
    barred = tasks.registry.promote.fn(registered, decision)
    construct: Any = Outcome.model_construct
    outcome = construct(
        decision=decision, registered=registered, rejected=None, run="", promotion=barred
    )
    assert "; registered as student version 2, not promoted: somebody has pinned version 1" in (
        verdict(outcome)
    )
    promoted = outcome.model_copy(update={"promotion": None})
    assert verdict(promoted).endswith("; registered as student version 2")
    refused = outcome.model_copy(
        update={"registered": None, "rejected": registered.model_copy(update={"role": "rejected"})}
    )
    assert verdict(refused).endswith("; kept as student version 2")
