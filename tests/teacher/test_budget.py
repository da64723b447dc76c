"""The cost of tokens, and the caps on what a run spends. Tests with calls have a clock of their
own (leaping_loop)."""

import asyncio
import random
from typing import Any

import pytest
from leaping_loop import leaping

from distillery.errors import BudgetReached
from distillery.recipe import BudgetRecipe, PriceRecipe
from distillery.records import Usage
from distillery.teacher.budget import Spending, cost_of

PRICES = PriceRecipe(input=2.0, cached_input=0.5, output=8.0)
MOST = Usage(prompt_tokens=100, completion_tokens=20)


def test_the_cost_of_tokens() -> None:
    usage = Usage(prompt_tokens=1_000_000, completion_tokens=500_000)
    assert cost_of(usage, PRICES) == pytest.approx(6.0)
    assert cost_of(usage, None) is None
    assert cost_of(Usage(), PRICES) == 0
    cached = Usage(prompt_tokens=1_000_000, completion_tokens=500_000, cached_tokens=400_000)
    assert cost_of(cached, PRICES) == pytest.approx(0.6 * 2 + 0.4 * 0.5 + 4)
    assert cost_of(cached, PriceRecipe(input=2.0, output=8.0)) == pytest.approx(6.0)
    assert cost_of(cached, PriceRecipe(input=2.0, cached_input=0.0, output=8.0)) == pytest.approx(
        1.2 + 4
    )


async def spend(
    spending: Spending, in_flight: int, rows: int, without_count: float = 0.0
) -> tuple[list[Usage], str]:
    """Make up to `rows` calls until a cap stops them; return what each took, as the endpoint
    counted it, and the cap's message, or "". `without_count`: the share of calls without a count.
    """
    chance = random.Random(in_flight)
    taken: list[Usage] = []
    refusals: list[str] = []
    left = iter(range(rows))

    async def worker() -> None:
        for _ in left:
            try:
                reserved = await spending.reserve(MOST)
            except BudgetReached as error:
                refusals.append(str(error))
                return
            await asyncio.sleep(chance.uniform(0.1, 2))
            used = Usage(
                prompt_tokens=chance.randint(0, 100), completion_tokens=chance.choice([0, 1, 20])
            )
            if chance.random() >= without_count:
                taken.append(used)
                spending.settle(reserved, used)
            else:
                taken.append(MOST)
                spending.settle(reserved, None)

    await asyncio.gather(*(worker() for _ in range(in_flight)))
    return taken, "".join(refusals[:1])


@pytest.mark.parametrize("in_flight", [1, 8, 64])
@pytest.mark.parametrize(
    ("name", "cap"),
    [
        ("calls", 1),
        ("calls", 100),
        ("tokens", 120),
        ("tokens", 7000),
        ("cost", 0.00036),
        ("cost", 0.02),
    ],
)
@pytest.mark.parametrize("without_count", [0.0, 0.3])
@leaping
async def test_a_cap_is_never_passed_and_used_as_far_as_it_goes(
    in_flight: int, name: str, cap: float, without_count: float
) -> None:
    spending = Spending(BudgetRecipe(**{name: cap}), PRICES)
    taken, refusal = await spend(spending, in_flight, 1000, without_count)
    total = sum(taken, Usage())
    spent = {
        "calls": len(taken),
        "tokens": total.prompt_tokens + total.completion_tokens,
        "cost": cost_of(total, PRICES) or 0.0,
    }[name]
    call = {"calls": 1, "tokens": 120, "cost": 0.00036}[name]
    assert cap - call < spent <= cap * (1 + 1e-9), "the next call at its most would exceed it"
    assert refusal.startswith(f"teacher.budget.{name}: {spent:g} of {cap:g} spent in this run")
    assert "\n" not in refusal


@pytest.mark.parametrize(
    ("caps", "named"),
    [
        ({"calls": 5, "tokens": 100_000}, "calls"),
        ({"calls": 1000, "tokens": 1000, "cost": 1.0}, "tokens"),
        ({"calls": 1000, "tokens": 100_000, "cost": 0.001}, "cost"),
    ],
)
@leaping
async def test_the_tightest_of_several_caps_is_named(caps: dict[str, Any], named: str) -> None:
    taken, refusal = await spend(Spending(BudgetRecipe(**caps), PRICES), 8, 2000)
    assert refusal.startswith(f"teacher.budget.{named}: ")
    assert 0 < len(taken) < 100


@leaping
async def test_without_a_cap_nothing_is_refused() -> None:
    taken, refusal = await spend(Spending(BudgetRecipe(), None), 64, 1000)
    assert (len(taken), refusal) == (1000, "")


@leaping
async def test_a_cap_below_one_call_lets_none_through() -> None:
    taken, refusal = await spend(Spending(BudgetRecipe(tokens=119), None), 8, 10)
    assert taken == []
    assert refusal.startswith("teacher.budget.tokens: 0 of 119 spent")


@leaping
async def test_who_waits_for_the_calls_under_way_gets_what_they_leave() -> None:
    spending = Spending(BudgetRecipe(tokens=240), None)
    first = await spending.reserve(MOST)
    second = await spending.reserve(MOST)
    third = asyncio.create_task(spending.reserve(MOST))
    await asyncio.sleep(1)
    assert not third.done()
    spending.settle(first, Usage())
    await third
    spending.settle(second, None)
    spending.settle(third.result(), None)
    with pytest.raises(BudgetReached, match=r"teacher\.budget\.tokens: 240 of 240 spent"):
        await spending.reserve(MOST)
