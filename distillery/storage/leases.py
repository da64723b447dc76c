"""Leases: which run is at which piece of work, so that runs on any machines do each piece once."""

import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

from sqlalchemy import Column, Float, String, Table, Text, delete, false, select, text, update
from sqlalchemy.sql.elements import TextClause

from distillery.errors import StoreError
from distillery.storage.database import METADATA, Database

LENGTH_S = 30.0

RENEWALS = 6
"""How often a lease is renewed within its length."""

POLL_S = 1.0

OUTAGE_S = 3.0
"""Seconds without an answer after which the database counts as having been away."""

LEASES = Table(
    "leases",
    METADATA,
    Column("name", String(200), primary_key=True),
    Column("holder", String(64), nullable=False),
    Column("run", Text, nullable=False),
    Column("expires_at", Float, nullable=False),
)

NOW = {
    "postgresql": text("extract(epoch from clock_timestamp())"),
    "sqlite": text("(julianday('now') - 2440587.5) * 86400.0"),
}
"""The database's own time, in seconds since the epoch."""


class Leases:
    """The leases in the shared database: rows with an expiry, which a holder renews while it works.

    Invariants:
    - A lease has one holder at a time: it is taken by one SQL statement that checks who has it.
    - Expiry is set and compared by the database's time, so machines' clocks need not agree.
    - A dead holder's lease expires by itself. It is taken only from the expiry that the waiting
      process has seen unchanged for the time of two renewals while the database answered: during
      an outage nobody can renew.
    - A holder that was suspended for longer may find that another process has begun the same work.
      That does the work twice and harms nothing: results are named by their content.
    - Processes that work for the holder may renew its lease too (`shared`), so that it outlives the
      holder until they end.

    A holder is any unique text; `run` is its name for people."""

    def __init__(self, url: str | None = None, seconds: float = LENGTH_S) -> None:
        self.database = Database(url)
        self._now: TextClause = NOW[self.database.backend]
        self._until = text(f"{self._now.text} + {seconds}")
        self._renewal_s = seconds / RENEWALS
        self._renewals: dict[tuple[str, str], threading.Event] = {}

    def acquire(
        self,
        name: str,
        holder: str,
        run: str = "",
        timeout: float | None = None,
        waiting: Callable[[str], None] | None = None,
    ) -> bool:
        """Take the lease as soon as it is free, and renew it until `release` or the end of this
        process. Return whether it was taken.

        Waits at most `timeout` seconds, by default without end. At each look `waiting` is told
        which run holds the lease; an error that it raises ends the wait."""
        deadline = None if timeout is None else time.monotonic() + timeout
        seen_expiry = None
        unchanged_since = asked_at = time.monotonic()
        while True:
            held = self.database.run(partial(self._read, name=name))
            now = time.monotonic()
            expiry = None if held is None else held.expires_at
            if expiry is None or expiry != seen_expiry or now - asked_at > OUTAGE_S:
                seen_expiry, unchanged_since = expiry, now
            abandoned = None
            if now - unchanged_since >= 2 * self._renewal_s:
                abandoned = seen_expiry
            take = partial(self._take, name=name, holder=holder, run=run, abandoned=abandoned)
            if self.database.run(take):
                break
            if deadline is not None and now >= deadline:
                return False
            if held and waiting:
                waiting(held.run or "another run")
            time.sleep(POLL_S)
            asked_at = time.monotonic()
        stop = self._renewals[name, holder] = threading.Event()
        threading.Thread(
            target=self._renew, args=(name, holder, stop), name="lease", daemon=True
        ).start()
        return True

    def release(self, name: str, holder: str) -> None:
        """Give the lease back. Where the database does not answer, it expires instead."""
        stop = self._renewals.pop((name, holder), None)
        if stop is None:
            return
        stop.set()
        owned = delete(LEASES).where(LEASES.c.name == name, LEASES.c.holder == holder)
        try:
            self.database.run_once(lambda connection: connection.execute(owned))
        except StoreError:
            return

    @contextmanager
    def shared(self, name: str, holder: str) -> Iterator[Callable[[], bool]]:
        """Renew a lease that another process has taken as `holder`, so that it outlives that one.

        Yield a function that returns whether the lease was lost: it had expired before, or somebody
        else has it."""
        stop, lost = threading.Event(), threading.Event()
        # One that has expired is free, though nobody may have taken it yet.
        if not self._renewed(name, holder, LEASES.c.expires_at > self._now):
            lost.set()
        thread = threading.Thread(
            target=self._renew, args=(name, holder, stop, lost), name="shared lease", daemon=True
        )
        thread.start()
        try:
            yield lost.is_set
        finally:
            stop.set()
            thread.join()

    def abandon(self, name: str, holder: str) -> None:
        """Renew the lease no more, and leave it to those who share it, or to expire."""
        stop = self._renewals.pop((name, holder), None)
        if stop:
            stop.set()

    def is_held(self, name: str) -> bool:
        """Return whether anybody holds the lease."""
        held = self.database.run(partial(self._read, name=name))
        return held is not None and not held.expired

    def holds(self, name: str, holder: str) -> bool:
        """Return whether this process took the lease as `holder` and has not released it, even if
        it has expired since: what this process has made may still be kept."""
        return (name, holder) in self._renewals

    def _read(self, connection: Any, name: str) -> Any:
        """Return the lease's row, with `expired`; None where there is none."""
        expired = (LEASES.c.expires_at <= self._now).label("expired")
        return connection.execute(select(LEASES, expired).where(LEASES.c.name == name)).first()

    def _take(
        self, connection: Any, name: str, holder: str, run: str, abandoned: float | None
    ) -> bool:
        """Take a lease that does not exist, that `holder` has, or that expired at `abandoned`."""
        free: Any = false()
        if abandoned is not None:
            free = (LEASES.c.expires_at <= self._now) & (LEASES.c.expires_at == abandoned)
        insert = self.database.insert(LEASES).values(
            name=name, holder=holder, run=run, expires_at=self._until
        )
        taken = insert.on_conflict_do_update(
            index_elements=[LEASES.c.name],
            set_={"holder": holder, "run": run, "expires_at": self._until},
            where=free | (LEASES.c.holder == holder),
        )
        return connection.execute(taken.returning(LEASES.c.name)).first() is not None

    def _renew(
        self, name: str, holder: str, stop: threading.Event, lost: threading.Event | None = None
    ) -> None:
        """Renew a lease until `stop`. `lost` is set where `holder` has it no more."""
        while not stop.wait(self._renewal_s):
            if not self._renewed(name, holder) and lost:
                lost.set()

    def _renewed(self, name: str, holder: str, *conditions: Any) -> bool:
        """Renew a lease that meets the conditions. Return False if `holder` has no such one; where
        the database does not answer, nobody can say so."""
        owned = update(LEASES).where(LEASES.c.name == name, LEASES.c.holder == holder, *conditions)
        renewed = owned.values(expires_at=self._until)
        try:
            return bool(self.database.run_once(lambda c: c.execute(renewed).rowcount))
        except StoreError:
            # The next try comes soon. If all of them fail, the lease expires, as it should.
            return True
