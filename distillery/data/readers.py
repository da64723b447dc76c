"""data/readers"""

import csv
import glob
import json
import logging
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from distillery.errors import DataError
from distillery.storage.working import working_folder


class Table(NamedTuple):
    """One file, or one split of a hub data set, as read: (where, values) a row; where is FILE:LINE, or for Parquet and
    the hub FILE:ROW, both from 1."""

    name: str
    columns: Sequence[str]
    rows: list[tuple[str, dict[str, Any]]]


def read_columns(
    paths: Sequence[str], wanted: Mapping[str, str]
) -> Iterator[tuple[str, dict[str, Any]]]:
    """(where, values) of each row of JSONL, CSV or Parquet files that have the columns in `wanted`, which says of each
    what it is. Raises DataError with the file and column."""
    for table in read_files("teacher.files", paths):
        for where, values in table.rows:
            for name, meaning in wanted.items():
                if values.get(name) in (None, ""):
                    raise DataError(f"{where}: {name}: missing; it is {meaning}")
            yield where, values


def quiet_datasets() -> Any:
    """Hugging Face `datasets`, kept from drawing bars and from logging what it raises as well."""
    import datasets
    from datasets.utils.logging import set_verbosity
    from datasets.utils.tqdm import disable_progress_bars as disable_datasets_bars
    from huggingface_hub.utils.logging import set_verbosity as set_hub_verbosity
    from huggingface_hub.utils.tqdm import disable_progress_bars

    disable_progress_bars()
    disable_datasets_bars()
    set_verbosity(logging.CRITICAL)
    set_hub_verbosity(logging.ERROR)
    return datasets


def read_files(setting: str, paths: Sequence[str]) -> Iterator[Table]:
    readers = {".jsonl": _jsonl, ".csv": _csv, ".parquet": _parquet}
    for path in (Path(path).expanduser() for path in paths):
        if path.suffix.lower() not in readers:
            raise DataError(
                f"{path}: {setting} takes {', '.join(readers)}, not {path.suffix or 'a bare name'!r}"
            )
        try:
            with path.open("rb") as file:
                empty = not file.read(1)
        except OSError as error:
            raise DataError(
                f"{path}: can't be read ({error.strerror}); correct {setting}"
            ) from error
        table = None if empty else readers[path.suffix.lower()](path)
        if not table or not table.rows:
            raise DataError(f"{path}: empty, without a single row; correct {setting}")
        yield table


def _jsonl(path: Path) -> Table:
    # Read as text and parsed here: `datasets` would guess types by column (dates, numbers) and lose the lines.
    rows = []
    for number, row in enumerate(_from_file("from_text", path, encoding="utf-8-sig"), 1):
        if row["text"].strip():
            rows.append((f"{path}:{number}", _json_object(row["text"], f"{path}:{number}")))
    return Table(str(path), list(dict.fromkeys(key for _, values in rows for key in values)), rows)


def _json_object(text: str, where: str) -> dict[str, Any]:
    try:
        value = json.loads(text)
    except ValueError as error:
        raise DataError(f"{where}: no JSON object ({error}); write one row a line") from error
    if not isinstance(value, dict):
        raise DataError(f"{where}: no JSON object but {type(value).__name__}; write one row a line")
    return value


def _csv(path: Path) -> Table:
    header, lines = _csv_lines(path)
    if not lines:
        return Table(str(path), header, [])
    # Every column as text, nothing taken for a missing value: 'NA', 'null' and '007' stay what they are.
    datasets = quiet_datasets()
    features = datasets.Features({name: datasets.Value("string") for name in header})
    rows = _from_file("from_csv", path, encoding="utf-8-sig", features=features, na_filter=False)
    if len(rows) != len(lines):
        raise DataError(
            f"{path}: {len(lines)} rows by its quotes but {len(rows)} read; check the quotes"
        )
    return Table(
        str(path), header, [(f"{path}:{line}", row) for line, row in zip(lines, rows, strict=True)]
    )


def _csv_lines(path: Path) -> tuple[list[str], list[int]]:
    """The header and the line (from 1) that each row starts on; rows may span lines."""
    lines: list[int] = []
    with path.open(encoding="utf-8-sig", newline="") as file:
        reader = csv.reader(file, strict=True)
        try:
            header = next((values for values in reader if values), [])
            if len(set(header)) != len(header):
                raise DataError(
                    f"{path}:1: two columns of one name among {', '.join(header)}; rename one"
                )
            start = reader.line_num + 1
            for values in reader:
                if values and len(values) != len(header):
                    raise DataError(
                        f"{path}:{start}: {len(values)} values under {len(header)} columns; quote a value with a comma"
                    )
                lines += [start] if values else []
                start = reader.line_num + 1
        except csv.Error as error:
            raise DataError(
                f"{path}:{reader.line_num}: no valid CSV ({error}); check the quotes"
            ) from error
        except UnicodeDecodeError as error:
            raise _not_utf8(path) from error
    return header, lines


def _parquet(path: Path) -> Table:
    rows = _from_file("from_parquet", path)
    columns = list(rows[0]) if rows else []
    return Table(
        str(path), columns, [(f"{path}:{number}", row) for number, row in enumerate(rows, 1)]
    )


def _from_file(method: str, path: Path, **options: Any) -> list[dict[str, Any]]:
    """Rows of a file through `datasets`. Its cache lives and dies with the call, so that no changed file is missed."""
    datasets = quiet_datasets()
    with working_folder("dataset") as scratch:
        try:
            read = getattr(datasets.Dataset, method)
            table = read(
                glob.escape(str(path)), cache_dir=str(scratch), keep_in_memory=True, **options
            )
            rows: list[dict[str, Any]] = table.to_list()
        except (
            OSError,
            ValueError,
            RuntimeError,
            NotImplementedError,
            datasets.exceptions.DatasetsError,
        ) as error:
            if isinstance(error.__cause__, UnicodeDecodeError) or isinstance(
                error, UnicodeDecodeError
            ):
                raise _not_utf8(path) from error
            raise DataError(
                f"{path}: can't be read as {path.suffix[1:].lower()} ({cause_of(error)})"
            ) from error
    return rows


def _not_utf8(path: Path) -> DataError:
    for number, line in enumerate(path.read_bytes().split(b"\n"), 1):
        try:
            line.decode()
        except UnicodeDecodeError:
            return DataError(f"{path}:{number}: not UTF-8; save the file in that encoding")
    return DataError(f"{path}: not UTF-8; save the file in that encoding")


def cause_of(error: BaseException) -> str:
    """The innermost reason in one short line."""
    while error.__cause__:
        error = error.__cause__
    text = " ".join(str(error).split()) or type(error).__name__
    return text if len(text) <= 200 else text[:199] + "…"
