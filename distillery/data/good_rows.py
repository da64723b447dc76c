"""Copy files of rows without their bad ones, and write these, each with its reason, to other files.

In: CSV, JSONL or Parquet files, and the lines (for Parquet, the rows, from 1) of their bad rows.
Out: for each a file of the same format with the other rows, of CSV and JSONL byte for byte as they
were, and a JSONL file with `line`, `reason` and `row` for each bad one; `row` is its text, or for
Parquet its values, and null where that is too long or can't be read. The files themselves stay as
they are.
"""

import json
import os
import uuid
from collections.abc import Callable, Collection, Iterator, Mapping
from itertools import pairwise
from pathlib import Path
from typing import Any, NamedTuple, TextIO

from distillery.data.readers import (
    NO_VALID_CSV,
    PARQUET_BATCH_ROWS,
    cause_of,
    each_line,
    open_table,
    too_large,
)
from distillery.errors import DataError
from distillery.settings import LocalSettings

GROUP_ROWS = 65_536
"""Rows of a row group of a Parquet copy, unless they take GROUP_BYTES."""

GROUP_BYTES = 64_000_000
"""Bytes in memory from which on a row group of a Parquet copy is written."""


class GoodCopy(NamedTuple):
    """The files that a file is copied to: its good rows, and its bad ones."""

    good: Path
    bad: Path


class RowText(NamedTuple):
    """A row of a text file with the blank lines after it; `line` 0: the header. `last`: its last
    line that is not blank. `text` is None if one of its lines is too long."""

    line: int
    last: int
    text: str | None


def good_copy_of(path: Path) -> GoodCopy:
    """Return the files for the good and bad rows of a file; they lie beside it."""
    return GoodCopy(
        path.with_name(f"{path.stem}-good{path.suffix}"), path.with_name(f"{path.stem}-bad.jsonl")
    )


def resolved(path: Path) -> Path:
    """Return the absolute path of a file, with links followed."""
    return path.expanduser().resolve()


def refuse_good_copies(paths: Collection[Path], others: Collection[Path], force: bool) -> None:
    """Raise DataError if the copies of the files in `paths` would overwrite each other, one of the
    `others`, which are read, or, unless `force`, a file that is there already."""
    read = set(map(resolved, [*paths, *others]))
    written: set[Path] = set()
    for path in paths:
        for target in good_copy_of(path):
            if resolved(target) in written:
                raise DataError(f"{target}: would be written for two files; rename one of them")
            if resolved(target) in read:
                raise DataError(
                    f"{target}: is read too, and the copy of {path} would overwrite it; rename it"
                )
            if os.path.lexists(target.expanduser()) and not force:
                raise DataError(f"{target}: exists; rename it, or say --force to overwrite it")
            written.add(resolved(target))


def write_good_copies(reasons: Mapping[Path, Mapping[int, str]]) -> dict[Path, GoodCopy]:
    """Write the copies of files, all of them or none, and return them by file. `reasons` says of
    each bad row of a file, by its line, what is wrong.

    Raises DataError for a file that can't be read or written, and for a bad row that good ones may
    be part of."""
    copies = {path: good_copy_of(path) for path in reasons}
    unfinished: dict[Path, Path] = {}
    try:
        for path, copy in copies.items():
            good, bad = (each.expanduser() for each in copy)
            for file in (good, bad):
                unfinished[file] = file.with_name(f"{file.name}.{uuid.uuid4().hex[:8]}")
            write_copy(path, unfinished[good], unfinished[bad], reasons[path])
        for file, written in unfinished.items():
            # A link is replaced, and what it leads to stays.
            written.replace(file)
    except OSError as error:
        raise not_copied(path, error) from error
    finally:
        for written in unfinished.values():
            written.unlink(missing_ok=True)
    return copies


def not_copied(path: Path, error: Exception) -> DataError:
    """Return the error for a file that can't be copied."""
    cause = getattr(error, "strerror", None) or cause_of(error)
    return DataError(f"{path}: can't be copied to {good_copy_of(path).good} ({cause})")


def write_copy(path: Path, good: Path, bad: Path, reasons: Mapping[int, str]) -> None:
    """Write the good and the bad rows of a file. Raises DataError, and OSError."""
    is_parquet = path.suffix.lower() == ".parquet"
    copy: Callable[..., Iterator[tuple[int, Any]]] = copy_parquet if is_parquet else copy_lines
    with bad.open("w", encoding="utf-8") as left_out:
        for line, row in copy(path, good, reasons):
            record = {"line": line, "reason": reasons[line], "row": row}
            left_out.write(json.dumps(record, ensure_ascii=False, default=str) + "\n")


def copy_lines(
    path: Path, good: Path, reasons: Mapping[int, str]
) -> Iterator[tuple[int, str | None]]:
    """Copy the lines of all rows but the bad ones, and yield these: where each starts, and its
    text. Raises DataError."""
    source = path.expanduser()
    with open_table("DATA", source, whole=True) as table:
        starts = {row.line for row in table.rows}
    limit = LocalSettings().row_bytes
    text_mode: dict[str, Any] = {"encoding": "utf-8", "errors": "surrogateescape", "newline": ""}
    with source.open(**text_mode) as lines, good.open("w", **text_mode) as copied:
        for row in split_lines(lines, limit, starts):
            reason = reasons.get(row.line)
            if reason is None:
                if row.text is None:
                    raise DataError(f"{path}: changed while it was read; run the command again")
                copied.write(row.text)
                continue
            if row.last > row.line and reason.startswith((NO_VALID_CSV, too_large(limit))):
                # Such as a quote that is never closed: all rows after it are in the value.
                raise DataError(
                    f"{path}:{row.line}: {reason}; the row goes on to line {row.last}, so good "
                    "rows may be part of it: mend it by hand, it is not left out"
                )
            yield row.line, row.text and shown_text(row.text)


def split_lines(file: TextIO, limit: int, starts: Collection[int]) -> Iterator[RowText]:
    """Yield the rows of a file, which start on the lines in `starts`."""
    row = last = 0
    text: str | None = ""
    for number, line in enumerate(each_line(file, limit), 1):
        if number in starts:
            yield RowText(row, last, text)
            row, text = number, ""
        if line is None or line.strip():
            last = number
        text = None if line is None or text is None else text + line
    yield RowText(row, last, text)


def shown_text(text: str) -> str:
    """Return the text of a row without its end; bytes that are not UTF-8 become a sign for that."""
    return text.rstrip("\r\n").encode("utf-8", "surrogateescape").decode("utf-8", "replace")


def copy_parquet(
    path: Path, good: Path, reasons: Mapping[int, str]
) -> Iterator[tuple[int, dict[str, Any] | None]]:
    """Copy all rows but the bad ones, and yield these: the number of each, and its values. Raises
    DataError for what PyArrow can't read or write."""
    import pyarrow  # type: ignore[import-untyped]
    import pyarrow.parquet  # type: ignore[import-untyped]

    try:
        with (
            pyarrow.parquet.ParquetFile(path.expanduser()) as table,
            pyarrow.parquet.ParquetWriter(good, table.schema_arrow) as copied,
        ):
            number = rows = held = 0
            kept: list[Any] = []
            for batch in table.iter_batches(PARQUET_BATCH_ROWS):
                first, number = number + 1, number + batch.num_rows
                bad = [each for each in range(first, number + 1) if each in reasons]
                for each in bad:
                    yield each, values_of(batch.slice(each - first, 1))
                # Slices, since PyArrow can't filter all types.
                for start, end in pairwise([first - 1, *bad, number + 1]):
                    kept.append(batch.slice(start + 1 - first, end - start - 1))
                rows += batch.num_rows
                held += batch.nbytes
                if rows >= GROUP_ROWS or held >= GROUP_BYTES:
                    copied.write_table(pyarrow.Table.from_batches(kept))
                    kept, rows, held = [], 0, 0
            if kept:
                copied.write_table(pyarrow.Table.from_batches(kept))
    except pyarrow.ArrowException as error:
        raise not_copied(path, error) from error


def values_of(row: Any) -> dict[str, Any] | None:
    """Return the values of a pyarrow.RecordBatch of one row; None if Python has none for them."""
    try:
        (values,) = row.to_pylist()
    except (ValueError, ArithmeticError, LookupError, TypeError):
        return None
    return dict(values)
