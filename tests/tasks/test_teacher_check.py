import logging
from typing import Any

import pytest

import tasks.teacher_check
from distillery.errors import TeacherError
from distillery.recipe import TrainingRecipe, parse_recipe
from distillery.records import Artifact, Example, PreparedDataset, Split, TeacherCheck
from flows.distill import compare_teacher, weighed
from tasks.teacher_check import heed, rival, soft_weight_of

GOLD = ["a", "b"] * 30


@pytest.fixture(autouse=True)
def _logger(monkeypatch: pytest.MonkeyPatch) -> None:
    logger = logging.getLogger("heeded")
    monkeypatch.setattr(tasks.teacher_check, "get_run_logger", lambda: logger)


def checked(teacher_right: int, rival_right: int) -> TeacherCheck:
    """A teacher and a rival that are right on so many of the first of 60 rows."""

    def answers(right: int) -> list[str]:
        return [*GOLD[:right], *["none"] * (60 - right)]

    teacher = answers(teacher_right)
    return TeacherCheck(
        artifact=Artifact(uri="file:///none", sha256="0" * 64, bytes=0),
        rows=60,
        correct=teacher_right,
        rivals=(rival("linear probe", answers(rival_right), teacher, GOLD),),
    )


def test_a_better_teacher_is_taken_without_a_word(caplog: pytest.LogCaptureFixture) -> None:
    heed(checked(50, 40), own_model=True, insist=False)
    assert caplog.text == ""


def test_a_worse_one_is_told_as_long_as_it_may_be_chance(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO):
        heed(checked(49, 50), own_model=True, insist=False)
    assert "right on 49 of 60 validation rows, and linear probe on 50, which may be" in caplog.text
    assert caplog.records[-1].levelname == "INFO"


def test_a_local_teacher_that_is_proven_worse_does_not_label() -> None:
    with pytest.raises(TeacherError, match=r"right on 20 of 60 .* or set teacher.insist: true"):
        heed(checked(20, 50), own_model=True, insist=False)


def test_it_labels_if_the_recipe_insists_and_so_does_an_endpoint(
    caplog: pytest.LogCaptureFixture,
) -> None:
    heed(checked(20, 50), own_model=True, insist=True)
    heed(checked(20, 50), own_model=False, insist=False)
    assert caplog.text.count("linear probe on 50") == 2


def test_no_teacher_is_compared_where_all_gold_rows_are_texts_of_none() -> None:
    """No rival can learn from them, and an endpoint would be asked for nothing."""
    recipe = parse_recipe(
        {
            "dataset": {"carve": {"validation": 0.2, "test": 0.3}},
            "task": {"kind": "classify", "other": {"files": ["texts.csv"]}},
        },
        "recipe.yaml",
    )
    splits = {}
    for role in ("gold", "train", "validation", "test"):
        splits[role] = Split(file=f"{role}.jsonl", rows=20, sha256="0" * 64)
    artifact = Artifact(uri="file:///none", sha256="0" * 64, bytes=0)
    data = PreparedDataset(artifact=artifact, splits=splits)

    def again(name: str, _task: Any) -> Any:
        raise AssertionError(f"{name} ran")

    compare_teacher(recipe, data, None, "endpoint", again)


def test_the_teacher_s_probabilities_count_by_their_calibration() -> None:
    rows = [
        Example(example_id=f"{n}", question="?", answer_key="a", classes=("a", "b"))
        for n in range(200)
    ]
    # Never sure, and always right: the labels are worth more.
    weight = soft_weight_of([(0.6, 0.4)] * 199 + [None], rows)
    assert weight is not None
    assert weight < 0.2
    assert soft_weight_of([None] * 200, rows) is None
    check = checked(50, 40).model_copy(update={"soft_weight": weight})
    assert "make 9 % of the loss" in check.decisions[0]
    assert weighed(TrainingRecipe(soft_weight="auto"), check).soft_weight == round(weight, 3)
    assert weighed(TrainingRecipe(soft_weight=0.5), check).soft_weight == 0.5
    # Where nobody can tell, the probabilities count alone.
    assert weighed(TrainingRecipe(soft_weight="auto"), checked(50, 40)).soft_share == 1.0
