"""Answer rows in shards: what a shard of rows and the file of its answers hold, and how the answers
to all shards become files for the user.

A shard's columns: file and line, where the row comes from; example_id, question, concept, choices
and fields, as in an Example; reason, why the row can't be asked, else null. Its answers have as
many rows in the same order: example_id, answer, probabilities, abstained; reason, why the row was
set aside, else null. Neither holds a gold answer.
"""

import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from itertools import islice
from pathlib import Path
from typing import Any, Literal

from distillery.data.rows import RowReader
from distillery.errors import ModelError, OutOfResources, named_line
from distillery.inference.batch import (
    ROWS,
    FailedRow,
    InputRow,
    Prediction,
    ScoreCounts,
    answer_some,
    row_reader,
)
from distillery.inference.student import Student
from distillery.recipe import Columns, PromptRecipe
from distillery.records import AnswerFormat, Record, Sha256, Shard, ShardAnswers
from distillery.storage.artifacts import ArtifactStore
from distillery.storage.digests import sha256_of
from distillery.storage.output import Output
from distillery.storage.shards import read_rows, read_shard, read_table, write_table
from distillery.storage.working import working_folder

ORIGIN = ("file", "line")
"""The columns that say where a row comes from: no answer depends on them."""

SOME_FORMAT = AnswerFormat(max_tokens=1, metric="exact_match")
"""Stands for the format of written answers while rows are cut, which takes no model."""

ANSWERS_FILE = "answers.parquet"

MANIFEST = "manifest.json"

PARTS = "answers-*.parquet"

PARQUET_NAMES = re.compile(r"manifest\.json|answers-[0-9]{5,}\.parquet")

LINES_NAMES = re.compile(r"(predictions|failed)\.jsonl")

Form = Literal["jsonl", "parquet"]
"""The files that a user gets: predictions.jsonl and failed.jsonl, or answers-NNNNN.parquet."""


Answers = Literal["options", "classes", "texts"]
"""What a student answers with: an option of the row itself, one of its classes, or a text that it
writes."""


class AnswersPart(Record):
    """A file of answers: `answered` of its `rows` have an answer."""

    file: str
    rows: int
    answered: int
    sha256: Sha256


class AnswersManifest(Record):
    """The content of manifest.json beside answers-NNNNN.parquet, whose `parts` follow each other as
    the rows of the input do. It is written last."""

    model: str
    rows: int
    failed: int
    parts: tuple[AnswersPart, ...]


def row_schema() -> Any:
    """Return the pyarrow.Schema of a shard of rows."""
    import pyarrow  # type: ignore[import-untyped]

    text = pyarrow.string()
    columns = {"file": text, "line": pyarrow.int64(), "example_id": text, "question": text}
    columns |= {"concept": text, "choices": pyarrow.list_(text)}
    columns |= {"fields": pyarrow.map_(text, text), "reason": text}
    return pyarrow.schema(columns)


def answer_schema(origin: bool) -> Any:
    """Return the pyarrow.Schema of answers; with `origin`, of those that users get."""
    import pyarrow

    text = pyarrow.string()
    columns = {"file": text, "line": pyarrow.int64()} if origin else {}
    columns |= {"example_id": text, "answer": text}
    columns |= {"probabilities": pyarrow.map_(text, pyarrow.float64())}
    columns |= {"abstained": pyarrow.bool_(), "reason": text}
    return pyarrow.schema(columns)


def shard_reader(columns: Columns, fields: tuple[str, ...], answers: Answers) -> RowReader:
    """Return the reader of rows that are cut into shards, for a student of these `answers`."""
    return row_reader(
        columns,
        fields,
        () if answers == "classes" else None,
        SOME_FORMAT if answers == "texts" else None,
    )


def shard_row(row: InputRow | FailedRow, file: str | None) -> dict[str, Any]:
    """Return the columns of a row that was read from `file`."""
    where = {"file": file, "line": row.line, "example_id": row.example_id}
    if isinstance(row, FailedRow):
        empty = dict.fromkeys(("question", "concept", "choices", "fields"))
        return {**where, **empty, "reason": row.reason}
    return {
        **where,
        "question": row.question,
        "concept": row.concept,
        "choices": list(row.choices),
        "fields": dict(row.fields),
        "reason": None,
    }


def row_to_ask(columns: dict[str, Any], student: Student) -> InputRow | FailedRow:
    """Return a row of a shard as `student` is asked it."""
    line, example_id = columns["line"], columns["example_id"]
    if columns["reason"] is not None:
        return FailedRow(line=line, example_id=example_id, reason=columns["reason"])
    return InputRow(
        line=line,
        example_id=example_id,
        question=columns["question"],
        concept=columns["concept"],
        choices=tuple(columns["choices"]),
        fields=dict(columns["fields"]),
        classes=student.classes.classes if student.classes else (),
        format=student.format,
    )


def answer_shard(
    student: Student,
    shard: Shard,
    prompt: PromptRecipe,
    store: ArtifactStore,
    folder: Path,
    progress: Callable[[int], None],
) -> ScoreCounts:
    """Answer the rows of a shard into `folder`/answers.parquet. `progress` is told how many rows
    are done.

    The numbers are the same whichever shard was answered before. Raises ArtifactDamaged for a shard
    that is not as it was written, and what `answer_each` raises."""
    # What is cached of earlier prompts can change the last bits of long ones.
    student.forget()
    rows = [row_to_ask(columns, student) for columns in read_shard(shard, store)]
    results, answered = [], 0
    for result in answer_each(student, rows, prompt):
        answered += isinstance(result, Prediction)
        results.append(answer_row(result))
        progress(len(results))
    folder.mkdir(parents=True, exist_ok=True)
    write_table(results, answer_schema(origin=False), folder / ANSWERS_FILE)
    return ScoreCounts(rows=answered, failed=len(results) - answered)


def answer_each(
    student: Student, rows: Sequence[InputRow | FailedRow], prompt: PromptRecipe
) -> Iterator[Prediction | FailedRow]:
    """Yield the answer to each row, or why it has none, in the rows' order.

    Rows over which the model fails are asked one by one, and a row over which it then fails is set
    aside. Raises ModelError if the model fails over all of more than ROWS rows, and OutOfResources
    where memory lacks for a single row: then it is not the rows' fault."""
    answered = 0
    remaining = iter(rows)
    failed: Exception | None = None
    while some := list(islice(remaining, ROWS)):
        try:
            results = list(answer_some(student, some, prompt))
        except Exception:
            results = []
            for row in some:
                try:
                    results += answer_some(student, [row], prompt)
                except OutOfResources:
                    raise
                except MemoryError as error:
                    raise OutOfResources(
                        "memory runs out; free memory, or use a machine with more"
                    ) from error
                except Exception as error:
                    failed = error
                    reason = f"the model fails over this row: {named_line(error)}"
                    results.append(
                        FailedRow(line=row.line, example_id=row.example_id, reason=reason)
                    )
        answered += sum(isinstance(result, Prediction) for result in results)
        yield from results
    if failed is not None and not answered and len(rows) > ROWS:
        raise ModelError(f"the model answers none of {len(rows)} rows: {named_line(failed)}")


def answer_row(result: Prediction | FailedRow) -> dict[str, Any]:
    """Return the columns of a row's answer."""
    if isinstance(result, FailedRow):
        empty = dict.fromkeys(("answer", "probabilities", "abstained"))
        return {"example_id": result.example_id, **empty, "reason": result.reason}
    return {
        "example_id": result.example_id,
        "answer": result.answer,
        "probabilities": result.probabilities,
        "abstained": result.abstained,
        "reason": None,
    }


def part_name(number: int) -> str:
    """Return the name of the file with the answers to the shard `number`, from 0."""
    return f"answers-{number:05}.parquet"


def gather(
    shards: Sequence[Shard],
    answers: Sequence[ShardAnswers],
    model: str,
    store: ArtifactStore,
    folder: Path,
) -> AnswersManifest:
    """Write the answers to all shards, with the rows' origin, and manifest.json into `folder`.
    `model`: its name and version."""
    parts = []
    for number, (shard, found) in enumerate(zip(shards, answers, strict=True)):
        rows = []
        results = read_rows(found.artifact, ANSWERS_FILE, store)
        for row, result in zip(read_shard(shard, store), results, strict=True):
            rows.append({name: row[name] for name in ORIGIN} | result)
        path = folder / part_name(number)
        write_table(rows, answer_schema(origin=True), path)
        part = AnswersPart(
            file=path.name, rows=len(rows), answered=found.rows, sha256=sha256_of(path)
        )
        parts.append(part)
    failed = sum(found.failed for found in answers)
    manifest = AnswersManifest(
        model=model,
        rows=sum(part.rows for part in parts),
        failed=failed,
        parts=tuple(parts),
    )
    (folder / MANIFEST).write_text(manifest.model_dump_json(indent=1) + "\n", encoding="utf-8")
    return manifest


def results_in(rows: Iterable[dict[str, Any]]) -> Iterator[Prediction | FailedRow]:
    """Yield the lines of predictions.jsonl and failed.jsonl that rows of answers stand for."""
    for row in rows:
        where = {name: row[name] for name in ("file", "line", "example_id")}
        if row["reason"] is not None:
            yield FailedRow(**where, reason=row["reason"])
        else:
            yield Prediction(
                **where,
                answer=row["answer"],
                probabilities=row["probabilities"],
                abstained=row["abstained"],
            )


def write_output(folder: Path, form: Form, output: Output) -> None:
    """Write the answers in `folder`, lines or what `gather` has written, to the user's folder. The
    last file is predictions.jsonl or manifest.json: it is there only where all others are."""
    if form == "parquet":
        # Parts of an earlier input would count as parts of this one.
        output.replace([*sorted(folder.glob(PARTS)), folder / MANIFEST], PARQUET_NAMES)
        return
    with working_folder("output") as lines:
        if (folder / MANIFEST).exists():
            write_lines(folder, lines)
            folder = lines
        output.replace([folder / "failed.jsonl", folder / "predictions.jsonl"], LINES_NAMES)


def write_lines(folder: Path, target: Path) -> None:
    """Write predictions.jsonl and failed.jsonl from the Parquet files in `folder` to `target`."""
    manifest = AnswersManifest.model_validate_json((folder / MANIFEST).read_bytes())
    with (
        (target / "predictions.jsonl").open("w", encoding="utf-8") as predictions,
        (target / "failed.jsonl").open("w", encoding="utf-8") as failures,
    ):
        for part in manifest.parts:
            for result in results_in(read_table(folder / part.file)):
                file = predictions if isinstance(result, Prediction) else failures
                file.write(result.model_dump_json() + "\n")
