"""How fast, and how far, a teacher is asked: one `Pace` and one `Spending` for all the workers of a run.

The pace follows the endpoint. Calls at a time go up by one a round and down by a third at each sign of overload
(additive increase, multiplicative decrease: Chiu and Jain, Analysis of the Increase and Decrease Algorithms, 1989).
What the endpoint says of its limits and of when to come back holds for every worker. When nothing but failures come, a
circuit breaker (Nygard, Release It!, 2007) lets one call at a time through, after pauses that grow, until one succeeds.
"""

import asyncio
import random
import re
import time
from collections import deque
from collections.abc import Mapping

from distillery.errors import BudgetReached
from distillery.recipe import BudgetRecipe, PriceRecipe, TeacherRecipe
from distillery.records import Usage

LONGEST_WAIT_S = 120.0
LONGEST_PAUSE_S = 30.0
FIRST_PAUSE_S = 1.0
BREAKS_AT = 10
"""Failures in a row, of all workers together, after which the endpoint counts as down."""

_LIMIT = "x-ratelimit-limit-"
_LEFT = "x-ratelimit-remaining-"
_RESET = "x-ratelimit-reset-"
_UNITS = {"ms": 0.001, "s": 1.0, "m": 60.0, "h": 3600.0}


class Stopped(Exception):
    """The run has ended for another worker's reason."""


class _Rate:
    """So many a minute, a second's worth of them at once (the generic cell rate algorithm, ITU-T I.371)."""

    def __init__(self, per_minute: float) -> None:
        self.per_minute = per_minute
        self._free_at = 0.0

    def wait(self, now: float) -> float:
        return self._free_at - now - 1.0

    def take(self, now: float, amount: float) -> None:
        self._free_at = max(self._free_at, now) + amount * 60.0 / self.per_minute


class Pace:
    """Lets calls through: at most teacher.concurrency at a time, and no more than the endpoint bears."""

    def __init__(self, recipe: TeacherRecipe) -> None:
        self._most = recipe.concurrency
        self._limit = float(recipe.concurrency)
        self._slowed_at = 0.0
        self._in_flight = 0
        self._waiting: deque[asyncio.Future[None]] = deque()
        self._hold_until = 0.0
        self._rates: dict[str, _Rate] = {}
        for name, value in (("requests", recipe.requests_per_minute), ("tokens", recipe.tokens_per_minute)):
            if value:
                self._rates[name] = _Rate(value)
        self._failures = self._pauses = 0
        self._paused_at = 0.0
        self._probe: float | None = None
        self._failing_since: float | None = None
        self.answered_at = 0.0
        self._stopped = False

    @property
    def concurrency(self) -> int:
        """How many calls may be under way at a time just now."""
        return int(self._limit)

    @property
    def silent_s(self) -> float:
        """Seconds since the first failure after the last answer; 0 where nothing has failed since."""
        return 0.0 if self._failing_since is None else time.monotonic() - self._failing_since

    @property
    def is_open(self) -> bool:
        """Whether the circuit is open: the endpoint counts as down."""
        return self._failures >= BREAKS_AT

    def stop(self) -> None:
        """Whoever waits for a turn gets Stopped."""
        self._stopped = True
        self._wake(len(self._waiting))

    async def turn(self, tokens: int) -> float:
        """Waits until a call of about so many tokens may be made; returns the time. `done` must follow."""
        while True:
            if self._stopped:
                raise Stopped
            now = time.monotonic()
            if self._in_flight >= self.concurrency or (self.is_open and self._probe is not None):
                await self._wait_for_change()
            elif (pause := self._pause(now)) > 0:
                await self._sleep(pause)
            else:
                break
        self._in_flight += 1
        self._probe = now if self.is_open else self._probe
        for name, rate in self._rates.items():
            rate.take(now, tokens if name == "tokens" else 1)
        return now

    def done(self, asked_at: float) -> None:
        """The call that was let through at `asked_at` is over, however it went."""
        self._in_flight -= 1
        self._probe = None if asked_at == self._probe else self._probe
        self._wake(max(self.concurrency - self._in_flight, 1))

    def succeeded(self, headers: Mapping[str, str]) -> None:
        self.answered_at = time.monotonic()
        self._failing_since = None
        self._failures = self._pauses = 0
        self._limit = min(self._limit + 1.0 / self._limit, float(self._most))
        self.heed(headers)

    def failed(self, asked_at: float, retry_after: float | None, headers: Mapping[str, str]) -> None:
        """A failure that says that the endpoint is overloaded or away, of a call made at `asked_at`."""
        now = time.monotonic()
        self._failures += 1
        self._failing_since = now if self._failing_since is None else self._failing_since
        if asked_at >= self._slowed_at:
            # Calls that were under way at the last slowing say nothing of the new pace; so with pauses below.
            self._limit = max(self._limit * 0.7, 1.0)
            self._slowed_at = now
        if retry_after is not None:
            self._hold(now + min(retry_after, LONGEST_WAIT_S))
        if self.is_open and asked_at >= self._paused_at:
            pause = min(FIRST_PAUSE_S * 2 ** min(self._pauses, 10), LONGEST_PAUSE_S)
            self._pauses, self._paused_at = self._pauses + 1, now
            self._hold(now + pause * random.uniform(0.75, 1.25))  # noqa: S311
        self.heed(headers)

    def heed(self, headers: Mapping[str, str]) -> None:
        """Takes the limits a minute, and when a used-up one is filled again, from the headers that OpenAI's and
        Azure's endpoints send (OpenAI's API guide, rate limits; Azure OpenAI quota)."""
        for name in ("requests", "tokens"):
            limit = headers.get(_LIMIT + name, "")
            if limit.isascii() and limit.isdigit() and int(limit) > 0:
                # What was taken stays taken, whatever the limit is now.
                self._rates.setdefault(name, _Rate(int(limit))).per_minute = int(limit)
            if headers.get(_LEFT + name) == "0" and (seconds := _seconds(headers.get(_RESET + name, ""))):
                self._hold(time.monotonic() + min(seconds, LONGEST_WAIT_S))

    def settle(self, difference: int) -> None:
        """A call took so many tokens more (or, below 0, fewer) than it was let through for."""
        if rate := self._rates.get("tokens"):
            rate.take(time.monotonic(), difference)

    def _hold(self, until: float) -> None:
        self._hold_until = max(self._hold_until, until)

    def _pause(self, now: float) -> float:
        return max([self._hold_until - now, *(rate.wait(now) for rate in self._rates.values())])

    async def _sleep(self, seconds: float) -> None:
        """Sleeps in short steps, so that `stop` is soon heeded."""
        await asyncio.sleep(min(seconds, 1.0))

    async def _wait_for_change(self) -> None:
        change = asyncio.get_running_loop().create_future()
        self._waiting.append(change)
        await change

    def _wake(self, count: int) -> None:
        while count > 0 and self._waiting:
            change = self._waiting.popleft()
            if not change.done():
                change.set_result(None)
                count -= 1


def _seconds(text: str) -> float:
    """OpenAI's durations: 1s, 6m0s, 120ms; a bare number is seconds."""
    if re.fullmatch(r"\d+(\.\d+)?", text):
        return float(text)
    return sum(float(number) * _UNITS[unit] for number, unit in re.findall(r"(\d+(?:\.\d+)?)(ms|s|m|h)", text))


def cost_of(usage: Usage, prices: PriceRecipe | None) -> float | None:
    """In the price table's currency; None without a table."""
    if prices is None:
        return None
    cached = prices.input if prices.cached_input is None else prices.cached_input
    fresh = usage.prompt_tokens - usage.cached_tokens
    return (fresh * prices.input + usage.cached_tokens * cached + usage.completion_tokens * prices.output) / 1e6


class Spending:
    """What a run has spent, and the cap on it. A call is let through only if the cap holds with what the calls under
    way will take at most; one that gave no usage is counted at that. `spent`: what the run has spent in other stages,
    by name; it is counted on in place."""

    def __init__(self, budget: BudgetRecipe, prices: PriceRecipe | None, spent: dict[str, float] | None = None) -> None:
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
        while over := next((n for n, cap in self._caps.items() if self._total(n) + wanted[n] > cap), None):
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
        return {"cost": cost, "tokens": float(usage.prompt_tokens + usage.completion_tokens), "calls": 1.0}
