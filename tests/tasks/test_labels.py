"""What the flow asks of labels before a student is trained on them."""

import json
from pathlib import Path
from typing import Any, cast

import pytest
from chat_endpoint import ChatEndpoint, said
from prefect import flow
from written_run import description

from distillery.data.examples import write_examples
from distillery.errors import TeacherError
from distillery.labels.known import gold_labels, write_known_labels
from distillery.labels.quote import typical_answer
from distillery.recipe import OtherRecipe, PromptRecipe, Recipe, TeacherRecipe
from distillery.records import CLASSES_FILE, Example, Rows, TeacherLabels
from distillery.storage.artifacts import ArtifactStore
from tasks import labels as labels_module
from tasks.labels import AS_TOLD, check_shares, rows_to_ask
from tasks.labels import label as label_stage

CLASSES = ("billing", "delivery", "other")
OTHER = OtherRecipe(files=("texts.csv",))


def answered(counts: dict[str, int]) -> list[Example]:
    rows = []
    for label, count in counts.items():
        for number in range(count):
            name = f"{label}-{number}"
            rows.append(Example(example_id=name, question=name, answer_key=label, classes=CLASSES))
    return rows


def gold_of(folder: Path, counts: dict[str, int]) -> Rows:
    folder.mkdir()
    lines = [row.model_dump_json() + "\n" for row in answered(counts)]
    (folder / "gold.jsonl").write_text("".join(lines))
    (folder / CLASSES_FILE).write_text(json.dumps(CLASSES))
    artifact = ArtifactStore().put(folder)
    return Rows(artifact=artifact, file="gold.jsonl", rows=len(lines), sha256="0" * 64)


def labels_of(folder: Path, counts: dict[str, int]) -> TeacherLabels:
    folder.mkdir()
    rows, prompt = answered(counts), PromptRecipe(user="{text}", answer="class")
    write_known_labels(rows, gold_labels(rows), prompt, AS_TOLD, folder)
    artifact = ArtifactStore().put(folder)
    return TeacherLabels(
        artifact=artifact, teacher="gold", accepted=len(rows), rejected=0, soft=False
    )


def test_texts_of_none_do_not_count_among_the_shares(tmp_path: Path) -> None:
    """Their files are as long as they are: other rows need not have as many."""
    labels = labels_of(tmp_path / "labels", {"billing": 100, "delivery": 90, "other": 10})
    gold = gold_of(tmp_path / "gold", {"billing": 20, "delivery": 20, "other": 160})
    with pytest.raises(TeacherError, match=r"the labels' shares are 0\.75 from those of the gold"):
        check_shares(labels, gold, 0.5)
    assert check_shares(labels, gold, 0.5, OTHER) is None
    alone = gold_of(tmp_path / "alone", {"other": 160})
    check_shares(labels, alone, 0.5, OTHER)


def test_the_shares_of_chosen_rows_differ_on_purpose(tmp_path: Path) -> None:
    labels = labels_of(tmp_path / "labels", {"billing": 90, "delivery": 10})
    gold = gold_of(tmp_path / "gold", {"billing": 20, "delivery": 80})
    with pytest.raises(TeacherError, match="shares are 0\\.70"):
        check_shares(labels, gold, 0.5)
    assert check_shares(labels, gold, 0.5, chosen=True) is None
    collapsed = labels_of(tmp_path / "collapsed", {"billing": 100})
    with pytest.raises(TeacherError, match="the student would learn one answer"):
        check_shares(collapsed, gold, 0.5, chosen=True)


def test_a_teacher_that_knows_only_the_class_of_none_has_collapsed(tmp_path: Path) -> None:
    labels = labels_of(tmp_path / "labels", {"other": 200})
    gold = gold_of(tmp_path / "gold", {"billing": 20, "delivery": 20, "other": 20})
    with pytest.raises(TeacherError, match="100% of the labels are 'other', but 0% of the gold"):
        check_shares(labels, gold, 0.5, OTHER)


def test_labels_that_lean_to_one_class_are_told(tmp_path: Path) -> None:
    labels = labels_of(tmp_path / "labels", {"billing": 140, "delivery": 60})
    gold = gold_of(tmp_path / "gold", {"billing": 50, "delivery": 50, "other": 100})
    told = check_shares(labels, gold, 0.5, OTHER)
    assert told
    assert "lean to 'billing': 70% of them, but 50% of the gold answers" in told


def test_rows_with_cached_labels_are_asked_again_only_where_answers_grow_old(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(labels_module, "is_cached", lambda *_, **__: True)
    train: Any = "rows"

    def asked(**teacher: Any) -> list[tuple[Rows, TeacherRecipe]]:
        recipe = Recipe.model_validate({"preset": "lab", "teacher": teacher})
        return rows_to_ask(recipe, train, cast(Any, None), "gpt-test", test=False)

    assert asked() == []
    assert [rows for rows, _ in asked(max_age=30)] == [train]


@pytest.mark.slow
@pytest.mark.usefixtures("prefect_api")
def test_the_quote_of_a_run_goes_by_the_length_of_its_gold_answers(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    gold = [description(number) for number in range(3)]
    write_examples(gold, tmp_path / "gold.jsonl")
    unknown = {"answer_key": None, "references": ()}
    rows = [description(number).model_copy(update=unknown) for number in range(3, 6)]
    write_examples(rows, tmp_path / "train.jsonl")
    train = Rows(
        artifact=ArtifactStore().put(tmp_path), file="train.jsonl", rows=3, sha256="0" * 64
    )
    prompt = PromptRecipe(system="", user="{text}", answer="written")

    @flow
    def run() -> None:
        label_stage(train, prompt, TeacherRecipe(max_tokens=64), "gpt-test")

    with ChatEndpoint(lambda _: said("A text.")) as server:
        monkeypatch.setenv("TEACHER_MODEL_NAME", "gpt-test")
        monkeypatch.setenv("TEACHER_MODEL_ENDPOINT", server.url)
        monkeypatch.setenv("TEACHER_MODEL_KEY", "a-key")
        run()
    (quoted,) = [text for text in caplog.messages if "3 rows to label" in text]
    expected = 3 * (typical_answer(gold) or 0)
    assert f"about {expected} out (from the gold answers' lengths, at most 64 each)" in quoted
