"""Processes that ask in batches and are killed (kill -9) between each two of their calls, or at any
moment: each answer is taken in once, no request is sent twice, and the ledger is the endpoint's own
count."""

import os
import random
import signal
import time
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Literal

import pytest
from batch_endpoint import BatchEndpoint, Plan
from batch_runs import PRICES, Nursery, asked_in_batches, batch_teacher, calls_in, left_in_book
from label_runs import example, stored_keys

pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]

ROWS = [example(number) for number in range(12)]

TEACHER = batch_teacher({"lines": 6})

REQUESTS = 14
"""A run's: a direct question, and two batches, each of which is uploaded, looked at, made, looked
at twice and downloaded."""


@pytest.fixture(autouse=True)
def _short_waits(monkeypatch: pytest.MonkeyPatch) -> None:
    """The next run looks often whether the killed one's leases have expired."""
    monkeypatch.setattr("distillery.storage.leases.POLL_S", 0.05)


@pytest.fixture(scope="module")
def nursery() -> Iterator[Nursery]:
    with Nursery() as started:
        yield started


def check(service: BatchEndpoint, url: str) -> None:
    """Check what is stored and booked, after a run has come to its end."""
    assert len(stored_keys(Path(url.removeprefix("sqlite:///")))) == len(ROWS)
    assert set(service.sent.values()) == {1}
    assert service.sent == service.answered
    assert left_in_book(url) == (0, 0)
    booked = [call for call in calls_in(url) if call["batch_id"]]
    assert len(booked) == service.answered.total()
    assert {call["request_key"] for call in booked} <= stored_keys(
        Path(url.removeprefix("sqlite:///"))
    )
    line = (40 * PRICES["input"] + PRICES["output"]) / 1e6 / 2
    assert sum(call["cost"] for call in booked) == pytest.approx(
        line * service.answered.total(), abs=1e-12
    )


async def test_a_run_makes_so_many_requests(url: str) -> None:
    with BatchEndpoint(lambda _: Plan(looks=1)) as service:
        await asked_in_batches(service, url, ROWS, TEACHER)
        check(service, url)
        assert len(service.requests) == REQUESTS - 1


@pytest.mark.parametrize("when", ["before", "after"])
@pytest.mark.parametrize("number", range(REQUESTS - 1))
async def test_killed_at_a_request(
    number: int, when: Literal["before", "after"], nursery: Nursery, url: str
) -> None:
    with BatchEndpoint(lambda _: Plan(looks=1)) as service:
        service.kill = (number, when)
        nursery.begin(service, url, ROWS, TEACHER)
        assert nursery.end() == -signal.SIGKILL
        service.kill = None
        await asked_in_batches(service, url, ROWS, TEACHER)
        check(service, url)


@pytest.mark.parametrize("when", ["before", "after"])
@pytest.mark.parametrize("method", ["intend", "change", "settle"])
async def test_killed_at_a_commit(method: str, when: str, nursery: Nursery, url: str) -> None:
    with BatchEndpoint(lambda _: Plan(looks=1)) as service:
        nursery.begin(service, url, ROWS, TEACHER, (method, when))
        assert nursery.end() == -signal.SIGKILL
        await asked_in_batches(service, url, ROWS, TEACHER)
        check(service, url)


@pytest.mark.parametrize("seed", range(3))
async def test_killed_at_any_moment_again_and_again(seed: int, nursery: Nursery, url: str) -> None:
    moments = random.Random(seed)
    with BatchEndpoint(lambda _: Plan(looks=3)) as service:
        for _ in range(7):
            process = nursery.begin(service, url, ROWS, TEACHER)
            time.sleep(moments.uniform(0.05, 1.5))
            # It may have come to its end meanwhile.
            with suppress(ProcessLookupError):
                os.kill(process, signal.SIGKILL)
            if nursery.end() == 0:
                break
        await asked_in_batches(service, url, ROWS, TEACHER)
        check(service, url)
