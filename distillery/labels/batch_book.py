"""The book of batches, in the database that runs share (DISTILLERY_LABELS): which batches the
teachers' endpoints have, and which requests are in them.

- teacher_batches: a row for each batch, written before its file is uploaded
- teacher_batch_lines: a row for each request that is in a batch, until its answer is taken in; and
  for each that has failed in a batch and is to be asked again
"""

import uuid
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, field, fields
from datetime import UTC, datetime
from hashlib import sha256
from types import TracebackType
from typing import Any, Literal, NamedTuple, Self

from sqlalchemy import (
    JSON,
    BigInteger,
    Column,
    DateTime,
    Float,
    Integer,
    String,
    Table,
    Text,
    and_,
    bindparam,
    delete,
    func,
    select,
    update,
)

from distillery.labels.store import chunks
from distillery.storage.database import METADATA, Database
from distillery.teacher.allowances import ALLOWANCES
from distillery.teacher.ledger import Call
from distillery.teacher.reservations import give_back

BatchState = Literal["intended", "uploaded", "submitted", "ended", "collected"]
"""How far a batch is.

intended: its requests are taken, and nothing may be uploaded yet. uploaded: the service has its
file. submitted: the service has made a batch of it. ended: the service has ended it, and answers
are still to be taken in. collected: none are.
"""

OPEN: tuple[BatchState, ...] = ("intended", "uploaded", "submitted", "ended")


@dataclass(frozen=True, slots=True)
class Batch:
    """A row of the table teacher_batches.

    batch_id: our own. digest: the SHA-256 (hex) of its file; "" until the file is written. teacher:
    its identity; url: its endpoint's. run and recipe: on whose behalf it was sent. file_id and
    service_id: the service's ids; status: the service's word for how it is. lines: its requests.
    tokens and cost: the most that they can take, in the prices' currency; cost is None without
    prices. prices: those of a batch, per million tokens. booked_at: since when the ledger has an
    entry for each of its requests.
    """

    teacher: str
    url: str
    run: str
    recipe: str
    batch_id: str = field(default_factory=lambda: uuid.uuid4().hex)
    state: BatchState = "intended"
    digest: str = ""
    file_id: str = ""
    service_id: str = ""
    status: str = ""
    lines: int = 0
    tokens: int = 0
    cost: float | None = None
    created_at: datetime = field(default_factory=lambda: datetime.now(UTC))
    submitted_at: datetime | None = None
    ended_at: datetime | None = None
    collected_at: datetime | None = None
    prices: dict[str, Any] | None = None
    booked_at: datetime | None = None

    @property
    def lease(self) -> str:
        """The name of its lease: who sends it, or takes its answers in, holds that."""
        return f"batch {self.batch_id}"

    @property
    def file_name(self) -> str:
        """The name under which its file is uploaded, by which a later run finds it again."""
        return f"distillery-{self.batch_id}-{self.digest[:16]}.jsonl"


class Line(NamedTuple):
    """A row of the table teacher_batch_lines: the batch that the request is in, "" if it is in
    none, and the batches in which it has failed."""

    batch_id: str
    tries: int


BATCHES = Table(
    "teacher_batches",
    METADATA,
    Column("batch_id", String(32), primary_key=True),
    Column("state", Text, nullable=False),
    Column("digest", String(64), nullable=False),
    Column("teacher", Text, nullable=False, index=True),
    Column("url", Text, nullable=False),
    Column("run", Text, nullable=False),
    Column("recipe", Text, nullable=False),
    Column("file_id", Text, nullable=False),
    Column("service_id", Text, nullable=False),
    Column("status", Text, nullable=False),
    Column("lines", Integer, nullable=False),
    Column("tokens", BigInteger, nullable=False),
    Column("cost", Float),
    Column("created_at", DateTime(timezone=True), nullable=False),
    Column("submitted_at", DateTime(timezone=True)),
    Column("ended_at", DateTime(timezone=True)),
    Column("collected_at", DateTime(timezone=True)),
    Column("prices", JSON(none_as_null=True)),
    Column("booked_at", DateTime(timezone=True)),
)

LINES = Table(
    "teacher_batch_lines",
    METADATA,
    Column("request_key", String(64), primary_key=True),
    Column("batch_id", String(32), nullable=False, index=True),
    Column("tries", Integer, nullable=False),
)

COLUMNS = [BATCHES.c[column.name] for column in fields(Batch)]

LINES_LEFT = select(func.count()).where(LINES.c.batch_id == BATCHES.c.batch_id).scalar_subquery()


class BatchBook:
    """The book of batches at `url`, by default DISTILLERY_LABELS. Its methods raise what
    `Database.run` raises.

    Invariants:
    - A request is in at most one batch: `intend` takes those that are in none, in one statement
      each.
    - A request leaves a batch only once its answer is committed to the label store, or once it is
      known that the batch holds none.
    """

    def __init__(self, url: str | None = None, wait_s: float | None = None) -> None:
        self._database = Database(url, wait_s)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self._database.close()

    def intend(self, batch: Batch, keys: Sequence[str]) -> set[str]:
        """Write a new batch, and take those of `keys` for it that are in no other; return them."""
        taken = self._database.insert(LINES).values(
            request_key=bindparam("key"), batch_id=batch.batch_id, tries=0
        )
        taken = taken.on_conflict_do_update(
            index_elements=[LINES.c.request_key],
            set_={"batch_id": batch.batch_id},
            where=LINES.c.batch_id == "",
        )
        insert = self._database.insert(BATCHES).on_conflict_do_nothing()

        def write(connection: Any) -> None:
            connection.execute(insert, [asdict(batch)])
            connection.execute(taken, [{"key": key} for key in keys])

        self._database.run(write)
        return self.keys_of(batch.batch_id)

    def change(self, batch_id: str, **values: Any) -> None:
        """Write new values of a batch's columns."""
        changed = update(BATCHES).where(BATCHES.c.batch_id == batch_id).values(**values)
        self._database.run(lambda connection: connection.execute(changed))

    def advance(self, batch_id: str, states: Sequence[BatchState], **values: Any) -> bool:
        """Write new values of a batch's columns if it is in one of these states; return whether it
        is. Who was suspended for long learns so that another process has gone on with the batch."""
        of_state = and_(BATCHES.c.batch_id == batch_id, BATCHES.c.state.in_(states))
        changed = update(BATCHES).where(of_state).values(**values)
        return bool(self._database.run(lambda connection: connection.execute(changed).rowcount))

    def adopt(self, batch_id: str, run: str) -> None:
        """Have `run` pay for a batch that an earlier run of its recipe sent."""
        changes = [
            update(BATCHES).where(BATCHES.c.batch_id == batch_id),
            update(ALLOWANCES).where(ALLOWANCES.c.holder == batch_id),
        ]

        def write(connection: Any) -> None:
            for change in changes:
                connection.execute(change.values(run=run))

        self._database.run(write)

    def give_up(self, batch_id: str) -> None:
        """Delete a batch that asks nothing, and leave its requests to others."""

        def write(connection: Any) -> None:
            self._free(connection, batch_id, None, 0)
            give_back(connection, batch_id)
            connection.execute(delete(BATCHES).where(BATCHES.c.batch_id == batch_id))

        self._database.run(write)

    def leave(self, batch_id: str, keys: Iterable[str]) -> None:
        """Take requests out of a batch that does not ask them."""
        listed = list(keys)
        self._database.run(lambda connection: self._free(connection, batch_id, listed, 0))

    def settle(
        self,
        batch_id: str,
        answered: Sequence[str],
        failed: Sequence[str] = (),
        untried: Sequence[str] = (),
    ) -> int:
        """Take the requests `answered`, whose answers are committed, those that `failed`, which
        count as tried once more, and those `untried`, to which the service did not come, out of an
        ended batch whose calls are all in the ledger; return how many are left in it. What is
        reserved of a budget is given back."""
        mine = and_(LINES.c.batch_id == batch_id, LINES.c.request_key == bindparam("key"))
        left = select(func.count()).where(LINES.c.batch_id == batch_id)

        def write(connection: Any) -> int:
            if answered:
                connection.execute(delete(LINES).where(mine), [{"key": key} for key in answered])
            self._free(connection, batch_id, failed, 1)
            self._free(connection, batch_id, untried, 0)
            give_back(connection, batch_id)
            count = int(connection.scalar(left))
            now = datetime.now(UTC)
            values: dict[str, Any] = {"booked_at": now}
            if not count:
                values |= {"state": "collected", "collected_at": now}
            own = update(BATCHES).where(BATCHES.c.batch_id == batch_id)
            connection.execute(own.values(**values))
            return count

        return self._database.run(write)

    def lines(self, keys: Iterable[str]) -> dict[str, Line]:
        """Return those of `keys` that are in a batch or have failed in one."""
        found = {}
        for chunk in chunks(keys):
            for row in self._rows(select(LINES).where(LINES.c.request_key.in_(chunk))):
                found[row.request_key] = Line(row.batch_id, row.tries)
        return found

    def keys_of(self, batch_id: str) -> set[str]:
        """Return the requests that are in a batch."""
        query = select(LINES.c.request_key).where(LINES.c.batch_id == batch_id)
        return {row.request_key for row in self._rows(query)}

    def batch(self, batch_id: str) -> Batch | None:
        """Return a batch; None if there is none of that id."""
        rows = self._rows(select(*COLUMNS).where(BATCHES.c.batch_id == batch_id))
        return Batch(*rows[0]) if rows else None

    def open_batches(self, teacher: str) -> list[Batch]:
        """Return a teacher's batches that are not collected, the oldest first."""
        query = select(*COLUMNS).where(BATCHES.c.teacher == teacher, BATCHES.c.state.in_(OPEN))
        return [Batch(*row) for row in self._rows(query.order_by(BATCHES.c.created_at))]

    def all_batches(self) -> list[tuple[Batch, int]]:
        """Return all batches, the newest first, each with its requests whose answers have not been
        taken in."""
        query = select(*COLUMNS, LINES_LEFT).order_by(BATCHES.c.created_at.desc())
        return [(Batch(*row[:-1]), row[-1]) for row in self._rows(query)]

    def _free(self, connection: Any, batch_id: str, keys: Sequence[str] | None, tries: int) -> None:
        """Take requests, by default all, out of a batch. One that was never tried needs no row."""
        mine: Any = LINES.c.batch_id == batch_id
        rows: list[dict[str, Any]] = [{}]
        if keys is not None:
            mine = and_(mine, LINES.c.request_key == bindparam("key"))
            rows = [{"key": key} for key in keys]
        if not rows:
            return
        if not tries:
            connection.execute(delete(LINES).where(mine, LINES.c.tries == 0), rows)
        freed = update(LINES).where(mine).values(batch_id="", tries=LINES.c.tries + tries)
        connection.execute(freed, rows)

    def _rows(self, query: Any) -> Sequence[Any]:
        return self._database.run(lambda connection: connection.execute(query).all())


def lost_call(batch: Batch, key: str) -> Call:
    """Return the entry of a request whose answer nobody will see."""
    lines = max(batch.lines, 1)
    return Call(
        call_id=call_id_of(batch, key),
        called_at=batch.submitted_at or batch.created_at,
        run=batch.run,
        recipe=batch.recipe,
        teacher=batch.teacher,
        purpose="label",
        outcome="lost",
        request_key=key,
        prompt_tokens=round(batch.tokens / lines),
        is_counted=False,
        cost=None if batch.cost is None else batch.cost / lines,
        prices=batch.prices,
        batch_id=batch.service_id,
    )


def call_id_of(batch: Batch, key: str) -> str:
    """Return the id of a request's entry in the ledger, so that one written twice counts once."""
    return sha256(f"{batch.batch_id} {key}".encode()).hexdigest()
