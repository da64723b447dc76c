"""What the teacher costs, and the caps on what is spent on it (teacher.budget)."""

import asyncio
import logging
import time
from collections.abc import Awaitable, Callable
from datetime import UTC, datetime
from typing import Self, TypeVar

from distillery.errors import BudgetReached, RecipeError
from distillery.recipe import BudgetRecipe, PriceRecipe, TeacherRecipe
from distillery.records import Usage
from distillery.storage.database import Database, nothing
from distillery.teacher.allowances import RENEWAL_S, Allowance
from distillery.teacher.ledger import Amounts, Payer, period_end, period_start, spent

T = TypeVar("T")

_log = logging.getLogger(__name__)

POLL_S = 1.0
"""Between two looks at whether another process has left something."""

LOOK_SHARE = 0.1
"""The share of its time that a waiting process spends on these looks, as long as they are no
further apart than renewals: each adds up the ledger and keeps the others from renewing."""


class HeldByOthers(Exception):
    """All that is left of the budget is allowed to other processes, which may give something back.
    `look_s`: the seconds after which the caller may try again; meanwhile it holds nothing that the
    others need."""

    def __init__(self, look_s: float) -> None:
        super().__init__(f"look again in {look_s:g} s")
        self.look_s = look_s


async def when_left(work: Callable[[], Awaitable[T]]) -> T:
    """Return what `work` does, which is begun again as long as others hold all that is left of a
    budget."""
    while True:
        try:
            return await work()
        except HeldByOthers as held:
            await asyncio.sleep(held.look_s)


def cost_of(usage: Usage, prices: PriceRecipe | None) -> float | None:
    """Return the cost of `usage` in the currency of `prices`; None without prices."""
    if prices is None:
        return None
    cached_price = prices.input
    if prices.cached_input is not None:
        cached_price = prices.cached_input
    fresh_tokens = usage.prompt_tokens - usage.cached_tokens
    return (
        fresh_tokens * prices.input
        + usage.cached_tokens * cached_price
        + usage.completion_tokens * prices.output
    ) / 1e6


def check_period(budget: BudgetRecipe, section: str, payer: Payer) -> None:
    """Raise RecipeError for a budget of a day, week or month of a payer without a recipe's name,
    which would be that of all such payers together."""
    if budget.caps and budget.period != "run" and not payer.recipe:
        raise RecipeError(
            f"{section}.budget.period: {budget.period} counts the runs of recipes of the same "
            "name, and this run has no recipe with a name; leave period out"
        )


def standing(
    budget: BudgetRecipe, prices: PriceRecipe | None, section: str, payer: Payer, database: Database
) -> str:
    """Return what the ledger says is spent of each cap and what is left, in one line; "" without
    caps."""
    if not budget.caps:
        return ""
    currency = prices.currency if prices else ""
    since = period_start(budget.period, datetime.now(UTC))
    gone = database.run(lambda c: spent(c, payer, section, currency, since))
    parts = []
    for name, cap in budget.caps.items():
        unit, digits = (currency, 2) if name == "cost" else (name, 0)
        left = max(cap - gone[name], 0.0)
        parts.append(
            f"{gone[name]:,.{digits}f} of {cap:,.{digits}f} {unit} spent in this {budget.period}, "
            f"{left:,.{digits}f} left"
        )
    return f"budget: {', and '.join(parts)}"


def saved_by_cache(usage: Usage, prices: PriceRecipe | None) -> float | None:
    """Return what the endpoint's cache of prompts took off the cost of `usage`; None without a
    price of cached tokens."""
    if prices is None or prices.cached_input is None:
        return None
    return usage.cached_tokens * (prices.input - prices.cached_input) / 1e6


class Spending:
    """What this process has spent on its teacher, and the caps on it: cost, tokens and calls.

    Each call reserves the most that it can take, and settles for what it took. Invariants:

    - What is spent and what is reserved are together within what is granted, as long as no call
      takes more than it reserved. Without an allowance the caps themselves are granted, to this
      object alone. With one, other processes share the caps: all that is granted and not yet spent
      is in its row.
    - A call of which the endpoint gave no count is counted at what it reserved.
    - A call that does not fit waits as long as others of this object have reserved something, and
      is to try again as long as a process with an allowance has: they may settle for less. If none
      has, the cap itself is reached.

    `section`: the recipe's section with the budget, for messages. `calls`: how many are made at a
    time. To be used within `async with` if it has an allowance.
    """

    def __init__(
        self,
        budget: BudgetRecipe,
        prices: PriceRecipe | None,
        section: str = TeacherRecipe.budget_section,
        allowance: Allowance | None = None,
        calls: int = 1,
    ) -> None:
        self._caps, self._period = budget.caps, budget.period
        self._prices = prices
        self._section = section
        self._allowance = allowance if self._caps else None
        self._calls = calls
        self._spent = dict.fromkeys(("cost", "tokens", "calls"), 0.0)
        self._reserved = dict.fromkeys(self._spent, 0.0)
        self._granted = dict.fromkeys(self._caps, 0.0) if self._allowance else self._caps
        self._is_used_up = False
        self._waits_for: tuple[str, ...] = ()
        self._looks_at = 0.0
        self._asks_for_more = asyncio.Lock()
        self._settled = asyncio.Event()

    async def __aenter__(self) -> Self:
        if self._allowance:
            self._renewal = asyncio.create_task(self._prolong(self._allowance))
        return self

    async def __aexit__(self, *_: object) -> None:
        if self._allowance:
            self._renewal.cancel()
            await asyncio.to_thread(self._allowance.release)

    @classmethod
    def shared(
        cls,
        recipe: TeacherRecipe,
        payer: Payer,
        database: Database,
        flush: Callable[[], None],
        recover: Callable[[], None] = nothing,
    ) -> Self:
        """Return the spending of one of the processes that ask a recipe's teacher on behalf of
        `payer`; `flush` commits to `database` all calls recorded so far, `recover` those that dead
        processes of this machine have left. Raises RecipeError for a budget of a day, week or month
        where no recipe has a name."""
        check_period(recipe.budget, recipe.section, payer)
        currency = recipe.prices.currency if recipe.prices else ""
        section = recipe.budget_section
        allowance = Allowance(database, flush, recipe.budget, payer, section, currency, recover)
        return cls(recipe.budget, recipe.prices, section, allowance, recipe.concurrency)

    @property
    def lapses(self) -> int:
        """How often others may have spent what this process had reserved, as it was suspended."""
        return self._allowance.lapses if self._allowance else 0

    async def reserve(self, most: Usage) -> Amounts:
        """Reserve the most that a call can take; pass the result to `settle`, or to `give_back` if
        the call is not made. Waits for calls under way where they may leave enough. Raises
        HeldByOthers where other processes may, and BudgetReached where a cap is reached."""
        wanted = self._amounts(most)
        while (name := self._exceeded_by(wanted)) is not None:
            if self._reserved["calls"] and (self._allowance is None or self._is_used_up):
                self._settled.clear()
                await self._settled.wait()
            elif self._allowance is None:
                raise self._reached(name, self._spent)
            else:
                await self._ask_for_more(self._allowance, wanted)
        for name, amount in wanted.items():
            self._reserved[name] += amount
        return wanted

    def settle(self, reserved: Amounts, used: Usage | None) -> None:
        """Replace what a call reserved by what it took: `used`, as the endpoint counted it, or all
        of `reserved` if `used` is None."""
        taken = reserved if used is None else self._amounts(used)
        for name, amount in taken.items():
            self._spent[name] += amount
        self.give_back(reserved)

    def give_back(self, reserved: Amounts) -> None:
        """Give back what a call reserved: all of it, if it is not made."""
        for name, amount in reserved.items():
            self._reserved[name] = max(self._reserved[name] - amount, 0.0)
        # Differences of floats leave a remainder; without calls under way nothing is reserved.
        if not round(self._reserved["calls"]):
            self._reserved = dict.fromkeys(self._reserved, 0.0)
        self._settled.set()

    async def _ask_for_more(self, allowance: Allowance, wanted: Amounts) -> None:
        """Have more granted, if there is any. Raises HeldByOthers if there may be some later, and
        BudgetReached if there never will be."""
        async with self._asks_for_more:
            name = self._exceeded_by(wanted)
            under_way = self._reserved["calls"] > 0
            if name is None or (under_way and self._is_used_up):
                return
            if (left_s := self._looks_at - time.monotonic()) > 0:
                raise HeldByOthers(left_s)
            kept = {each: self._reserved[each] for each in self._caps}
            base = {each: self._spent[each] + kept[each] for each in self._caps}
            # What is not kept goes back with the same transaction, so that nobody takes it now.
            self._granted = base
            began = time.monotonic()
            grant = await asyncio.to_thread(allowance.renew, kept, wanted, self._calls)
            self._granted = {each: base[each] + grant.more[each] for each in self._caps}
            self._is_used_up = not any(grant.more.values())
            if self._is_used_up and not under_way:
                if not grant.waits_for:
                    raise self._reached(name, grant.spent)
                self._tell_of(grant.waits_for)
                took = time.monotonic() - began
                look_s = max(POLL_S, min(took / LOOK_SHARE, RENEWAL_S))
                self._looks_at = time.monotonic() + look_s
                raise HeldByOthers(look_s)

    def _tell_of(self, runs: tuple[str, ...]) -> None:
        """Say which runs this one waits for, if it has not said so."""
        if runs != self._waits_for:
            self._waits_for = runs
            _log.warning(
                "%s.budget: all that is left is allowed to others; waiting for what run %s gives "
                "back",
                self._section,
                ", ".join(runs),
            )

    async def _prolong(self, allowance: Allowance) -> None:
        while True:
            await asyncio.sleep(RENEWAL_S)
            await asyncio.to_thread(allowance.prolong)

    def _reached(self, name: str, spent: Amounts) -> BudgetReached:
        again = "run again to continue"
        if end := period_end(self._period, datetime.now(UTC)):
            again = f"run again from {end:%Y-%m-%d} (UTC) on to continue"
        return BudgetReached(
            f"{self._section}.budget.{name}: {spent[name]:g} of {self._caps[name]:g} spent in this "
            f"{self._period}, and the next call could exceed it; all answers are kept: {again}, or "
            "raise the cap"
        )

    def _exceeded_by(self, wanted: Amounts) -> str | None:
        has_lapsed = self._allowance is not None and self._allowance.has_lapsed
        for name, granted in self._granted.items():
            if has_lapsed:
                granted = 0.0
            if self._spent[name] + self._reserved[name] + wanted[name] > granted:
                return name
        return None

    def _amounts(self, usage: Usage) -> Amounts:
        return {
            "cost": cost_of(usage, self._prices) or 0.0,
            "tokens": float(usage.prompt_tokens + usage.completion_tokens),
            "calls": 1.0,
        }
