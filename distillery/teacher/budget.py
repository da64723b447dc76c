"""teacher/budget"""

import asyncio

from distillery.errors import BudgetReached
from distillery.recipe import BudgetRecipe, PriceRecipe
from distillery.records import Usage


def cost_of(usage: Usage, prices: PriceRecipe | None) -> float | None:
    """In the price table's currency; None without a table."""
    if prices is None:
        return None
    cached = prices.input if prices.cached_input is None else prices.cached_input
    fresh = usage.prompt_tokens - usage.cached_tokens
    return (
        fresh * prices.input
        + usage.cached_tokens * cached
        + usage.completion_tokens * prices.output
    ) / 1e6


class Spending:
    """What a run has spent, and the cap on it. A call is let through only if the cap holds with what the calls under
    way will take at most; one that gave no usage is counted at that. `spent`: what the run has spent in other stages,
    by name; it is counted on in place."""

    def __init__(
        self,
        budget: BudgetRecipe,
        prices: PriceRecipe | None,
        spent: dict[str, float] | None = None,
    ) -> None:
        self._caps = {name: cap for name, cap in budget.model_dump().items() if cap is not None}
        self._prices = prices
        self._spent = {} if spent is None else spent
        for name in ("cost", "tokens", "calls"):
            self._spent.setdefault(name, 0.0)
        self._reserved = dict.fromkeys(("cost", "tokens", "calls"), 0.0)
        self._change = asyncio.Event()

    async def reserve(self, most: Usage) -> dict[str, float]:
        """Sets aside what a call may take at most; `settle` must follow. Waits where only the calls under way stand
        between it and the cap; raises BudgetReached where the cap itself does."""
        wanted = self._amounts(most)
        while over := next(
            (n for n, cap in self._caps.items() if self._total(n) + wanted[n] > cap), None
        ):
            if not self._reserved["calls"]:
                raise BudgetReached(
                    f"teacher.budget.{over}: {self._spent[over]:g} of {self._caps[over]:g} spent in this run, and the "
                    "next call would pass it; what was answered is kept: run again to go on, or raise the cap"
                )
            self._change.clear()
            await self._change.wait()
        for name, amount in wanted.items():
            self._reserved[name] += amount
        return wanted

    def settle(self, reserved: dict[str, float], used: Usage | None) -> None:
        """`used`: what the endpoint counted; None where it gave no count, nothing where it refused to answer."""
        spent = reserved if used is None else self._amounts(used)
        for name, amount in reserved.items():
            self._reserved[name] = max(self._reserved[name] - amount, 0.0)
            self._spent[name] += spent[name]
        # Sums of floats leave dust; with nothing under way there is nothing reserved.
        if not round(self._reserved["calls"]):
            self._reserved = dict.fromkeys(self._reserved, 0.0)
        self._change.set()

    def _total(self, name: str) -> float:
        return self._spent[name] + self._reserved[name]

    def _amounts(self, usage: Usage) -> dict[str, float]:
        cost = cost_of(usage, self._prices) or 0.0
        return {
            "cost": cost,
            "tokens": float(usage.prompt_tokens + usage.completion_tokens),
            "calls": 1.0,
        }
