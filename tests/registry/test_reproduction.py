"""What `compare` says differs between a version and what was made again, and what a recipe is
pinned to."""

import os
from pathlib import Path
from typing import Any

import pytest
from registered_student import ROWS, example, labels, prepared, provenance, register

from distillery.errors import RegistryError
from distillery.evaluation.report import write_answers
from distillery.records import (
    EvaluationReport,
    OnnxModel,
    PreparedDataset,
    RegisteredModel,
    TeacherLabels,
)
from distillery.registry.local import LocalRegistry
from distillery.registry.reproduction import (
    Compared,
    Remade,
    apart,
    compare,
    pinned_recipe,
    render_reproduction,
)
from distillery.storage.artifacts import ArtifactStore

pytestmark = pytest.mark.usefixtures("one_registry")


@pytest.fixture
def made(tmp_path: Path) -> dict[str, Any]:
    return provenance(tmp_path / "made")


@pytest.fixture
def model(tmp_path: Path, made: dict[str, Any]) -> RegisteredModel:
    return register(tmp_path / "first", f"original-{tmp_path.name}", made)


def remade(
    folder: Path,
    made: dict[str, Any],
    *,
    data: PreparedDataset | None = None,
    found: TeacherLabels | None = None,
    answers: str = "AB",
    weights: str | None = None,
) -> Remade:
    """What a second run makes: all as before, unless told otherwise."""
    store = ArtifactStore()
    folder.mkdir()
    (folder / "genai_config.json").write_text("{}")
    (folder / "model.onnx").write_text(weights or str(folder.parent / "first"))
    exported = made["model"] | {"artifact": store.put(folder)}
    (folder / "report").mkdir()
    tested = [example(each) for each in ROWS["test"]]
    write_answers(folder / "report", tested, {"gold": ["A", "A"], "student int4": list(answers)})
    report = made["evaluation"] | {"artifact": store.put(folder / "report")}
    return Remade(
        data=data or PreparedDataset.model_validate(made["data"]),
        labels=found or TeacherLabels.model_validate(made["labels"]),
        model=OnnxModel.model_validate(exported),
        report=EvaluationReport.model_validate(report),
    )


def compared(
    tmp_path: Path, model: RegisteredModel, made: dict[str, Any], again: Remade
) -> dict[str, Compared]:
    folder = LocalRegistry().download(model, tmp_path / "down")
    store = ArtifactStore()
    found = compare(model, folder, made, again, store, store)
    differing = {each.what: each for each in found.compared if each.different != 0}
    assert found.same == (not set(differing) - {"files"})
    told = render_reproduction(found)
    assert told.endswith("are the same") == found.same
    for each in differing.values():
        assert each.what in told
    return differing


def test_equal_runs_differ_in_nothing(
    tmp_path: Path, model: RegisteredModel, made: dict[str, Any]
) -> None:
    assert compared(tmp_path, model, made, remade(tmp_path / "again", made)) == {}


def test_each_difference_is_told(
    tmp_path: Path, model: RegisteredModel, made: dict[str, Any]
) -> None:
    rows = {**ROWS, "train": ("r1", "r2", "r4")}
    again = remade(
        tmp_path / "again",
        made,
        data=prepared(tmp_path / "rows", rows),
        found=labels(tmp_path / "other", {"r1": "B", "r2": "B"}),
        answers="BB",
        weights="others",
    )
    assert compared(tmp_path, model, made, again) == {
        "train rows": Compared(what="train rows", of=4, different=2, first=("r3", "r4")),
        "labels": Compared(what="labels", of=2, different=1, first=("r1",)),
        "answers": Compared(what="answers", of=2, different=1, first=("t1",)),
        "files": Compared(what="files", of=2, different=1, first=("model.onnx",)),
    }


def test_other_files_alone_are_no_failure(
    tmp_path: Path, model: RegisteredModel, made: dict[str, Any]
) -> None:
    again = remade(tmp_path / "again", made, weights="rounded otherwise")
    assert set(compared(tmp_path, model, made, again)) == {"files"}


def test_labels_that_are_gone_are_not_called_equal(
    tmp_path: Path, model: RegisteredModel, made: dict[str, Any]
) -> None:
    made["labels"]["artifact"] = {"uri": "file:///gone", "sha256": "0" * 64, "bytes": 1}
    found = labels(tmp_path / "other", {"r1": "A", "r2": "B"})
    differing = compared(tmp_path, model, made, remade(tmp_path / "again", made, found=found))
    assert differing == {"labels": Compared(what="labels", of=2, different=None)}


def test_probabilities_of_tokens_are_not_called_equal(
    tmp_path: Path, model: RegisteredModel, made: dict[str, Any]
) -> None:
    """Written labels have none beside their answers."""
    found = labels(tmp_path / "other", {"r1": "A", "r2": "B"}).model_copy(update={"soft": True})
    again = remade(tmp_path / "again", made, found=found)
    folder, store = LocalRegistry().download(model, tmp_path / "down"), ArtifactStore()
    told = compare(model, folder, made, again, store, store).compared
    assert "probabilities" not in {each.what for each in told}


def test_the_recipe_is_pinned(model: RegisteredModel, made: dict[str, Any], tmp_path: Path) -> None:
    made["recipe"]["dataset"] |= {"source": "hub", "name": "tau/commonsense_qa", "revision": None}
    made["recipe"]["teacher"] |= {"canaries": {"rows": 3, "threshold": 0.1, "stop": True}}
    made["recipe"]["teacher"] |= {"max_age": 30}
    made |= {"source": "tau/commonsense_qa@abc", "teacher": "a-large-model"}
    recipe = pinned_recipe(model, made)
    assert recipe.dataset.revision == "abc"
    assert recipe.teacher.identity == "a-large-model"
    assert recipe.teacher.canaries.rows == 0
    assert recipe.teacher.max_age is None
    assert recipe.student.base.revision == "c" * 40
    for broken in ({**made, "recipe": {"name": 3}}, {**made, "student": None}, {}):
        with pytest.raises(RegistryError, match="its manifest holds no whole recipe"):
            pinned_recipe(model, broken)


def test_a_recipe_from_before_the_choice_takes_the_smallest_form_again(
    model: RegisteredModel, made: dict[str, Any]
) -> None:
    assert pinned_recipe(model, made).export.choose == "fastest"
    del made["recipe"]["export"]["choose"]
    assert pinned_recipe(model, made).export.choose == "smallest"


def test_a_run_apart_reaches_no_paid_teacher(
    tmp_path: Path, model: RegisteredModel, made: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TEACHER_MODEL_ENDPOINT", "https://paid.example.com/v1")
    monkeypatch.delenv("TEACHER_MODEL_KEY", raising=False)
    before = dict(os.environ)
    with apart(tmp_path, pinned_recipe(model, made)):
        assert os.environ["TEACHER_MODEL_ENDPOINT"].startswith("http://127.0.0.1:")
        assert os.environ["DISTILLERY_STORE"] == str(tmp_path / "store")
        assert "DISTILLERY_LABELS" not in set(os.environ) - set(before)
    assert dict(os.environ) == before
