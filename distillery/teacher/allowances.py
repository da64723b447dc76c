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
from distillery.storage.database import METADATA, Database
from distillery.storage.leases import LENGTH_S, NOW, OUTAGE_S, RENEWALS
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
    of anything where a call does not fit. `spent`: what the ledger says. `is_final`: no other
    process has an allowance, which might be given back soon."""

    more: Amounts
    spent: Amounts
    is_final: bool


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

    The budget is that of a run, or of a recipe since the day, week or month began in UTC, of
    teachers or of judges, as `section` of the recipe says. `flush` commits all calls recorded so
    far. Costs in another currency than `currency` don't count.
    """

    def __init__(
        self,
        database: Database,
        flush: Callable[[], None],
        budget: BudgetRecipe,
        payer: Payer,
        section: str,
        currency: str,
    ) -> None:
        self._database, self._flush = database, flush
        self._caps, self._period = budget.caps, budget.period
        self._payer, self._section, self._currency = payer, section, currency
        self._holder = new_call_id()
        self._until = text(f"{NOW[database.backend].text} + {LENGTH_S}")
        self._others = OtherRows(payer, section, budget, database.backend)

    def renew(self, kept: Amounts, call: Amounts, calls: int) -> Grant:
        """Keep `kept` of the allowance, give the rest back, and take more: a share of what is left,
        at least enough for `calls` calls that take `call`, as far as there is so much. Waits for
        the database; raises what `Database.run` and `flush` raise."""
        self._flush()
        return self._database.run(partial(self._renew, kept=kept, call=call, calls=calls))

    def prolong(self) -> None:
        """Put the row's expiry off. If the database does not answer, the next call may."""
        own = update(ALLOWANCES).where(ALLOWANCES.c.holder == self._holder)
        try:
            self._database.run_once(lambda c: c.execute(own.values(expires_at=self._until)))
        except StoreError:
            return

    def release(self) -> None:
        """Give the allowance back. Where the database does not answer, it expires instead."""
        own = delete(ALLOWANCES).where(ALLOWANCES.c.holder == self._holder)
        try:
            self._flush()
            self._database.run_once(lambda c: c.execute(own))
        except StoreError:
            return

    def _renew(self, connection: Any, kept: Amounts, call: Amounts, calls: int) -> Grant:
        if self._database.backend == "postgresql":
            connection.exec_driver_sql("LOCK TABLE budget_allowances IN EXCLUSIVE MODE")
        # SQLite takes its lock at the first write: before anything is read.
        self._write(connection, kept)
        others = self._others.read(connection, self._caps, self._holder)
        since = period_start(self._period, datetime.now(UTC))
        gone = spent(connection, self._payer, self._section, self._currency, since)
        # A batch takes hours: nobody waits for what it may leave.
        is_final = all(other.expires_at >= NEVER for other in others)
        more = {}
        for name, cap in self._caps.items():
            held = sum(getattr(other, name) for other in others)
            left = cap - gone[name] - held - kept[name]
            if call[name] > left:
                return Grant(dict.fromkeys(self._caps, 0.0), gone, is_final=is_final)
            more[name] = min(left, max(left * SHARE, call[name] * calls))
        self._write(connection, {name: kept[name] + more[name] for name in self._caps})
        return Grant(more, gone, is_final=is_final)

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
    """The rows of a budget that are not a process's own, as it sees them one time after another."""

    def __init__(self, payer: Payer, section: str, budget: BudgetRecipe, backend: str) -> None:
        mine = ALLOWANCES.c.run == payer.run
        if budget.period != "run":
            mine = ALLOWANCES.c.recipe == payer.recipe
        self._same_budget = and_(mine, ALLOWANCES.c.section == section)
        self._now = NOW[backend]
        self._seen: dict[tuple[str, float], float] = {}
        self._looked_at = float("-inf")

    def read(self, connection: Any, caps: Iterable[str], own: str = "") -> list[Any]:
        """Within a transaction, return the rows that allow something of one of `caps`, but that of
        the holder `own`, and drop those of dead processes."""
        of_others = and_(self._same_budget, ALLOWANCES.c.holder != own)
        expired = (ALLOWANCES.c.expires_at <= self._now).label("expired")
        now = time.monotonic()
        if now - self._looked_at > OUTAGE_S:
            self._seen.clear()
        self._looked_at = now
        found = []
        for row in connection.execute(select(ALLOWANCES, expired).where(of_others)).all():
            if row.expired:
                since = self._seen.setdefault((row.holder, row.expires_at), now)
                if now - since >= 2 * RENEWAL_S:
                    dead = delete(ALLOWANCES).where(ALLOWANCES.c.holder == row.holder)
                    connection.execute(dead)
                    continue
            if any(getattr(row, name) > 0 for name in caps):
                found.append(row)
        return found
