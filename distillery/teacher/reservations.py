"""Reservations: what the batches under way may still take of a budget. They are rows of
budget_allowances that don't expire, so that direct calls leave room for them."""

from collections.abc import Callable
from datetime import UTC, datetime
from typing import Any

from sqlalchemy import delete

from distillery.recipe import TeacherRecipe
from distillery.records import Usage
from distillery.storage.database import Database
from distillery.teacher.allowances import ALLOWANCES, NEVER, OtherRows
from distillery.teacher.budget import cost_of
from distillery.teacher.ledger import Amounts, Payer, period_start, spent


class Reservations:
    """The reservations of the batches that a recipe's teacher is sent on behalf of `payer`. `flush`
    commits to `database` all calls recorded so far.

    What is reserved, allowed and spent is together within every cap: a reservation is made by one
    transaction, which reads the others. A batch's id is its holder."""

    def __init__(
        self, database: Database, flush: Callable[[], None], recipe: TeacherRecipe, payer: Payer
    ) -> None:
        self._database, self._flush = database, flush
        self._caps, self._period = recipe.budget.caps, recipe.budget.period
        self._section, self._payer = recipe.section, payer
        self._currency = recipe.prices.currency if recipe.prices else ""
        self._others = OtherRows(payer, recipe.section, recipe.budget, database.backend)
        self.is_final = True
        """Whether no process that asks directly has an allowance, which might be given back soon,
        as of the last look at the room."""

    def room(self) -> Amounts:
        """Return how much of each cap is left, by name."""
        self._flush()
        return self._database.run(self._room) if self._caps else {}

    def reserve(self, batch_id: str, most: Amounts) -> bool:
        """Reserve the most that a batch can take, if the budget has room for it; return whether it
        has."""
        self._flush()

        def write(connection: Any) -> bool:
            if self._database.backend == "postgresql":
                connection.exec_driver_sql("LOCK TABLE budget_allowances IN EXCLUSIVE MODE")
            # SQLite takes its lock at the first write: before anything is read.
            row = self._database.insert(ALLOWANCES).values(
                holder=batch_id,
                run=self._payer.run,
                recipe=self._payer.recipe,
                section=self._section,
                expires_at=NEVER,
                **most,
            )
            connection.execute(row.on_conflict_do_nothing())
            room = self._room(connection)
            fits = all(left >= 0 for left in room.values())
            if not fits:
                connection.execute(delete(ALLOWANCES).where(ALLOWANCES.c.holder == batch_id))
            return fits

        return self._database.run(write)

    def _room(self, connection: Any) -> Amounts:
        rows = self._others.read(connection, self._caps)
        self.is_final = all(row.expires_at >= NEVER for row in rows)
        since = period_start(self._period, datetime.now(UTC))
        gone = spent(connection, self._payer, self._section, self._currency, since)
        room = {}
        for name, cap in self._caps.items():
            room[name] = cap - gone[name] - sum(getattr(row, name) for row in rows)
        return room


def give_back(connection: Any, batch_id: str) -> None:
    """Within a transaction, delete a batch's reservation."""
    connection.execute(delete(ALLOWANCES).where(ALLOWANCES.c.holder == batch_id))


def amounts_of(most: Usage, calls: int, recipe: TeacherRecipe) -> Amounts:
    """Return what `calls` requests can take at the recipe's prices, as budgets count it."""
    return {
        "cost": cost_of(most, recipe.prices) or 0.0,
        "tokens": float(most.prompt_tokens + most.completion_tokens),
        "calls": float(calls),
    }


def fits(amounts: Amounts, room: Amounts) -> bool:
    """Return whether these amounts are within what is left."""
    return all(amounts[name] <= left for name, left in room.items())
