"""The stage in which a judge is asked: cached by what it depends on, with its canaries."""

import json
import logging
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from chat_endpoint import ChatEndpoint, said, shorter
from prefect import flow
from written_run import description

from distillery.data.examples import write_examples
from distillery.errors import TeacherChanged
from distillery.recipe import JudgeRecipe, PromptRecipe
from distillery.records import EvaluationReport, Figures, Interval, Rows, ScoreRow
from distillery.storage.artifacts import ArtifactStore
from distillery.storage.digests import sha256_of
from tasks.judge import Compared, preferred
from tasks.results import results_in_store
from tasks.stage import refreshing

PROMPT = PromptRecipe(system="", user="{text}", answer="written")
STUDENT = "student int8"


pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("prefect_api")]


@pytest.fixture
def judge(monkeypatch: pytest.MonkeyPatch) -> Iterator[ChatEndpoint]:
    with ChatEndpoint(shorter) as server:
        monkeypatch.setenv("JUDGE_MODEL_NAME", "brief")
        monkeypatch.setenv("JUDGE_MODEL_ENDPOINT", server.url)
        monkeypatch.setenv("JUDGE_MODEL_KEY", "a-judges-key")
        yield server


def evaluated(folder: Path) -> tuple[EvaluationReport, Rows]:
    """An evaluation of ten rows, of which the student answers four at greater length than its
    teacher, one with nothing and five alike, and the rows."""
    rows = [description(number) for number in range(10)]
    test, answers = folder / "rows", folder / "evaluation"
    test.mkdir()
    answers.mkdir()
    write_examples(rows, test / "test.jsonl")
    lines = []
    for number, row in enumerate(rows):
        student = f"longer, {row.answer_key}" if number < 4 else row.answer_key
        if number == 4:
            student = None
        line = {"example_id": row.example_id, "gold": row.answer_key, "teacher": row.answer_key}
        lines.append(json.dumps({**line, STUDENT: student}) + "\n")
    (answers / "answers.jsonl").write_text("".join(lines))
    score = ScoreRow(
        name=STUDENT,
        kind="model",
        correct=5,
        rows=10,
        accuracy=0.5,
        interval=Interval(low=0.2, high=0.8),
        figures=Figures(),
    )
    report = EvaluationReport(
        artifact=ArtifactStore().put(answers),
        scoreboard=(score,),
        candidate=STUDENT,
        answers_sha256=sha256_of(answers / "answers.jsonl"),
    )
    file = test / "test.jsonl"
    asked = Rows(
        artifact=ArtifactStore().put(test), file=file.name, rows=10, sha256=sha256_of(file)
    )
    return report, asked


def compared(report: EvaluationReport, test: Rows, **settings: Any) -> Compared:
    """Ask the judge in a run of its own."""
    recipe = JudgeRecipe(**{"outage_s": 1} | settings)

    @flow(name="compare")
    def compare() -> list[Compared]:
        return [preferred(report, test, PROMPT, recipe, refreshing(()))]

    with results_in_store():
        (found,) = compare()
    return found


def test_a_judge_is_asked_again_only_for_what_has_changed(
    tmp_path: Path, judge: ChatEndpoint, caplog: pytest.LogCaptureFixture
) -> None:
    report, rows = evaluated(tmp_path)
    first = compared(report, rows)
    assert first.preferences is not None
    figures = first.preferences.figures
    assert (figures.wins, figures.ties, figures.losses) == (0, 5, 5)
    assert (figures.judge, first.preferences.asked, len(judge.calls)) == ("brief", 8, 8)
    (row,) = first.report.scoreboard
    assert row.figures is not None
    assert row.figures.preferences == figures

    again = compared(report, rows, prices={"input": 1, "output": 1}, concurrency=1)
    assert again.preferences == first.preferences, "found in the cache"
    told = compared(report, rows, instructions="The longer text is better.")
    assert told.preferences is not None
    assert (told.preferences.asked, len(judge.calls)) == (8, 16)

    known = compared(report, rows, rows=9)
    assert known.preferences is not None
    assert known.preferences.figures.rows == 9
    assert (known.preferences.asked, len(judge.calls)) == (0, 16), "what it said is in the store"

    judge.script = lambda call: said("C")
    with caplog.at_level(logging.INFO):
        watched = compared(report, rows, canaries={"rows": 4})
    assert watched.drift is not None
    assert (watched.drift.compared, len(watched.drift.changed)) == (4, 4)
    warned = [record.getMessage() for record in caplog.records if record.levelname == "WARNING"]
    assert any("more than evaluation.judge.canaries.threshold (10%)" in text for text in warned)
    with pytest.raises(TeacherChanged) as error:
        compared(report, rows, canaries={"rows": 4, "stop": True})
    assert str(error.value).endswith(
        "give the new judge another evaluation.judge.identity, or set canaries.stop: false"
    )


def test_no_judge_is_asked_where_there_is_none(tmp_path: Path) -> None:
    report, rows = evaluated(tmp_path)
    assert preferred(report, rows, PROMPT, None, refreshing(())) == Compared(report)
