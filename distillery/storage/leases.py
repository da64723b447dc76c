"""Leases: who is at which piece of work, so that runs on any machines do each piece once.

A lease is a row with an expiry in the shared SQL database. Its holder renews it while it works; the lease of one who
died expires by itself. Times are the database's own, so that machines' clocks need not agree. While the database is
away nobody can renew: so whoever waits takes an expired lease only after having seen, for two renewals' time with the
database there, that nobody renews it. A holder that was held up for longer may find that another has begun the same
work: that costs the work twice and harms nothing, since what is made is named by its content.
"""

import threading
import time
from collections.abc import Callable
from functools import partial
from typing import Any

from sqlalchemy import Column, Float, String, Table, Text, delete, false, select, text, update
from sqlalchemy.sql.elements import TextClause

from distillery.errors import StoreError
from distillery.storage.database import METADATA, Database

SECONDS = 30.0

_RENEWALS = 6

_POLL = 1.0

_OUTAGE = 3.0
"""Seconds without an answer after which the database counts as having been away."""

_LEASES = Table(
    "leases",
    METADATA,
    Column("name", String(200), primary_key=True),
    Column("holder", String(64), nullable=False),
    Column("run", Text, nullable=False),
    Column("expires_at", Float, nullable=False),
)

_NOW = {
    "postgresql": text("extract(epoch from clock_timestamp())"),
    "sqlite": text("(julianday('now') - 2440587.5) * 86400.0"),
}


class Leases:
    """The leases in the shared database. A holder is any unique text; `run` is what people call it."""

    def __init__(self, url: str | None = None, seconds: float = SECONDS) -> None:
        self._database = Database(url)
        self._now: TextClause = _NOW[self._database.backend]
        self._seconds = seconds
        self._renewals: dict[tuple[str, str], threading.Event] = {}

    def acquire(
        self,
        name: str,
        holder: str,
        run: str = "",
        timeout: float | None = None,
        waiting: Callable[[str], None] | None = None,
    ) -> bool:
        """Takes the lease as soon as it is free, and renews it until `release` or the end of this process.

        Waits for at most `timeout` seconds, without end by default; returns whether it was taken. `waiting` is told at
        each look which run holds it; what it raises ends the wait."""
        deadline = None if timeout is None else time.monotonic() + timeout
        seen: float | None = None
        since = asked = time.monotonic()
        while True:
            held = self._database.run(lambda connection: self._read(connection, name))
            now = time.monotonic()
            if held is None or held.expires_at != seen or now - asked > _OUTAGE:
                seen, since = held.expires_at if held else None, now
            left = seen if now - since >= 2 * self._seconds / _RENEWALS else None
            if self._database.run(
                partial(self._take, name=name, holder=holder, run=run, left=left)
            ):
                break
            if deadline is not None and now >= deadline:
                return False
            if held and waiting:
                waiting(held.run or "another run")
            time.sleep(_POLL)
            asked = time.monotonic()
        stop = self._renewals[name, holder] = threading.Event()
        threading.Thread(
            target=self._renew, args=(name, holder, stop), name="lease", daemon=True
        ).start()
        return True

    def release(self, name: str, holder: str) -> None:
        """Lets go of the lease; one that can't be released now expires."""
        if stop := self._renewals.pop((name, holder), None):
            stop.set()
            owned = delete(_LEASES).where(_LEASES.c.name == name, _LEASES.c.holder == holder)
            try:
                self._database.run_once(lambda connection: connection.execute(owned))
            except StoreError:
                return

    def is_held(self, name: str) -> bool:
        """Whether anybody holds it."""
        held = self._database.run(lambda connection: self._read(connection, name))
        return held is not None and not held.expired

    def holds(self, name: str, holder: str) -> bool:
        """Whether this process is at that work as `holder`, as far as it knows: what it has made it may keep."""
        return (name, holder) in self._renewals

    def _read(self, connection: Any, name: str) -> Any:
        expired = (_LEASES.c.expires_at <= self._now).label("expired")
        return connection.execute(select(_LEASES, expired).where(_LEASES.c.name == name)).first()

    def _take(self, connection: Any, name: str, holder: str, run: str, left: float | None) -> bool:
        """Takes a lease that nobody has, that `holder` has, or that expired at `left`."""
        until = self._until()
        insert = self._database.insert(_LEASES).values(
            name=name, holder=holder, run=run, expires_at=until
        )
        free = (
            (_LEASES.c.expires_at <= self._now) & (_LEASES.c.expires_at == left)
            if left is not None
            else false()
        )
        taken = insert.on_conflict_do_update(
            index_elements=[_LEASES.c.name],
            set_={"holder": holder, "run": run, "expires_at": until},
            where=free | (_LEASES.c.holder == holder),
        )
        return connection.execute(taken.returning(_LEASES.c.name)).first() is not None

    def _renew(self, name: str, holder: str, stop: threading.Event) -> None:
        owned = update(_LEASES).where(_LEASES.c.name == name, _LEASES.c.holder == holder)
        renewed = owned.values(expires_at=self._until())
        while not stop.wait(self._seconds / _RENEWALS):
            try:
                self._database.run_once(lambda connection: connection.execute(renewed))
            except StoreError:
                # The next try comes soon; should all of them fail, the lease expires, which is what it is for.
                continue

    def _until(self) -> TextClause:
        return text(f"{self._now.text} + {self._seconds}")
