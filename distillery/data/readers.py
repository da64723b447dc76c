"""Read JSONL, CSV and Parquet files row by row: the only reader of tables in this project.

The name's ending tells the format. Text is UTF-8, with or without a byte order mark.
  .jsonl     one JSON object a line; blank lines are skipped
  .csv       the first row names the columns; each value is text, so that 'NA', 'null' and '007'
             stay as they are; a quoted value may span lines
  .parquet   each value as PyArrow converts it to Python
`open_table` streams rows in the file's order and marks those that are malformed: batch inference
sets these aside. `read_files` loads whole files and raises at the first malformed row: data
preparation and label files use it.
"""

import csv
import json
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple, TextIO

from distillery.errors import DataError
from distillery.storage.allowed import local_path

NOT_UTF8 = "not UTF-8; save the file in that encoding"

PARQUET_BATCH_ROWS = 256
"""Rows in memory at a time."""

_SURROGATES = re.compile("[\ud800-\udfff]")


class TableRow(NamedTuple):
    """A row as read. `line` is the line that it starts on, from 1; in Parquet, its row.

    A malformed row has a `fault`: what is wrong and what to do. Its `values` are empty if they
    can't be read. A CSV row that is not UTF-8 has a fault and values: the bad bytes may stand in
    a column that nobody needs.
    """

    line: int
    values: dict[str, Any]
    fault: str = ""


class OpenTable(NamedTuple):
    """A file that is being read. `columns` is None if no header names them: in JSONL each row has
    keys of its own, and an empty CSV file has no first row."""

    columns: Sequence[str] | None
    rows: Iterator[TableRow]


class Table(NamedTuple):
    """A whole file, or a whole split of a hub data set.

    `rows` are (where, values) pairs; where is FILE:LINE, or FILE:ROW for Parquet and the hub.
    """

    name: str
    columns: Sequence[str]
    rows: list[tuple[str, dict[str, Any]]]


def read_columns(
    paths: Sequence[str], wanted: Mapping[str, str]
) -> Iterator[tuple[str, dict[str, Any]]]:
    """Yield (where, values) for each row of the files in teacher.files.

    `wanted` maps the columns that every row must fill to their meanings. Raises DataError with
    the file, line and column.
    """
    for table in read_files("teacher.files", paths):
        for where, values in table.rows:
            for name, meaning in wanted.items():
                if values.get(name) in (None, ""):
                    raise DataError(f"{where}: {name}: missing; it is {meaning}")
            yield where, values


def read_files(setting: str, paths: Sequence[str]) -> Iterator[Table]:
    """Yield each file as a whole.

    Raises DataError for a file that can't be read or has no row, and for a malformed row.
    `setting` is the recipe's key that names the files.
    """
    for path in paths:
        yield read_file(setting, local_path(path, setting))


def read_file(setting: str, path: Path) -> Table:
    """Return a file as a whole; see `read_files`."""
    rows = []
    with open_table(setting, path) as (columns, streamed):
        refuse_equal_columns(path, columns)
        for line, values, fault in streamed:
            if fault:
                raise DataError(f"{path}:{line}: {fault}")
            rows.append((f"{path}:{line}", values))
    if not rows:
        raise DataError(f"{path}: empty, without a single row; correct {setting}")
    if columns is None:
        keys: dict[str, None] = {}
        for _, values in rows:
            keys.update(dict.fromkeys(values))
        columns = list(keys)
    return Table(str(path), columns, rows)


def refuse_equal_columns(path: Path, columns: Sequence[str] | None) -> None:
    """Raise DataError if two columns have one name."""
    if columns is not None and len(set(columns)) < len(columns):
        raise DataError(f"{path}:1: two columns of one name among {', '.join(columns)}; rename one")


@contextmanager
def open_table(setting: str, path: Path) -> Iterator[OpenTable]:
    """Open a file whose rows are read one by one as the caller asks for them.

    Raises DataError for a file that can't be read or is in another format. `setting` names the
    recipe's key or the parameter that holds the path.
    """
    suffix = path.suffix.lower()
    try:
        # Bytes that are not UTF-8 become lone surrogates, so that they spoil one row, not the file.
        if suffix == ".jsonl":
            with path.open(encoding="utf-8", errors="surrogateescape") as file:
                yield OpenTable(None, jsonl_rows(file))
        elif suffix == ".csv":
            with path.open(encoding="utf-8-sig", errors="surrogateescape", newline="") as file:
                yield open_csv(file, path)
        elif suffix == ".parquet":
            with open_parquet(path) as table:
                yield table
        else:
            raise DataError(
                f"{path}: {setting} takes .jsonl, .csv, .parquet, not {path.suffix!r}; convert it"
            )
    except OSError as error:
        raise DataError(
            f"{path}: can't be read ({error.strerror or cause_of(error)}); correct {setting}"
        ) from error


def jsonl_rows(file: TextIO) -> Iterator[TableRow]:
    """Yield the rows of a JSONL file."""
    for number, line in enumerate(file, 1):
        text = line.removeprefix("\ufeff").rstrip("\n")
        if has_surrogates(text):
            yield TableRow(number, {}, NOT_UTF8)
        elif text.strip():
            yield jsonl_row(number, text)


def jsonl_row(number: int, text: str) -> TableRow:
    """Return a line of a JSONL file as a row."""
    try:
        values = json.loads(text)
    except (ValueError, RecursionError) as error:
        return TableRow(number, {}, f"no JSON object ({error}); write one row a line")
    if not isinstance(values, dict):
        found = type(values).__name__
        return TableRow(number, {}, f"no JSON object but {found}; write one row a line")
    return TableRow(number, values)


def open_csv(file: TextIO, path: Path) -> OpenTable:
    """Read the header of a CSV file. Raises DataError if it is malformed."""
    cells = csv_cells(file)
    line, header, fault = next(cells, (1, [], ""))
    if fault:
        raise DataError(f"{path}:{line}: {fault}")
    return OpenTable(header or None, csv_rows(header, cells))


def csv_cells(file: TextIO) -> Iterator[tuple[int, list[str], str]]:
    """Yield the line that a row starts on, its cells and its fault; blank lines are skipped."""
    reader = csv.reader(file, strict=True)
    while True:
        line = reader.line_num + 1
        try:
            cells = next(reader)
        except StopIteration:
            return
        except csv.Error as error:
            yield line, [], f"no valid CSV ({error}); check the quotes"
        else:
            if cells:
                yield line, cells, ""


def csv_rows(
    header: Sequence[str], rows: Iterator[tuple[int, list[str], str]]
) -> Iterator[TableRow]:
    """Yield the rows of a CSV file from what `csv_cells` yields after the header."""
    for line, cells, fault in rows:
        if fault:
            yield TableRow(line, {}, fault)
        elif len(cells) != len(header):
            counts = f"{len(cells)} values under {len(header)} columns"
            yield TableRow(line, {}, f"{counts}; quote a value with a comma")
        else:
            values = dict(zip(header, cells, strict=True))
            if has_surrogates("".join(cells)):
                fault = NOT_UTF8
            yield TableRow(line, values, fault)


@contextmanager
def open_parquet(path: Path) -> Iterator[OpenTable]:
    """Open a Parquet file. Raises DataError if it is none, and OSError if it can't be read."""
    import pyarrow  # type: ignore[import-untyped]
    import pyarrow.parquet  # type: ignore[import-untyped]

    try:
        with path.open("rb") as file, pyarrow.parquet.ParquetFile(file) as parquet:
            yield OpenTable(parquet.schema_arrow.names, parquet_rows(parquet))
    except pyarrow.ArrowException as error:
        raise DataError(
            f"{path}: can't be read as parquet ({cause_of(error)}); write the file anew"
        ) from error


def parquet_rows(parquet: Any) -> Iterator[TableRow]:
    """Yield the rows of a pyarrow.parquet.ParquetFile."""
    number = 0
    for batch in parquet.iter_batches(batch_size=PARQUET_BATCH_ROWS):
        for index in range(batch.num_rows):
            number += 1
            try:
                (values,) = batch.slice(index, 1).to_pylist()
            except UnicodeDecodeError:
                yield TableRow(number, {}, NOT_UTF8)
            else:
                yield TableRow(number, values)


def has_surrogates(text: str) -> bool:
    """Return whether the text has half of a surrogate pair, which UTF-8 can't express."""
    return _SURROGATES.search(text) is not None


def cause_of(error: BaseException) -> str:
    """Return the innermost cause in a line of at most 200 characters."""
    while error.__cause__:
        error = error.__cause__
    text = " ".join(str(error).split()) or type(error).__name__
    if len(text) > 200:
        text = text[:199] + "…"
    return text
