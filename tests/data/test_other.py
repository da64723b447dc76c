"""Texts of no class in the data become rows of a class of their own."""

import json
import logging
from pathlib import Path
from typing import Any

import pytest
from row_files import write

from distillery.data.examples import read_examples
from distillery.data.prepare import PreparedCounts, check_rows, prepare
from distillery.data.source import source_identity
from distillery.errors import DataError
from distillery.recipe import Recipe, parse_recipe
from distillery.records import CLASSES_FILE, Example

LABELS = ("refund", "delivery", "invoice")
CARVE = {"gold": 0.4, "validation": 0.2, "test": 0.4}
ITEMS = ("router", "cable", "modem", "parcel", "socket", "voucher", "meter", "antenna", "battery")


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def text(number: int, kind: str = "my") -> str:
    """A text that no other number's or kind's resembles."""
    words = [f"{kind}-{ITEMS[number // 9**place % 9]}" for place in range(4)]
    return f"{kind} {' '.join(words)} number {number}"


def rows(count: int, start: int = 0, label: str | None = None) -> list[dict[str, Any]]:
    """Rows of the data; their labels are LABELS in turn, or `label`."""
    found = []
    for number in range(start, start + count):
        answer = LABELS[number % 3] if label is None else label
        found.append({"text": text(number), "label": answer})
    return found


def bare(count: int, start: int = 1000) -> list[dict[str, Any]]:
    """Rows of the data without a label, which are those of train."""
    return rows(count, start, "")


def others(count: int) -> list[dict[str, Any]]:
    return [{"text": text(number, "chat")} for number in range(count)]


def recipe_of(
    name: str = "rows.jsonl", other: str = "other.jsonl", labels: Any = None, **dataset: Any
) -> Recipe:
    values = {
        "source": "files",
        "files": {"train": [name]},
        "splits": {"train": "train"},
        "carve": CARVE,
    }
    task = {"kind": "classify", "labels": labels, "other": {"files": [other]}}
    return parse_recipe({"dataset": values | dataset, "task": task}, "recipe.yaml")


def prepared(recipe: Recipe, out: str = "out") -> tuple[PreparedCounts, dict[str, list[Example]]]:
    counts = prepare(recipe.dataset, Path(out), recipe.task)
    return counts, {role: read_examples(Path(out) / f"{role}.jsonl") for role in counts.splits}


def roles_of(splits: dict[str, list[Example]], label: str = "other") -> dict[str, str]:
    """Return the role of each text that has the label."""
    found = {}
    for role, examples in splits.items():
        for example in examples:
            if example.answer_key == label:
                assert example.question not in found, "a text stands in two roles"
                found[example.question] = role
    return found


def shares(roles: dict[str, str]) -> dict[str, float]:
    found = list(roles.values())
    return {role: found.count(role) / len(found) for role in set(found)}


def refusal(recipe: Recipe) -> str:
    with pytest.raises(DataError) as caught:
        prepare(recipe.dataset, Path("refused"), recipe.task)
    assert "\n" not in str(caught.value)
    return str(caught.value)


@pytest.mark.parametrize("name", ["other.jsonl", "other.csv", "other.parquet"])
def test_the_texts_are_rows_of_their_class_in_each_role_but_train(name: str) -> None:
    write([*rows(60), *bare(30)], "rows.jsonl")
    # Ids and labels of other files mean something else.
    texts = [each | {"id": 1, "label": "weather"} for each in others(50)]
    recipe = recipe_of(other=write(texts, name))
    counts, splits = prepared(recipe)
    assert counts.classes == ("delivery", "invoice", "other", "refund")
    assert json.loads(Path("out", CLASSES_FILE).read_text()) == list(counts.classes)
    assert set(roles_of(splits)) == {each["text"] for each in texts}
    assert all(example.answer_key is None for example in splits["train"])
    assert all(example.keys == counts.classes for example in splits["gold"])
    assert counts.duplicates_dropped == 0
    assert check_rows(recipe.dataset, recipe.task) == {
        role: split.rows for role, split in counts.splits.items()
    }


def test_labels_that_are_named_are_followed_by_the_class() -> None:
    write([*rows(60), *bare(9)], "rows.jsonl")
    write(others(20), "other.jsonl")
    counts, _ = prepared(recipe_of(labels=list(LABELS)))
    assert counts.classes == (*LABELS, "other")
    Path("labels.txt").write_text("refund\ndelivery\ninvoice\nother\n")
    assert refusal(recipe_of(labels="labels.txt")) == (
        "labels.txt: the class 'other' is that of task.other; remove it here, or choose another "
        "task.other.label"
    )


def test_rows_of_the_data_may_have_the_class_too() -> None:
    write([*rows(60), *rows(3, 60, "other"), *bare(9)], "rows.jsonl")
    write(others(20), "other.jsonl")
    for labels in (None, list(LABELS)):
        _, splits = prepared(recipe_of(labels=labels), f"out-{labels}")
        assert len(roles_of(splits)) == 23


def test_the_texts_are_dealt_in_the_proportion_of_the_answered_rows() -> None:
    """Whatever is left for train: the answers of its rows are the teacher's."""
    write([*rows(300), *bare(9)], "rows.jsonl")
    write(others(900), "other.jsonl")
    for number, carve in enumerate((CARVE, {role: share / 4 for role, share in CARVE.items()})):
        _, splits = prepared(recipe_of(carve=carve), f"out-{number}")
        assert shares(roles_of(splits)) == pytest.approx(CARVE, abs=0.05)


@pytest.mark.parametrize(
    ("splits", "carve", "expected"),
    [
        ({"test": "test"}, {"gold": 0.8, "validation": 0.2}, (0.67, 0.17, 0.17)),
        ({"test": "test", "gold": "gold"}, {}, (0.78, 0, 0.22)),
        ({"test": "test"}, {}, (0.78, 0, 0.22)),
        ({}, {"test": 0.3}, (0.7, 0, 0.3)),
    ],
)
def test_roles_that_are_not_carved_get_their_part(
    splits: dict[str, str], carve: dict[str, float], expected: tuple[float, float, float]
) -> None:
    files = {}
    for number, name in enumerate(("train", "gold", "test")):
        files[name] = [
            write([*rows(40, 40 * number), *bare(9 * (name == "train"))], f"{name}.jsonl")
        ]
    write(others(900), "other.jsonl")
    recipe = recipe_of(files=files, splits={"train": "train", **splits}, carve=carve)
    assert recipe.student.gold, "the student learns the class from gold rows"
    found = shares(roles_of(prepared(recipe)[1]))
    for role, share in zip(("gold", "validation", "test"), expected, strict=True):
        assert found.get(role, 0) == pytest.approx(share, abs=0.05), role


def test_rows_that_are_added_move_none() -> None:
    write([*rows(100), *bare(9)], "rows.jsonl")
    write(others(100), "other.jsonl")
    _, before = prepared(recipe_of(), "before")
    _, again = prepared(recipe_of(), "again")
    assert again == before
    write([*rows(90, 100), *bare(9), *rows(100)], "rows.jsonl")
    write(others(190)[::-1], "other.jsonl")
    _, after = prepared(recipe_of(), "after")
    for label in ("other", *LABELS):
        assert roles_of(before, label).items() < roles_of(after, label).items()


def test_texts_move_no_row_of_the_data() -> None:
    write([*rows(100), *bare(50)], "rows.jsonl")
    write(others(50), "other.jsonl")
    _, splits = prepared(recipe_of())
    recipe = recipe_of()
    task = recipe.task.model_copy(update={"other": None})
    _, without = prepared(recipe.model_copy(update={"task": task}), "without")
    for role, examples in splits.items():
        own = [example.question for example in examples if example.answer_key != "other"]
        assert own == [example.question for example in without[role]]


def test_texts_that_have_a_label_are_left_out_and_told(caplog: pytest.LogCaptureFixture) -> None:
    write([*rows(60), *bare(20)], "rows.jsonl")
    labelled = rows(5)
    twice = [{"text": others(1)[0]["text"].upper()}]
    write([*labelled, *bare(3), *others(30), *twice], "other.jsonl")
    with caplog.at_level(logging.WARNING):
        counts, splits = prepared(recipe_of())
    said = caplog.messages
    assert len(said) == 1
    assert said[0].startswith("task.other.files: 5 of 38 texts stand in the data with a label, ")
    assert "other.jsonl:" in said[0]
    assert " = rows.jsonl:" in said[0]
    assert len(roles_of(splits)) == 33
    assert len(splits["train"]) == 17, "a text that is out of scope is not asked of the teacher"
    assert counts.duplicates_dropped == 5 + 3 + 1
    write(labelled, "other.jsonl")
    assert refusal(recipe_of()) == (
        "task.other.files: of 5 texts, 5 stand in the data with a label, and none of the others is "
        "left to learn from; add texts that are out of scope"
    )


def test_texts_of_rounds_to_come_are_held_back() -> None:
    write([*rows(400), *bare(9)], "rows.jsonl")
    write(others(400), "other.jsonl")
    carve = {"gold": 0.3, "test": 0.1}
    seen: set[str] = set()
    for number in range(4):
        rotation = {"rounds": 4, "round": number}
        _, splits = prepared(recipe_of(carve=carve, rotation=rotation), f"out-{number}")
        roles = roles_of(splits)
        test = {name for name, role in roles.items() if role == "test"}
        assert len(test) == pytest.approx(400 * 0.1 / 0.7, abs=20)
        assert not test & seen
        seen |= test
        assert list(roles.values()).count("gold") == pytest.approx(400 * 0.3 / 0.7, abs=30)


def test_a_sample_takes_its_part_of_the_class() -> None:
    write([*rows(300), *bare(9)], "rows.jsonl")
    write(others(300), "other.jsonl")
    files = {"train": ["rows.jsonl"], "gold": [write(rows(200, 300), "gold.jsonl")]}
    sources: list[dict[str, Any]] = [
        {},
        {"files": files, "splits": {"train": "train", "gold": "gold"}, "carve": {"test": 0.3}},
    ]
    for number, source in enumerate(sources):
        _, whole = prepared(recipe_of(**source), f"whole-{number}")
        _, part = prepared(recipe_of(**source, sample={"gold": 100}), f"part-{number}")
        answers = [row.answer_key for row in whole["gold"]]
        expected = 100 * answers.count("other") / len(answers)
        found = [row.answer_key for row in part["gold"]].count("other")
        assert found == pytest.approx(expected, abs=15)


def test_a_correction_gives_a_text_its_class() -> None:
    write([*rows(60), *bare(9)], "rows.jsonl")
    write(others(30), "other.jsonl")
    wrong = others(30)[7]["text"]
    write([{"text": wrong, "label": "refund"}], "corrections.csv")
    _, splits = prepared(recipe_of(corrections=["corrections.csv"]))
    assert wrong not in roles_of(splits)
    assert wrong in roles_of(splits, "refund")


@pytest.mark.parametrize(
    ("name", "content", "said"),
    [
        ("other.csv", "text\nhello\n \n", "other.csv:3: text: empty; fill it in or remove the row"),
        ("other.jsonl", '{"text": 0.5}\n', "other.jsonl:1: text: float where text belongs; "),
        ("other.jsonl", "", "other.jsonl: empty, without a single row; correct task.other.files"),
        ("other.txt", "hello", "other.txt: task.other.files takes .jsonl, .csv, .parquet, not "),
        (
            "other.csv",
            "message\nhello\n",
            "other.csv: no column 'text', only 'message'; the files of task.other need the text in "
            "the same columns as those of the dataset",
        ),
    ],
)
def test_a_text_that_is_none_is_named(name: str, content: str, said: str) -> None:
    write([*rows(60), *bare(9)], "rows.jsonl")
    Path(name).write_text(content)
    assert refusal(recipe_of(other=name)).startswith(said)


def test_the_source_has_another_identity_if_a_text_changes() -> None:
    write([*rows(60), *bare(9)], "rows.jsonl")
    write(others(30), "other.jsonl")
    recipe = recipe_of()
    found = [source_identity(recipe.dataset), source_identity(recipe.dataset, recipe.task.other)]
    write(others(31), "other.jsonl")
    found.append(source_identity(recipe.dataset, recipe.task.other))
    assert len(set(found)) == 3
    Path("other.jsonl").rename("moved.jsonl")
    assert source_identity(recipe.dataset, recipe_of(other="moved.jsonl").task.other) == found[-1]
    with pytest.raises(DataError, match=r"other\.jsonl: no such file; correct task\.other\.files"):
        source_identity(recipe.dataset, recipe.task.other)
