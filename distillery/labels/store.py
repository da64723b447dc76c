"""The label store: every answer that a teacher gave, under what was asked of whom, in the database that runs share.

What was paid for is here and nowhere else, rejected answers too: none is asked for twice.
"""

import json
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from functools import partial
from itertools import islice
from operator import methodcaller
from pathlib import Path
from queue import Empty, SimpleQueue
from types import TracebackType
from typing import Any, Self

from sqlalchemy import (
    JSON,
    Column,
    DateTime,
    Float,
    Integer,
    String,
    Table,
    Text,
    and_,
    delete,
    func,
    not_,
)
from sqlalchemy.sql import select

from distillery.errors import DataError, StoreError
from distillery.storage.database import METADATA, Database


@dataclass(frozen=True, slots=True)
class StoredAnswer:
    """An answer as it stands in the table teacher_answers. `answer`: a letter in the order that was shown; None where
    it is no label, for `reason`. `latency_ms`: of the call that succeeded. `example_id` and `prompt`: the row that
    first asked for it, and the user message."""

    request_key: str
    teacher: str
    answer: str | None
    distribution: dict[str, float] | None
    raw: str
    prompt_tokens: int
    completion_tokens: int
    latency_ms: float
    attempts: int
    model_version: str
    reason: str = ""
    cached_tokens: int = 0
    cost: float | None = None
    example_id: str = ""
    prompt: str = ""


_TABLE = Table(
    "teacher_answers",
    METADATA,
    Column("request_key", String(64), primary_key=True),
    Column("teacher", Text, nullable=False),
    Column("answer", String(1)),
    Column("distribution", JSON(none_as_null=True)),
    Column("raw", Text, nullable=False),
    Column("prompt_tokens", Integer, nullable=False),
    Column("completion_tokens", Integer, nullable=False),
    Column("latency_ms", Float, nullable=False),
    Column("attempts", Integer, nullable=False),
    Column("model_version", Text, nullable=False),
    Column("created_at", DateTime(timezone=True), nullable=False),
    Column("reason", Text, nullable=False, server_default=""),
    Column("cached_tokens", Integer, nullable=False, server_default="0"),
    Column("cost", Float),
    Column("example_id", Text, nullable=False, server_default=""),
    Column("prompt", Text, nullable=False, server_default=""),
)

_ANSWER_COLUMNS = [column for column in _TABLE.columns if column.name != "created_at"]

_LOOKUP_ROWS = 1000

_COMMIT_ROWS = 500

_GATHER_S = 0.02
"""Between an answer and its commit, so that what comes close behind goes with it: each commit costs a wait for the disk
and a millisecond of CPU time, which the calls under way need."""

_EXPORT_ROWS = 10_000


@dataclass(frozen=True)
class Experience:
    """What a teacher's answers so far tell of the next ones: means over `answers` of them. `tokens_per_character`: of
    the prompt's tokens to the user message's characters."""

    answers: int
    tokens_per_character: float
    completion_tokens: float
    latency_ms: float


class LabelStore:
    """Teacher answers by request key, in SQLite or PostgreSQL (`url` as SQLAlchemy writes it; DISTILLERY_LABELS).

    One thread writes: it commits whatever has arrived while its last commit ran, at once, so that an answer is on disk
    some milliseconds after `add`. An answer that is there already stays as it is. An outage of the database is waited
    out (database.py); then StoreUnavailable, and StoreError for what waiting does not mend.
    """

    def __init__(self, url: str | None = None, wait_s: float | None = None) -> None:
        self._database = Database(url, wait_s)
        self._arrived: SimpleQueue[StoredAnswer | threading.Event | None] = SimpleQueue()
        self._failure: StoreError | None = None
        self._writer = threading.Thread(target=self._write, name="label-store", daemon=True)
        self._writer.start()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self._stop()
        if error is None:
            self._raise_failure()

    def get_many(self, keys: Iterable[str]) -> dict[str, StoredAnswer]:
        """The stored answers among `keys`, those that were just added included."""
        self.flush()
        found: dict[str, StoredAnswer] = {}
        wanted = iter(keys)
        while chunk := list(islice(wanted, _LOOKUP_ROWS)):
            query = select(*_ANSWER_COLUMNS).where(_TABLE.c.request_key.in_(chunk))
            rows = self._database.run(methodcaller("execute", query)).all()
            found |= {row.request_key: StoredAnswer(*row) for row in rows}
        return found

    def answered(self, keys: Iterable[str]) -> set[str]:
        """Those of `keys` that have an answer."""
        found: set[str] = set()
        wanted = iter(keys)
        while chunk := list(islice(wanted, _LOOKUP_ROWS)):
            query = select(_TABLE.c.request_key).where(_TABLE.c.request_key.in_(chunk))
            found.update(self._database.run(methodcaller("execute", query)).scalars())
        return found

    def experience(
        self, teacher: str, ends_with: str = "", ends_without: str = ""
    ) -> Experience | None:
        """What is known of this teacher from its last 1,000 answers to prompts that end with, and without, these texts;
        None where it has given none."""
        last = select(_TABLE).where(
            _TABLE.c.teacher == teacher, _TABLE.c.prompt != "", _TABLE.c.prompt_tokens > 0
        )
        if ends_with:
            last = last.where(_TABLE.c.prompt.endswith(ends_with, autoescape=True))
        if ends_without:
            last = last.where(not_(_TABLE.c.prompt.endswith(ends_without, autoescape=True)))
        some = last.order_by(_TABLE.c.created_at.desc()).limit(1000).subquery()
        characters = func.sum(func.length(some.c.prompt))
        wanted = (
            func.sum(some.c.prompt_tokens),
            characters,
            some.c.completion_tokens,
            some.c.latency_ms,
        )
        query = select(func.count(), wanted[0], wanted[1], func.avg(wanted[2]), func.avg(wanted[3]))
        count, tokens, length, completion, latency = self._database.run(
            methodcaller("execute", query)
        ).one()
        return (
            Experience(count, tokens / length, float(completion), float(latency)) if count else None
        )

    def add(self, answer: StoredAnswer) -> None:
        """Hands an answer to the writer, without waiting; raises what a former write failed with."""
        self._raise_failure()
        self._arrived.put(answer)

    @property
    def waiting(self) -> int:
        """How many answers have been added and are not yet on their way to the database."""
        return self._arrived.qsize()

    def flush(self) -> None:
        """Waits until all that was added is committed."""
        if self._writer.is_alive():
            done = threading.Event()
            self._arrived.put(done)
            done.wait()
        self._raise_failure()

    def close(self) -> None:
        """Commits what has arrived and lets go of the database."""
        self._stop()
        self._raise_failure()

    def export(self, path: Path, teacher: str | None = None) -> int:
        """Writes the answers, of one teacher or of all, as a Parquet file, and returns their number."""
        import pyarrow as pa  # type: ignore[import-untyped]
        import pyarrow.parquet as pq  # type: ignore[import-untyped]

        count, last = 0, ""
        beside = path.with_name(f".{path.name}.partial")
        try:
            with pq.ParquetWriter(beside, _parquet_schema()) as file:
                while rows := self._page(last, teacher):
                    flat = [_with_distribution(row, json.dumps) for row in rows]
                    file.write_table(pa.Table.from_pylist(flat, schema=_parquet_schema()))
                    count, last = count + len(rows), rows[-1]["request_key"]
            beside.replace(path)
        except OSError as error:
            beside.unlink(missing_ok=True)
            raise DataError(
                f"{path}: can't be written ({error.strerror or 'no such folder'})"
            ) from None
        return count

    def load(self, path: Path) -> int:
        """Adds the answers of a file that `export` wrote; those that are here already stay. Returns how many were new.

        Raises DataError where the file is none of those."""
        import pyarrow as pa
        import pyarrow.parquet as pq

        try:
            file = pq.ParquetFile(path)
            if not file.schema_arrow.equals(_parquet_schema()):
                raise DataError(
                    f"{path}: its columns are not those that distillery labels export writes"
                )
            before = self._count()
            for batch in file.iter_batches(_EXPORT_ROWS):
                rows = [_with_distribution(row, json.loads) for row in batch.to_pylist()]
                insert = self._database.insert(_TABLE).on_conflict_do_nothing()
                self._database.run(methodcaller("execute", insert, rows))
        except (OSError, pa.ArrowInvalid) as error:
            raise DataError(
                f"{path}: can't be read as Parquet ({' '.join(str(error).split())[:200]})"
            ) from None
        return self._count() - before

    def delete(
        self,
        rows: Iterable[str] = (),
        containing: Iterable[str] = (),
        rejected: bool = False,
        dry_run: bool = False,
    ) -> int:
        """Deletes the answers to the rows with these ids, those whose prompt or answer contains one of these texts in
        whatever case, and, if so told, all that are no label. Returns how many. What was made from them stays: see
        README."""
        wanted: list[Any] = [_TABLE.c.answer.is_(None)] if rejected else []
        for text in filter(None, containing):
            wanted += [
                _TABLE.c.prompt.icontains(text, autoescape=True),
                _TABLE.c.raw.icontains(text, autoescape=True),
            ]
        ids = iter(dict.fromkeys(filter(None, rows)))
        while chunk := list(islice(ids, _LOOKUP_ROWS)):
            wanted.append(_TABLE.c.example_id.in_(chunk))
        # One transaction for all of them; an answer that two wishes name is counted once.
        count = int(self._database.run(partial(_delete, wanted=wanted, dry_run=dry_run)))
        if not dry_run:
            self._database.forget_log()
        return count

    def summary(self) -> list[tuple[str, int, int, float]]:
        """(teacher, answers, those that are no label, cost) of each teacher."""
        rejected = func.count().filter(_TABLE.c.answer.is_(None))
        cost = func.coalesce(func.sum(_TABLE.c.cost), 0.0)
        query = select(_TABLE.c.teacher, func.count(), rejected, cost).group_by(_TABLE.c.teacher)
        rows = self._database.run(methodcaller("execute", query.order_by(_TABLE.c.teacher))).all()
        return [(row[0], row[1], row[2], row[3]) for row in rows]

    def _count(self) -> int:
        return int(
            self._database.run(methodcaller("scalar", select(func.count()).select_from(_TABLE)))
        )

    def _page(self, after: str, teacher: str | None) -> list[dict[str, Any]]:
        query = (
            select(_TABLE)
            .where(_TABLE.c.request_key > after)
            .order_by(_TABLE.c.request_key)
            .limit(_EXPORT_ROWS)
        )
        query = query if teacher is None else query.where(_TABLE.c.teacher == teacher)
        return [
            dict(row._mapping) for row in self._database.run(methodcaller("execute", query)).all()
        ]

    def _stop(self) -> None:
        if self._writer.is_alive():
            self._arrived.put(None)
            self._writer.join()
        self._database.close()

    def _raise_failure(self) -> None:
        if self._failure:
            raise self._failure

    def _write(self) -> None:
        while True:
            batch = self._take()
            answers = [item for item in batch if isinstance(item, StoredAnswer)]
            if answers and not self._failure:
                try:
                    self._commit(answers)
                except StoreError as error:
                    self._failure = error
                except Exception as error:
                    # Whoever waits must hear of it, whatever it is.
                    self._failure = StoreError(
                        f"an answer can't be stored ({' '.join(str(error).split())[:200]})"
                    )
            for item in batch:
                if isinstance(item, threading.Event):
                    item.set()
            if None in batch:
                return

    def _take(self) -> list[StoredAnswer | threading.Event | None]:
        """Waits for one item and takes what else is there."""
        batch = [self._arrived.get()]
        if isinstance(batch[0], StoredAnswer):
            time.sleep(_GATHER_S)
        while len(batch) < _COMMIT_ROWS:
            try:
                batch.append(self._arrived.get_nowait())
            except Empty:
                break
        return batch

    def _commit(self, answers: list[StoredAnswer]) -> None:
        now = datetime.now(UTC)
        rows = [{**asdict(answer), "created_at": now} for answer in answers]
        insert = self._database.insert(_TABLE).on_conflict_do_nothing()
        self._database.run(lambda connection: connection.execute(insert, rows))


def _delete(connection: Any, wanted: list[Any], dry_run: bool) -> int:
    """How many answers any of `wanted` describes; they are deleted, but not in a dry run."""
    count = 0
    for number, one in enumerate(wanted):
        if dry_run:
            # What a wish before this one would have deleted is not there any more.
            one = and_(one, *(not_(earlier) for earlier in wanted[:number]))
            count += connection.scalar(select(func.count()).select_from(_TABLE).where(one))
        else:
            count += connection.execute(delete(_TABLE).where(one)).rowcount
    return count


def _parquet_schema() -> Any:
    import pyarrow as pa

    kinds = {Integer: pa.int64(), Float: pa.float64(), DateTime: pa.timestamp("us", tz="UTC")}
    fields: Iterator[Any] = (
        pa.field(
            column.name, kinds.get(type(column.type), pa.string()), nullable=bool(column.nullable)
        )
        for column in _TABLE.columns
    )
    return pa.schema(fields)


def _with_distribution(row: dict[str, Any], how: Callable[[Any], Any]) -> dict[str, Any]:
    return row | {"distribution": None if row["distribution"] is None else how(row["distribution"])}
