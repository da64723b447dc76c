"""What the teacher costs, and the caps on what one run spends on it (teacher.budget)."""

import asyncio

from distillery.errors import BudgetReached
from distillery.recipe import BudgetRecipe, PriceRecipe, TeacherRecipe
from distillery.records import Usage


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


def saved_by_cache(usage: Usage, prices: PriceRecipe | None) -> float | None:
    """Return what the endpoint's cache of prompts took off the cost of `usage`; None without a
    price of cached tokens."""
    if prices is None or prices.cached_input is None:
        return None
    return usage.cached_tokens * (prices.input - prices.cached_input) / 1e6


class Spending:
    """What a run has spent on its teacher, and the caps on it: cost, tokens and calls.

    Each call reserves the most that it can take, and settles for what it took. Invariants:

    - What is spent and what is reserved are together within every cap, as long as no call takes
      more than it reserved.
    - A call of which the endpoint gave no count is counted at what it reserved.
    - A call that does not fit waits as long as other calls are under way: they may settle for less.
      If none is, the cap itself is reached.

    `spent` is what the run has spent in other stages, by name; this object adds to it. `section`:
    the recipe's section with the budget, for messages.
    """

    def __init__(
        self,
        budget: BudgetRecipe,
        prices: PriceRecipe | None,
        spent: dict[str, float] | None = None,
        section: str = TeacherRecipe.section,
    ) -> None:
        self._caps: dict[str, float] = budget.model_dump(exclude_none=True)
        self._prices = prices
        self._section = section
        self._spent = {} if spent is None else spent
        for name in ("cost", "tokens", "calls"):
            self._spent.setdefault(name, 0.0)
        self._reserved = {"cost": 0.0, "tokens": 0.0, "calls": 0.0}
        self._settled = asyncio.Event()

    async def reserve(self, most: Usage) -> dict[str, float]:
        """Reserve the most that a call can take; pass the result to `settle`. Waits for calls under
        way where they may leave enough. Raises BudgetReached where a cap is reached."""
        wanted = self._amounts(most)
        while True:
            name = self._cap_exceeded_by(wanted)
            if name is None:
                break
            if not self._reserved["calls"]:
                raise BudgetReached(
                    f"{self._section}.budget.{name}: {self._spent[name]:g} of "
                    f"{self._caps[name]:g} spent in this run, and the next call could exceed it; "
                    "all answers are kept: run again to continue, or raise the cap"
                )
            self._settled.clear()
            await self._settled.wait()
        for name, amount in wanted.items():
            self._reserved[name] += amount
        return wanted

    def settle(self, reserved: dict[str, float], used: Usage | None) -> None:
        """Replace what a call reserved by what it took: `used`, as the endpoint counted it, or all
        of `reserved` if `used` is None."""
        taken = reserved
        if used is not None:
            taken = self._amounts(used)
        for name, amount in reserved.items():
            self._reserved[name] = max(self._reserved[name] - amount, 0.0)
            self._spent[name] += taken[name]
        # Differences of floats leave a remainder; without calls under way nothing is reserved.
        if not round(self._reserved["calls"]):
            self._reserved = dict.fromkeys(self._reserved, 0.0)
        self._settled.set()

    def _cap_exceeded_by(self, wanted: dict[str, float]) -> str | None:
        for name, cap in self._caps.items():
            if self._spent[name] + self._reserved[name] + wanted[name] > cap:
                return name
        return None

    def _amounts(self, usage: Usage) -> dict[str, float]:
        return {
            "cost": cost_of(usage, self._prices) or 0.0,
            "tokens": float(usage.prompt_tokens + usage.completion_tokens),
            "calls": 1.0,
        }
