"""How fast and how far a teacher is asked. Time is a loop's own here, so that minutes take milliseconds."""

import asyncio
import random
import selectors
from bisect import bisect_left
from collections.abc import Coroutine
from itertools import pairwise
from types import SimpleNamespace
from typing import Any

import pytest

from distillery.errors import BudgetReached
from distillery.recipe import BudgetRecipe, PriceRecipe, TeacherRecipe
from distillery.records import Usage
from distillery.teacher.budget import Spending, cost_of
from distillery.teacher.pace import BREAKS_AT, LONGEST_PAUSE_S, LONGEST_WAIT_S, Pace, Stopped


class _Leaping(selectors.DefaultSelector):
    """Leaps over the time in which nothing happens."""

    now = 1000.0

    def select(self, timeout: float | None = None) -> Any:
        assert timeout is not None, "everybody waits, and nobody is left to wake them"
        self.now += max(timeout, 0.0)
        return super().select(0)


class _Loop(asyncio.SelectorEventLoop):
    def __init__(self) -> None:
        self.clock = _Leaping()
        super().__init__(self.clock)

    def time(self) -> float:
        return self.clock.now


@pytest.fixture(autouse=True)
def _the_loops_time(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("distillery.teacher.pace.time", SimpleNamespace(monotonic=now))
    monkeypatch.setattr("distillery.teacher.pace.random", random.Random(1))


def now() -> float:
    return asyncio.get_running_loop().time()


def run(work: Coroutine[Any, Any, Any]) -> Any:
    with asyncio.Runner(loop_factory=_Loop) as runner:
        return runner.run(work)


def paced(**recipe: Any) -> Pace:
    recipe = TeacherRecipe(**recipe)
    return Pace(recipe.concurrency, recipe.requests_per_minute, recipe.tokens_per_minute)


class Worker:
    """Calls an endpoint that takes `seconds` a call; `started` is when each call was let through."""

    def __init__(self, pace: Pace, seconds: float = 0.1, tokens: int = 10) -> None:
        self.pace, self.seconds, self.tokens = pace, seconds, tokens
        self.started: list[float] = []
        self.under_way = self.most_under_way = 0

    async def call(
        self, works: bool = True, retry_after: float | None = None, **headers: str
    ) -> None:
        asked_at = await self.pace.turn(self.tokens)
        self.started.append(now())
        self.under_way += 1
        self.most_under_way = max(self.most_under_way, self.under_way)
        await asyncio.sleep(self.seconds)
        told = {name.replace("_", "-"): value for name, value in headers.items()}
        if works:
            self.pace.succeeded(told)
        else:
            self.pace.failed(asked_at, retry_after, told)
        self.under_way -= 1
        self.pace.done(asked_at)

    async def calls(self, count: int, **how: Any) -> None:
        left = iter(range(count))

        async def some() -> None:
            for _ in left:
                await self.call(**how)

        await asyncio.gather(*(some() for _ in range(min(count, 100))))


def test_no_more_calls_at_a_time_than_the_recipe_says() -> None:
    async def work() -> None:
        worker = Worker(paced(concurrency=7))
        await worker.calls(100)
        assert worker.most_under_way == 7
        assert now() - worker.started[0] == pytest.approx(15 * 0.1, abs=0.05), (
            "and no fewer: 100 calls in 15 rounds"
        )

    run(work())


def test_one_round_of_failures_slows_down_once() -> None:
    async def work() -> None:
        worker = Worker(paced(concurrency=100))
        await worker.calls(BREAKS_AT - 1, works=False)
        assert worker.pace.concurrency == 70
        await worker.call(works=False)
        assert worker.pace.concurrency == 49, "a call of the new pace failed too"

    run(work())


def test_the_pace_falls_by_shares_and_rises_by_one_a_round() -> None:
    async def work() -> None:
        worker = Worker(paced(concurrency=10))
        for expected in (7, 4, 3, 2, 1, 1, 1):
            await worker.call(works=False)
            assert worker.pace.concurrency == expected
        rounds = []
        while worker.pace.concurrency < 10:
            before = worker.pace.concurrency
            await worker.calls(before)
            rounds.append(worker.pace.concurrency - before)
        assert set(rounds) <= {0, 1}
        assert 9 <= len(rounds) <= 15
        await worker.calls(100)
        assert worker.pace.concurrency == 10

    run(work())


def test_a_slowed_pace_holds_for_those_who_wait() -> None:
    async def work() -> None:
        worker = Worker(paced(concurrency=10))
        for _ in range(3):
            await worker.call(works=False)
        worker.most_under_way = 0
        await worker.calls(6)
        assert worker.most_under_way == 3

    run(work())


def test_retry_after_holds_every_worker() -> None:
    async def work() -> None:
        worker = Worker(paced(concurrency=8))
        await worker.call(works=False, retry_after=30)
        told = now()
        await worker.calls(20)
        assert min(worker.started[1:]) - told == pytest.approx(30, abs=0.1)

    run(work())


def test_a_later_shorter_wait_does_not_shorten_the_longer() -> None:
    async def work() -> None:
        worker = Worker(paced())
        asked = [await worker.pace.turn(1) for _ in range(2)]
        worker.pace.failed(asked[0], 60, {})
        worker.pace.failed(asked[1], 1, {})
        for asked_at in asked:
            worker.pace.done(asked_at)
        told = now()
        await worker.call()
        assert worker.started[0] - told == pytest.approx(60, abs=0.1)

    run(work())


def test_a_wait_of_hours_is_cut() -> None:
    async def work() -> None:
        worker = Worker(paced())
        await worker.call(works=False, retry_after=86400)
        await worker.call(x_ratelimit_remaining_tokens="0", x_ratelimit_reset_tokens="7h12m0s")
        await worker.call()
        waits = [later - earlier for earlier, later in pairwise(worker.started)]
        assert waits == pytest.approx([LONGEST_WAIT_S] * 2, abs=0.3)

    run(work())


@pytest.mark.parametrize("name", ["requests", "tokens"])
@pytest.mark.parametrize(
    ("reset", "seconds"),
    [
        ("6m0s", LONGEST_WAIT_S),
        ("1m30.5s", 90.5),
        ("120ms", 0.12),
        ("1s", 1),
        ("8.64s", 8.64),
        ("20", 20),
        ("1.5", 1.5),
        ("0s", 0),
        ("", 0),
        ("soon", 0),
    ],
)
def test_a_used_up_limit_holds_until_it_is_filled_again(
    name: str, reset: str, seconds: float
) -> None:
    async def work() -> None:
        worker = Worker(paced())
        headers = {f"x-ratelimit-remaining-{name}": "0", f"x-ratelimit-reset-{name}": reset}
        await worker.call(**headers)
        told = now()
        await worker.call()
        assert worker.started[1] - told == pytest.approx(seconds, abs=0.001)

    run(work())


def test_a_limit_that_is_not_used_up_holds_nobody() -> None:
    async def work() -> None:
        worker = Worker(paced())
        await worker.call(x_ratelimit_remaining_requests="1", x_ratelimit_reset_requests="60s")
        told = now()
        await worker.call()
        assert worker.started[1] == told

    run(work())


def most_in(times: list[float], seconds: float) -> int:
    """The most calls that any `seconds` of the run saw."""
    return max(bisect_left(times, start + seconds) - at for at, start in enumerate(times))


@pytest.mark.parametrize("limit", [30, 60, 600])
def test_requests_a_minute_are_kept_and_used(limit: int) -> None:
    async def work() -> list[float]:
        worker = Worker(paced(concurrency=64, requests_per_minute=limit))
        await worker.calls(3 * limit)
        return worker.started

    times = run(work())
    assert most_in(times, 60) <= limit + limit / 60 + 1, "a minute's, and the second's at its start"
    assert times[-1] - times[0] <= 180


def test_tokens_a_minute_are_kept_and_used() -> None:
    async def work() -> list[float]:
        worker = Worker(paced(concurrency=64, tokens_per_minute=6000), tokens=100)
        await worker.calls(180)
        return worker.started

    times = run(work())
    assert 60 <= most_in(times, 60) <= 62
    assert 170 <= times[-1] - times[0] <= 180


def test_the_tighter_of_two_limits_rules() -> None:
    async def work() -> list[float]:
        worker = Worker(
            paced(concurrency=64, tokens_per_minute=6000, requests_per_minute=6000), tokens=100
        )
        await worker.calls(120)
        return worker.started

    times = run(work())
    assert 110 <= times[-1] - times[0] <= 120


def test_tokens_that_were_not_used_are_given_back_and_those_beyond_are_owed() -> None:
    async def work(difference: int) -> float:
        pace = paced(tokens_per_minute=6000)
        started = now()
        for _ in range(60):
            asked_at = await pace.turn(100)
            pace.succeeded({})
            pace.settle(difference)
            pace.done(asked_at)
        return now() - started

    assert run(work(0)) == pytest.approx(58, abs=1.5)
    assert run(work(-50)) == pytest.approx(29, abs=1.5)
    assert run(work(100)) == pytest.approx(118, abs=2.5)


def test_a_call_of_more_tokens_than_a_minute_has_is_let_through_at_last() -> None:
    async def work() -> None:
        worker = Worker(paced(tokens_per_minute=100), tokens=300)
        await worker.calls(2)
        assert worker.started[1] - worker.started[0] == pytest.approx(180, abs=2)

    run(work())


@pytest.mark.parametrize("name", ["requests", "tokens"])
def test_the_endpoints_headers_set_the_limit(name: str) -> None:
    async def work() -> list[float]:
        worker = Worker(paced(concurrency=64, **{f"{name}_per_minute": 10_000_000}), tokens=1)
        await worker.call(**{f"x-ratelimit-limit-{name}": "60"})
        await worker.calls(120)
        return worker.started[1:]

    times = run(work())
    assert 117 <= times[-1] - times[0] <= 120


@pytest.mark.parametrize("value", ["0", "-5", "many", "1.5", "²", ""])
def test_a_senseless_limit_is_none(value: str) -> None:
    async def work() -> None:
        worker = Worker(paced(concurrency=64))
        await worker.call(x_ratelimit_limit_requests=value)
        told = now()
        await worker.calls(64)
        assert set(worker.started[1:]) == {told}

    run(work())


def test_a_limit_that_changes_forgets_nothing_of_what_was_taken() -> None:
    """Deployments behind one address tell different limits."""

    async def work() -> list[float]:
        worker = Worker(paced(concurrency=1), seconds=0.01)
        for number in range(60):
            await worker.call(x_ratelimit_limit_requests="60" if number % 2 else "61")
        return worker.started

    times = run(work())
    assert times[-1] - times[0] >= 55


def test_the_circuit_opens_after_failures_in_a_row_and_closes_on_success() -> None:
    async def work() -> None:
        worker = Worker(paced(concurrency=1))
        for _ in range(BREAKS_AT - 1):
            await worker.call(works=False)
        assert not worker.pace.is_open
        await worker.call()
        for _ in range(BREAKS_AT - 1):
            await worker.call(works=False)
        assert not worker.pace.is_open, "a success in between starts the count anew"
        await worker.call(works=False)
        assert worker.pace.is_open
        told = now()
        await worker.call()
        assert 0.75 <= worker.started[-1] - told <= 1.25
        assert not worker.pace.is_open
        told = now()
        await worker.call()
        assert worker.started[-1] == told

    run(work())


def test_the_pauses_of_an_open_circuit_grow_to_a_bound() -> None:
    async def work() -> list[float]:
        worker = Worker(paced(concurrency=1), seconds=0)
        for _ in range(BREAKS_AT + 12):
            await worker.call(works=False)
        return worker.started

    times = run(work())
    pauses = [later - earlier for earlier, later in pairwise(times)][BREAKS_AT - 1 :]
    for number, pause in enumerate(pauses):
        expected = min(2.0**number, LONGEST_PAUSE_S)
        assert 0.74 * expected <= pause <= 1.26 * expected


def test_an_open_circuit_lets_one_call_through_at_a_time() -> None:
    async def work() -> None:
        worker = Worker(paced(concurrency=64), seconds=0.5)
        for _ in range(BREAKS_AT):
            await worker.call(works=False)
        assert worker.pace.is_open
        await worker.calls(20, works=False)
        assert worker.most_under_way == 1
        assert worker.pace.is_open
        await worker.calls(200)
        assert not worker.pace.is_open
        assert worker.most_under_way > 10, "once it is closed they need not wait for one another"

    run(work())


def test_a_straggler_from_before_lets_no_second_probe_through() -> None:
    async def work() -> int:
        pace = paced(concurrency=20)
        fast, slow, probes = Worker(pace), Worker(pace, seconds=5), Worker(pace, seconds=20)
        stragglers = asyncio.create_task(slow.calls(2, works=False))
        await fast.calls(BREAKS_AT, works=False)
        assert pace.is_open
        await asyncio.gather(stragglers, probes.calls(5, works=False))
        return probes.most_under_way

    assert run(work()) == 1


def test_calls_that_were_under_way_when_the_circuit_opened_do_not_lengthen_its_pause() -> None:
    async def work() -> None:
        worker = Worker(paced(concurrency=64))
        await worker.calls(64, works=False)
        told = now()
        await worker.call()
        assert 0.75 <= worker.started[-1] - told <= 1.25

    run(work())


def test_an_endpoint_that_says_at_once_is_not_hammered_while_it_is_down() -> None:
    async def work() -> None:
        worker = Worker(paced(concurrency=8), seconds=0.01)
        for _ in range(BREAKS_AT + 20):
            await worker.call(works=False, retry_after=0)
        assert worker.started[-1] - worker.started[BREAKS_AT] > 60

    run(work())


def test_silence_is_counted_from_the_first_failure_after_the_last_answer() -> None:
    async def work() -> None:
        worker = Worker(paced(), seconds=2)
        await asyncio.sleep(500)
        assert worker.pace.silent_s == 0, "nobody has asked"
        await worker.call()
        await asyncio.sleep(500)
        assert worker.pace.silent_s == 0, "nor since"
        await worker.call(works=False)
        await worker.call(works=False)
        assert worker.pace.silent_s == pytest.approx(2)
        await worker.call()
        assert worker.pace.silent_s == 0

    run(work())


def test_stop_ends_all_waiting() -> None:
    async def work() -> None:
        pace = paced(concurrency=1)
        asked_at = await pace.turn(1)
        full = [asyncio.create_task(pace.turn(1)) for _ in range(5)]
        await asyncio.sleep(0.01)
        stopped = now()
        pace.stop()
        assert all(
            isinstance(one, Stopped) for one in await asyncio.gather(*full, return_exceptions=True)
        )
        assert now() == stopped
        with pytest.raises(Stopped):
            await pace.turn(1)
        pace.failed(asked_at, None, {})
        pace.done(asked_at)

    run(work())


@pytest.mark.parametrize("why", ["held", "limited", "open"])
def test_stop_is_heeded_within_a_second_by_those_who_sleep(why: str) -> None:
    async def work() -> None:
        worker = Worker(paced(concurrency=2, requests_per_minute=1 if why == "limited" else None))
        if why == "open":
            for _ in range(BREAKS_AT + 5):
                await worker.call(works=False)
        else:
            await worker.call(works=False, retry_after=100 if why == "held" else None)
        sleeping = [asyncio.create_task(worker.call()) for _ in range(5)]
        await asyncio.sleep(0.5)
        stopped = now()
        worker.pace.stop()
        assert all(
            isinstance(one, Stopped)
            for one in await asyncio.gather(*sleeping, return_exceptions=True)
        )
        assert now() - stopped <= 1

    run(work())


def test_nobody_is_forgotten_however_calls_end() -> None:
    """Calls that fail and succeed at random, and some that are cancelled while they wait: all others come through."""

    async def work() -> None:
        chance = random.Random(7)
        pace = paced(concurrency=16)

        async def one() -> None:
            while True:
                asked_at = await pace.turn(1)
                try:
                    await asyncio.sleep(chance.uniform(0, 0.2))
                    if chance.random() < 0.4:
                        pace.succeeded({})
                        return
                    pace.failed(asked_at, chance.choice([None, None, 0.1]), {})
                finally:
                    pace.done(asked_at)

        tasks = [asyncio.create_task(one()) for _ in range(500)]
        for task in tasks[::7]:
            asyncio.get_running_loop().call_later(chance.uniform(0, 5), task.cancel)
        ends = await asyncio.gather(*tasks, return_exceptions=True)
        assert {type(end) for end in ends} <= {type(None), asyncio.CancelledError}
        assert sum(end is None for end in ends) >= 400

    run(work())


PRICES = PriceRecipe(input=2.0, cached_input=0.5, output=8.0)


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


MOST = Usage(prompt_tokens=100, completion_tokens=20)


async def spend(
    spending: Spending, in_flight: int, rows: int, without_count: float = 0.0
) -> tuple[list[Usage], str]:
    """Calls until the cap stops them; what each took, as the endpoint counted it, and what the cap said."""
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
            counted = chance.random() >= without_count
            taken.append(used if counted else MOST)
            spending.settle(reserved, used if counted else None)

    await asyncio.gather(*(worker() for _ in range(in_flight)))
    return taken, refusals[0] if refusals else ""


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
def test_a_cap_is_never_passed_and_used_as_far_as_it_goes(
    in_flight: int, name: str, cap: float, without_count: float
) -> None:
    spending = Spending(BudgetRecipe(**{name: cap}), PRICES)
    taken, refusal = run(spend(spending, in_flight, 1000, without_count))
    total = sum(taken, Usage())
    cost = cost_of(total, PRICES)
    spent = {
        "calls": len(taken),
        "tokens": total.prompt_tokens + total.completion_tokens,
        "cost": cost,
    }[name]
    call = {"calls": 1, "tokens": 120, "cost": cost_of(MOST, PRICES)}[name]
    assert cap - call < spent <= cap * (1 + 1e-9), "the next call at its most would have passed it"
    assert refusal.startswith(f"teacher.budget.{name}: {spent:g} of {cap:g} spent in this run")
    assert "\n" not in refusal


def test_the_tightest_of_several_caps_is_named() -> None:
    for caps, named in (
        ({"calls": 5, "tokens": 100_000}, "calls"),
        ({"calls": 1000, "tokens": 1000, "cost": 1.0}, "tokens"),
        ({"calls": 1000, "tokens": 100_000, "cost": 0.001}, "cost"),
    ):
        taken, refusal = run(spend(Spending(BudgetRecipe(**caps), PRICES), 8, 2000))
        assert refusal.startswith(f"teacher.budget.{named}: ")
        assert 0 < len(taken) < 100


def test_without_a_cap_nothing_is_refused() -> None:
    taken, refusal = run(spend(Spending(BudgetRecipe(), None), 64, 1000))
    assert (len(taken), refusal) == (1000, "")


def test_a_cap_below_one_call_lets_none_through() -> None:
    taken, refusal = run(spend(Spending(BudgetRecipe(tokens=119), None), 8, 10))
    assert taken == []
    assert refusal.startswith("teacher.budget.tokens: 0 of 119 spent")


def test_who_waits_for_the_calls_under_way_gets_what_they_leave() -> None:
    async def work() -> None:
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

    run(work())
