"""The label store's answers in files: in Parquet for another label store, or as training rows for
other programs."""

import json
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any, Literal

from sqlalchemy import DateTime, Float, Integer, LargeBinary, bindparam
from sqlalchemy.sql import select

from distillery.data.answer_tokens import unpacked
from distillery.errors import DataError, one_line
from distillery.labels.store import NEW_ANSWER, TABLE, LabelStore, execute
from distillery.recipe import JUDGE

EXPORT_ROWS = 2_000
"""Rows of an export that are in memory at a time. The tokens of an answer of 100 take some 13 kB.
"""

RowForm = Literal["messages", "question-answer"]


def export_answers(store: LabelStore, path: Path, teacher: str | None = None) -> int:
    """Write the answers, of one teacher or of all, to a Parquet file; return their number.

    Its columns are the table's, with the distribution as JSON. Raises DataError if the file
    can't be written; an older file at `path` stays then.
    """
    import pyarrow as pa  # type: ignore[import-untyped]
    import pyarrow.parquet as pq  # type: ignore[import-untyped]

    schema, count = parquet_schema(), 0
    with in_place_of(path) as unfinished, pq.ParquetWriter(unfinished, schema) as file:
        for page in pages(store, teacher):
            file.write_table(pa.Table.from_pylist(page, schema=schema))
            count += len(page)
    return count


def export_rows(store: LabelStore, path: Path, form: RowForm, teacher: str | None = None) -> int:
    """Write the answers that are labels, of one teacher or of all, as training rows: one JSON
    object a line, in the order of their keys; what a judge says is no label. Return their
    number.

    question-answer: {"Question": user message, "Answer": letter, class or text}. messages:
    {"messages": [...]}, the same as a chat; the store keeps no system message. Raises DataError
    if the file can't be written; an older file at `path` stays then.
    """
    count = 0
    with (
        in_place_of(path) as unfinished,
        unfinished.open("w", encoding="utf-8", newline="\n") as file,
    ):
        for page in pages(store, teacher):
            for row in page:
                # Answers of the first versions were stored without their prompts.
                is_label = row["answer"] is not None and not row["teacher"].startswith(JUDGE)
                if not is_label or not row["prompt"]:
                    continue
                line = training_row(row["prompt"], row["answer"], form)
                file.write(json.dumps(line, ensure_ascii=False) + "\n")
                count += 1
    return count


def import_answers(store: LabelStore, path: Path) -> int:
    """Add the answers of a file that `export_answers` wrote, and return how many are new.

    Answers that are stored already stay as they are. Files of versions that kept no tokens have
    no such column. Raises DataError for any other file.
    """
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        file = pq.ParquetFile(path)
        schema = parquet_schema()
        earlier = schema.remove(schema.get_field_index("tokens"))
        if not any(file.schema_arrow.equals(known) for known in (schema, earlier)):
            raise DataError(
                f"{path}: its columns are not those that distillery labels export writes"
            )
        before = count_answers(store)
        for batch in file.iter_batches(EXPORT_ROWS):
            rows = batch.to_pylist()
            for row in rows:
                if row["distribution"] is not None:
                    row["distribution"] = stored_distribution(row["distribution"], path)
                if row.setdefault("tokens", None) is not None:
                    check_tokens(row["tokens"], path)
            store.database.run(partial(execute, statement=NEW_ANSWER, values=rows))
    except (OSError, pa.ArrowInvalid) as error:
        raise DataError(f"{path}: can't be read as Parquet ({one_line(error)})") from None
    return count_answers(store) - before


def count_answers(store: LabelStore) -> int:
    return sum(count for _, count, _ in store.summary())


def pages(store: LabelStore, teacher: str | None) -> Iterator[list[dict[str, Any]]]:
    """Yield the table by EXPORT_ROWS rows in the order of their keys, distributions as JSON."""
    query = select(TABLE).order_by(TABLE.c.request_key).limit(EXPORT_ROWS)
    query = query.where(TABLE.c.request_key > bindparam("last_key"))
    if teacher is not None:
        query = query.where(TABLE.c.teacher == teacher)
    last_key = ""
    while True:
        values, page = {"last_key": last_key}, []
        for found in store.database.run(partial(all_rows, query=query, values=values)):
            row = dict(found._mapping)
            if row["distribution"] is not None:
                row["distribution"] = json.dumps(row["distribution"])
            page.append(row)
        if not page:
            return
        yield page
        last_key = page[-1]["request_key"]


def all_rows(connection: Any, query: Any, values: dict[str, str]) -> Sequence[Any]:
    rows: Sequence[Any] = connection.execute(query, values).all()
    return rows


@contextmanager
def in_place_of(path: Path) -> Iterator[Path]:
    """Yield the path of a file beside `path`, which takes its place once it is whole. Raises
    DataError if it can't be written; an older file at `path` stays then."""
    unfinished = path.with_name(f".{path.name}.partial")
    try:
        yield unfinished
        unfinished.replace(path)
    except OSError as error:
        raise DataError(
            f"{path}: can't be written ({error.strerror or 'no such folder'})"
        ) from None
    finally:
        unfinished.unlink(missing_ok=True)


def training_row(prompt: str, answer: str, form: RowForm) -> dict[str, Any]:
    """Return a question and its answer in one of the forms of `export_rows`."""
    if form == "question-answer":
        return {"Question": prompt, "Answer": answer}
    return {
        "messages": [
            {"role": "user", "content": prompt},
            {"role": "assistant", "content": answer},
        ]
    }


def stored_distribution(text: str, path: Path) -> Any:
    """Return the probabilities in a file that `export_answers` wrote. Raises DataError for other
    text."""
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        raise DataError(
            f"{path}: distribution: no JSON ({type(error).__name__}); export the labels again"
        ) from error


def check_tokens(data: bytes, path: Path) -> None:
    """Raise DataError for bytes that are not the tokens of an answer in a file that
    `export_answers` wrote."""
    try:
        unpacked(data)
    except ValueError as error:
        raise DataError(f"{path}: tokens: {error}; export the labels again") from error


def parquet_schema() -> Any:
    """Return the Arrow schema of an export: the table's columns, texts and JSON as strings."""
    import pyarrow as pa

    types = {
        Integer: pa.int64(),
        Float: pa.float64(),
        DateTime: pa.timestamp("us", tz="UTC"),
        LargeBinary: pa.binary(),
    }
    fields = []
    for column in TABLE.columns:
        arrow_type = types.get(type(column.type), pa.string())
        fields.append(pa.field(column.name, arrow_type, nullable=bool(column.nullable)))
    return pa.schema(fields)
