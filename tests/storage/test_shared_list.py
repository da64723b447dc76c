"""A list of work on a real database: each number goes to one process, whoever takes at once."""

import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from postgres_server import Postgres

from distillery.storage import shared_list
from distillery.storage.database import Database
from distillery.storage.shared_list import SharedList

TAKER = """
import sys, time
from distillery.storage.database import Database
from distillery.storage.shared_list import SharedList
shared = SharedList("work", Database(sys.argv[1]))
print("ready", flush=True)
sys.stdin.readline()
while (number := shared.take()) is not None:
    print(number)
    time.sleep(0.02)
"""


@pytest.fixture(params=["sqlite", pytest.param("postgresql", marks=pytest.mark.slow)])
def database(tmp_path: Path, request: pytest.FixtureRequest) -> Iterator[Database]:
    if request.param == "sqlite":
        yield Database(f"sqlite:///{tmp_path / 'labels.db'}")
    else:
        with Postgres() as server:
            found = Database(server.url())
            yield found
            found.close()


def test_numbers_are_taken_in_their_order(database: Database) -> None:
    shared = SharedList("work", database)
    assert (shared.take(), shared.progress()) == (None, ([], 0))
    shared.offer([7, 3, 5])
    assert [shared.take(), shared.take()] == [7, 3]
    assert shared.progress() == ([7, 3], 1)
    assert SharedList("other", database).take() is None


def test_a_list_is_replaced_once_it_is_at_its_end(database: Database) -> None:
    shared = SharedList("work", database)
    shared.offer([1, 2])
    shared.take()
    shared.offer([8])
    assert shared.take() == 2, "another process may be at the first list"
    shared.offer([8])
    assert (shared.take(), shared.take()) == (8, None)
    shared.offer([9])
    shared.remove()
    assert shared.take() is None


def test_processes_that_take_at_once_never_get_the_same_number(database: Database) -> None:
    SharedList("work", database).offer(range(300))
    takers = []
    for _ in range(3):
        taker = subprocess.Popen(
            [sys.executable, "-c", TAKER, database.url.render_as_string(hide_password=False)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        takers.append(taker)
    for taker in takers:
        assert taker.stdout
        assert taker.stdout.readline() == "ready\n"
    for taker in takers:
        assert taker.stdin
        print(file=taker.stdin, flush=True)
    found = [[int(line) for line in taker.communicate(timeout=120)[0].split()] for taker in takers]
    assert sorted(number for each in found for number in each) == list(range(300))
    assert all(found), "else nobody took beside another one"


def test_a_list_that_nobody_comes_back_to_is_removed(
    database: Database, monkeypatch: pytest.MonkeyPatch
) -> None:
    old, other = SharedList("old", database), SharedList("other", database)
    old.offer([1, 2])
    other.offer([1])
    assert old.progress() == ([], 2)
    monkeypatch.setattr(shared_list, "KEPT_S", -1.0)
    other.offer([1])
    assert old.progress() == ([], 0)
