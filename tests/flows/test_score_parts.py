"""Scoring by several processes: the numbers and files of one, also when one of them is killed."""

import logging
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import psutil
import pytest
import registered_student
from child_runs import children_that, one_killed, served
from prefect import flow
from prefect_api import OwnPrefect

from distillery.data.examples import write_examples
from distillery.evaluation import slices
from distillery.evaluation.report import ANSWERS_FILE
from distillery.recipe import BaseModelRecipe, Columns, PromptRecipe
from distillery.records import (
    EvaluationReport,
    Example,
    OnnxModel,
    Rows,
    StudentCheckpoint,
    TeacherLabels,
)
from distillery.storage.artifacts import ArtifactStore
from distillery.storage.digests import sha256_of
from tasks.evaluation import asked_models, evaluate
from tasks.results import BLOCK, results_in_store
from tasks.score_parts import in_parts

pytestmark = [
    pytest.mark.slow,
    pytest.mark.timeout(600),
    pytest.mark.usefixtures("prefect_api"),
]


ROWS, BEHIND = 2300, 2300 - slices.SLICE_ROWS
"""Three slices, and the rows of the two that children ask."""

PROMPT = PromptRecipe(system="", user="{question}\n{choices}", max_tokens=128)


def example(number: int) -> Example:
    """A row of up to 70 words, so that no two batches are alike; some are too long to be asked."""
    words = " ".join(["where is it", "thank you", "awful"][number % 3] for _ in range(number % 23))
    choices = ("pleased", "displeased", "neither")[: 2 + number % 2]
    return Example(
        example_id=f"r{number}", question=f"{number} {words}", choices=choices, answer_key="A"
    )


class Made(NamedTuple):
    """What is scored."""

    test: Rows
    base: BaseModelRecipe
    student: StudentCheckpoint
    candidate: OnnxModel
    teacher: OnnxModel
    labels: TeacherLabels


def stored_rows(folder: Path, count: int) -> Rows:
    folder.mkdir()
    file = folder / "test.jsonl"
    write_examples([example(number) for number in range(count)], file)
    artifact = ArtifactStore().put(folder)
    return Rows(artifact=artifact, file=file.name, rows=count, sha256=sha256_of(file))


def stored_model(folder: Path, precision: str) -> OnnxModel:
    artifact = ArtifactStore().put(folder)
    return OnnxModel(artifact=artifact, precision=precision, algorithm="rtn", parameters=7)


@pytest.fixture
def made(tmp_path: Path, tiny_model: Callable[[str], Path], tiny_onnx: Callable[..., Path]) -> Made:
    checkpoint = tmp_path / "checkpoint"
    shutil.copytree(tiny_model("llama"), checkpoint / "model")
    base = BaseModelRecipe(model=str(tiny_model("llama")))
    return Made(
        test=stored_rows(tmp_path / "rows", ROWS),
        base=base,
        student=StudentCheckpoint(
            artifact=ArtifactStore().put(checkpoint),
            method="full",
            base=base.model,
            parameters=7,
            steps=1,
        ),
        candidate=stored_model(tiny_onnx("llama", "int4"), "int4"),
        teacher=stored_model(tiny_onnx("llama"), "fp32"),
        labels=registered_student.labels(tmp_path / "labels", {"r0": "A", "r1": "B"}),
    )


def evaluated(made: Made, processes: int = 1, deployment: str | None = None) -> EvaluationReport:
    """Evaluate anew, in a run of its own."""
    asked = asked_models(PROMPT, made.base, made.student, made.candidate, made.teacher, PROMPT)

    @flow(name="evaluation")
    def run() -> list[EvaluationReport]:
        stage = evaluate.with_options(refresh_cache=True)
        report = in_parts(stage, [*asked.values()], processes, deployment)(
            test=made.test,
            train=made.test,
            labels=made.labels,
            gold=None,
            learns_from_gold=False,
            prompt=PROMPT,
            base=made.base,
            student=made.student,
            candidate=made.candidate,
            teacher=made.teacher,
            machine="here",
            teacher_prompt=PROMPT,
            validation=None,
            columns=Columns(),
            fields=(),
        )
        return [report]

    with results_in_store():
        (report,) = run()
    return report


def numbers(report: EvaluationReport) -> tuple[str, bytes, list[dict[str, object]]]:
    """All that is not measured: the answers' digest, each row's answers and probabilities, and the
    scoreboard."""
    folder = ArtifactStore().fetch(report.artifact)
    measured = {"rows_per_second", "p50_ms", "p95_ms", "peak_mib", "waited", "figures"}
    board = [row.model_dump(exclude=measured) for row in report.scoreboard]
    assert (folder / ANSWERS_FILE).is_file()
    return report.answers_sha256, (folder / "rows.jsonl").read_bytes(), board


def scorers() -> list[psutil.Process]:
    """The children that ask models for this process."""
    return children_that(lambda each: any("score_rows" in part for part in each.cmdline()))


def slices_kept() -> int:
    """How many slices are cached."""
    results = Path(os.environ["DISTILLERY_HOME"]) / "store" / "results"
    return len(list(results.glob("score-slice-*")))


@pytest.fixture
def one(made: Made, monkeypatch: pytest.MonkeyPatch) -> tuple[object, ...]:
    """The numbers of one process."""
    monkeypatch.setattr(slices, "ROWS_OF_A_PART", 500)
    return numbers(evaluated(made))


def test_three_processes_find_the_numbers_of_one_though_one_is_killed(
    made: Made, one: tuple[object, ...], caplog: pytest.LogCaptureFixture
) -> None:
    """What Transformers runs is left to the run itself, since each process has a part of the cores.
    A second run finds all slices."""
    caplog.set_level(logging.INFO)
    assert slices_kept() == 0
    with one_killed(lambda: slices_kept() > 0, scorers) as killed:
        assert numbers(evaluated(made, processes=3)) == one
    assert killed
    assert "has ended early (its process was killed" in caplog.text
    assert f"{2 * BEHIND:,} of {2 * BEHIND:,} rows asked, in 3 parts" in caplog.text
    assert slices_kept() == 2 * 2
    caplog.clear()
    assert numbers(evaluated(made, processes=3)) == one
    assert "0 rows to ask: one process asks them" in caplog.text


def test_runs_of_a_deployment_do_the_same_with_all_models(
    made: Made,
    one: tuple[object, ...],
    prefect_server: OwnPrefect,
    caplog: pytest.LogCaptureFixture,
) -> None:
    caplog.set_level(logging.INFO)
    # The block as from a pool's template.
    block = {"PREFECT_RESULTS_DEFAULT_STORAGE_BLOCK": BLOCK}
    with served(prefect_server, "score_rows", **block) as deployment:
        assert numbers(evaluated(made, processes=2, deployment=deployment)) == one
    assert f"{3 * BEHIND:,} of {3 * BEHIND:,} rows asked, in 2 parts" in caplog.text
    assert slices_kept() == 3 * 2
