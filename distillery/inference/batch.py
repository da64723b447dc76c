"""Answer the rows of a file with a student.

Rows in: a JSONL, CSV or Parquet file (data/readers.py) in the columns that data/rows.py lists.
Files out: predictions.jsonl, one `Prediction` a line, and failed.jsonl, one `FailedRow` a line. A
row that is malformed, can't be asked or gets no answer is set aside there and stops nothing.
Rows are read, answered and written ROWS at a time, so memory stays flat however long the file is.
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
from itertools import islice
from pathlib import Path

from pydantic import Field

from distillery.answers import NotAnAnswer
from distillery.data.readers import TableRow, has_surrogates, open_table
from distillery.data.rows import RowReader, refuse_missing_columns, to_example
from distillery.errors import DataError
from distillery.inference.generation import Written
from distillery.inference.student import Answer, Student
from distillery.recipe import Columns, PromptRecipe
from distillery.records import AnswerFormat, Example, Record

ROWS = 16
"""Rows that are answered together: more of them, in passes of 256 tokens, gain little."""


class Prediction(Record):
    """One line of predictions.jsonl: the likeliest letter, and the probability of each letter; or a
    written answer, without probabilities.

    `file`: which of several files the row is in; left out if there is one. `line`: the row's line
    in the file, from 1; in Parquet, its row. Rows that come from no file leave it out. `abstained`:
    whether the student withholds the answer, because its probability is below the student's
    threshold. A student without a threshold leaves it out."""

    file: str | None = Field(None, exclude_if=lambda file: file is None)
    line: int | None = Field(None, exclude_if=lambda line: line is None)
    example_id: str
    answer: str
    probabilities: dict[str, float] = Field({}, exclude_if=lambda shares: not shares)
    abstained: bool | None = Field(None, exclude_if=lambda abstained: abstained is None)


class InputRow(Example):
    """An Example that knows its line in the file, from 1; in Parquet, its row."""

    line: int


class FailedRow(Record):
    """One line of failed.jsonl: a row that was set aside, and why.

    `example_id` is empty if the row has none that can be read. `line` is None for rows that come
    from no file. `file` is as in a Prediction.
    """

    file: str | None = Field(None, exclude_if=lambda file: file is None)
    line: int | None
    example_id: str
    reason: str


class ScoreCounts(Record):
    """How many rows were answered, and how many were set aside."""

    rows: int
    failed: int


def score_file(
    student: Student,
    examples: Iterable[Example | FailedRow],
    prompt: PromptRecipe,
    out: Path,
    progress: Callable[[int], None] | None = None,
) -> ScoreCounts:
    """Answer every row into `out`/predictions.jsonl; set aside the others in `out`/failed.jsonl.
    `progress` is told after each row how many are done."""
    out.mkdir(parents=True, exist_ok=True)
    rows = failed = 0
    remaining = iter(examples)
    with (
        (out / "predictions.jsonl").open("w", encoding="utf-8") as predictions,
        (out / "failed.jsonl").open("w", encoding="utf-8") as failures,
    ):
        while some := list(islice(remaining, ROWS)):
            for result in answer_some(student, some, prompt):
                if isinstance(result, Prediction):
                    predictions.write(result.model_dump_json() + "\n")
                    rows += 1
                else:
                    failures.write(result.model_dump_json() + "\n")
                    failed += 1
                if progress:
                    progress(rows + failed)
    return ScoreCounts(rows=rows, failed=failed)


def answer_some(
    student: Student, examples: Sequence[Example | FailedRow], prompt: PromptRecipe
) -> Iterator[Prediction | FailedRow]:
    """Yield the student's answer to each row, or why it can't be asked, in the rows' order."""
    asked = [example for example in examples if not isinstance(example, FailedRow)]
    answers = iter(student.answers(asked, prompt))
    for example in examples:
        if isinstance(example, FailedRow):
            yield example
        else:
            yield as_result(example, next(answers))


def as_result(example: Example, found: Answer | Written | DataError) -> Prediction | FailedRow:
    """Return the line for a row and its answer, or for why it can't be asked or has none."""
    line = example.line if isinstance(example, InputRow) else None
    if isinstance(found, DataError):
        reason = str(found).removeprefix(f"{example.example_id}: ")
        return FailedRow(line=line, example_id=example.example_id, reason=reason)
    if isinstance(found, Written):
        try:
            answer = found.answer(example.format)
        except NotAnAnswer as error:
            return FailedRow(line=line, example_id=example.example_id, reason=str(error))
        return Prediction(line=line, example_id=example.example_id, answer=answer)
    return Prediction(
        line=line,
        example_id=example.example_id,
        answer=found.letter,
        probabilities=found.probabilities,
        abstained=found.abstained,
    )


def row_reader(
    columns: Columns,
    fields: tuple[str, ...],
    classes: tuple[str, ...] | None,
    answer_format: AnswerFormat | None,
) -> RowReader:
    """Return the reader of rows for a student with these classes or this format of its answers;
    without either, each row has options of its own. `fields`: dataset.fields of its recipe."""
    if classes is not None or answer_format is not None:
        # A text is all that such a row needs.
        columns = columns.model_copy(update={"choices": None})
    return RowReader(columns, fields, classes is not None, classes or None, answer_format)


def read_rows(path: Path, reader: RowReader) -> Iterator[InputRow | FailedRow]:
    """Yield the rows of a file one by one, a malformed one as a FailedRow. Answers are optional.

    Raises DataError if the file can't be read, or lacks the column of the questions or choices.
    """
    with open_table("input_uri", path) as table:
        if table.columns is not None:
            refuse_missing_columns(
                str(path), table.columns, reader.needed("inference"), reader.fields
            )
        for row in table.rows:
            yield input_row(row, reader)


def count_rows(path: Path, most: int | None = None) -> int:
    """Return how many rows a file holds, malformed ones included; `most` if it holds as many or
    more. Raises DataError."""
    with open_table("input_uri", path) as table:
        return sum(1 for _ in islice(table.rows, most))


def input_row(row: TableRow, reader: RowReader) -> InputRow | FailedRow:
    """Return a row as an Example, or why it is none."""
    values = row.values
    if reader.classify or reader.format:
        # An answer that the file has is of no use here, and may be of another class or form.
        values = {name: value for name, value in values.items() if name != reader.columns.answer}
    try:
        example = to_example(values, reader, "row")
    except DataError as error:
        found = row.values.get(reader.columns.id) if reader.columns.id else None
        example_id = ""
        if isinstance(found, str | int) and not has_surrogates(str(found)):
            example_id = str(found)
        reason = row.fault or str(error).removeprefix("row: ")
        return FailedRow(line=row.line, example_id=example_id, reason=reason)
    shared = {"classes": example.classes, "format": example.format}
    return InputRow(line=row.line, **shared, **example.model_dump())
