"""The label store: every answer that a teacher gave, by what was asked of whom.

It is the table teacher_answers in the database that runs share (DISTILLERY_LABELS). It holds all
that was paid for, rejected answers too, so that nothing is asked for twice.
"""

import asyncio
import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from functools import partial
from itertools import chain, islice
from operator import attrgetter, itemgetter
from queue import Empty, SimpleQueue
from time import monotonic, sleep
from types import TracebackType
from typing import Any, NamedTuple, Self

from sqlalchemy import (
    JSON,
    Column,
    DateTime,
    Float,
    Integer,
    LargeBinary,
    String,
    Table,
    Text,
    and_,
    bindparam,
    delete,
    func,
    not_,
    or_,
    update,
)
from sqlalchemy.sql import select

from distillery.errors import RowRefused, StoreError, one_line
from distillery.labels.journal import Item, Journal, Kind, recover, values_of
from distillery.labels.pairs import both_orders
from distillery.settings import LocalSettings
from distillery.storage.database import METADATA, Database, insert_new, nothing
from distillery.teacher.ledger import Call, write_calls


class StoredAnswer(NamedTuple):
    """A row of the table teacher_answers. A tuple, since a second run makes one for each row.

    answer: the letter in the order shown, the class, the option's text where the likeliest one was
    asked for, or the written answer, that the text `raw` was read as; None if it is no label, for
    `reason`. acceptance.py reads the text again. latency_ms: of the call that succeeded. example_id
    and prompt: the row that first asked for the answer, and its user message. tokens: those of a
    written answer after any thinking, with the teacher's probabilities, as data/answer_tokens.py
    packs them; None where it gave none.
    """

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
    tokens: bytes | None = None


TABLE = Table(
    "teacher_answers",
    METADATA,
    Column("request_key", String(64), primary_key=True),
    Column("teacher", Text, nullable=False),
    Column("answer", Text),
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
    Column("tokens", LargeBinary),
)

COLUMN_NAMES = {column.name for column in TABLE.columns}

NEW_ANSWER = insert_new(TABLE)

NEWER_ANSWER = insert_new(
    TABLE,
    "(request_key) DO UPDATE SET "
    + ", ".join(f"{column.name} = excluded.{column.name}" for column in TABLE.columns)
    + " WHERE teacher_answers.created_at < :since",
).bindparams(bindparam("since", type_=TABLE.c.created_at.type))
"""Takes the place of an answer from before `since`."""

ANSWER_COLUMNS = [column for column in TABLE.columns if column.name != "created_at"]

KEYS_PER_QUERY = 1000

MOST_PER_COMMIT = 500

GATHER_S = 0.05
"""Pause between an answer and its commit, so that the answers right behind it go with it: a commit
waits for the disk and takes a millisecond of CPU time, which the calls under way need."""

SLOW_COMMIT_S = 2.0
"""Seconds of one commit after which the database counts as away: it may not answer at all, which
SQLite tells after 30 s and PostgreSQL's server, if it has vanished, as late."""

CONTAINER_WAIT_S = 900.0
"""Seconds for which a commit waits out an outage in a container, unless DISTILLERY_STORE_WAIT says
otherwise: the journal vanishes with the container."""

PAUSE_S = 0.1
"""How often it is looked whether the database is back."""

EXPERIENCE_ROWS = 1000


@dataclass(frozen=True)
class Experience:
    """What a teacher's last answers tell about the next: their number, and means over them.

    tokens_per_character: of the prompt's tokens to the characters of the user message. latency_ms:
    of direct calls; 0 where there are none.
    """

    answers: int
    tokens_per_character: float
    completion_tokens: float
    latency_ms: float


@dataclass(frozen=True, slots=True)
class Arrival:
    """A row of TABLE, a call or both, on the way to the database. `lines`: their numbers in the
    journal. `is_kept`: whether the journal has them."""

    row: dict[str, Any] | None
    call: Call | None
    lines: tuple[int, ...]
    is_kept: bool = True


class LabelStore:
    """Teacher answers by request key, in SQLite or PostgreSQL.

    `url` is SQLAlchemy's, by default DISTILLERY_LABELS. `wait_s` is how long an outage of the
    database is waited out, by default DISTILLERY_STORE_WAIT; then StoreUnavailable is raised, and
    StoreError at once for what waiting does not mend. Answers older than `max_age` days, if it is
    given, are taken for missing by `get_many` and `answered`, and replaced by those that are added.

    To open a store takes in what processes of this machine that have ended left in their journals
    (journal.py); `recovered` tells of each. Not so with `recovers=False`, for those who only read.

    Any thread adds answers; one thread of the store's own writes them. Invariants:
    - Answers are committed in the order of `add`, without a call of `flush`: the writer pauses for
      GATHER_S, then commits what has arrived, up to MOST_PER_COMMIT at a time.
    - An answer that is stored already, and not too old, never changes: the first one under a key
      stays. Only what its text is read as may: `accept`.
    - `flush` puts an event into the writer's queue and returns when the writer sets it, which is
      after the commit of all answers before it.
    - What is added is in the journal before it is in the writer's queue, and leaves the journal
      after its commit. So does a call that has begun, until it is recorded.
    - While commits fail, or one takes longer than SLOW_COMMIT_S, `is_away` is true and `ready`
      waits, so that no call begins; the writer tries again for `wait_s`.
    - The first failure after that is final: nothing is committed after it, and every later `add`,
      `flush`, `get_many` and `close` raises it. What is added still comes into the journal.
    - A None in the queue ends the writer. `close` sends it after the last answer.
    """

    def __init__(
        self,
        url: str | None = None,
        wait_s: float | None = None,
        max_age: float | None = None,
        recovers: bool = True,
    ) -> None:
        self._database = Database(url, wait_s)
        self._since = None
        if max_age is not None:
            self._since = datetime.now(UTC) - timedelta(days=max_age)
        self._arrived: SimpleQueue[Arrival | threading.Event | None] = SimpleQueue()
        self._failure: StoreError | None = None
        self._commit_wait_s = wait_s
        settings = LocalSettings()
        if wait_s is None and settings.container and "store_wait" not in settings.model_fields_set:
            self._commit_wait_s = CONTAINER_WAIT_S
        self._is_failing = False
        self._committing_since: float | None = None
        self._lost = 0
        self.recovered = recover(self._database, self._take_in) if recovers else []
        self._journal = Journal(self._database)
        self._begun: dict[str, tuple[Call, int]] = {}
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

    @property
    def database(self) -> Database:
        """The database of the answers, in which runs find each other too."""
        return self._database

    @property
    def is_away(self) -> bool:
        """Whether the database does not answer at present."""
        since = self._committing_since
        is_slow = since is not None and monotonic() - since > SLOW_COMMIT_S
        return self._is_failing or is_slow

    def get_many(self, keys: Iterable[str]) -> dict[str, StoredAnswer]:
        """Return the answers stored under `keys`, by key, including those just added."""
        self.flush()
        found = {}
        for chunk in chunks(keys):
            query = select(*ANSWER_COLUMNS).where(self._is_stored(chunk))
            for row in self._rows(query):
                answer = StoredAnswer._make(row)
                found[answer.request_key] = answer
        return found

    def answered(self, keys: Iterable[str]) -> set[str]:
        """Return those of `keys` that an answer is stored under."""
        found: set[str] = set()
        for chunk in chunks(keys):
            query = select(TABLE.c.request_key).where(self._is_stored(chunk))
            found.update(row.request_key for row in self._rows(query))
        return found

    def experience(
        self,
        teacher: str,
        ends_with: str = "",
        ends_without: str = "",
        longest: int | None = None,
        keys: Iterable[str] | None = None,
    ) -> Experience | None:
        """Return what this teacher's last EXPERIENCE_ROWS answers tell; None if there are none.

        `ends_with` and `ends_without` choose answers by the end of their prompts, and `keys` those
        under some of the first EXPERIENCE_ROWS of these keys. `longest` chooses labels of so many
        characters at most, under any key. Rejected answers are paid too: with `longest`, those
        under `keys` count, and all of them where the teacher has given no longer label.
        """
        prompt = TABLE.c.prompt
        last = select(TABLE).where(
            TABLE.c.teacher == teacher, prompt != "", TABLE.c.prompt_tokens > 0
        )
        if ends_with:
            last = last.where(prompt.endswith(ends_with, autoescape=True))
        if ends_without:
            last = last.where(not_(prompt.endswith(ends_without, autoescape=True)))
        under_keys = self._is_stored(list(islice(keys or (), EXPERIENCE_ROWS)))
        if longest is not None:
            other = TABLE.alias()
            longer = select(other.c.request_key).where(
                other.c.teacher == teacher, func.length(other.c.answer) > longest
            )
            is_of_kind = or_(under_keys, not_(longer.exists()))
            is_rejected = TABLE.c.answer.is_(None)
            is_short = func.length(TABLE.c.answer) <= longest
            last = last.where(or_(is_short, and_(is_rejected, is_of_kind)))
        elif keys is not None:
            last = last.where(under_keys)
        answers = last.order_by(TABLE.c.created_at.desc()).limit(EXPERIENCE_ROWS).subquery()
        query = select(
            func.count(),
            func.sum(answers.c.prompt_tokens),
            func.sum(func.length(answers.c.prompt)),
            func.avg(answers.c.completion_tokens),
            # Answers from batches have no latency.
            func.coalesce(func.avg(func.nullif(answers.c.latency_ms, 0)), 0),
        )
        ((count, tokens, characters, completion_tokens, latency_ms),) = self._rows(query)
        if not count:
            return None
        return Experience(count, tokens / characters, float(completion_tokens), float(latency_ms))

    def first_answers(self, teacher: str, count: int) -> list[StoredAnswer]:
        """Return up to `count` of a teacher's answers, those with the lowest keys."""
        of_teacher = select(*ANSWER_COLUMNS).where(TABLE.c.teacher == teacher)
        rows = self._rows(of_teacher.order_by(TABLE.c.request_key).limit(count))
        return [StoredAnswer._make(row) for row in rows]

    def begin(self, call: Call) -> None:
        """Note that a call is about to be made, of which `call` tells the most that it can take.
        Where the process ends before `record`, this is the ledger's entry. Raises StoreError where
        the journal can't be written, and the writer's failure; the call must not be made then."""
        self._raise_failure()
        self._begun[call.call_id] = call, self._journal.write("begun", values_of(call))

    async def ready(self) -> None:
        """Wait while the database is away, before a call begins. Raises the writer's failure."""
        while self.is_away and not self._failure:
            await asyncio.sleep(PAUSE_S)
        self._raise_failure()

    def add(self, answer: StoredAnswer, call: Call | None = None) -> None:
        """Hand an answer to the writer, and the call that gave it, without waiting. Raises
        StoreError where the journal can't be written, and the writer's failure; the answer is
        committed, or in the journal, in spite of the one or the other."""
        row = {**answer._asdict(), "created_at": datetime.now(UTC)}
        entry = None if call is None else values_of(call)
        line = {"row": row, "since": self._since, "call": entry}
        self._hand_over("answer", line, row, call)

    def record(self, call: Call) -> None:
        """Hand a call to the writer, for the ledger, without waiting. Raises as `add` does."""
        self._hand_over("call", values_of(call), None, call)

    def _hand_over(
        self, kind: Kind, line: dict[str, Any], row: dict[str, Any] | None, call: Call | None
    ) -> None:
        begun = self._begun.pop(call.call_id, None) if call else None
        lines = [begun[1]] if begun else []
        count = len(lines)
        if self.is_away:
            self._journal.set_durable(True)
        try:
            lines.append(self._journal.write(kind, line))
        finally:
            self._arrived.put(Arrival(row, call, tuple(lines), len(lines) > count))
        self._raise_failure()

    @property
    def waiting(self) -> int:
        """Return how many answers the writer has not taken yet."""
        return self._arrived.qsize()

    def flush(self) -> None:
        """Wait until all that was added is committed. Raises the writer's failure."""
        if self._writer.is_alive():
            committed = threading.Event()
            self._arrived.put(committed)
            committed.wait()
        self._raise_failure()

    def recover(self) -> None:
        """Take in what processes of this machine that have ended by now left in their journals."""
        self.recovered += recover(self._database, self._take_in)

    def close(self) -> None:
        """Commit what was added and disconnect. Raises the writer's failure."""
        self._stop()
        self._raise_failure()

    def accept(self, answers: Sequence[StoredAnswer]) -> None:
        """Write what the texts of stored answers are read as by now, and the reasons. The
        probabilities of another letter or class go; tokens are the text's, and stay."""
        if not answers:
            return
        accepted = (
            update(TABLE)
            .where(TABLE.c.request_key == bindparam("key"))
            .values(answer=bindparam("read_as"), reason=bindparam("why"), distribution=None)
        )
        # As in `_insert`, in the order of the keys.
        rows = [
            {"key": answer.request_key, "read_as": answer.answer, "why": answer.reason}
            for answer in sorted(answers, key=attrgetter("request_key"))
        ]
        self._database.run(partial(execute, statement=accepted, values=rows))

    def delete(
        self,
        rows: Iterable[str] = (),
        containing: Iterable[str] = (),
        rejected: bool = False,
        dry_run: bool = False,
    ) -> int:
        """Delete answers and return how many; in a dry run, return how many it would be.

        Deleted are the answers to the rows with the ids `rows`, of judges too, those whose prompt
        or answer contains one of the texts `containing` (in any case), and if `rejected`, those
        that are no label. What was made of them before stays where it is: see
        docs/how-to/labels.md.
        """
        conditions: list[Any] = []
        if rejected:
            conditions.append(TABLE.c.answer.is_(None))
        for text in filter(None, containing):
            conditions.append(TABLE.c.prompt.icontains(text, autoescape=True))
            conditions.append(TABLE.c.raw.icontains(text, autoescape=True))
        named = list(filter(None, rows))
        # Each id once: an answer is in one chunk at most.
        ids = dict.fromkeys(chain(named, *map(both_orders, named)))
        # All in one transaction.
        delete_all = partial(delete_answers, conditions=conditions, ids=list(ids), dry_run=dry_run)
        count = self._database.run(delete_all)
        if not dry_run:
            self._database.truncate_log()
        return count

    def summary(self) -> list[tuple[str, int, int]]:
        """Return (teacher, answers, rejected answers) for each teacher, by name."""
        rejected = func.count().filter(TABLE.c.answer.is_(None))
        query = select(TABLE.c.teacher, func.count(), rejected)
        found = self._rows(query.group_by(TABLE.c.teacher).order_by(TABLE.c.teacher))
        return [(row[0], row[1], row[2]) for row in found]

    def commit(self, rows: list[dict[str, Any]], calls: Sequence[Call] = ()) -> None:
        """Write rows of TABLE and calls in one transaction. Only the writer calls it."""
        self._insert(rows, calls, self._since, self._pause, self._commit_wait_s)

    def _insert(
        self,
        rows: list[dict[str, Any]],
        calls: Sequence[Call],
        since: datetime | None,
        on_failure: Callable[[], None] = nothing,
        wait_s: float | None = None,
    ) -> None:
        """Write rows of TABLE and calls in one transaction. What is stored stays, answers of before
        `since` excepted. `on_failure` and `wait_s` as in `Database.run`."""
        insert = NEW_ANSWER if since is None else NEWER_ANSWER.bindparams(since=since)
        # Two processes that wrote equal answers in different orders would each wait for the other.
        rows = sorted(rows, key=itemgetter("request_key"))

        def write(connection: Any) -> None:
            if rows:
                execute(connection, insert, rows)
            write_calls(connection, calls)

        self._database.run(write, on_failure, wait_s)

    def _pause(self) -> None:
        """Have no call begin while the database is away, and keep on the disk what arrives."""
        self._is_failing = True
        self._journal.set_durable(True)

    def _take_in(self, items: list[Item]) -> list[Item]:
        """Write what a journal holds; what is in the database already stays. Return what the
        database refuses."""
        refused, by_since = [], dict[datetime | None, list[Item]]()
        for item in items:
            if item.row is None or item.row.keys() == COLUMN_NAMES:
                by_since.setdefault(item.since, []).append(item)
            else:
                refused.append(item)
        for since, of_since in by_since.items():
            for start in range(0, len(of_since), MOST_PER_COMMIT):
                refused += self._insert_items(of_since[start : start + MOST_PER_COMMIT], since)
        return refused

    def _insert_items(self, items: list[Item], since: datetime | None) -> list[Item]:
        """Write items, one by one if not all at once, and return those that are refused."""
        rows = [item.row for item in items if item.row is not None]
        calls = [item.call for item in items if item.call is not None]
        try:
            self._insert(rows, calls, since)
        except (RowRefused, ValueError, TypeError, AttributeError, OverflowError):
            if len(items) == 1:
                return items
            return [item for each in items for item in self._insert_items([each], since)]
        return []

    def _is_stored(self, keys: Sequence[str]) -> Any:
        """Return the condition for answers under `keys` that are not too old."""
        is_one = TABLE.c.request_key.in_(keys)
        if self._since is None:
            return is_one
        return and_(is_one, TABLE.c.created_at >= self._since)

    def _rows(self, query: Any) -> Sequence[Any]:
        return self._database.run(lambda connection: connection.execute(query).all())

    def _stop(self) -> None:
        if self._writer.is_alive():
            # Calls that nobody waits for any more are lost.
            for call, line in self._begun.values():
                self._arrived.put(Arrival(None, call, (line,)))
            self._arrived.put(None)
            self._writer.join()
        self._database.close()
        self._journal.close()

    def _raise_failure(self) -> None:
        if not self._failure:
            return
        message, kept = str(self._failure), self._journal.answers
        if kept and LocalSettings().container:
            message += (
                f"; {kept} answers are in {self._journal.path} and vanish with this container, "
                "unless that is on a volume that the next run gets too"
            )
        elif kept:
            message += (
                f"; {kept} answers are safe in {self._journal.path}: the next run on this machine "
                "takes them in, or `distillery labels recover` does"
            )
        if self._lost:
            message += f"; {self._lost} answers are lost, since the journal had no room either"
        raise type(self._failure)(message)

    def _write(self) -> None:
        """Commit what arrives until a None does. Runs in the writer's thread."""
        while True:
            batch = self._take_batch()
            arrivals = [item for item in batch if isinstance(item, Arrival)]
            if arrivals and not self._failure:
                try:
                    self._commit(arrivals)
                except StoreError as error:
                    self._failure = error
                except Exception as error:
                    # Those who wait for a flush must hear of any failure.
                    self._failure = StoreError(f"an answer can't be stored ({one_line(error)})")
                if self._failure:
                    self._pause()
            if self._failure:
                self._lost += sum(bool(item.row) and not item.is_kept for item in arrivals)
            for item in batch:
                if isinstance(item, threading.Event):
                    item.set()
            if None in batch:
                return

    def _commit(self, arrivals: Sequence[Arrival]) -> None:
        """Commit what has arrived and take it out of the journal. Raises StoreError."""
        rows = [arrival.row for arrival in arrivals if arrival.row]
        calls = [arrival.call for arrival in arrivals if arrival.call]
        self._committing_since = monotonic()
        try:
            self.commit(rows, calls)
        finally:
            self._committing_since = None
        self._journal.settle(line for arrival in arrivals for line in arrival.lines)
        self._is_failing = False
        self._journal.set_durable(False)

    def _take_batch(self) -> list[Arrival | threading.Event | None]:
        """Wait for one item and take what else has arrived, after a pause if it is an answer."""
        batch = [self._arrived.get()]
        if isinstance(batch[0], Arrival):
            sleep(GATHER_S)
        while len(batch) < MOST_PER_COMMIT:
            try:
                batch.append(self._arrived.get_nowait())
            except Empty:
                break
        return batch


def chunks(items: Iterable[str]) -> Iterator[list[str]]:
    """Yield `items` by KEYS_PER_QUERY, since a query takes only so many parameters."""
    remaining = iter(items)
    while True:
        chunk = list(islice(remaining, KEYS_PER_QUERY))
        if not chunk:
            return
        yield chunk


def execute(connection: Any, statement: Any, values: list[dict[str, Any]]) -> None:
    """Execute an SQL statement once for all of `values`."""
    connection.execute(statement, values)


def delete_answers(
    connection: Any, conditions: Sequence[Any], ids: Sequence[str], dry_run: bool
) -> int:
    """Delete the answers that meet any of the conditions and those to the rows with these distinct
    ids, and return how many; in a dry run, count them only. An answer counts once, whatever it is
    deleted for."""
    count = 0

    def apply(condition: Any, earlier: Sequence[Any]) -> int:
        if dry_run:
            # In earnest, an earlier condition would have deleted what it shares with this one.
            # Chunks of ids share nothing: a query that named all ids before would grow too large.
            condition = and_(condition, *map(not_, earlier))
            query = select(func.count()).select_from(TABLE).where(condition)
            return int(connection.scalar(query))
        return int(connection.execute(delete(TABLE).where(condition)).rowcount)

    for number, condition in enumerate(conditions):
        count += apply(condition, conditions[:number])
    for chunk in chunks(ids):
        count += apply(TABLE.c.example_id.in_(chunk), conditions)
    return count
