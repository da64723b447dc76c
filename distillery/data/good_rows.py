"""Copy a file of rows without its bad ones, and write these, each with its reason, to another file.

In: a CSV, JSONL or Parquet file, and the lines (for Parquet, the rows, from 1) of its bad rows.
Out: a file of the same format with the other rows, of CSV and JSONL byte for byte as they were, and
a JSONL file with `line`, `reason` and `row` for each bad one; `row` is its text, or for Parquet its
values, and null where that is too long or can't be read. The file itself stays as it is.
"""

import json
from collections.abc import Callable, Collection, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple, TextIO

from distillery.data.readers import PARQUET_BATCH_ROWS, each_line, open_table
from distillery.errors import DataError
from distillery.settings import LocalSettings


class GoodCopy(NamedTuple):
    """The files that a file is copied to: its good rows, and its bad ones."""

    good: Path
    bad: Path


def good_copy_of(path: Path) -> GoodCopy:
    """Return the files for the good and bad rows of a file; they lie beside it."""
    return GoodCopy(
        path.with_name(f"{path.stem}-good{path.suffix}"), path.with_name(f"{path.stem}-bad.jsonl")
    )


def refuse_good_copies(paths: Collection[Path], others: Collection[Path], force: bool) -> None:
    """Raise DataError if the copies of the files in `paths` would overwrite each other, one of the
    `others`, which are read, or, unless `force`, a file that is there already."""
    written: set[Path] = set()
    for path in paths:
        for target in good_copy_of(path):
            if target in written:
                raise DataError(f"{target}: would be written for two files; rename one of them")
            if target in {*paths, *others}:
                raise DataError(
                    f"{target}: would be overwritten by what is left of {path}; leave it out, or "
                    "rename it"
                )
            if target.expanduser().exists() and not force:
                raise DataError(f"{target}: exists; rename it, or say --force to overwrite it")
            written.add(target)


def write_good_copy(path: Path, reasons: Mapping[int, str]) -> GoodCopy:
    """Write the copies of a file. `reasons` says of each bad row, by its line, what is wrong.

    Raises DataError for a file that can't be read or written."""
    written = good_copy_of(path)
    source, good, bad = (each.expanduser() for each in (path, *written))
    try:
        with bad.open("w", encoding="utf-8") as left_out:
            is_parquet = source.suffix.lower() == ".parquet"
            copy: Callable[..., Iterator[tuple[int, Any]]]
            copy = copy_parquet if is_parquet else copy_lines
            for line, row in copy(source, good, reasons):
                told = {"line": line, "reason": reasons[line], "row": row}
                left_out.write(json.dumps(told, ensure_ascii=False, default=str) + "\n")
    except OSError as error:
        raise DataError(
            f"{path}: can't be copied to {written.good} ({error.strerror or error})"
        ) from error
    return written


def copy_lines(source: Path, good: Path, bad: Collection[int]) -> Iterator[tuple[int, str | None]]:
    """Copy the lines of all rows but the `bad` ones, and yield these: where each starts, and its
    text."""
    with open_table("DATA", source, whole=True) as table:
        starts = {row.line for row in table.rows}
    limit = LocalSettings().row_bytes
    how: dict[str, Any] = {"encoding": "utf-8", "errors": "surrogateescape", "newline": ""}
    with source.open(**how) as lines, good.open("w", **how) as copied:
        yield from sorted_out(lines, limit, starts, bad, copied)


def sorted_out(
    file: TextIO, limit: int, starts: Collection[int], bad: Collection[int], copied: TextIO
) -> Iterator[tuple[int, str | None]]:
    """Write the lines of good rows and of the header to `copied`, and yield the bad rows."""
    row, text = 0, ""
    is_whole = True
    for number, line in enumerate(each_line(file, limit), 1):
        if number in starts:
            if row in bad:
                yield row, shown_text(text) if is_whole else None
            row, text, is_whole = number, "", True
        if row not in bad:
            copied.write(line or "")
        elif line is None:
            is_whole = False
        else:
            text += line
    if row in bad:
        yield row, shown_text(text) if is_whole else None


def shown_text(text: str) -> str:
    """Return the text of a row without its end; bytes that are not UTF-8 become a sign for that."""
    return text.rstrip("\r\n").encode("utf-8", "surrogateescape").decode("utf-8", "replace")


def copy_parquet(
    source: Path, good: Path, bad: Collection[int]
) -> Iterator[tuple[int, dict[str, Any] | None]]:
    """Copy all rows but the `bad` ones, and yield these: the number of each, and its values."""
    import pyarrow  # type: ignore[import-untyped]
    import pyarrow.parquet  # type: ignore[import-untyped]

    number = 0
    with (
        pyarrow.parquet.ParquetFile(source) as table,
        pyarrow.parquet.ParquetWriter(good, table.schema_arrow) as copied,
    ):
        for batch in table.iter_batches(PARQUET_BATCH_ROWS):
            numbers = range(number + 1, number + 1 + batch.num_rows)
            number += batch.num_rows
            is_good = [each not in bad for each in numbers]
            copied.write_batch(batch.filter(pyarrow.array(is_good)))
            for position, each in enumerate(numbers):
                if each in bad:
                    try:
                        (values,) = batch.slice(position, 1).to_pylist()
                    except (ValueError, ArithmeticError, LookupError, TypeError):
                        values = None
                    yield each, values
