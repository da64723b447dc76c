"""teacher.shared_pace: runs of one teacher share its limits by the label database."""

import subprocess
import time
from bisect import bisect_left
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path

import pytest
from chat_endpoint import ChatEndpoint, good
from label_runs import endpoint_of, example, run_process

from distillery.recipe import TeacherRecipe
from distillery.storage import sharers as sharers_module
from distillery.storage.database import Database
from distillery.teacher.pace import Pace, pace_of

SHORT = "from distillery.storage import sharers\nsharers.BEAT_S, sharers.LENGTH_S = 0.5, 3.0\n"


async def seconds_of(calls: int, pace: Pace) -> float:
    """Return how long so many calls take one by one, without the first."""
    for number in range(calls):
        asked_at = await pace.turn(1)
        if number == 0:
            started = time.monotonic()
        pace.done(asked_at)
    return time.monotonic() - started


def pace(server: ChatEndpoint, url: str, **recipe: object) -> Pace:
    return pace_of(TeacherRecipe.model_validate(recipe), endpoint_of(server), Database(url))


async def test_a_run_beside_another_waits_to_be_counted_and_takes_half_of_the_limits(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sharers_module, "BEAT_S", 0.1)
    url = f"sqlite:///{tmp_path / 'labels.db'}"
    shared = {"requests_per_minute": 6000, "shared_pace": True}
    with ChatEndpoint() as server, ChatEndpoint() as other_server:
        first, second = pace(server, url, **shared), pace(server, url, **shared)
        elsewhere = pace(other_server, url, **shared)
        assert await seconds_of(1, first) < 60
        started = time.monotonic()
        taken = await seconds_of(200, second)
        assert time.monotonic() - started - taken >= 1.0, "the first has to count it before"
        assert taken >= 2.9, "50 at once, and 50 a second"
        assert await seconds_of(200, elsewhere) >= 0.9
        assert elsewhere.runs == 1
        await first.leave()
        deadline = time.monotonic() + 60
        while second.runs > 1:
            assert time.monotonic() < deadline
            time.sleep(0.02)
        await second.leave()
        await elsewhere.leave()


@pytest.mark.slow
@pytest.mark.parametrize("told_by", ["recipe", "headers"])
def test_processes_keep_within_the_limit_and_take_over_from_one_that_is_killed(
    tmp_path: Path, told_by: str
) -> None:
    """The endpoint takes 20 calls a second of all runs together."""
    recipe = TeacherRecipe(concurrency=4, shared_pace=True)
    headers = {"x-ratelimit-limit-requests": "1200"}
    if told_by == "recipe":
        recipe, headers = recipe.model_copy(update={"requests_per_minute": 1200}), {}
    url = f"sqlite:///{tmp_path / 'labels.db'}"
    rows = [example(number) for number in range(3000)]

    def wait_until(happened: Callable[[], bool]) -> None:
        deadline = time.monotonic() + 100
        while not happened():
            assert time.monotonic() < deadline
            time.sleep(0.05)

    with ExitStack() as runs:
        server = runs.enter_context(ChatEndpoint(lambda call: replace(good(call), headers=headers)))

        def calls_of(key: str) -> list[float]:
            return [call.at for call in list(server.calls) if call.key == key]

        def started(key: str) -> subprocess.Popen[bytes]:
            run = run_process(
                server, url, tmp_path / key, rows, recipe, key, first=SHORT, stderr=None
            )
            runs.enter_context(run)
            runs.callback(run.kill)
            wait_until(lambda: len(calls_of(key)) >= 20)
            return run

        names = ["first-run", "second-run", "third-run"]
        first, *_ = [started(name) for name in names]
        together = time.monotonic()
        wait_until(lambda: all(calls_of(name)[-1] > together + 6 for name in names))
        killed_at = time.monotonic()
        times = [call.at for call in server.calls if call.at < killed_at]
        first.kill()
        wait_until(lambda: most_in(calls_of("second-run"), 2.0, killed_at) >= 17)
    # One second's worth may be made at once, and the first calls before a header has come.
    assert most_in(times, 3.0) <= 4 * 20 + 3 * recipe.concurrency
    for name in names:
        shares = [at for at in calls_of(name) if together < at < killed_at]
        assert most_in(shares, 2.0) <= 3 * 20 / 3 + recipe.concurrency


def most_in(times: Sequence[float], seconds: float, since: float = 0.0) -> int:
    """Return the most of these times, which are in order, within so many seconds after `since`."""
    times = [at for at in times if at >= since]
    ends = (bisect_left(times, start + seconds) for start in times)
    return max((end - at for at, end in enumerate(ends)), default=0)
