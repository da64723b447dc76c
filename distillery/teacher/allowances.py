"""Allowances: how much of a budget each of the processes that share it may spend at present."""

import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from datetime import UTC, datetime
from functools import partial
from typing import Any

from sqlalchemy import Column, Float, String, Table, Text, and_, delete, select, text, update

from distillery.errors import StoreError
from distillery.recipe import BudgetRecipe
from distillery.storage.database import METADATA, Database, nothing
from distillery.storage.leases import LENGTH_S, NOW, RENEWALS
from distillery.teacher.ledger import Amounts, Payer, new_call_id, period_start, spent

SHARE = 1 / 8
"""The share of what is left that a process takes at a time, so that it asks the database rarely and
leaves the others enough."""

RENEWAL_S = LENGTH_S / RENEWALS

NEVER = 1e12
"""The expiry of what batches may take (reservations.py), which may be under way for a day."""

ALLOWANCES = Table(
    "budget_allowances",
    METADATA,
    Column("holder", String(64), primary_key=True),
    Column("run", Text, nullable=False),
    Column("recipe", Text, nullable=False),
    Column("section", Text, nullable=False),
    Column("cost", Float, nullable=False),
    Column("tokens", Float, nullable=False),
    Column("calls", Float, nullable=False),
    Column("expires_at", Float, nullable=False),
)


@dataclass(frozen=True)
class Grant:
    """What came of asking for an allowance. `more`: what may be spent beyond what was kept; nothing
    of anything where a call does not fit. `spent`: what the ledger says. `waits_for`: the runs of
    the other processes that have an allowance, which might be given back soon."""

    more: Amounts
    spent: Amounts
    waits_for: tuple[str, ...]


class Allowance:
    """One process's allowance: a row with an expiry, which the process renews while it asks.

    Invariants:
    - What the ledger has and what the rows allow are together within every cap, as long as no call
      takes more than it reserved. A row is changed by one transaction, which reads both.
    - A call leaves the row only after it is in the ledger: what is kept is counted before `flush`
      commits the calls that have ended.
    - Expiry is set and compared by the database's time. A dead process's row is dropped by one that
      needs it, once that has seen it expired and unchanged for the time of two renewals while the
      database answered: during an outage nobody can renew.
    - A process whose row may have been dropped, because it was suspended, has lapsed: it spends
      nothing until it has renewed.
    - Before a dead process's row is dropped, `recover` writes into the ledger what that process had
      in its journal: answers on the way to the database, and its calls under way as lost. That is
      so on the machine where it died. On others these calls, at most teacher.concurrency under way
      and what was not committed yet, can be spent beyond the cap until that machine recovers the
      journal.

    The budget is that of a run, or of a recipe since the day, week or month began in UTC, of
    teachers or of judges, as `section` of the recipe says. `flush` commits all calls recorded so
    far. `recover` commits what dead processes of this machine have left. Costs in another currency
    than `currency` don't count.
    """

    def __init__(
        self,
        database: Database,
        flush: Callable[[], None],
        budget: BudgetRecipe,
        payer: Payer,
        section: str,
        currency: str,
        recover: Callable[[], None] = nothing,
    ) -> None:
        self._database, self._flush, self._recover = database, flush, recover
        self._caps, self._period = budget.caps, budget.period
        self._payer, self._section, self._currency = payer, section, currency
        self._holder = new_call_id()
        self._until = text(f"{NOW[database.backend].text} + {LENGTH_S}")
        self._others = OtherRows(payer, section, budget, database.backend)
        self._renewed_at = float("-inf")
        self._lapses = 0

    @property
    def lapses(self) -> int:
        """How often others may have dropped the row. What was reserved before may be spent."""
        return self._lapses + self.has_lapsed

    @property
    def has_lapsed(self) -> bool:
        """Whether others may have dropped the row, so that it allows nothing."""
        # Not time.monotonic(), which stands still while a machine sleeps. A clock that is set ahead
        # costs a renewal.
        return time.time() - self._renewed_at > LENGTH_S

    def renew(self, kept: Amounts, call: Amounts, calls: int) -> Grant:
        """Keep `kept` of the allowance, give the rest back, and take more: a share of what is left,
        at least enough for `calls` calls that take `call`, as far as there is so much. Waits for
        the database; raises what `Database.run` and `flush` raise."""
        self._flush()
        renew = partial(self._renew, kept=kept, call=call, calls=calls)
        began = time.time()
        grant = self._database.run(renew, self._others.forget)
        if self._others.dead:
            self._recover()
            self._database.run(self._others.drop_dead)
            began = time.time()
            grant = self._database.run(renew, self._others.forget)
        self._hold_since(began)
        return grant

    def prolong(self) -> None:
        """Put the row's expiry off. If the database does not answer, the next call may."""
        own = update(ALLOWANCES).where(ALLOWANCES.c.holder == self._holder)
        began = time.time()
        try:
            found = self._database.run_once(
                lambda c: c.execute(own.values(expires_at=self._until)).rowcount
            )
        except StoreError:
            self._others.forget()
            return
        self._hold_since(began if found else float("-inf"))

    def release(self) -> None:
        """Give the allowance back. Where the database does not answer, it expires instead."""
        own = delete(ALLOWANCES).where(ALLOWANCES.c.holder == self._holder)
        try:
            self._flush()
            self._database.run_once(lambda c: c.execute(own))
        except StoreError:
            return

    def _hold_since(self, began: float) -> None:
        self._lapses += self.has_lapsed
        self._renewed_at = began

    def _renew(self, connection: Any, kept: Amounts, call: Amounts, calls: int) -> Grant:
        if self._database.backend == "postgresql":
            connection.exec_driver_sql("LOCK TABLE budget_allowances IN EXCLUSIVE MODE")
        # SQLite takes its lock at the first write: before anything is read.
        self._write(connection, kept)
        others = self._others.read(connection, self._caps, self._holder)
        since = period_start(self._period, datetime.now(UTC))
        gone = spent(connection, self._payer, self._section, self._currency, since)
        # A batch takes hours: nobody waits for what it may leave.
        waits_for = tuple(sorted({row.run for row in others if row.expires_at < NEVER}))
        more = {}
        for name, cap in self._caps.items():
            held = sum(getattr(other, name) for other in others)
            left = cap - gone[name] - held - kept[name]
            if call[name] > left:
                return Grant(dict.fromkeys(self._caps, 0.0), gone, waits_for)
            more[name] = min(left, max(left * SHARE, call[name] * calls))
        self._write(connection, {name: kept[name] + more[name] for name in self._caps})
        return Grant(more, gone, waits_for)

    def _write(self, connection: Any, amounts: Amounts) -> None:
        allowed = {name: amounts.get(name, 0.0) for name in ("cost", "tokens", "calls")}
        row = self._database.insert(ALLOWANCES).values(
            holder=self._holder,
            run=self._payer.run,
            recipe=self._payer.recipe,
            section=self._section,
            expires_at=self._until,
            **allowed,
        )
        changed: dict[str, Any] = {**allowed, "expires_at": self._until}
        connection.execute(row.on_conflict_do_update(index_elements=["holder"], set_=changed))


class OtherRows:
    """The rows of a budget that are not a process's own, as it sees them one time after another.
    `dead`: holder and expiry of rows that were seen expired for the time of two renewals."""

    def __init__(self, payer: Payer, section: str, budget: BudgetRecipe, backend: str) -> None:
        mine = ALLOWANCES.c.run == payer.run
        if budget.period != "run":
            mine = ALLOWANCES.c.recipe == payer.recipe
        self._same_budget = and_(mine, ALLOWANCES.c.section == section)
        self._now = NOW[backend]
        self._seen: dict[tuple[str, float], float] = {}
        self.dead: set[tuple[str, float]] = set()

    def read(self, connection: Any, caps: Iterable[str], own: str = "") -> list[Any]:
        """Within a transaction, return the rows that allow something of one of `caps`, but that of
        the holder `own`, and note those of dead processes."""
        of_others = and_(self._same_budget, ALLOWANCES.c.holder != own)
        expired = (ALLOWANCES.c.expires_at <= self._now).label("expired")
        now = time.monotonic()
        found = []
        for row in connection.execute(select(ALLOWANCES, expired).where(of_others)).all():
            if row.expired:
                since = self._seen.setdefault((row.holder, row.expires_at), now)
                if now - since >= 2 * RENEWAL_S:
                    self.dead.add((row.holder, row.expires_at))
            if any(getattr(row, name) > 0 for name in caps):
                found.append(row)
        return found

    def forget(self) -> None:
        """Begin anew to look for dead processes: the database was away, so nobody could renew."""
        self._seen.clear()

    def drop_dead(self, connection: Any) -> None:
        """Drop the rows of dead processes, those excepted that have been renewed since."""
        for holder, expires_at in self.dead:
            unchanged = and_(ALLOWANCES.c.holder == holder, ALLOWANCES.c.expires_at == expires_at)
            connection.execute(delete(ALLOWANCES).where(unchanged))
        self.dead.clear()
