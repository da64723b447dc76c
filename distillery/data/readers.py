"""Read JSONL, CSV and Parquet files row by row: the only reader of tables in this project.

The name's ending tells the format. Text is UTF-8, with or without a byte order mark.
  .jsonl     one JSON object a line; blank lines are skipped
  .csv       the first row names the columns; each value is text, so that 'NA', 'null' and '007'
             stay as they are; a quoted value may span lines
  .parquet   each value as PyArrow converts it to Python
`open_table` streams rows in the file's order and marks those that are malformed: batch inference
sets these aside. `each_row` raises at the first malformed row: label files use it, through
`read_columns`, and data preparation through `read_files`.

No row takes more than DISTILLERY_ROW_MB, whatever the file holds: a longer one is malformed, and of
a Parquet file no more is unfolded at a time than a few such rows take (`parquet_rows`).
"""

import csv
import json
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple, TextIO

from distillery.data.pages import DELTA_BYTE_ARRAY, Chunk, ColumnPages, read_footer, read_pages
from distillery.errors import DataError, one_line
from distillery.settings import LocalSettings
from distillery.storage.allowed import local_path

NOT_UTF8 = "not UTF-8; save the file in that encoding"

NO_VALID_CSV = "no valid CSV"
"""What the fault of a CSV row with wrong quotes begins with."""

PARQUET_BATCH_ROWS = 256
"""Rows of a Parquet file in memory at a time, at most."""

BATCH_SHARE = 8
"""A batch of Parquet rows takes as much as this many rows of DISTILLERY_ROW_MB, or is one row."""

PAGES_SHARE = 64
"""The open pages of a Parquet file's columns take as much as this many such rows, at most."""

SKIPPED_CHARACTERS = 65_536
"""How much of a line that is too long is read at a time."""

LISTED_NAMES = 20
"""Columns that an error lists at most."""

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
    """A file, or a split of a hub data set, whose rows are read as the caller asks for them.

    `rows` are (where, values) pairs; where is FILE:LINE, or FILE:ROW for Parquet and the hub.
    `columns` has the names of all columns once all rows are read: in JSONL each row has its own.
    """

    name: str
    columns: dict[str, None]
    rows: Iterator[tuple[str, dict[str, Any]]]


def read_columns(
    paths: Sequence[str], wanted: Mapping[str, str]
) -> Iterator[tuple[str, dict[str, Any]]]:
    """Yield (where, values) for each row of the files in teacher.files, as it is read.

    `wanted` maps the columns that every row must fill to their meanings. Raises DataError with
    the file, line and column.
    """
    setting = "teacher.files"
    for path in paths:
        for where, values in each_row(setting, local_path(path, setting)):
            for name, meaning in wanted.items():
                if values.get(name) in (None, ""):
                    raise DataError(f"{where}: {name}: missing; it is {meaning}")
            yield where, values


def read_files(setting: str, paths: Sequence[str]) -> Iterator[Table]:
    """Yield each file as a table.

    Raises DataError for a file that can't be read or has no row, and for a malformed row, once its
    rows are read. `setting` is the recipe's key that names the files.
    """
    for path in paths:
        yield read_file(setting, local_path(path, setting))


def read_file(setting: str, path: Path) -> Table:
    """Return a file as a table; see `read_files`."""
    columns: dict[str, None] = {}

    def rows() -> Iterator[tuple[str, dict[str, Any]]]:
        for where, values in each_row(setting, path):
            columns.update(dict.fromkeys(values))
            yield where, values

    return Table(str(path), columns, rows())


def each_row(setting: str, path: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    """Yield (where, values) for each row of a file, as it is read. Raises DataError as
    `read_files` does, for a malformed row once the rows before it are read."""
    is_empty = True
    with open_table(setting, path, whole=True) as (columns, rows):
        refuse_equal_columns(path, columns)
        for line, values, fault in rows:
            if fault:
                raise DataError(f"{path}:{line}: {fault}")
            is_empty = False
            yield f"{path}:{line}", values
    if is_empty:
        raise DataError(f"{path}: empty, without a single row; correct {setting}")


def refuse_equal_columns(path: Path, columns: Sequence[str] | None) -> None:
    """Raise DataError if two columns have one name."""
    if columns is not None and len(set(columns)) < len(columns):
        raise DataError(f"{path}:1: two columns of one name among {listed(columns)}; rename one")


@contextmanager
def open_table(setting: str, path: Path, whole: bool = False) -> Iterator[OpenTable]:
    """Open a file whose rows are read one by one as the caller asks for them.

    Raises DataError for a file that can't be read or is in another format. `setting` names the
    recipe's key or the parameter that holds the path. `whole`: the caller takes all rows, so that
    the rows of a Parquet file may unfold to no more than DISTILLERY_TABLE_MB.
    """
    suffix = path.suffix.lower()
    limit = LocalSettings().row_bytes
    try:
        # Bytes that are not UTF-8 become lone surrogates, so that they spoil one row, not the file.
        if suffix == ".jsonl":
            with path.open(encoding="utf-8", errors="surrogateescape") as file:
                yield OpenTable(None, jsonl_rows(file, limit))
        elif suffix == ".csv":
            with path.open(encoding="utf-8-sig", errors="surrogateescape", newline="") as file:
                yield open_csv(file, path, limit)
        elif suffix == ".parquet":
            with open_parquet(path, limit, whole) as table:
                yield table
        else:
            raise DataError(
                f"{path}: {setting} takes .jsonl, .csv, .parquet, not {path.suffix!r}; convert it"
            )
    except OSError as error:
        raise DataError(
            f"{path}: can't be read ({error.strerror or cause_of(error)}); correct {setting}"
        ) from error


def each_line(file: TextIO, limit: int) -> Iterator[str | None]:
    """Yield the lines of a file with their ends; None for a line of more than `limit` characters
    before its end, which is skipped bit by bit."""
    is_split = False
    while line := file.readline(limit + len("\r\n")):
        if is_split and line == "\n":
            # The end "\r\n" of the line before, of which "\r" was read with the line.
            is_split = False
            continue
        is_split = False
        if len(line) <= limit or len(line.rstrip("\r\n")) <= limit:
            yield line
            continue
        while line and not line.endswith(("\n", "\r")):
            line = file.readline(SKIPPED_CHARACTERS)
        is_split = line.endswith("\r")
        yield None


def too_large(limit: int) -> str:
    """Return the fault of a row of more than `limit` characters or bytes."""
    return f"more than {limit / 1e6:g} MB in one row; shorten it, or raise DISTILLERY_ROW_MB"


def jsonl_rows(file: TextIO, limit: int) -> Iterator[TableRow]:
    """Yield the rows of a JSONL file, each of at most `limit` characters."""
    for number, line in enumerate(each_line(file, limit), 1):
        if line is None:
            yield TableRow(number, {}, too_large(limit))
            continue
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


class RowTooLarge(Exception):
    """A row of a CSV file that is longer than the limit."""


class CsvLines:
    """The lines of a CSV file, for csv.reader. `number` is that of the last one.

    Raises RowTooLarge once the lines since `begin_row` have more than `limit` characters;
    csv.reader begins anew with the line after that. Its own limit is for a value, not for a row.
    """

    def __init__(self, file: TextIO, limit: int) -> None:
        self._lines = each_line(file, limit)
        self._limit = limit
        self._taken = 0
        self.number = 0

    def begin_row(self) -> None:
        """Count from here."""
        self._taken = 0

    def __iter__(self) -> "CsvLines":
        return self

    def __next__(self) -> str:
        line = next(self._lines)
        self.number += 1
        if line is not None:
            self._taken += len(line)
        if line is None or self._taken > self._limit:
            raise RowTooLarge
        return line


def open_csv(file: TextIO, path: Path, limit: int) -> OpenTable:
    """Read the header of a CSV file. Raises DataError if it is malformed."""
    cells = csv_cells(file, limit)
    line, header, fault = next(cells, (1, [], ""))
    if fault:
        raise DataError(f"{path}:{line}: {fault}")
    return OpenTable(header or None, csv_rows(header, cells))


def csv_cells(file: TextIO, limit: int) -> Iterator[tuple[int, list[str], str]]:
    """Yield the line that a row starts on, its cells and its fault; blank lines are skipped. A row
    has at most `limit` characters."""
    # The largest that there is on every system: CsvLines holds to the limit.
    csv.field_size_limit(2**31 - 1)
    lines = CsvLines(file, limit)
    reader = csv.reader(lines, strict=True)
    while True:
        line = lines.number + 1
        lines.begin_row()
        try:
            cells = next(reader)
        except StopIteration:
            return
        except RowTooLarge:
            yield line, [], too_large(limit)
        except csv.Error as error:
            yield line, [], f"{NO_VALID_CSV} ({error}); check the quotes"
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
def open_parquet(path: Path, limit: int, whole: bool) -> Iterator[OpenTable]:
    """Open a Parquet file. Raises DataError if it is none, and OSError if it can't be read."""
    import pyarrow  # type: ignore[import-untyped]

    most = LocalSettings().table_bytes if whole else None
    try:
        with path.open("rb") as file, path.open("rb") as headers, parquet_file(file, path) as table:
            rows = parquet_rows(table, headers, path, limit, most)
            yield OpenTable(table.schema_arrow.names, rows)
    except pyarrow.ArrowException as error:
        raise no_parquet(path, error) from error


def parquet_file(file: BinaryIO, path: Path) -> Any:
    """Return a file as a pyarrow.parquet.ParquetFile. Raises DataError if it is none."""
    import pyarrow
    import pyarrow.parquet  # type: ignore[import-untyped]

    try:
        metadata = pyarrow.parquet.read_metadata(file)
        return pyarrow.parquet.ParquetFile(
            file,
            metadata=metadata,
            # Equal texts in lists stay one text until they are measured.
            read_dictionary=text_lists(metadata.schema),
            # Without these two, all that a row group holds is read at once.
            pre_buffer=False,
            buffer_size=65_536,
        )
    except (pyarrow.ArrowException, ValueError, LookupError, TypeError) as error:
        # Names of columns that are no text, too.
        raise no_parquet(path, error) from error


def no_parquet(path: Path, error: Exception) -> DataError:
    """Return the error for a file that PyArrow can't read."""
    return DataError(f"{path}: can't be read as parquet ({cause_of(error)}); write the file anew")


def text_lists(schema: Any) -> list[str]:
    """Return the columns of a pyarrow.parquet.ParquetSchema that are texts or bytes in lists."""
    columns = [schema.column(index) for index in range(len(schema))]
    return [
        column.path
        for column in columns
        if column.max_repetition_level and column.physical_type == "BYTE_ARRAY"
    ]


def parquet_rows(
    parquet: Any, headers: BinaryIO, path: Path, limit: int, most: int | None
) -> Iterator[TableRow]:
    """Yield the rows of a pyarrow.parquet.ParquetFile, each of at most `limit` bytes. `headers`:
    the same file, to read its page headers from.

    The pages decide how many rows are unfolded at a time: no value is larger than the page that it
    stands in, or than its column's dictionary. Raises DataError for pages that are too large, and
    for more than `most` bytes of rows.
    """
    number = total = 0
    for group, chunks in enumerate(read_footer(headers)):
        size = batch_rows(parquet.schema, chunks, headers, f"{path}: row group {group + 1}", limit)
        batches = parquet.iter_batches(batch_size=size, row_groups=[group], use_threads=False)
        for batch in batches:
            taken = sum(map(unfolded_bytes, batch.columns))
            total += taken
            if most is not None and total > most:
                raise DataError(
                    f"{path}: its rows unfold to more than {most / 1e6:g} MB; take fewer, or raise "
                    "DISTILLERY_TABLE_MB"
                )
            for index in range(batch.num_rows):
                number += 1
                row = batch.slice(index, 1)
                if taken > limit and sum(map(unfolded_bytes, row.columns)) > limit:
                    yield TableRow(number, {}, too_large(limit))
                else:
                    yield parquet_row(number, row)


def parquet_row(number: int, row: Any) -> TableRow:
    """Return a pyarrow.RecordBatch of one row as a row."""
    try:
        (values,) = row.to_pylist()
    except UnicodeDecodeError:
        return TableRow(number, {}, NOT_UTF8)
    except (ValueError, ArithmeticError, LookupError, TypeError) as error:
        # Such as a date before year 1, which Python has none for.
        return TableRow(number, {}, f"a value can't be read ({cause_of(error)}); correct the row")
    return TableRow(number, values)


def batch_rows(
    schema: Any, chunks: Sequence[Chunk], headers: BinaryIO, where: str, limit: int
) -> int:
    """Return how many rows of a row group may be unfolded at a time, all columns together.

    Raises DataError, with `where`, if its pages take too much for even one row, and OSError for a
    file that is no valid Parquet."""
    if len(chunks) != len(schema):
        raise OSError(f"{len(chunks)} columns in a row group of {len(schema)}")
    largest = held = unfolded = 0
    for index, chunk in enumerate(chunks):
        pages = column_pages(schema.column(index), chunk, headers, where)
        largest += pages.largest
        held += pages.held
        unfolded += pages.unfolded
    if max(held, unfolded) > PAGES_SHARE * limit:
        raise DataError(
            f"{where} unfolds to {max(held, unfolded) / 1e6:,.0f} MB at a time, more than "
            f"{PAGES_SHARE} rows of {limit / 1e6:g} MB; write the file with smaller pages, or "
            "raise DISTILLERY_ROW_MB"
        )
    return max(1, min(PARQUET_BATCH_ROWS, BATCH_SHARE * limit // max(1, largest)))


def column_pages(column: Any, chunk: Chunk, headers: BinaryIO, where: str) -> ColumnPages:
    """Return the pages of a column in a row group; for one without lists nothing unfolds beyond
    them. Raises DataError for a list of texts that nobody can tell the size of."""
    # A value's own bytes, and what PyArrow keeps of where the lists begin and end.
    width = 16
    if column.physical_type == "FIXED_LEN_BYTE_ARRAY":
        width = 8 + column.length
    pages = read_pages(headers, chunk, width)
    if not column.max_repetition_level:
        return pages._replace(unfolded=0)
    if DELTA_BYTE_ARRAY in pages.encodings:
        raise DataError(
            f"{where}: the lists in {shown(column.path)} are written as DELTA_BYTE_ARRAY, whose "
            "size nobody can tell; write the file anew with another encoding"
        )
    return pages


def unfolded_bytes(array: Any) -> int:
    """Return how many bytes a pyarrow.Array takes, with its equal texts written out."""
    import pyarrow
    from pyarrow import compute

    if isinstance(array, pyarrow.DictionaryArray):
        lengths = array.dictionary
        if not pyarrow.types.is_primitive(lengths.type):
            lengths = compute.binary_length(lengths)
            return int(compute.sum(lengths.take(array.indices)).as_py() or 0)
        return int(array.indices.nbytes + len(array) * lengths.type.bit_width // 8)
    if isinstance(array, pyarrow.ExtensionArray):
        return unfolded_bytes(array.storage)
    if isinstance(array, pyarrow.MapArray):
        first, last = array.offsets[0].as_py(), array.offsets[-1].as_py()
        return sum(unfolded_bytes(part[first:last]) for part in (array.keys, array.items))
    if pyarrow.types.is_nested(array.type) and not pyarrow.types.is_union(array.type):
        inner = array.flatten()
        return sum(map(unfolded_bytes, inner if isinstance(inner, list) else [inner]))
    return int(array.nbytes)


def has_surrogates(text: str) -> bool:
    """Return whether the text has half of a surrogate pair, which UTF-8 can't express."""
    return _SURROGATES.search(text) is not None


def shown(text: str) -> str:
    """Return a text in quotes and in one line, of about 100 characters at most."""
    if len(text) > 100:
        text = f"{text[:60]} … {text[-30:]}"
    return repr(text)


def listed(names: Sequence[str]) -> str:
    """Return names in quotes, and of many the first ones."""
    text = ", ".join(map(shown, names[:LISTED_NAMES]))
    if len(names) > LISTED_NAMES:
        text += f" and {len(names) - LISTED_NAMES} more"
    return text


def cause_of(error: BaseException) -> str:
    """Return the innermost cause in a line of at most 200 characters."""
    while error.__cause__:
        error = error.__cause__
    return one_line(error) or type(error).__name__
