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

from distillery.recipe import TeacherRecipe

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
        for name, value in (
            ("requests", recipe.requests_per_minute),
            ("tokens", recipe.tokens_per_minute),
        ):
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

    def failed(
        self, asked_at: float, retry_after: float | None, headers: Mapping[str, str]
    ) -> None:
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
            if headers.get(_LEFT + name) == "0" and (
                seconds := _seconds(headers.get(_RESET + name, ""))
            ):
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
    return sum(
        float(number) * _UNITS[unit]
        for number, unit in re.findall(r"(\d+(?:\.\d+)?)(ms|s|m|h)", text)
    )
