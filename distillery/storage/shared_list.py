"""A list of work that processes on any machines share: each takes the next number of it, so that
all of them are at work until the list is at its end."""

import json
from collections.abc import Sequence
from typing import Any

from sqlalchemy import Column, Integer, String, Table, Text, delete, select, update

from distillery.storage.database import METADATA, Database

LISTS = Table(
    "shared_lists",
    METADATA,
    Column("name", String(64), primary_key=True),
    Column("numbers", Text, nullable=False),
    Column("count", Integer, nullable=False),
    Column("taken", Integer, nullable=False),
)
"""`numbers` is JSON; of these `count` numbers the first `taken` ones are taken."""


class SharedList:
    """The list `name` in the shared database, DISTILLERY_LABELS.

    Invariant: no two of those who take get the same number. Whether what was taken is done is not
    known here: the process that has offered the list looks, and offers the rest. A number may be
    lost, where only the database's answer to a commit was."""

    def __init__(self, name: str, url: str | None = None) -> None:
        self.name = name
        self._database = Database(url)
        self._own = LISTS.c.name == name

    def offer(self, numbers: Sequence[int]) -> None:
        """Put a new list in place, unless there is one with numbers left: others may be at it."""
        new = {"numbers": json.dumps(list(numbers)), "count": len(numbers), "taken": 0}
        put = self._database.insert(LISTS).values(name=self.name, **new)
        put = put.on_conflict_do_update(
            index_elements=[LISTS.c.name], set_=new, where=LISTS.c.taken >= LISTS.c["count"]
        )
        self._database.run(lambda connection: connection.execute(put))

    def take(self) -> int | None:
        """Take the next number; None where none is left, or there is no list."""
        step = update(LISTS).where(self._own, LISTS.c.taken < LISTS.c["count"])
        step = step.values(taken=LISTS.c.taken + 1)

        def taken(connection: Any) -> Any:
            return connection.execute(step.returning(LISTS.c.taken, LISTS.c.numbers)).first()

        row = self._database.run(taken)
        return None if row is None else int(json.loads(row.numbers)[row.taken - 1])

    def taken(self) -> tuple[list[int], int]:
        """Return the numbers that were taken, and how many are left; none and 0 where there is no
        list."""
        whole = select(LISTS.c.numbers, LISTS.c.taken).where(self._own)
        row = self._database.run(lambda connection: connection.execute(whole).first())
        if row is None:
            return [], 0
        numbers = json.loads(row.numbers)
        return numbers[: row.taken], len(numbers) - row.taken

    def remove(self) -> None:
        """Remove the list: who takes from it finds nothing more."""
        removed = delete(LISTS).where(self._own)
        self._database.run_once(lambda connection: connection.execute(removed))
