"""The stage that sets a student's threshold: what it leaves in the student's folder, and what it
refuses."""

from pathlib import Path
from typing import Any

import pytest

import tasks.abstention
from distillery.errors import DataError, ModelError
from distillery.evaluation.scoring import Scored
from distillery.inference.abstention import read_abstention
from distillery.recipe import AbstainRecipe, PromptRecipe
from distillery.records import Artifact, Example, OnnxModel, PreparedDataset, Rows, Split
from distillery.storage.artifacts import ArtifactStore
from tasks.abstention import check_provable, set_threshold

PROMPT = PromptRecipe(system="", user="{question}\n{choices}", max_tokens=128)
ROWS = 200


@pytest.fixture(autouse=True)
def _told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tasks.abstention, "conclude", print)


def validation(folder: Path) -> Rows:
    folder.mkdir()
    lines = []
    for number in range(ROWS):
        row = Example(example_id=f"r{number}", question=f"question {number}", choices=("x", "y"))
        lines.append(row.model_copy(update={"answer_key": "A"}).model_dump_json() + "\n")
    (folder / "validation.jsonl").write_text("".join(lines))
    artifact = ArtifactStore().put(folder)
    return Rows(artifact=artifact, file="validation.jsonl", rows=ROWS, sha256="d" * 64)


def exported(folder: Path) -> OnnxModel:
    folder.mkdir()
    (folder / "genai_config.json").write_text("{}")
    artifact = ArtifactStore().put(folder)
    return OnnxModel(
        artifact=artifact, precision="int4", algorithm="rtn", parameters=1, produced_by="mine-1"
    )


def answering(monkeypatch: pytest.MonkeyPatch, wrong_below: float) -> None:
    """A student with the confidences from 0.5 to 1, evenly, that is wrong on all below one."""

    def score(*_arguments: Any, **_keywords: Any) -> Scored:
        confidences = [0.5 + number / 2 / ROWS for number in range(ROWS)]
        answers = ["B" if confidence < wrong_below else "A" for confidence in confidences]
        probabilities = []
        for answer, confidence in zip(answers, confidences, strict=True):
            pair = (confidence, 1 - confidence)
            probabilities.append(pair if answer == "A" else pair[::-1])
        return Scored(
            answers=tuple(answers),
            probabilities=tuple(probabilities),
            latencies_ms=(),
            rows_per_second=0,
            peak_mib=0,
            load_s=0,
            ran_on="nothing",
        )

    monkeypatch.setattr(tasks.abstention, "score_model", score)


def test_the_threshold_stands_in_the_students_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    answering(monkeypatch, wrong_below=0.65)
    model = exported(tmp_path / "model")
    rows = validation(tmp_path / "rows")
    found = set_threshold.fn(model, AbstainRecipe(accuracy=0.95), PROMPT, rows)
    folder = ArtifactStore().fetch(found.artifact)
    assert read_abstention(folder) == found.abstention
    assert found.abstention is not None
    assert found.abstention.proof is not None
    assert found.abstention.proof.bound >= 0.95
    assert found.abstention.threshold > 0.6
    assert (folder / "genai_config.json").exists()
    assert "or more are right with 95% confidence" in capsys.readouterr().out
    # What later stages depend on has changed; who exported it has not.
    assert found.content_id != model.content_id
    assert found.produced_by == "mine-1"


def test_a_threshold_that_the_recipe_gives_is_taken_as_it_is(tmp_path: Path) -> None:
    recipe = AbstainRecipe(threshold=0.7, answer="ask a colleague")
    found = set_threshold.fn(exported(tmp_path / "model"), recipe, PROMPT, None)
    assert found.abstention is not None
    assert found.abstention.model_dump() == {
        "threshold": 0.7,
        "answer": "ask a colleague",
        "proof": None,
    }


def test_an_accuracy_that_no_threshold_reaches_is_told_in_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    answering(monkeypatch, wrong_below=0.99)
    model, rows = exported(tmp_path / "model"), validation(tmp_path / "rows")
    with pytest.raises(ModelError) as caught:
        set_threshold.fn(model, AbstainRecipe(accuracy=0.95), PROMPT, rows)
    text = str(caught.value)
    assert "no threshold reaches 0.95 on 200 validation rows: the best, " in text
    assert "more validation rows or a better student would help most" in text
    assert "\n" not in text


def data(rows: int, classes: tuple[str, ...] = ()) -> PreparedDataset:
    split = Split(file="validation.jsonl", rows=rows, sha256="d" * 64)
    artifact = Artifact(uri="file:///none", sha256="0" * 64, bytes=0)
    return PreparedDataset(artifact=artifact, splits={"validation": split}, classes=classes)


def test_what_cannot_be_proven_is_refused_before_anything_is_trained() -> None:
    recipe = AbstainRecipe(accuracy=0.95)
    said = "103 validation rows can't prove 0.95, even if all answers are right; 104 can: add"
    with pytest.raises(DataError, match=said):
        check_provable(recipe, data(103))
    check_provable(recipe, data(104))
    check_provable(AbstainRecipe(threshold=0.7), data(1))


def test_a_class_that_is_named_like_the_answer_of_an_unsure_student_is_refused() -> None:
    with pytest.raises(DataError, match=r"task\.abstain\.answer: 'unsure' is one of the classes"):
        check_provable(AbstainRecipe(threshold=0.7), data(9, ("sure", "unsure")))
