"""Rows whose answers are written: their form, and several answers to one text."""

import json
from pathlib import Path
from typing import Any

import pytest

from distillery.data.answer_format import named_format, with_schema
from distillery.data.examples import read_examples
from distillery.data.prepare import check_rows, prepare
from distillery.errors import DataError
from distillery.recipe import Columns, DatasetRecipe, Recipe, TaskRecipe
from distillery.records import Example

SCHEMA: dict[str, Any] = {
    "type": "object",
    "properties": {"city": {"type": "string"}, "days": {"type": "integer"}},
}

EXTRACT = TaskRecipe(kind="extract", schema=SCHEMA)

GENERATE = TaskRecipe(kind="generate", max_tokens=40)


def dataset(files: dict[str, list[Path]], **values: Any) -> DatasetRecipe:
    columns = Columns(question="text", choices=None, answer="answer")
    return DatasetRecipe(
        **{
            "source": "files",
            "files": {role: tuple(map(str, paths)) for role, paths in files.items()},
            "splits": {role: role for role in files},
            "columns": columns,
            **values,
        }
    )


def write_rows(path: Path, rows: list[dict[str, Any]]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def rows_of(role: str, answers: list[tuple[str, Any]], folder: Path) -> Path:
    rows = [{"text": text, "answer": answer} for text, answer in answers]
    return write_rows(folder / f"{role}.jsonl", rows)


def prepared(recipe: DatasetRecipe, task: TaskRecipe, out: Path) -> dict[str, list[Example]]:
    counts = prepare(recipe, out, task)
    return {role: read_examples(out / f"{role}.jsonl") for role in counts.splits}


def test_json_answers_are_written_in_one_form(tmp_path: Path) -> None:
    train = rows_of("train", [("a", {"days": 2, "city": "Oslo"}), ("b", None)], tmp_path)
    test = rows_of("test", [("c", '{"days":3}'), ("d", {})], tmp_path)
    splits = prepared(dataset({"train": [train], "test": [test]}), EXTRACT, tmp_path / "out")
    answers = {row.question: row.answer_key for rows in splits.values() for row in rows}
    assert answers == {"a": '{"city": "Oslo", "days": 2}', "b": None, "c": '{"days": 3}', "d": "{}"}
    for rows in splits.values():
        for row in rows:
            assert row.format == named_format(EXTRACT)
            assert row.keys == row.options == ()


def test_a_csv_holds_json_text(tmp_path: Path) -> None:
    path = tmp_path / "rows.csv"
    path.write_text('text,answer\na,"{""city"": ""Oslo""}"\nb,"{""days"":1}"\n')
    test = rows_of("test", [("c", {})], tmp_path)
    splits = prepared(dataset({"train": [path], "test": [test]}), EXTRACT, tmp_path / "out")
    assert {row.answer_key for row in splits["train"]} == {'{"city": "Oslo"}', '{"days": 1}'}


@pytest.mark.parametrize(
    ("answer", "reason"),
    [
        ("Oslo", "no JSON (Expecting value: line 1 column 1 (char 0))"),
        (
            "{'city': 'Oslo'}",
            "no JSON (Expecting property name enclosed in double quotes: line 1 column 2 (char 1))",
        ),
        ('{"city": "Oslo", "city": "Bergen"}', "JSON with a field twice in one object"),
        ({"city": 1}, "does not meet the schema: city: 1 is not of type 'string'"),
        (["Oslo"], "list where text belongs"),
    ],
)
def test_a_bad_answer_is_told_with_its_line(tmp_path: Path, answer: Any, reason: str) -> None:
    train = rows_of("train", [("a", {}), ("b", answer)], tmp_path)
    test = rows_of("test", [("c", {})], tmp_path)
    with pytest.raises(DataError) as error:
        check_rows(dataset({"train": [train], "test": [test]}), EXTRACT)
    assert str(error.value) == f"{train}:2: answer: {reason}; correct the row"


def test_several_answers_to_a_text_are_references(tmp_path: Path) -> None:
    several = [("one  text", "B"), ("One text", "A"), ("one text", "B"), ("other words here", "C")]
    gold = rows_of("gold", [("gold text", "X"), ("gold text", "Y")], tmp_path)
    train = rows_of("train", [("train text", "T"), ("train text", "U")], tmp_path)
    test = rows_of("test", several, tmp_path)
    recipe = dataset({"gold": [gold], "train": [train], "test": [test]})
    splits = prepared(recipe, GENERATE, tmp_path / "out")
    by_text = {row.question.casefold().replace("  ", " "): row for row in splits["test"]}
    assert len(splits["test"]) == len(by_text) == 2
    assert set(by_text["one text"].right_answers) == {"A", "B"}
    assert by_text["other words here"].right_answers == ("C",)
    assert [set(row.right_answers) for row in splits["train"]] == [{"T", "U"}]
    assert [row.right_answers for row in splits["gold"]] == [("X",), ("Y",)]
    counts = prepare(recipe, tmp_path / "again", GENERATE)
    assert counts.duplicates_dropped == 1, "the second B, and no other answer"


def test_rows_of_one_instruction_are_told_apart_by_their_columns(tmp_path: Path) -> None:
    rows = []
    for number in range(4):
        body = f"the body {number} of a letter"
        rows.append({"text": "Sum up the letter.", "body": body, "answer": f"{number}"})
    train, test = (write_rows(tmp_path / f"{name}.jsonl", rows) for name in ("train", "test"))
    write_rows(train, rows[:2])
    write_rows(test, rows[2:])
    recipe = dataset({"train": [train], "test": [test]}, fields=("body",), near_duplicate=1.0)
    splits = prepared(recipe, GENERATE, tmp_path / "out")
    assert [len(splits[role]) for role in ("train", "test")] == [2, 2]
    assert all(not row.references for row in splits["test"])


def test_a_split_is_another_one_with_another_format(tmp_path: Path) -> None:
    train = rows_of("train", [("a", "A")], tmp_path)
    test = rows_of("test", [("c", "C")], tmp_path)
    recipe = dataset({"train": [train], "test": [test]})
    digests = set()
    for number, task in enumerate((GENERATE, TaskRecipe(kind="generate", max_tokens=41))):
        digests.add(prepare(recipe, tmp_path / f"{number}", task).splits["train"].sha256)
    assert len(digests) == 2


def test_a_schema_may_stand_in_a_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "schema.json"
    path.write_text(json.dumps(SCHEMA))
    named = TaskRecipe(kind="extract", schema=str(path))
    assert with_schema(named) == EXTRACT
    assert named_format(named) == named_format(EXTRACT)
    path.write_text('{"type": "array"}')
    with pytest.raises(DataError, match=r"schema\.json: the answers are objects.*task.schema"):
        named_format(named)
    path.write_text('{"type": "object", "not": ' * 300 + "{}" + "}" * 300)
    with pytest.raises(DataError, match=r"schema\.json: nested too deeply"):
        named_format(named)
    path.write_text("{")
    with pytest.raises(DataError, match=r"schema\.json: can't be read .no JSON"):
        named_format(named)
    monkeypatch.setenv("PREFECT__FLOW_RUN_ID", "any")
    monkeypatch.setenv("DISTILLERY_DATA_FOLDERS", str(tmp_path))
    secret = tmp_path / "secret.env"
    secret.write_text(json.dumps(SCHEMA))
    with pytest.raises(DataError, match=r"a file that ends in \.json"):
        named_format(TaskRecipe(kind="extract", schema=str(secret)))


def test_a_split_is_another_one_with_the_fields_in_another_order(tmp_path: Path) -> None:
    """The answers are written in that order, and the file alone does not tell where none is
    known."""
    train = rows_of("train", [("a", None)], tmp_path)
    test = rows_of("test", [("c", {"days": 1})], tmp_path)
    recipe = dataset({"train": [train], "test": [test]})
    turned = {**SCHEMA, "properties": dict(reversed(SCHEMA["properties"].items()))}
    assert turned == SCHEMA
    digests = set()
    for number, schema in enumerate((SCHEMA, turned)):
        task = TaskRecipe(kind="extract", schema=schema)
        digests.add(prepare(recipe, tmp_path / f"{number}", task).splits["train"].sha256)
    assert len(digests) == 2


def test_texts_that_are_made_by_a_pattern_are_no_copies(tmp_path: Path) -> None:
    """By default; the same text in other letters and with other blanks is one."""
    pattern = "name[The Eagle], eatType[pub], food[English], area[riverside], near[Cafe {}]"
    texts = [pattern.format(number) for number in range(12)]
    path = write_rows(
        tmp_path / "rows.jsonl",
        [{"text": text, "answer": f"Rated {number}."} for number, text in enumerate(texts)]
        + [{"text": texts[0].upper().replace(" ", "  "), "answer": "Rated zero."}],
    )
    values: dict[str, Any] = {
        "task": {"kind": "generate"},
        "dataset": {"source": "files", "files": {"train": [str(path)]}, "carve": {"test": 0.4}},
    }
    recipe = Recipe.model_validate(values)
    splits = prepared(recipe.dataset, recipe.task, tmp_path / "out")
    assert sum(map(len, splits.values())) == 12
    assert len(splits["test"]) >= 2
    joined = [row for rows in splits.values() for row in rows if row.references]
    assert [set(row.right_answers) for row in joined] == [{"Rated 0.", "Rated zero."}]
    values["dataset"]["near_duplicate"] = 0.8
    recipe = Recipe.model_validate(values)
    with pytest.raises(DataError, match="no row is left for train"):
        prepare(recipe.dataset, tmp_path / "none", recipe.task)
