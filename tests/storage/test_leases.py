"""Leases on a real database: one holder at a time, across processes, and free again when the holder dies."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from postgres_server import Postgres

from distillery.storage.leases import Leases

HOLDER = """
import sys, time
from distillery.storage.leases import Leases
leases = Leases(sys.argv[1], seconds=float(sys.argv[2]))
leases.acquire("work", "child", run="the child's run")
print("held", flush=True)
time.sleep(60)
"""
WORKERS = """
import sys, time
from distillery.storage.leases import Leases
leases, log = Leases(sys.argv[1], seconds=3), open(sys.argv[2], "a", buffering=1)
for turn in range(3):
    holder = f"{sys.argv[3]}-{turn}"
    leases.acquire("work", holder)
    log.write(f"in {holder}\\n")
    time.sleep(0.05)
    log.write(f"out {holder}\\n")
    leases.release("work", holder)
"""


@pytest.fixture(params=["sqlite", pytest.param("postgresql", marks=pytest.mark.slow)])
def url(tmp_path: Path, request: pytest.FixtureRequest) -> Iterator[str]:
    if request.param == "sqlite":
        yield f"sqlite:///{tmp_path / 'labels.db'}"
    else:
        with Postgres() as server:
            yield server.url()


def started(code: str, *arguments: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-c", code, *arguments], stdout=subprocess.PIPE, text=True
    )


def test_a_lease_has_one_holder_at_a_time(url: str) -> None:
    leases = Leases(url)
    assert leases.acquire("work", "a", run="first")
    assert not leases.acquire("work", "b", timeout=0)
    assert leases.acquire("other work", "b", timeout=0)
    assert leases.holds("work", "a")
    assert not leases.holds("work", "b")
    assert leases.is_held("work")
    leases.release("work", "b")
    assert leases.is_held("work")
    leases.release("work", "a")
    assert not leases.is_held("work")
    assert leases.acquire("work", "b", timeout=0)


def test_who_waits_is_told_for_whom_and_gets_it(url: str) -> None:
    leases, told = Leases(url), list[str]()
    leases.acquire("work", "a", run="first")
    assert not leases.acquire("work", "b", timeout=1.5, waiting=told.append)
    assert set(told) == {"first"}


def test_a_holder_that_lives_keeps_it_past_its_length(url: str) -> None:
    leases = Leases(url, seconds=1)
    leases.acquire("work", "a")
    time.sleep(2)
    assert leases.is_held("work")
    assert not leases.acquire("work", "b", timeout=0)


def test_the_lease_of_a_killed_process_expires(url: str) -> None:
    child = started(HOLDER, url, "2")
    assert child.stdout
    assert child.stdout.readline() == "held\n"
    leases = Leases(url, seconds=2)
    assert leases.is_held("work")
    assert not leases.acquire("work", "b", timeout=2.5)
    os.kill(child.pid, signal.SIGKILL)
    child.wait()
    killed = time.monotonic()
    assert leases.acquire("work", "b", timeout=10)
    assert time.monotonic() - killed < 5


def test_processes_take_turns(url: str, tmp_path: Path) -> None:
    log = tmp_path / "log"
    workers = [started(WORKERS, url, str(log), str(number)) for number in range(4)]
    assert [worker.wait(60) for worker in workers] == [0] * 4
    lines = log.read_text().splitlines()
    assert len(lines) == 24
    for entered, left in zip(lines[::2], lines[1::2], strict=True):
        assert entered.removeprefix("in ") == left.removeprefix("out ")


@pytest.mark.slow
def test_an_outage_longer_than_the_lease_changes_no_holder() -> None:
    with Postgres() as server:
        holder, other = Leases(server.url(), seconds=3), Leases(server.url(), seconds=3)
        holder.acquire("work", "a")
        with ThreadPoolExecutor() as pool:
            waiting = pool.submit(other.acquire, "work", "b")
            time.sleep(1.5)
            server.stop()
            time.sleep(5)
            server.start()
            time.sleep(5)
            assert not waiting.done()
            holder.release("work", "a")
            assert waiting.result(timeout=10)
