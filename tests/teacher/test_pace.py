"""The pace: how fast a teacher is asked. Each test has a clock of its own (leaping_loop)."""

import asyncio
import random
from bisect import bisect_left
from itertools import pairwise
from types import SimpleNamespace
from typing import Any

import pytest
from leaping_loop import leaping, now

from distillery.teacher.pace import BREAKS_AT, LONGEST_PAUSE_S, LONGEST_WAIT_S, Pace, Stopped


@pytest.fixture(autouse=True)
def own_clock_and_chance(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("distillery.teacher.pace.time", SimpleNamespace(monotonic=now))
    monkeypatch.setattr("distillery.teacher.pace.random", random.Random(1))


class Worker:
    """Makes calls that take `seconds`; `started` is when each of them was let through."""

    def __init__(self, pace: Pace, seconds: float = 0.1, tokens: int = 10) -> None:
        self.pace, self.seconds, self.tokens = pace, seconds, tokens
        self.started: list[float] = []
        self.under_way = self.most_under_way = 0

    async def call(
        self,
        works: bool = True,
        retry_after: float | None = None,
        limits: dict[str, str] | None = None,
    ) -> None:
        """Make one call. `limits`: the response's headers, without x-ratelimit-."""
        asked_at = await self.pace.turn(self.tokens)
        self.started.append(now())
        self.under_way += 1
        self.most_under_way = max(self.most_under_way, self.under_way)
        await asyncio.sleep(self.seconds)
        headers = {f"x-ratelimit-{name}": value for name, value in (limits or {}).items()}
        if works:
            self.pace.succeeded(headers)
        else:
            self.pace.failed(asked_at, retry_after, headers)
        self.under_way -= 1
        self.pace.done(asked_at)

    async def calls(self, count: int, works: bool = True) -> None:
        """Make `count` calls, at most 100 at a time."""
        left = iter(range(count))

        async def make_some() -> None:
            for _ in left:
                await self.call(works)

        await asyncio.gather(*(make_some() for _ in range(min(count, 100))))


@leaping
async def test_no_more_calls_at_a_time_than_the_recipe_says() -> None:
    worker = Worker(Pace(7))
    await worker.calls(100)
    assert worker.most_under_way == 7
    assert now() - worker.started[0] == pytest.approx(15 * 0.1, abs=0.05), (
        "and no fewer: 100 calls in 15 rounds"
    )


@leaping
async def test_one_round_of_failures_slows_down_once() -> None:
    worker = Worker(Pace(100))
    await worker.calls(BREAKS_AT - 1, works=False)
    assert worker.pace.concurrency == 70
    await worker.call(works=False)
    assert worker.pace.concurrency == 49, "a call of the new pace failed too"


@leaping
async def test_the_pace_falls_by_shares_and_rises_by_one_a_round() -> None:
    worker = Worker(Pace(10))
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


@leaping
async def test_a_slowed_pace_holds_for_those_who_wait() -> None:
    worker = Worker(Pace(10))
    for _ in range(3):
        await worker.call(works=False)
    worker.most_under_way = 0
    await worker.calls(6)
    assert worker.most_under_way == 3


@leaping
async def test_retry_after_holds_every_worker() -> None:
    worker = Worker(Pace(8))
    await worker.call(works=False, retry_after=30)
    told = now()
    await worker.calls(20)
    assert min(worker.started[1:]) - told == pytest.approx(30, abs=0.1)


@leaping
async def test_a_later_shorter_wait_does_not_shorten_the_longer() -> None:
    worker = Worker(Pace(8))
    asked = [await worker.pace.turn(1) for _ in range(2)]
    worker.pace.failed(asked[0], 60, {})
    worker.pace.failed(asked[1], 1, {})
    for asked_at in asked:
        worker.pace.done(asked_at)
    told = now()
    await worker.call()
    assert worker.started[0] - told == pytest.approx(60, abs=0.1)


@leaping
async def test_a_wait_of_hours_is_cut() -> None:
    worker = Worker(Pace(8))
    await worker.call(works=False, retry_after=86400)
    await worker.call(limits={"remaining-tokens": "0", "reset-tokens": "7h12m0s"})
    await worker.call()
    waits = [later - earlier for earlier, later in pairwise(worker.started)]
    assert waits == pytest.approx([LONGEST_WAIT_S] * 2, abs=0.3)


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
@leaping
async def test_a_used_up_limit_holds_until_it_is_filled_again(
    name: str, reset: str, seconds: float
) -> None:
    worker = Worker(Pace(8))
    await worker.call(limits={f"remaining-{name}": "0", f"reset-{name}": reset})
    told = now()
    await worker.call()
    assert worker.started[1] - told == pytest.approx(seconds, abs=0.001)


@leaping
async def test_a_limit_that_is_not_used_up_holds_nobody() -> None:
    worker = Worker(Pace(8))
    await worker.call(limits={"remaining-requests": "1", "reset-requests": "60s"})
    told = now()
    await worker.call()
    assert worker.started[1] == told


def most_in(times: list[float], seconds: float) -> int:
    """Return the most calls within any `seconds` of the run; `times` are theirs, in order."""
    return max(bisect_left(times, start + seconds) - at for at, start in enumerate(times))


@pytest.mark.parametrize("limit", [30, 60, 600])
@leaping
async def test_requests_a_minute_are_kept_and_used(limit: int) -> None:
    worker = Worker(Pace(64, requests_per_minute=limit))
    await worker.calls(3 * limit)
    times = worker.started
    assert most_in(times, 60) <= limit + limit / 60 + 1, "a minute's, and the second's at its start"
    assert times[-1] - times[0] <= 180


@leaping
async def test_tokens_a_minute_are_kept_and_used() -> None:
    worker = Worker(Pace(64, tokens_per_minute=6000), tokens=100)
    await worker.calls(180)
    times = worker.started
    assert 60 <= most_in(times, 60) <= 62
    assert 170 <= times[-1] - times[0] <= 180


@leaping
async def test_the_tighter_of_two_limits_rules() -> None:
    worker = Worker(Pace(64, tokens_per_minute=6000, requests_per_minute=6000), tokens=100)
    await worker.calls(120)
    times = worker.started
    assert 110 <= times[-1] - times[0] <= 120


@pytest.mark.parametrize(
    ("difference", "seconds", "tolerance"), [(0, 58, 1.5), (-50, 29, 1.5), (100, 118, 2.5)]
)
@leaping
async def test_tokens_that_were_not_used_are_given_back_and_those_beyond_are_owed(
    difference: int, seconds: float, tolerance: float
) -> None:
    pace = Pace(8, tokens_per_minute=6000)
    started = now()
    for _ in range(60):
        asked_at = await pace.turn(100)
        pace.succeeded({})
        pace.settle(difference)
        pace.done(asked_at)
    assert now() - started == pytest.approx(seconds, abs=tolerance)


@leaping
async def test_a_call_of_more_tokens_than_a_minute_has_is_let_through_at_last() -> None:
    worker = Worker(Pace(8, tokens_per_minute=100), tokens=300)
    await worker.calls(2)
    assert worker.started[1] - worker.started[0] == pytest.approx(180, abs=2)


@pytest.mark.parametrize("name", ["requests", "tokens"])
@leaping
async def test_the_endpoints_headers_set_the_limit(name: str) -> None:
    limit: Any = {f"{name}_per_minute": 10_000_000}
    worker = Worker(Pace(64, **limit), tokens=1)
    await worker.call(limits={f"limit-{name}": "60"})
    await worker.calls(120)
    times = worker.started[1:]
    assert 117 <= times[-1] - times[0] <= 120


@pytest.mark.parametrize("name", ["requests", "tokens"])
@leaping
async def test_a_limit_in_the_headers_replaces_the_recipes(name: str) -> None:
    """However low the recipe's is, the endpoint knows better."""
    limit: Any = {f"{name}_per_minute": 60}
    worker = Worker(Pace(64, **limit), tokens=1)
    await worker.call(limits={f"limit-{name}": "6000000"})
    await worker.calls(120)
    assert worker.started[-1] - worker.started[1] < 2


@leaping
async def test_a_limit_of_one_request_a_minute_is_kept() -> None:
    worker = Worker(Pace(8))
    await worker.call(limits={"limit-requests": "1"})
    await worker.calls(2)
    assert worker.started[2] - worker.started[1] == pytest.approx(59, abs=1)


@pytest.mark.parametrize("name", ["requests", "tokens"])
@leaping
async def test_a_used_up_limit_without_a_time_holds_nobody(name: str) -> None:
    worker = Worker(Pace(8))
    await worker.call(limits={f"remaining-{name}": "0"})
    told = now()
    await worker.call()
    assert worker.started[1] == told


@leaping
async def test_the_time_of_the_last_answer_is_known() -> None:
    worker = Worker(Pace(8))
    assert worker.pace.answered_at == 0
    await worker.call()
    answered = now()
    await worker.call(works=False)
    assert worker.pace.answered_at == answered < now()


@pytest.mark.parametrize("value", ["0", "-5", "many", "1.5", "²", ""])
@leaping
async def test_a_senseless_limit_is_none(value: str) -> None:
    worker = Worker(Pace(64))
    await worker.call(limits={"limit-requests": value})
    told = now()
    await worker.calls(64)
    assert set(worker.started[1:]) == {told}


@leaping
async def test_a_limit_that_changes_forgets_nothing_of_what_was_taken() -> None:
    """Deployments behind one address report different limits."""
    worker = Worker(Pace(1), seconds=0.01)
    for _ in range(30):
        await worker.call(limits={"limit-requests": "61"})
        await worker.call(limits={"limit-requests": "60"})
    times = worker.started
    assert times[-1] - times[0] >= 55


@leaping
async def test_the_circuit_opens_after_failures_in_a_row_and_closes_on_success() -> None:
    worker = Worker(Pace(1))
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


@leaping
async def test_the_pauses_of_an_open_circuit_grow_to_a_bound() -> None:
    worker = Worker(Pace(1), seconds=0)
    for _ in range(BREAKS_AT + 12):
        await worker.call(works=False)
    times = worker.started
    pauses = [later - earlier for earlier, later in pairwise(times)][BREAKS_AT - 1 :]
    for number, pause in enumerate(pauses):
        expected = min(2.0**number, LONGEST_PAUSE_S)
        assert 0.74 * expected <= pause <= 1.26 * expected


@leaping
async def test_an_open_circuit_lets_one_call_through_at_a_time() -> None:
    worker = Worker(Pace(64), seconds=0.5)
    for _ in range(BREAKS_AT):
        await worker.call(works=False)
    assert worker.pace.is_open
    await worker.calls(20, works=False)
    assert worker.most_under_way == 1
    assert worker.pace.is_open
    await worker.calls(200)
    assert not worker.pace.is_open
    assert worker.most_under_way > 10, "once it is closed they need not wait for one another"


@leaping
async def test_a_straggler_from_before_lets_no_second_trial_through() -> None:
    pace = Pace(20)
    fast, slow, trials = Worker(pace), Worker(pace, seconds=5), Worker(pace, seconds=20)
    stragglers = asyncio.create_task(slow.calls(2, works=False))
    await fast.calls(BREAKS_AT, works=False)
    assert pace.is_open
    await asyncio.gather(stragglers, trials.calls(5, works=False))
    assert trials.most_under_way == 1


@leaping
async def test_calls_from_before_the_circuit_opened_do_not_lengthen_its_pause() -> None:
    worker = Worker(Pace(64))
    await worker.calls(64, works=False)
    told = now()
    await worker.call()
    assert 0.75 <= worker.started[-1] - told <= 1.25


@leaping
async def test_an_endpoint_that_fails_at_once_is_not_hammered_while_it_is_down() -> None:
    worker = Worker(Pace(8), seconds=0.01)
    for _ in range(BREAKS_AT + 20):
        await worker.call(works=False, retry_after=0)
    assert worker.started[-1] - worker.started[BREAKS_AT] > 60


@leaping
async def test_silence_is_counted_from_the_first_failure_after_the_last_answer() -> None:
    worker = Worker(Pace(8), seconds=2)
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


async def assert_all_stopped(tasks: list[asyncio.Task[Any]]) -> None:
    ends = await asyncio.gather(*tasks, return_exceptions=True)
    assert {type(end) for end in ends} == {Stopped}


@leaping
async def test_stop_ends_all_waiting() -> None:
    pace = Pace(1)
    asked_at = await pace.turn(1)
    waiting = [asyncio.create_task(pace.turn(1)) for _ in range(5)]
    await asyncio.sleep(0.01)
    stopped = now()
    pace.stop()
    await assert_all_stopped(waiting)
    assert now() == stopped
    with pytest.raises(Stopped):
        await pace.turn(1)
    pace.failed(asked_at, None, {})
    pace.done(asked_at)


@pytest.mark.parametrize("why", ["held", "limited", "open"])
@leaping
async def test_stop_is_heeded_within_a_second_by_those_who_sleep(why: str) -> None:
    worker = Worker(Pace(2, requests_per_minute=1 if why == "limited" else None))
    if why == "open":
        for _ in range(BREAKS_AT + 5):
            await worker.call(works=False)
    else:
        await worker.call(works=False, retry_after=100 if why == "held" else None)
    sleeping = [asyncio.create_task(worker.call()) for _ in range(5)]
    await asyncio.sleep(0.5)
    stopped = now()
    worker.pace.stop()
    await assert_all_stopped(sleeping)
    assert now() - stopped <= 1


@pytest.mark.parametrize("pause", [None, 5.0], ids=["when woken", "in a pause"])
@leaping
async def test_a_worker_cancelled_before_its_turn_leaves_it_to_the_next(
    pause: float | None,
) -> None:
    pace = Pace(1)
    asked_at = await pace.turn(1)
    first = asyncio.create_task(pace.turn(1))
    second = asyncio.create_task(pace.turn(1))
    await asyncio.sleep(1)
    if pause:
        pace.failed(asked_at, pause, {})
    pace.done(asked_at)
    if pause:
        await asyncio.sleep(1)
    assert not first.done()
    first.cancel()
    pace.done(await second)
    assert first.cancelled()


@leaping
async def test_nobody_is_forgotten_however_calls_end() -> None:
    """Calls fail and succeed at random, and some are cancelled while they wait: all others come
    through."""
    chance = random.Random(7)
    pace = Pace(16)

    async def call_until_it_works() -> None:
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

    tasks = [asyncio.create_task(call_until_it_works()) for _ in range(500)]
    for task in tasks[::7]:
        asyncio.get_running_loop().call_later(chance.uniform(0, 5), task.cancel)
    ends = await asyncio.gather(*tasks, return_exceptions=True)
    assert {type(end) for end in ends} <= {type(None), asyncio.CancelledError}
    assert ends.count(None) >= 400
