"""Rows of shards and their answers: the files that there are without shards, and no row that spoils
others."""

import json
from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pyarrow.parquet  # type: ignore[import-untyped]
import pytest

from distillery.data.rows import RowReader
from distillery.errors import DataError, ModelError, OutOfResources
from distillery.inference.batch import FailedRow, InputRow, read_rows, row_reader, score_file
from distillery.inference.shards import (
    MANIFEST,
    ORIGIN,
    Answers,
    answer_each,
    answer_shard,
    gather,
    row_schema,
    row_to_ask,
    shard_reader,
    shard_row,
    write_output,
)
from distillery.inference.student import Answer
from distillery.recipe import Columns, PromptRecipe
from distillery.records import AnswerFormat, Example, Shard, ShardAnswers
from distillery.storage.artifacts import ArtifactStore
from distillery.storage.output import Output
from distillery.storage.shards import read_shard, write_shards

PROMPT = PromptRecipe()


class Stub:
    """A student that answers A, and fails over what a question says. `asked`: how many rows it was
    given at a time. `lack`: what it raises over a hungry row. `most`: rows that it has memory
    for."""

    lack: Exception = MemoryError()
    most = 16

    def __init__(self, classes: tuple[str, ...] = (), form: AnswerFormat | None = None) -> None:
        self.classes = SimpleNamespace(classes=classes) if classes else None
        self.format = form
        self.asked: list[int] = []

    def forget(self) -> None:
        self.asked.append(0)

    def answers(self, examples: Sequence[Example], _prompt: PromptRecipe) -> list[Any]:
        self.asked.append(len(examples))
        if any("poison" in example.question for example in examples):
            raise RuntimeError("an\ninvalid tensor")
        if any("hungry" in example.question for example in examples):
            raise self.lack
        if len(examples) > self.most:
            raise MemoryError
        found: list[Any] = []
        for example in examples:
            if "long" in example.question:
                found.append(DataError(f"{example.example_id}: the prompt is too long"))
            else:
                share = 1 / (3 + len(example.question))
                shares = {"A": 1 - share, "B": share}
                found.append(Answer(letter="A", probabilities=shares, abstained=None))
        return found


def student(**settings: Any) -> Any:
    return Stub(**settings)


def input_rows(questions: Sequence[str]) -> list[InputRow | FailedRow]:
    return [
        InputRow(line=number, example_id=f"r{number}", question=text, choices=("yes", "no"))
        for number, text in enumerate(questions, 1)
    ]


def write_file(path: Path, questions: Sequence[str]) -> Path:
    lines = []
    for number, text in enumerate(questions):
        row = {"id": f"r{number}", "question": text, "choices": ["yes", "no"]}
        lines.append(json.dumps(row) if text else '{"id": "bad"')
    path.write_text("\n".join(lines) + "\n")
    return path


def in_shards(path: Path, most: int, name: str | None = None) -> list[Shard]:
    found = (shard_row(row, name) for row in read_rows(path, RowReader(Columns())))
    return list(write_shards(found, row_schema(), ArtifactStore(), most, ORIGIN))


def answered(shards: Sequence[Shard], folder: Path) -> list[ShardAnswers]:
    found = []
    for number, shard in enumerate(shards):
        out = folder / f"shard-{number}"
        counts = answer_shard(student(), shard, PROMPT, ArtifactStore(), out, lambda _: None)
        found.append(ShardAnswers(artifact=ArtifactStore().put(out), **dict(counts)))
    return found


def test_a_row_is_asked_as_it_was_read() -> None:
    store = ArtifactStore()
    read: list[InputRow | FailedRow] = [
        InputRow(
            line=3,
            example_id="ü",
            question="Wo?",
            concept="c",
            choices=("hier", "dort"),
            fields={"b": "1", "a": ""},
        ),
        FailedRow(line=None, example_id="", reason="no JSON object"),
    ]
    (shard,) = write_shards([shard_row(row, "f") for row in read], row_schema(), store)
    rows = read_shard(shard, store)
    assert [row["file"] for row in rows] == ["f", "f"]
    assert [row_to_ask(row, student()) for row in rows] == read
    assert [*rows[0]["fields"]] == ["b", "a"]
    form = AnswerFormat(max_tokens=4, metric="exact_match")
    asked = row_to_ask(rows[0], student(classes=("x", "y"), form=form))
    assert isinstance(asked, InputRow)
    assert (asked.classes, asked.format) == (("x", "y"), form)


def test_a_gold_answer_changes_no_shard(tmp_path: Path) -> None:
    path = write_file(tmp_path / "rows.jsonl", ["one", "two"])
    (before,) = in_shards(path, 4)
    rows = [json.loads(line) | {"answerKey": "A"} for line in path.read_text().splitlines()]
    path.write_text("\n\n".join(map(json.dumps, rows)))
    (after,) = in_shards(path, 4)
    assert before.content_id == after.content_id


def test_the_lines_are_those_of_a_file_without_shards(tmp_path: Path) -> None:
    questions = [f"question {number}" for number in range(50)]
    questions[7], questions[20], questions[33] = "", "a long one", ""
    path = write_file(tmp_path / "rows.jsonl", questions)
    score_file(student(), read_rows(path, RowReader(Columns())), PROMPT, tmp_path / "whole")
    shards = in_shards(path, 16)
    folder = tmp_path / "gathered"
    folder.mkdir()
    manifest = gather(shards, answered(shards, tmp_path), "m version 1", ArtifactStore(), folder)
    assert (manifest.rows, manifest.failed, len(manifest.parts)) == (50, 3, 4)
    write_output(folder, "jsonl", Output(str(tmp_path / "out"), "output"))
    for name in ("predictions.jsonl", "failed.jsonl"):
        assert (tmp_path / "out" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()


@pytest.mark.parametrize(
    ("answers", "classes", "form"),
    [
        ("options", None, None),
        ("classes", ("x", "y"), None),
        ("texts", None, AnswerFormat(max_tokens=9, metric="exact_match")),
    ],
)
def test_rows_are_named_and_asked_as_in_a_file_without_shards(
    answers: Answers,
    classes: tuple[str, ...] | None,
    form: AnswerFormat | None,
    tmp_path: Path,
) -> None:
    """Rows without ids, which have names from their content, and with answers of another kind."""
    rows = [
        {"question": "What is it?", "choices": ["a", "b"], "text": text, "answerKey": 7}
        for text in ("one", "two", "")
    ]
    if answers == "options":
        rows = [row | {"answerKey": "B"} for row in rows]
    path = tmp_path / "rows.jsonl"
    path.write_text("\n".join(map(json.dumps, rows)))
    read = list(read_rows(path, row_reader(Columns(), ("text",), classes, form)))
    found = read_rows(path, shard_reader(Columns(), ("text",), answers))
    (shard,) = write_shards(
        (shard_row(row, None) for row in found), row_schema(), ArtifactStore(), 4, ORIGIN
    )
    asked = student(classes=classes or (), form=form)
    cut = [row_to_ask(row, asked) for row in read_shard(shard, ArtifactStore())]
    unanswered = [row.model_copy(update={"answer_key": None}) for row in read]
    assert cut == unanswered
    assert len({row.example_id for row in cut}) == (3 if answers == "texts" else 1)


def test_parquet_has_all_rows_in_their_order(tmp_path: Path) -> None:
    path = write_file(tmp_path / "rows.jsonl", ["one", "", "a long one", "poison", "two"])
    shards = in_shards(path, 2, "a.jsonl")
    folder, out = tmp_path / "gathered", tmp_path / "out"
    folder.mkdir()
    gather(shards, answered(shards, tmp_path), "m version 1", ArtifactStore(), folder)
    out.mkdir()
    for stale in ("answers-00000.parquet", "answers-00009.parquet", MANIFEST):
        (out / stale).write_text("of an earlier, longer input")
    write_output(folder, "parquet", Output(str(out), "output"))
    assert {file.name for file in out.iterdir()} == {
        *(f"answers-0000{number}.parquet" for number in range(3)),
        MANIFEST,
    }
    rows = pyarrow.parquet.read_table(out / "answers-00000.parquet").to_pylist()
    for number in (1, 2):
        rows += pyarrow.parquet.read_table(out / f"answers-0000{number}.parquet").to_pylist()
    assert [(row["file"], row["line"]) for row in rows] == [("a.jsonl", n) for n in range(1, 6)]
    assert [row["answer"] for row in rows] == ["A", None, None, None, "A"]
    reasons = [row["reason"] for row in rows]
    assert reasons[2] == "the prompt is too long"
    assert reasons[3] == "the model fails over this row: RuntimeError: an invalid tensor"


def test_a_row_over_which_the_model_fails_spoils_no_other() -> None:
    questions = [f"question {number}" for number in range(40)]
    questions[18] = "poison"
    stub = student()
    results = list(answer_each(stub, input_rows(questions), PROMPT))
    assert [type(result).__name__ for result in results].count("FailedRow") == 1
    assert [result.example_id for result in results] == [f"r{n}" for n in range(1, 41)]
    assert stub.asked == [16, 16, *[1] * 16, 8]


def test_a_model_that_fails_over_all_rows_fails_the_shard() -> None:
    with pytest.raises(ModelError, match=r"answers none of 40 rows: RuntimeError: an invalid"):
        list(answer_each(student(), input_rows(["poison"] * 40), PROMPT))
    # A few bad rows at the end of a file are no proof against the model.
    assert len(list(answer_each(student(), input_rows(["poison"] * 3), PROMPT))) == 3


@pytest.mark.parametrize("lack", [MemoryError(), OutOfResources("the model runs out of memory")])
def test_memory_that_lacks_is_no_row_s_result(lack: Exception, tmp_path: Path) -> None:
    stub = student()
    stub.lack = lack
    path = write_file(tmp_path / "rows.jsonl", ["one", "poison", "hungry"])
    (shard,) = in_shards(path, 4)
    with pytest.raises(OutOfResources, match="memory"):
        answer_shard(stub, shard, PROMPT, ArtifactStore(), tmp_path / "out", lambda _: None)
    assert not (tmp_path / "out").exists()


def test_a_text_on_memory_is_no_lack_of_it() -> None:
    """An error may quote the row."""
    stub = student()
    stub.lack = RuntimeError("no token for 'my phone is out of memory'")
    found = list(answer_each(stub, input_rows(["one", "hungry"]), PROMPT))
    assert [type(result).__name__ for result in found] == ["Prediction", "FailedRow"]


def test_rows_that_lack_memory_together_are_answered_one_by_one() -> None:
    stub = student()
    stub.most = 3
    found = list(answer_each(stub, input_rows(["one"] * 20), PROMPT))
    assert stub.asked == [16, *[1] * 16, 4, *[1] * 4]
    assert {type(result).__name__ for result in found} == {"Prediction"}


def test_no_shard_depends_on_the_one_before(tmp_path: Path) -> None:
    (shard,) = in_shards(write_file(tmp_path / "rows.jsonl", ["one"]), 4)
    stub = student()
    answer_shard(stub, shard, PROMPT, ArtifactStore(), tmp_path / "out", lambda _: None)
    assert stub.asked == [0, 1], "what is cached of earlier prompts is forgotten first"
