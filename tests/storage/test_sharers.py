"""Which runs share a limit, on a real database: they are counted while they live, and no outage
makes a share larger."""

import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from sqlalchemy import func, select, text
from still_clock import StillClock

from distillery.storage import sharers as sharers_module
from distillery.storage.database import Database
from distillery.storage.leases import LEASES, NOW
from distillery.storage.sharers import Sharers

CHILD = """
import sys, time
from distillery.storage.database import Database
from distillery.storage.sharers import Sharers
Sharers(Database(sys.argv[1]), "limits").join()
print("joined", flush=True)
time.sleep(600)
"""


@pytest.fixture(params=["sqlite", pytest.param("postgresql", marks=pytest.mark.slow)])
def url(tmp_path: Path, request: pytest.FixtureRequest) -> str:
    if request.param == "sqlite":
        return f"sqlite:///{tmp_path / 'labels.db'}"
    return str(request.getfixturevalue("postgres_url"))


@pytest.fixture
def often(monkeypatch: pytest.MonkeyPatch) -> None:
    """Has the runs of this process count each other ten times a second."""
    monkeypatch.setattr(sharers_module, "BEAT_S", 0.1)


def wait_until(happened: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 60
    while not happened():
        assert time.monotonic() < deadline
        time.sleep(0.02)


def joined(url: str, what: str = "limits") -> Sharers:
    runs = Sharers(Database(url), what)
    runs.join()
    return runs


@pytest.mark.usefixtures("often")
def test_runs_that_share_the_same_count_each_other_until_they_leave(url: str) -> None:
    first, other = joined(url), joined(url, "other limits")
    assert first.count == 1
    second = joined(url)
    assert second.count == 2, "it knows at once"
    wait_until(lambda: first.count == 2)
    assert other.count == 1
    second.leave()
    wait_until(lambda: first.count == 1)
    first.leave()
    other.leave()
    assert rows(url) == 0


def rows(url: str) -> int:
    found: int = Database(url).run(
        lambda connection: connection.execute(select(func.count()).select_from(LEASES)).scalar_one()
    )
    return found


@pytest.mark.usefixtures("often")
def test_a_killed_run_is_counted_until_its_row_expires_by_the_databases_clock(
    url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    own = joined(url)
    with subprocess.Popen(
        [sys.executable, "-c", CHILD, url], stdout=subprocess.PIPE, text=True
    ) as child:
        assert child.stdout
        assert child.stdout.readline() == "joined\n"
        wait_until(lambda: own.count == 2)
        child.kill()
    time.sleep(1)
    assert own.count == 2, "it has not expired yet"
    for backend, now in NOW.items():
        monkeypatch.setitem(NOW, backend, text(f"{now.text} + {sharers_module.LENGTH_S}"))
    wait_until(lambda: own.count == 1)
    assert rows(url) == 2
    for backend, now in NOW.items():
        monkeypatch.setitem(NOW, backend, text(f"{now.text} + {sharers_module.REMOVED_AFTER_S}"))
    wait_until(lambda: rows(url) == 1)
    own.leave()


@pytest.mark.usefixtures("often")
def test_the_count_stays_during_an_outage_and_until_the_others_have_had_time_to_return(
    url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    clock = StillClock(now=100.0)
    monkeypatch.setattr(sharers_module, "time", clock)
    own, other = joined(url), joined(url)
    wait_until(lambda: own.count == 2)
    execute(url, "ALTER TABLE leases RENAME TO away")
    clock.now = 200.0
    wait_until(lambda: own.failed_at == 200.0)
    other.leave()
    assert own.count == 2
    # As though both rows had expired in the outage.
    execute(url, "DELETE FROM away")
    execute(url, "ALTER TABLE away RENAME TO leases")
    wait_until(lambda: rows(url) == 1)
    time.sleep(0.5)
    assert own.count == 2
    clock.now = 201.0
    wait_until(lambda: own.count == 1)
    own.leave()


@pytest.mark.usefixtures("often")
def test_a_run_that_joins_in_an_outage_knows_the_others_before_it_begins(
    url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sharers_module, "RETRY_S", 0.1)
    own = joined(url)
    execute(url, "ALTER TABLE leases RENAME TO away")
    late = Sharers(Database(url), "limits")
    joining = threading.Thread(target=late.join)
    joining.start()
    wait_until(lambda: late.failed_at > 0)
    assert joining.is_alive()
    execute(url, "ALTER TABLE away RENAME TO leases")
    joining.join(timeout=20)
    assert late.count == 2
    late.leave()
    own.leave()


def execute(url: str, statement: str) -> None:
    Database(url).run(lambda connection: connection.execute(text(statement)))
