"""How many runs share something at present, such as an endpoint's limits, on whatever machines."""

import hashlib
import threading
import time
from typing import Any
from uuid import uuid4

from sqlalchemy import delete, func, select, text

from distillery.errors import StoreError
from distillery.storage.database import Database
from distillery.storage.leases import LEASES, NOW

BEAT_S = 5.0
"""Between two renewals of a run's row; each also counts the other runs."""

LENGTH_S = 60.0
"""After the last renewal of a run that died, until the others count it no longer. A renewal may
wait 30 s for SQLite's lock."""

JOIN_S = 30.0
"""How long a run that joins waits for a database that does not answer."""

RETRY_S = 1.0
"""Between two tries to join."""

REMOVED_AFTER_S = 3600.0
"""After the expiry of a row. Its run is long dead then, so that no two runs wait for each other's
row."""


class Sharers:
    """The runs that share `what`, any text, in a database.

    A run is one of them from `join` to `leave`. It is a row of the table of leases, under a name of
    its own, which a thread renews. The row expires by the database's clock.

    Invariants:
    - `count` is at least 1: this run. It never waits for the database.
    - A run that joins is counted by all others within BEAT_S, if the database answers them.
    - A run joins once the database has answered, or after JOIN_S: until then it knows of no other.
    - While the database does not answer, `count` stays. All rows may have expired when it answers
      again, so that `count` does not fall for as long as it takes the others to renew theirs.
      `failed_at` is the time.monotonic() at which it last did not answer.
    """

    def __init__(self, database: Database, what: str) -> None:
        self.count = 1
        self.failed_at = float("-inf")
        self._database = database
        self._prefix = f"shares {hashlib.sha256(what.encode()).hexdigest()} "
        self._name = f"{self._prefix}{uuid4().hex}"
        self._left = threading.Event()
        self._thread = threading.Thread(target=self._stay, name="sharers", daemon=True)

    @property
    def counted_within_s(self) -> float:
        """Seconds after `join` within which the others count this run, if the database answers."""
        return BEAT_S + 1.0

    def join(self) -> None:
        """Be counted from now on, and know how many runs there are. Waits for a database that does
        not answer, JOIN_S at most."""
        deadline = time.monotonic() + JOIN_S
        while not self._beat() and time.monotonic() < deadline and not self._left.wait(RETRY_S):
            pass
        self._thread.start()

    def leave(self) -> None:
        """Be counted no longer. Where the database does not answer, the row expires instead."""
        self._left.set()
        if self._thread.is_alive():
            self._thread.join(BEAT_S)

    def _stay(self) -> None:
        while not self._left.wait(BEAT_S):
            self._beat()
        own = delete(LEASES).where(LEASES.c.name == self._name)
        try:
            self._database.run_once(lambda connection: connection.execute(own))
        except StoreError:
            return

    def _beat(self) -> bool:
        """Renew the row and count the runs; return whether the database answered."""
        try:
            count = self._database.run_once(self._renew_and_count)
        except StoreError:
            self.failed_at = time.monotonic()
            return False
        if count > self.count or time.monotonic() - self.failed_at > 2 * BEAT_S:
            self.count = count
        return True

    def _renew_and_count(self, connection: Any) -> int:
        now = NOW[self._database.backend].text
        until = text(f"{now} + {LENGTH_S}")
        own = self._database.insert(LEASES).values(
            name=self._name, holder="", run="", expires_at=until
        )
        connection.execute(
            own.on_conflict_do_update(index_elements=[LEASES.c.name], set_={"expires_at": until})
        )
        runs = LEASES.c.name.startswith(self._prefix)
        dead = LEASES.c.expires_at <= text(f"{now} - {REMOVED_AFTER_S}")
        connection.execute(delete(LEASES).where(runs, dead))
        alive = LEASES.c.expires_at > text(now)
        count: int = connection.execute(
            select(func.count()).select_from(LEASES).where(runs, alive)
        ).scalar_one()
        return max(count, 1)
