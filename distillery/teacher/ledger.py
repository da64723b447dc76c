"""The ledger: every call that may be billed, in the table teacher_calls of the database that runs
share (DISTILLERY_LABELS). Budgets, reports, quotes and `distillery labels costs` read this book.
"""

import uuid
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from typing import Any, Literal, Protocol

from sqlalchemy import (
    JSON,
    BigInteger,
    Boolean,
    Column,
    DateTime,
    Float,
    Index,
    Integer,
    String,
    Table,
    Text,
    and_,
    func,
    not_,
    select,
    text,
)

from distillery.records import CallTotal, Usage
from distillery.storage.database import METADATA, Database, insert_new

Purpose = Literal["label", "validation row", "test row", "canary", "judge", "probe"]
"""What a call was made for. label: a row to train on. canary: a row that is asked again, to detect
a teacher or judge that has changed. probe: a short question that shows whether the endpoint
answers."""

Outcome = Literal["answer", "rejected", "malformed", "retried", "filtered", "refused", "lost"]
"""What became of a call.

answer: a text came, and was read as a label. rejected: it was none, or was cut off. malformed: no
chat completion came. retried: the try failed, and was made again or given up. filtered: the
endpoint's filter blocked it. refused: the endpoint refused this request. lost: the call was
cancelled, or the process ended, before the response came.
"""


def new_call_id() -> str:
    """Return an id that no other call has."""
    return uuid.uuid4().hex


@dataclass(frozen=True)
class Payer:
    """On whose behalf calls are made: the flow run's id, or where there is none a random one, and
    the recipe's name."""

    run: str = field(default_factory=new_call_id)
    recipe: str = ""


@dataclass(frozen=True, slots=True)
class Call:
    """A row of the table teacher_calls: one call, or one line of a batch.

    call_id: unique, so that a call that is written twice counts once. run and recipe: see Payer;
    "" for calls of versions before the ledger. teacher: its identity. request_key: the answer's key
    in teacher_answers; "" for a probe. is_counted: whether the endpoint counted the tokens, or
    bills none; otherwise they are an estimate of a prompt that it read and refused, or, where
    nobody knows what became of the call, the most that it can have taken. cost: in
    prices["currency"]; None without prices. prices: the recipe's list, per million tokens.
    batch_id: the endpoint's batch; "" for a direct call. called_at: when the call began.
    """

    run: str
    recipe: str
    teacher: str
    purpose: Purpose
    outcome: Outcome
    request_key: str = ""
    prompt_tokens: int = 0
    cached_tokens: int = 0
    completion_tokens: int = 0
    is_counted: bool = True
    cost: float | None = None
    prices: dict[str, Any] | None = None
    batch_id: str = ""
    call_id: str = field(default_factory=new_call_id)
    called_at: datetime = field(default_factory=lambda: datetime.now(UTC))


class Book(Protocol):
    """The ledger as those who make calls write it: LabelStore, or NoBook."""

    @property
    def is_away(self) -> bool:
        """Whether nothing can be written now, so that no call should begin."""

    async def ready(self) -> None:
        """Wait until calls may begin. Raises StoreError if that will not be."""
        ...

    def begin(self, call: Call) -> None:
        """Note that a call is about to be made, as one that is lost if its end is never recorded.
        Raises StoreError where it must not be made."""
        ...

    def record(self, call: Call) -> None:
        """Write a call that has ended. Raises StoreError."""
        ...


class NoBook:
    """Takes calls and writes none of them."""

    is_away = False

    async def ready(self) -> None: ...

    def begin(self, call: Call) -> None: ...

    def record(self, call: Call) -> None: ...


Amounts = dict[str, float]
"""What a budget counts, by the names of its caps: cost, tokens and calls."""


CALLS = Table(
    "teacher_calls",
    METADATA,
    Column("call_id", String(64), primary_key=True),
    Column("called_at", DateTime(timezone=True), nullable=False, index=True),
    Column("run", Text, nullable=False, index=True),
    Column("recipe", Text, nullable=False),
    Column("teacher", Text, nullable=False),
    Column("purpose", Text, nullable=False),
    Column("outcome", Text, nullable=False),
    Column("request_key", String(64), nullable=False),
    Column("prompt_tokens", Integer, nullable=False),
    Column("cached_tokens", Integer, nullable=False),
    Column("completion_tokens", Integer, nullable=False),
    Column("is_counted", Boolean, nullable=False),
    Column("cost", Float),
    Column("prices", JSON(none_as_null=True)),
    Column("batch_id", Text, nullable=False),
)

SPENDING = Table(
    "teacher_spending",
    METADATA,
    Column("run", Text, primary_key=True),
    Column("recipe", Text, primary_key=True),
    Column("section", Text, primary_key=True),
    Column("day", String(10), primary_key=True),
    Column("currency", Text, primary_key=True),
    Column("cost", Float, nullable=False),
    Column("tokens", BigInteger, nullable=False),
    Column("calls", BigInteger, nullable=False),
    Index("ix_teacher_spending_recipe_day", "recipe", "day"),
)
"""The sums of the calls of each run, recipe, section of the recipe (teacher or judge), day in UTC
(YYYY-MM-DD) and currency ("" without prices), so that a budget need not add up the ledger. A
trigger of the database adds each new call (migration 0009)."""

NEW_CALL = insert_new(CALLS)


def sum_key(call: Call) -> tuple[str, ...]:
    """Return the key of the row of SPENDING that a call is added to."""
    section = "evaluation.judge" if call.teacher[:6] == "judge:" else "teacher"
    day = call.called_at.astimezone(UTC).date().isoformat()
    currency = str((call.prices or {}).get("currency") or "")
    return call.run, call.recipe, section, day, currency


def write_calls(connection: Any, calls: Sequence[Call]) -> None:
    """Write calls within a transaction. A call that is there already stays as it is.

    They are written in the order of the sums that they are added to: two processes that took these
    rows in different orders would each wait for the other."""
    names = CALLS.columns.keys()
    # asdict would copy the prices of each.
    rows = [{name: getattr(call, name) for name in names} for call in sorted(calls, key=sum_key)]
    if rows:
        connection.execute(NEW_CALL, rows)


def period_start(period: str, now: datetime) -> datetime | None:
    """Return when the day, the week (on Monday) or the month of `now` (in UTC) began; None for the
    period "run"."""
    midnight = now.replace(hour=0, minute=0, second=0, microsecond=0)
    if period == "day":
        return midnight
    if period == "week":
        return midnight - timedelta(days=midnight.weekday())
    if period == "month":
        return midnight.replace(day=1)
    return None


def period_end(period: str, now: datetime) -> datetime | None:
    """Return when the next day, week or month begins; None for the period "run"."""
    start = period_start(period, now)
    if start is None:
        return None
    if period == "month":
        return (start + timedelta(days=31)).replace(day=1)
    return start + timedelta(days=7 if period == "week" else 1)


def spent(
    connection: Any, payer: Payer, section: str, currency: str, since: datetime | None
) -> Amounts:
    """Return what the ledger says a run has spent, or with `since`, the beginning of a day, all
    runs of its recipe from then on: on judges if `section` of the recipe is theirs, else on
    teachers. Costs in another currency don't count."""
    whose = SPENDING.c.run == payer.run
    if since is not None:
        first = since.date().isoformat()
        whose = and_(SPENDING.c.recipe == payer.recipe, SPENDING.c.day >= first)
    in_currency = SPENDING.c.currency == currency
    query = select(
        func.coalesce(func.sum(SPENDING.c.cost).filter(in_currency), 0.0),
        func.coalesce(func.sum(SPENDING.c.tokens), 0),
        func.coalesce(func.sum(SPENDING.c.calls), 0),
    ).where(whose, SPENDING.c.section == section)
    cost, tokens, calls = connection.execute(query).one()
    return {"cost": float(cost), "tokens": float(tokens), "calls": float(calls)}


def totals(database: Database, by: Sequence[str], *conditions: Any) -> list[CallTotal]:
    """Return the entries that meet all of the conditions, together for each value of the columns
    `by` and each currency, in the order of their first calls."""
    columns = [CALLS.c[name] for name in by]
    # By its label: PostgreSQL takes the expression here and in the result for two different ones.
    currency = text("currency")
    query = select(
        *columns,
        CALLS.c.prices["currency"].as_string().label("currency"),
        func.count().label("calls"),
        func.count().filter(not_(CALLS.c.is_counted)).label("estimated"),
        func.sum(CALLS.c.prompt_tokens).label("prompt_tokens"),
        func.sum(CALLS.c.cached_tokens).label("cached_tokens"),
        func.sum(CALLS.c.completion_tokens).label("completion_tokens"),
        func.sum(CALLS.c.cost).label("cost"),
    )
    query = query.where(*conditions).group_by(*columns, currency)
    in_order = query.order_by(func.min(CALLS.c.called_at), *columns)
    found = []
    for row in database.run(lambda connection: connection.execute(in_order).all()):
        usage = Usage(
            prompt_tokens=row.prompt_tokens,
            cached_tokens=row.cached_tokens,
            completion_tokens=row.completion_tokens,
        )
        found.append(
            CallTotal(
                **{name: getattr(row, name) for name in by},
                calls=row.calls,
                estimated=row.estimated,
                usage=usage,
                cost=row.cost,
                currency=row.currency or "",
            )
        )
    return found


def weekly_totals(database: Database, since: datetime | None = None) -> list[CallTotal]:
    """Return the entries of each week, which begins on Monday in UTC, from `since` on."""
    first = database.run(lambda c: c.execute(select(func.min(CALLS.c.called_at))).scalar())
    if first is None:
        return []
    # SQLite gives UTC without a zone, PostgreSQL the time in the session's zone.
    first = first.astimezone(UTC) if first.tzinfo else first.replace(tzinfo=UTC)
    begin = first if since is None else max(since, first)
    monday, found = period_start("week", begin), []
    while monday is not None and monday <= datetime.now(UTC):
        following = monday + timedelta(days=7)
        in_week = (CALLS.c.called_at >= max(monday, begin), CALLS.c.called_at < following)
        for total in totals(database, (), *in_week):
            found.append(total.model_copy(update={"week": f"{monday:%Y-%m-%d}"}))
        monday = following
    return found


def sum_of(found: Iterable[CallTotal], currency: str = "") -> CallTotal:
    """Return several totals together; their cost in one currency."""
    listed = list(found)
    costs = [each.cost for each in listed if each.cost is not None and each.currency == currency]
    return CallTotal(
        calls=sum(each.calls for each in listed),
        estimated=sum(each.estimated for each in listed),
        usage=sum((each.usage for each in listed), Usage()),
        cost=sum(costs) if costs else None,
        currency=currency,
    )


def costs_table(by: str, found: Iterable[CallTotal]) -> str:
    """Return totals as a table for the terminal, whose lines are named by the field `by`."""
    lines = [
        f"{'calls':>11} {'estimated':>9} {'fresh in':>14} {'cached in':>14} {'out':>13} "
        f"{'cost':>16}  {by}"
    ]
    for each in found:
        usage = each.usage
        fresh = usage.prompt_tokens - usage.cached_tokens
        cost = "no prices" if each.cost is None else f"{each.cost:,.4f} {each.currency}".strip()
        name = getattr(each, by) or "not known"
        lines.append(
            f"{each.calls:>11,} {each.estimated:>9,} {fresh:>14,} {usage.cached_tokens:>14,} "
            f"{usage.completion_tokens:>13,} {cost:>16}  {name}"
        )
    return "\n".join(lines)
