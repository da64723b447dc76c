"""A list of work that processes on any machines share: each takes the next number of it, so that
all of them are at work until the list is at its end."""

import json
from collections.abc import Sequence
from typing import Any

from sqlalchemy import Column, Float, Integer, String, Table, Text, delete, select, text, update

from distillery.storage.database import METADATA, Database
from distillery.storage.leases import NOW

KEPT_S = 30 * 24 * 3600.0
"""Seconds after which a list is removed that nobody has come back to."""

LISTS = Table(
    "shared_lists",
    METADATA,
    Column("name", String(64), primary_key=True),
    Column("numbers", Text, nullable=False),
    Column("size", Integer, nullable=False),
    Column("taken", Integer, nullable=False),
    Column("offered_at", Float, nullable=False),
)
"""`numbers` is JSON; of these `size` numbers the first `taken` ones are taken."""


class SharedList:
    """The list `name` in a database.

    Invariant: no two processes take the same number. Whether a number that was taken is done is not
    known here. The process that offers the list finds that out, and offers again what is not done.
    A number is lost if the database's answer to its commit is lost."""

    def __init__(self, name: str, database: Database) -> None:
        self.name = name
        self._database = database
        self._now = NOW[database.backend]
        self._own = LISTS.c.name == name

    def offer(self, numbers: Sequence[int]) -> None:
        """Put a new list in place, unless there is one with numbers left: others may take them."""
        new: dict[str, Any] = {"numbers": json.dumps(list(numbers)), "size": len(numbers)}
        new |= {"taken": 0, "offered_at": self._now}
        put = self._database.insert(LISTS).values(name=self.name, **new)
        put = put.on_conflict_do_update(
            index_elements=[LISTS.c.name], set_=new, where=LISTS.c.taken >= LISTS.c.size
        )
        forgotten = LISTS.c.offered_at < text(f"{self._now.text} - {KEPT_S}")

        def offer(connection: Any) -> None:
            connection.execute(delete(LISTS).where(forgotten))
            connection.execute(put)

        self._database.run(offer)

    def take(self) -> int | None:
        """Take the next number; None where none is left, or there is no list."""
        step = update(LISTS).where(self._own, LISTS.c.taken < LISTS.c.size)
        step = step.values(taken=LISTS.c.taken + 1)

        def take(connection: Any) -> Any:
            return connection.execute(step.returning(LISTS.c.taken, LISTS.c.numbers)).first()

        row = self._database.run(take)
        return None if row is None else int(json.loads(row.numbers)[row.taken - 1])

    def progress(self) -> tuple[list[int], int]:
        """Return the numbers that were taken, and how many are left; none and 0 where there is no
        list."""
        whole = select(LISTS.c.numbers, LISTS.c.taken).where(self._own)
        row = self._database.run(lambda connection: connection.execute(whole).first())
        if row is None:
            return [], 0
        numbers = json.loads(row.numbers)
        return numbers[: row.taken], len(numbers) - row.taken

    def remove(self) -> None:
        """Remove the list: processes that take from it find nothing more."""
        removed = delete(LISTS).where(self._own)
        self._database.run_once(lambda connection: connection.execute(removed))
