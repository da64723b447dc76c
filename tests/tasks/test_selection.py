"""Which train rows are labelled: chosen by the last student or by words, with what stays of the
rows before; with a real registry and real prepared rows."""

import json
import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import registered_student

import tasks.selection
from distillery.data.examples import read_examples
from distillery.data.prepare import write_chosen
from distillery.errors import DataError
from distillery.labels.acceptance import stored_answer
from distillery.labels.questions import questions
from distillery.labels.report import Tally
from distillery.labels.store import LabelStore
from distillery.recipe import CascadeRecipe, PromptRecipe, Recipe, SelectRecipe, TeacherRecipe
from distillery.records import (
    Artifact,
    CascadeFigures,
    Example,
    PreparedDataset,
    RegisteredModel,
    Rows,
    Selection,
    Split,
)
from distillery.registry.history import Actor
from distillery.registry.last_student import LastStudent, find_last_student, shares_by_student
from distillery.registry.local import LocalRegistry
from distillery.report.facts import labelling_facts
from distillery.storage.artifacts import ArtifactStore
from distillery.teacher.reply import Completion

PROMPT = PromptRecipe(user="{text}", answer="class")
CLASSES = ("pets", "tools")
WORDS = {"pets": ("cat", "dog", "parrot"), "tools": ("saw", "hammer", "drill")}

pytestmark = pytest.mark.usefixtures("own_registry")


@pytest.fixture(autouse=True)
def without_prefect(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tasks.selection, "conclude", print)
    monkeypatch.setattr(tasks.selection, "show_rows", lambda done, of: None)


def row(number: int, answered: bool = False, classes: Sequence[str] = CLASSES) -> Example:
    label = CLASSES[number % 2]
    text = f"my {WORDS[label][number % 3]} is number {number}"
    return Example(
        example_id=f"row-{number}",
        question=text,
        classes=tuple(classes),
        answer_key=label if answered else None,
    )


def rows_in_store(folder: Path, name: str, rows: Sequence[Example]) -> Rows:
    """These rows as a split of their own."""
    (folder / name).mkdir()
    split = write_chosen(rows, folder / name / f"{name}.jsonl")
    return Rows(artifact=ArtifactStore().put(folder / name), **split.model_dump())


def read(rows: Rows) -> list[Example]:
    return read_examples(ArtifactStore().fetch(rows.artifact) / rows.file)


def select(
    train: Rows,
    gold: Rows | None = None,
    last: RegisteredModel | None = None,
    learnt: Rows | None = None,
    teacher: TeacherRecipe | None = None,
    **settings: Any,
) -> Selection:
    recipe = SelectRecipe.model_validate({"rows": 6, **settings})
    teacher = teacher or TeacherRecipe()
    cheap = "small" if teacher.cascade else None
    found: Selection = tasks.selection.select_rows.fn(
        train, recipe, last, learnt, gold, PROMPT, teacher, "large", cheap
    )
    return found


def test_words_of_the_gold_rows_tell_what_is_unsure(tmp_path: Path) -> None:
    known = [row(number) for number in range(20)]
    odd = [row(number).model_copy(update={"question": f"my yak {number}"}) for number in (21, 22)]
    train = rows_in_store(tmp_path, "train", known + odd)
    gold = rows_in_store(tmp_path, "gold", [row(number, answered=True) for number in range(12)])
    found = select(train, gold, rows=2, by="uncertainty")
    assert [each.question for each in read(found.rows)] == ["my yak 21", "my yak 22"]
    assert found.line() == (
        "2 of 22 train rows are labelled; chosen by uncertainty (TF-IDF on gold rows)"
    )
    assert (found.kept, found.train_sha256) == (0, train.sha256)


def test_chosen_rows_are_a_split_in_the_order_of_the_train_rows(tmp_path: Path) -> None:
    train = rows_in_store(tmp_path, "train", [row(number) for number in range(20)])
    found = select(train, by="diversity")
    chosen = read(found.rows)
    numbers = [int(each.example_id.partition("-")[2]) for each in chosen]
    assert numbers == sorted(numbers)
    assert len(numbers) == found.chosen.rows == 6
    assert chosen[0].classes == CLASSES
    file = ArtifactStore().fetch(found.artifact) / "selection.jsonl"
    lines = [json.loads(line) for line in file.read_text().splitlines()]
    assert {line["example_id"] for line in lines} == {each.example_id for each in chosen}
    assert {line["why"] for line in lines} == {"different"}
    again = select(train, by="diversity")
    assert again.artifact.sha256 == found.artifact.sha256


def test_rows_of_which_nobody_is_sure_are_chosen_by_diversity(tmp_path: Path) -> None:
    rows = [
        registered_student.example(f"r{number}").model_copy(
            update={"choices": (f"yes {number}", f"no {number}")}
        )
        for number in range(12)
    ]
    train = rows_in_store(tmp_path, "train", rows)
    found = select(train, gold=train)
    assert found.chosen.rows == 6
    assert found.line().endswith(
        "chosen by diversity; there is no student yet, and of words the options differ from row to "
        "row, so that letters are no classes"
    )
    with pytest.raises(DataError, match=r"teacher\.select\.by: uncertainty: nobody knows it"):
        select(train, gold=train, by="uncertainty")


RECIPE: dict[str, Any] = {
    "name": "mine",
    "task": {"kind": "classify"},
    "dataset": {"source": "files", "files": {"train": ["a.csv"]}, "carve": {"test": 0.2}},
    "teacher": {"kind": "endpoint", "select": {"rows": 6, "by": "diversity"}},
    "registry": {"model_name": "mine"},
}


def recipe(**teacher: Any) -> Recipe:
    return Recipe.model_validate({**RECIPE, "teacher": {**RECIPE["teacher"], **teacher}})


def prepared(train: Rows) -> PreparedDataset:
    split = Split(file=train.file, rows=train.rows, sha256=train.sha256)
    return PreparedDataset(artifact=train.artifact, splits={"train": split})


def register(folder: Path, train: Rows, **made: Any) -> RegisteredModel:
    """Register a champion that has learnt from these train rows."""
    content = folder / "model"
    content.mkdir()
    (content / "model.onnx").write_text("weights")
    provenance: dict[str, Any] = {
        "recipe": recipe().model_dump(mode="json"),
        "teacher": "large",
        "data": prepared(train).model_dump(mode="json"),
        **made,
    }
    registry = LocalRegistry()
    model = registry.register(content, "mine", {}, provenance)
    registry.promote(model, None, Actor("a run"))
    return model


def last_of(
    train: Rows, identity: str = "large", cheap: str | None = None, **teacher: Any
) -> LastStudent:
    return find_last_student(
        LocalRegistry(), recipe(**teacher), prepared(train), identity, ArtifactStore(), cheap
    )


def test_what_the_last_student_learnt_stays(tmp_path: Path) -> None:
    before = rows_in_store(tmp_path, "before", [row(number) for number in range(20)])
    assert last_of(before) == LastStudent()
    first = select(before, by="diversity")
    champion = register(tmp_path, before, selection=first.model_dump(mode="json"))

    # The same run again takes the same rows: it pays for nothing anew.
    assert last_of(before).selection == first
    # More rows have come: those of before stay, and as many again are added.
    train = rows_in_store(tmp_path, "train", [row(number) for number in range(5, 40)])
    last = last_of(train)
    assert last.model
    assert last.model.version == champion.version
    assert last.selection is None
    assert last.learnt == first.rows
    second = select(train, learnt=last.learnt, by="diversity")
    still_there = {each.question for each in read(first.rows)} & {
        each.question for each in read(train)
    }
    chosen = {each.question for each in read(second.rows)}
    assert second.kept == len(still_there)
    assert still_there < chosen
    assert len(chosen) == second.kept + 6


def test_rows_whose_answers_are_stored_stay(tmp_path: Path) -> None:
    """Whether or not a student that learnt from them was promoted."""
    rows = [row(number) for number in range(20)]
    train = rows_in_store(tmp_path, "train", rows)
    cascade = TeacherRecipe(cascade=CascadeRecipe(below=0.9))
    assert cascade.cascade

    def answer(number: int, teacher: TeacherRecipe, identity: str, share: float) -> None:
        (question,) = questions(rows[number], PROMPT, teacher, identity)
        top = (("pets", math.log(share)), ("tools", math.log(1 - share)))
        completion = Completion("pets", "stop", top_logprobs=top, answer_letter="pets")
        with LabelStore() as store:
            store.add(stored_answer(question, completion, teacher, identity))

    answer(3, TeacherRecipe(), "large", 0.99)
    found = select(train, by="diversity")
    assert (found.kept, found.chosen.rows) == (1, 7)
    assert rows[3].question in {each.question for each in read(found.rows)}
    answer(4, cascade.cascade, "small", 0.99)
    answer(5, cascade.cascade, "small", 0.6)
    # Row 3 has no cheap answer, and the teacher is still to be asked about row 5.
    assert select(train, by="diversity", teacher=cascade).kept == 1
    answer(5, cascade, "large", 0.99)
    assert select(train, by="diversity", teacher=cascade).kept == 2


def test_rows_stay_only_where_their_answers_are_known(tmp_path: Path) -> None:
    """Another teacher, or one that is asked otherwise, would be paid for them anew."""
    before = rows_in_store(tmp_path, "before", [row(number) for number in range(20)])
    first = select(before, by="diversity")
    register(tmp_path, before, selection=first.model_dump(mode="json"))
    for last in (last_of(before, "other"), last_of(before, max_tokens=99)):
        assert last.model
        assert (last.learnt, last.selection) == (None, None)
    # Another choice of the same rows; and settings on which no answer depends.
    assert last_of(before, select={"rows": 7, "by": "diversity"}).selection is None
    assert last_of(before, concurrency=3).selection == first


def test_rows_stay_only_where_the_cheap_teacher_is_the_same(tmp_path: Path) -> None:
    before = rows_in_store(tmp_path, "before", [row(number) for number in range(20)])
    first = select(before, by="diversity")
    register(
        tmp_path,
        before,
        selection=first.model_dump(mode="json"),
        recipe=recipe(cascade={"below": 0.8}).model_dump(mode="json"),
        labels={"cascade": {"cheap": "small"}},
    )
    same = {"below": 0.8, "concurrency": 3}
    filters = {"agreement_with_gold": True}
    assert last_of(before, cheap="small", cascade=same, filters=filters).selection == first
    assert last_of(before, cheap="other", cascade=same).selection is None
    assert last_of(before, cheap="small", cascade={"below": 0.9}).selection is None


def test_a_student_of_all_rows_has_learnt_them_all(tmp_path: Path) -> None:
    before = rows_in_store(tmp_path, "before", [row(number) for number in range(20)])
    register(tmp_path, before)
    assert last_of(before).learnt == Rows(
        artifact=before.artifact, file=before.file, rows=20, sha256=before.sha256
    )


def test_rows_that_are_no_longer_in_the_store_do_not_stay(tmp_path: Path) -> None:
    before = rows_in_store(tmp_path, "before", [row(number) for number in range(20)])
    gone = Artifact(uri="file:///gone", sha256="e" * 64, bytes=1)
    register(tmp_path, before.model_copy(update={"artifact": gone}))
    last = last_of(before)
    assert last.model
    assert last.learnt is None


def test_a_student_tells_of_which_rows_it_is_sure(tiny_onnx: Callable[..., Path]) -> None:
    rows = [registered_student.example(f"r{number}") for number in range(20)]
    rows[3] = rows[3].model_copy(update={"question": "long " * 2000})
    folder = tiny_onnx("llama")
    shares = shares_by_student(folder, rows, PromptRecipe())
    assert shares is not None
    assert shares[3] is None, "its prompt is too long"
    known = [each for each in shares if each is not None]
    assert len(known) == 19
    for each in known:
        assert len(each) == 2
        assert sum(each) == pytest.approx(1)
    assert shares_by_student(folder, [row(1)], PromptRecipe()) is None, "it has other classes"


def test_what_was_saved_is_told(tmp_path: Path) -> None:
    train = rows_in_store(tmp_path, "train", [row(number) for number in range(20)])
    selection = select(train, by="diversity")
    labels = registered_student.labels(tmp_path / "labels", {"row-1": "pets"})
    figures = CascadeFigures(
        cheap="small",
        below=0.8,
        cheap_rows=3,
        dear_rows=3,
        compared=2,
        agreed=1,
        cheap_asked=6,
        dear_asked=3,
        cheap_cost=0.06,
        dear_cost=0.18,
        saved=0.12,
    )
    changed = {"cascade": figures, "equal": 2, "cached_saved": 0.5, "cost": 0.24, "asked": 6}
    facts = dict(labelling_facts(labels.model_copy(update=changed), Tally().report(), selection))
    assert facts["saved by cached tokens"] == "0.50 EUR"
    assert facts["saved by asking equal rows once"] == "2 calls, about 0.08 EUR"
    assert facts["labels of small, 0.8 or surer"] == "3"
    assert facts["of 2 rows that both answered, they agree on"] == "50.0%"
    assert facts["calls of the teacher"] == "3, 0.18 EUR"
    assert facts["saved against the teacher alone"] == "about 0.12 EUR"
    # Six rows for 0.24 EUR; the other 14 would have cost 0.56.
    assert facts["saved by choosing rows"] == "about 0.56 EUR: 14 rows were not asked"
    plain = dict(labelling_facts(labels, Tally().report()))
    assert not any(name.startswith("saved") for name in plain)
