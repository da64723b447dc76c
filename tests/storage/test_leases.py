"""Leases on a real database: one holder at a time, across processes, and free again when the
holder dies. Time is the database's; tests move it on, and wait for what happens then."""

import subprocess
import sys
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from threading import Event

import pytest
from postgres_server import Postgres
from sqlalchemy import select, text

from distillery.storage import leases as leases_module
from distillery.storage.database import Database
from distillery.storage.leases import LEASES, NOW, Leases

LENGTH_S = 600.0
"""Of a lease in these tests: no pause of a busy machine is as long."""

MOVED = " + (SELECT seconds FROM moved_clock)"

HOLDER = """
import sys, time
from sqlalchemy import text
from distillery.storage import leases
url, moved, length, renewals = sys.argv[1:]
leases.RENEWALS = int(renewals)
for backend, now in leases.NOW.items():
    leases.NOW[backend] = text(now.text + moved)
leases.Leases(url, seconds=float(length)).acquire("work", "child", run="the child's run")
print("held", flush=True)
time.sleep(600)
"""
WORKERS = """
import sys, time
from distillery.storage import leases as module
module.POLL_S = 0.05
leases, log = module.Leases(sys.argv[1]), open(sys.argv[2], "a", buffering=1)
for turn in range(3):
    holder = f"{sys.argv[3]}-{turn}"
    leases.acquire("work", holder)
    log.write(f"in {holder}\\n")
    time.sleep(0.05)
    log.write(f"out {holder}\\n")
    leases.release("work", holder)
"""


@pytest.fixture(autouse=True)
def _frequent_looks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Who waits looks ten times a second, in place of once."""
    monkeypatch.setattr(leases_module, "POLL_S", 0.1)


@pytest.fixture(params=["sqlite", pytest.param("postgresql", marks=pytest.mark.slow)])
def url(tmp_path: Path, request: pytest.FixtureRequest) -> str:
    if request.param == "sqlite":
        return f"sqlite:///{tmp_path / 'labels.db'}"
    return str(request.getfixturevalue("postgres_url"))


class MovedClock:
    """A database's clock that runs ahead by as much as the test says."""

    def __init__(self, url: str) -> None:
        self.database = Database(url)
        self.execute("CREATE TABLE moved_clock (seconds FLOAT)")
        self.execute("INSERT INTO moved_clock VALUES (0)")

    def execute(self, statement: str) -> None:
        self.database.run(lambda connection: connection.execute(text(statement)))

    def move_on(self, seconds: float) -> None:
        self.execute(f"UPDATE moved_clock SET seconds = seconds + {seconds}")

    def expiry(self) -> float:
        """Return when the only lease expires."""
        expiry: float = self.database.run(
            lambda connection: connection.execute(select(LEASES.c.expires_at)).scalar_one()
        )
        return expiry

    def wait_for_renewal(self, after: float) -> None:
        """Wait until the only lease expires later than `after`."""
        while self.expiry() <= after:
            time.sleep(0.02)


@pytest.fixture
def move_clocks(monkeypatch: pytest.MonkeyPatch) -> Callable[[str, int], MovedClock]:
    """Has all leases go by the clock that is returned, and be renewed so often in their length."""

    def move(url: str, renewals: int) -> MovedClock:
        clock = MovedClock(url)
        monkeypatch.setattr(leases_module, "RENEWALS", renewals)
        for backend, now in NOW.items():
            monkeypatch.setitem(NOW, backend, text(now.text + MOVED))
        return clock

    return move


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
    leases, told, waits = Leases(url), list[str](), Event()

    def waiting(run: str) -> None:
        told.append(run)
        waits.set()

    leases.acquire("work", "a", run="first")
    with ThreadPoolExecutor() as pool:
        taken = pool.submit(leases.acquire, "work", "b", waiting=waiting)
        assert waits.wait(60)
        assert not taken.done()
        leases.release("work", "a")
        assert taken.result(timeout=60)
    assert set(told) == {"first"}
    assert leases.is_held("work")


def test_what_the_one_who_is_told_raises_ends_the_wait(url: str) -> None:
    def waiting(run: str) -> None:
        raise InterruptedError(run)

    leases = Leases(url)
    leases.acquire("work", "a", run="first")
    with pytest.raises(InterruptedError, match="first"):
        leases.acquire("work", "b", waiting=waiting)


def test_a_holder_that_lives_keeps_it_past_its_length(
    url: str, move_clocks: Callable[[str, int], MovedClock]
) -> None:
    clock = move_clocks(url, 3000)
    leases = Leases(url, LENGTH_S)
    leases.acquire("work", "a")
    for _ in range(5):
        before = clock.expiry()
        clock.move_on(LENGTH_S / 2)
        clock.wait_for_renewal(before + LENGTH_S / 4)
    assert leases.is_held("work")
    assert not leases.acquire("work", "b", timeout=1)


def test_the_lease_of_a_killed_process_expires(
    url: str, move_clocks: Callable[[str, int], MovedClock]
) -> None:
    clock, told = move_clocks(url, 3000), list[str]()
    leases = Leases(url, LENGTH_S)
    with started(HOLDER, url, MOVED, str(LENGTH_S), "3000") as child:
        assert child.stdout
        assert child.stdout.readline() == "held\n"
        assert leases.is_held("work")
        assert not leases.acquire("work", "b", timeout=1)
        child.kill()
    assert not leases.acquire("work", "b", timeout=1), "it has not expired yet"
    clock.move_on(LENGTH_S + 1)
    assert not leases.is_held("work")
    assert leases.acquire("work", "b", waiting=told.append, timeout=60)
    assert set(told) == {"the child's run"}
    assert len(told) < 20, "two renewals later, as nobody has renewed it meanwhile"


def test_who_shares_a_lease_keeps_it_when_its_holder_is_gone(
    url: str, move_clocks: Callable[[str, int], MovedClock]
) -> None:
    clock = move_clocks(url, 3000)
    holder, child, other = (Leases(url, LENGTH_S) for _ in range(3))
    holder.acquire("work", "a")
    with child.shared("work", "a") as is_lost:
        holder.abandon("work", "a")
        for _ in range(3):
            before = clock.expiry()
            clock.move_on(LENGTH_S / 2)
            clock.wait_for_renewal(before + LENGTH_S / 4)
        assert not other.acquire("work", "b", timeout=1)
        assert not is_lost()
        # The same run again.
        assert holder.acquire("work", "a", timeout=0)
        holder.abandon("work", "a")
    assert other.is_held("work")
    clock.move_on(LENGTH_S + 1)
    with child.shared("work", "a") as is_lost:
        assert is_lost(), "it has expired, and is not revived"
    assert other.acquire("work", "b", timeout=60)


def test_who_shares_a_lease_learns_that_it_is_lost(
    url: str, move_clocks: Callable[[str, int], MovedClock]
) -> None:
    move_clocks(url, 3000)
    leases = Leases(url, LENGTH_S)
    with leases.shared("work", "a") as is_lost:
        assert is_lost()
    leases.acquire("work", "a")
    with leases.shared("work", "a") as is_lost:
        assert not is_lost()
        leases.release("work", "a")
        deadline = time.monotonic() + 60
        while not is_lost():
            assert time.monotonic() < deadline
            time.sleep(0.05)
        assert leases.acquire("work", "b", timeout=0)


def test_processes_take_turns(url: str, tmp_path: Path) -> None:
    log = tmp_path / "log"
    workers = [started(WORKERS, url, str(log), str(number)) for number in range(4)]
    assert [worker.wait(120) for worker in workers] == [0] * 4
    lines = log.read_text().splitlines()
    assert len(lines) == 24
    for entered, left in zip(lines[::2], lines[1::2], strict=True):
        assert entered.removeprefix("in ") == left.removeprefix("out ")


@pytest.mark.slow
def test_an_outage_longer_than_the_lease_changes_no_holder(
    move_clocks: Callable[[str, int], MovedClock],
) -> None:
    waits = Event()
    with Postgres() as server:
        # Renewed every 5 s; taken from its holder after 10 s without a renewal.
        clock = move_clocks(server.url(), 120)
        holder, other = Leases(server.url(), LENGTH_S), Leases(server.url(), LENGTH_S)
        holder.acquire("work", "a")
        with ThreadPoolExecutor() as pool:
            taken = pool.submit(other.acquire, "work", "b", waiting=lambda _: waits.set())
            assert waits.wait(60)
            server.stop()
            time.sleep(leases_module.OUTAGE_S + 1)
            server.start()
            # As though the lease had expired while the database was away.
            before = clock.expiry()
            clock.move_on(LENGTH_S + 60)
            clock.wait_for_renewal(before + LENGTH_S)
            assert not taken.done()
            waits.clear()
            assert waits.wait(60), "it goes on waiting"
            assert holder.is_held("work")
            holder.release("work", "a")
            assert taken.result(timeout=60)
