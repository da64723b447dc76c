"""inference/batch"""

import csv
import json
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

from distillery.data.rows import to_example
from distillery.errors import DataError
from distillery.inference.onnx_student import OnnxStudent
from distillery.recipe import Columns, PromptRecipe
from distillery.records import Example, Record


class Prediction(Record):
    """One line of predictions.jsonl."""

    example_id: str
    answer: str
    probabilities: dict[str, float]


class InputRow(Example):
    """An Example that knows its line in the file, from 1 (in Parquet, its row)."""

    line: int


class FailedRow(Record):
    """A row that was set aside. `example_id` is empty where the row has none that can be read, `line` is None for rows
    that come from no file."""

    line: int | None
    example_id: str
    reason: str


class ScoreCounts(Record):
    rows: int
    failed: int


def score_file(
    student: OnnxStudent, examples: Iterable[Example | FailedRow], prompt: PromptRecipe, out: Path
) -> ScoreCounts:
    """Answers every row into `out`/predictions.jsonl; a row that can't be asked goes to failed.jsonl and stops nothing.

    Takes rows one by one and keeps none."""
    out.mkdir(parents=True, exist_ok=True)
    rows = failed = 0
    with (
        (out / "predictions.jsonl").open("w") as predictions,
        (out / "failed.jsonl").open("w") as failures,
    ):
        for example in examples:
            result = example if isinstance(example, FailedRow) else _score(student, example, prompt)
            if isinstance(result, Prediction):
                predictions.write(result.model_dump_json() + "\n")
                rows += 1
            else:
                failures.write(result.model_dump_json() + "\n")
                failed += 1
    return ScoreCounts(rows=rows, failed=failed)


def read_rows(path: Path, columns: Columns) -> Iterator[InputRow | FailedRow]:
    """The rows of a JSONL, CSV or Parquet file in the columns that dataset.py describes, answers optional, one by one.

    A malformed row comes as a FailedRow. Raises DataError for a file that can't be read or that lacks the column of the
    questions or the choices."""
    readers = {".jsonl": _jsonl, ".csv": _csv, ".parquet": _parquet}
    reader = readers.get(path.suffix.lower())
    if reader is None:
        raise DataError(
            f"{path}: a file to score ends in {', '.join(readers)}, not {path.suffix or 'a bare name'!r}"
        )
    try:
        for line, values in reader(path, columns):
            yield _row(line, values, columns)
    except OSError as error:
        raise DataError(
            f"{path}: can't be read ({error.strerror or error}); correct the path"
        ) from error


_Values = dict[str, Any] | str
"""A row as read, or why it can't be."""


def _row(line: int, values: _Values, columns: Columns) -> InputRow | FailedRow:
    if isinstance(values, str):
        return FailedRow(line=line, example_id="", reason=values)
    place = f"line {line}"
    try:
        example = to_example(values, columns, place)
    except DataError as error:
        name = values.get(columns.id) if columns.id else None
        known = str(name) if isinstance(name, str | int) else ""
        return FailedRow(line=line, example_id=known, reason=str(error).removeprefix(f"{place}: "))
    return InputRow(line=line, **example.model_dump())


def _jsonl(path: Path, columns: Columns) -> Iterator[tuple[int, _Values]]:
    with path.open("rb") as file:
        for number, line in enumerate(file, 1):
            if line.strip():
                yield number, _json_object(line)


def _json_object(line: bytes) -> _Values:
    try:
        values = json.loads(line.decode("utf-8-sig"))
    except UnicodeDecodeError:
        return "not UTF-8"
    except (ValueError, RecursionError) as error:
        return f"no JSON object ({error})"
    return values if isinstance(values, dict) else f"no JSON object but {type(values).__name__}"


def _csv(path: Path, columns: Columns) -> Iterator[tuple[int, _Values]]:
    # What is no UTF-8 becomes surrogates here, which the check of the row then refuses: one row, not the file.
    with path.open(encoding="utf-8-sig", errors="surrogateescape", newline="") as file:
        reader = csv.reader(file, strict=True)
        header: list[str] | None = None
        while True:
            start = reader.line_num + 1
            try:
                cells = next(reader, None)
            except csv.Error as error:
                yield start, f"no valid CSV ({error})"
                continue
            if cells is None:
                return
            if not cells:
                continue
            if header is None:
                header = _with_columns(cells, path, columns)
            elif len(cells) != len(header):
                yield start, f"{len(cells)} values under {len(header)} columns"
            else:
                yield start, dict(zip(header, cells, strict=True))


def _parquet(path: Path, columns: Columns) -> Iterator[tuple[int, _Values]]:
    import pyarrow  # type: ignore[import-untyped]
    import pyarrow.parquet  # type: ignore[import-untyped]

    try:
        with pyarrow.parquet.ParquetFile(path) as file:
            _with_columns(file.schema_arrow.names, path, columns)
            number = 0
            for batch in file.iter_batches(batch_size=256):
                for values in batch.to_pylist():
                    number += 1
                    yield number, values
    except pyarrow.ArrowException as error:
        raise DataError(
            f"{path}: no valid Parquet file ({' '.join(str(error).split())[:200]})"
        ) from error


def _with_columns(names: Sequence[str], path: Path, columns: Columns) -> list[str]:
    for setting, column in (("question", columns.question), ("choices", columns.choices)):
        if column not in names:
            raise DataError(
                f"{path}: no column {column!r}, only {', '.join(map(repr, names))}; "
                f"set dataset.columns.{setting} to the one that is meant"
            )
    return list(names)


def _score(student: OnnxStudent, example: Example, prompt: PromptRecipe) -> Prediction | FailedRow:
    try:
        answer = student.answer(example, prompt)
    except DataError as error:
        line = example.line if isinstance(example, InputRow) else None
        reason = str(error).removeprefix(f"{example.example_id}: ")
        return FailedRow(line=line, example_id=example.example_id, reason=reason)
    return Prediction(
        example_id=example.example_id, answer=answer.letter, probabilities=answer.probabilities
    )
