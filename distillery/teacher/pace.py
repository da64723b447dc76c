"""How fast the teacher is asked: one `Pace` for all the workers of a run.

The pace follows the endpoint. The number of calls at a time rises by one in a round of successes
and falls by 30 % at a sign of overload (additive increase, multiplicative decrease: Chiu and Jain,
Analysis of the Increase and Decrease Algorithms, 1989). The limits that the endpoint reports, and
the time after which it wants to be asked again, hold for every worker. When only failures come, a
circuit breaker (Nygard, Release It!, 2007) lets one call through at a time, after growing pauses,
until one succeeds. The limits per minute may be shared with other runs.
"""

import asyncio
import random
import re
import time
from collections import deque
from collections.abc import Mapping

from distillery.recipe import TeacherRecipe
from distillery.storage.database import Database
from distillery.storage.sharers import Sharers
from distillery.teacher.endpoint import Endpoint

LONGEST_WAIT_S = 120.0
"""The longest that a header of the endpoint makes the workers wait."""

LONGEST_PAUSE_S = 30.0

FIRST_PAUSE_S = 1.0

BREAKS_AT = 10
"""Failures in a row, of all workers together, after which the endpoint counts as down."""

SECONDS_IN = {"ms": 0.001, "s": 1.0, "m": 60.0, "h": 3600.0}


class Stopped(Exception):
    """The run has ended for another worker's reason."""


class RateLimit:
    """A limit per minute, of which one second's worth may be used at once (the generic cell rate
    algorithm, ITU-T I.371)."""

    def __init__(self, per_minute: float) -> None:
        self.per_minute = per_minute
        self._free_at = 0.0

    def wait(self, now: float) -> float:
        """Return the seconds until something may be taken; 0 or less: at once."""
        return self._free_at - now - 1.0

    def take(self, now: float, amount: float) -> None:
        self._free_at = max(self._free_at, now) + amount * 60.0 / self.per_minute


class Pace:
    """Lets calls through: at most `most_calls` at a time, and no more than the endpoint can take.

    A worker awaits `turn`, makes its call, reports it by `succeeded` or `failed` (or by neither, if
    it was cancelled) and ends it by `done`. All workers run in one event loop. Invariants:

    - A worker holds a turn from the return of `turn` until it passes the time that it got to
      `done`. A turn is given only while fewer than `concurrency` are held. A pace that slows down
      takes no turn back; it gives none until enough of them are done.
    - A worker waits to be woken only if all turns are held or the trial of an open circuit is under
      way. Each `done` wakes as many waiters as there are free turns, and at least one. A waiter
      that is woken checks all conditions again; a worker that is cancelled before it got its turn
      wakes another. So nobody waits for a turn that is free. A worker that waits for a time (a
      limit or a pause) is not woken: it sleeps for at most a second and checks again.
    - The circuit opens after BREAKS_AT failures in a row and closes at the first success, of
      whichever call. While it is open, one call at a time is let through as a trial, and each
      failed trial doubles the pause before the next, up to LONGEST_PAUSE_S. A call from before the
      opening is no trial: its failure lengthens no pause.
    - After `stop` no turn is given: those who wait and those who come later get Stopped.
    - With `sharers`, each call takes from the limits as much as that many runs would. This run
      joins them at its first turn, so that one that has nothing to ask takes no share, and gives no
      turn until the others have counted it.
    """

    def __init__(
        self,
        most_calls: int,
        requests_per_minute: int | None = None,
        tokens_per_minute: int | None = None,
        sharers: Sharers | None = None,
    ) -> None:
        self._most_calls = most_calls
        self._sharers = sharers
        self._joining: asyncio.Task[None] | None = None
        self._limit = float(most_calls)
        self._slowed_at = 0.0
        self._in_flight = 0
        self._waiting: deque[asyncio.Future[None]] = deque()
        self._hold_until = 0.0
        self._rates: dict[str, RateLimit] = {}
        if requests_per_minute:
            self._rates["requests"] = RateLimit(requests_per_minute)
        if tokens_per_minute:
            self._rates["tokens"] = RateLimit(tokens_per_minute)
        self._failures_in_a_row = 0
        self._failing_since: float | None = None
        self._pauses = 0
        self._paused_at = 0.0
        self._trial_at: float | None = None
        self._stopped = False
        self.answered_at = 0.0

    @property
    def concurrency(self) -> int:
        """How many calls may be under way at a time at present."""
        return int(self._limit)

    @property
    def runs(self) -> int:
        """How many runs share the limits."""
        return self._sharers.count if self._sharers else 1

    @property
    def silent_s(self) -> float:
        """Seconds since the first failure after the last answer; 0 if nothing has failed since."""
        if self._failing_since is None:
            return 0.0
        return time.monotonic() - self._failing_since

    @property
    def is_open(self) -> bool:
        """Whether the circuit is open: the endpoint counts as down."""
        return self._failures_in_a_row >= BREAKS_AT

    def stop(self) -> None:
        """Raise Stopped in every worker that waits for a turn, now or later."""
        self._stopped = True
        self._wake(len(self._waiting))

    def raise_if_stopped(self) -> None:
        if self._stopped:
            raise Stopped

    async def sleep(self, seconds: float) -> None:
        """Wait until a call may be tried again. Raises Stopped within a second of `stop`."""
        while seconds > 0:
            self.raise_if_stopped()
            step = min(seconds, 1.0)
            await asyncio.sleep(step)
            seconds -= step

    async def turn(self, tokens: int) -> float:
        """Wait until a call of about `tokens` tokens may be made; return the time, for `done`."""
        try:
            await self._have_joined()
            now = await self._wait_for_turn()
        except asyncio.CancelledError:
            # It may have been woken for a free turn, which is another waiter's now.
            self._wake(1)
            raise
        self._in_flight += 1
        if self.is_open:
            self._trial_at = now
        for name, rate in self._rates.items():
            rate.take(now, (tokens if name == "tokens" else 1) * self.runs)
        return now

    async def _have_joined(self) -> None:
        if self._sharers is None:
            return
        if self._joining is None:
            self._joining = asyncio.create_task(self._join(self._sharers))
        # Another worker may be cancelled: the run joins all the same.
        await asyncio.shield(self._joining)

    async def _join(self, runs: Sharers) -> None:
        await asyncio.to_thread(runs.join)
        if runs.count > 1:
            # The others take larger shares until they have counted this run.
            self._hold(time.monotonic() + runs.counted_within_s)

    async def leave(self) -> None:
        """Give this run's share of the limits back, once all its calls are made."""
        if self._sharers and self._joining:
            await self._joining
            await asyncio.to_thread(self._sharers.leave)

    async def _wait_for_turn(self) -> float:
        while True:
            self.raise_if_stopped()
            now = time.monotonic()
            trial_is_under_way = self.is_open and self._trial_at is not None
            if self._in_flight >= self.concurrency or trial_is_under_way:
                woken = asyncio.get_running_loop().create_future()
                self._waiting.append(woken)
                await woken
                continue
            pause = self._hold_until - now
            for rate in self._rates.values():
                pause = max(pause, rate.wait(now))
            if pause <= 0:
                return now
            # In short steps, so that `stop` takes effect within a second.
            await asyncio.sleep(min(pause, 1.0))

    def done(self, asked_at: float) -> None:
        """End the turn that was given at `asked_at`, whatever became of the call."""
        self._in_flight -= 1
        if asked_at == self._trial_at:
            self._trial_at = None
        self._wake(max(self.concurrency - self._in_flight, 1))

    def succeeded(self, headers: Mapping[str, str]) -> None:
        """Note that the endpoint works: it answered, or it refused this call alone."""
        self.answered_at = time.monotonic()
        self._failing_since = None
        self._failures_in_a_row = 0
        self._pauses = 0
        self._limit = min(self._limit + 1.0 / self._limit, float(self._most_calls))
        self.adopt_limits(headers)

    def failed(
        self, asked_at: float, retry_after: float | None, headers: Mapping[str, str]
    ) -> None:
        """Note that the endpoint is overloaded or down, by a call that was made at `asked_at`."""
        now = time.monotonic()
        self._failures_in_a_row += 1
        if self._failing_since is None:
            self._failing_since = now
        # A call that was under way at the last slowing tells nothing of the new pace, nor does one
        # from before the last pause tell whether that was long enough.
        if asked_at >= self._slowed_at:
            self._limit = max(self._limit * 0.7, 1.0)
            self._slowed_at = now
        if retry_after is not None:
            self._hold(now + min(retry_after, LONGEST_WAIT_S))
        if self.is_open and asked_at >= self._paused_at:
            pause = min(FIRST_PAUSE_S * 2 ** min(self._pauses, 10), LONGEST_PAUSE_S)
            self._pauses += 1
            self._paused_at = now
            self._hold(now + pause * random.uniform(0.75, 1.25))  # noqa: S311
        self.adopt_limits(headers)

    def adopt_limits(self, headers: Mapping[str, str]) -> None:
        """Adopt the limits per minute, and wait until one that is used up is renewed, as the
        endpoint's headers say (OpenAI's API guide, rate limits; Azure OpenAI quota)."""
        for name in ("requests", "tokens"):
            limit = headers.get(f"x-ratelimit-limit-{name}", "")
            if limit.isascii() and limit.isdigit() and float(limit) > 0:
                if name not in self._rates:
                    self._rates[name] = RateLimit(float(limit))
                # What was taken stays taken when the limit changes.
                self._rates[name].per_minute = float(limit)
            if headers.get(f"x-ratelimit-remaining-{name}") == "0":
                seconds = parse_duration(headers.get(f"x-ratelimit-reset-{name}", ""))
                self._hold(time.monotonic() + min(seconds, LONGEST_WAIT_S))

    def settle(self, difference: int) -> None:
        """Correct the tokens of a call that took `difference` more (below 0: fewer) than it was let
        through for."""
        if "tokens" in self._rates:
            self._rates["tokens"].take(time.monotonic(), difference * self.runs)

    def _hold(self, until: float) -> None:
        self._hold_until = max(self._hold_until, until)

    def _wake(self, count: int) -> None:
        while count > 0 and self._waiting:
            waiter = self._waiting.popleft()
            if not waiter.done():
                waiter.set_result(None)
                count -= 1


def pace_of(recipe: TeacherRecipe, endpoint: Endpoint, database: Database | None = None) -> Pace:
    """Return the pace at which a run asks `endpoint`. With teacher.shared_pace, the runs that ask
    the same model there share its limits by `database`."""
    runs = None
    if recipe.shared_pace and database:
        runs = Sharers(database, f"{endpoint.url} {endpoint.model}")
    return Pace(recipe.concurrency, recipe.requests_per_minute, recipe.tokens_per_minute, runs)


def parse_duration(text: str) -> float:
    """Return the seconds of a duration as OpenAI writes it: 1s, 6m0s, 120ms, or 20 for 20 s; 0 if
    it is none of these."""
    if re.fullmatch(r"\d+(\.\d+)?", text):
        return float(text)
    seconds = 0.0
    for number, unit in re.findall(r"(\d+(?:\.\d+)?)(ms|s|m|h)", text):
        seconds += float(number) * SECONDS_IN[unit]
    return seconds
