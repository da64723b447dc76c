"""A list of work on a real database: each number goes to one process, whoever takes at once."""

import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from postgres_server import Postgres

from distillery.storage.shared_list import SharedList

TAKER = """
import sys
from distillery.storage.shared_list import SharedList
shared = SharedList("work", sys.argv[1])
print("ready", flush=True)
sys.stdin.readline()
while (number := shared.take()) is not None:
    print(number)
"""


@pytest.fixture(params=["sqlite", pytest.param("postgresql", marks=pytest.mark.slow)])
def url(tmp_path: Path, request: pytest.FixtureRequest) -> Iterator[str]:
    if request.param == "sqlite":
        yield f"sqlite:///{tmp_path / 'labels.db'}"
    else:
        with Postgres() as server:
            yield server.url()


def test_numbers_are_taken_in_their_order(url: str) -> None:
    shared = SharedList("work", url)
    assert (shared.take(), shared.taken()) == (None, ([], 0))
    shared.offer([7, 3, 5])
    assert [shared.take(), shared.take()] == [7, 3]
    assert shared.taken() == ([7, 3], 1)
    assert SharedList("other", url).take() is None


def test_a_list_is_replaced_once_it_is_at_its_end(url: str) -> None:
    shared = SharedList("work", url)
    shared.offer([1, 2])
    shared.take()
    shared.offer([8])
    assert shared.take() == 2, "another process may be at the first list"
    shared.offer([8])
    assert (shared.take(), shared.take()) == (8, None)
    shared.offer([9])
    shared.remove()
    assert shared.take() is None


def test_processes_that_take_at_once_never_get_the_same_number(url: str) -> None:
    SharedList("work", url).offer(range(300))
    takers = []
    for _ in range(3):
        taker = subprocess.Popen(
            [sys.executable, "-c", TAKER, url],
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
