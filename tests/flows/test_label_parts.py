"""Labelling by two processes: the files of one process, each row asked once, one budget, and
nothing lost when a process is killed."""

import logging
import os
import subprocess
import sys
import threading
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager, ExitStack
from contextvars import copy_context
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import psutil
import pytest
from chat_endpoint import Call, ChatEndpoint, Reply, good
from child_runs import children_that, one_killed, served
from label_runs import KEY, PROMPT, example
from postgres_server import Postgres
from prefect import flow
from prefect_api import OwnPrefect, wait_for
from sqlalchemy import select
from workshop import COUNTING, PROJECT

from distillery.data.examples import write_examples
from distillery.errors import BudgetReached, CredentialsError, DataError
from distillery.labels import parts as parts_module
from distillery.recipe import TeacherRecipe
from distillery.records import Rows, TeacherLabels
from distillery.storage.artifacts import ArtifactStore
from distillery.storage.database import Database
from distillery.storage.digests import sha256_of
from distillery.storage.leases import Leases
from distillery.teacher.ledger import CALLS
from tasks import locks
from tasks.label_parts import LabelJob, ask_in_processes, ask_part
from tasks.labels import label
from tasks.locks import Lease, leased
from tasks.parent import ParentEnded
from tasks.results import results_in_store

pytestmark = [
    pytest.mark.slow,
    pytest.mark.timeout(600),
    pytest.mark.usefixtures("prefect_api"),
]


CONCURRENCY = 8


def slow(call: Call) -> Reply:
    return replace(good(call), delay=0.02)


@pytest.fixture(params=["sqlite", "postgresql"])
def databases(
    request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> Iterator[Callable[[str], Database]]:
    """`databases(name)` makes a database of labels the one in use."""
    monkeypatch.setattr(parts_module, "CALLS_OF_A_PART", 20)
    with ExitStack() as stack:

        def use(name: str) -> Database:
            url = f"sqlite:///{tmp_path / name}.db"
            if request.param == "postgresql":
                server: Postgres = request.getfixturevalue("postgres_server")
                url = stack.enter_context(server.new_database())
            monkeypatch.setenv("DISTILLERY_LABELS", url)
            monkeypatch.setenv("DISTILLERY_HOME", str(tmp_path / name))
            database = Database(url)
            stack.callback(database.close)
            return database

        yield use


@pytest.fixture
def endpoint(monkeypatch: pytest.MonkeyPatch) -> Iterator[ChatEndpoint]:
    with ChatEndpoint(slow) as server:
        monkeypatch.setenv("TEACHER_MODEL_NAME", "gpt-test")
        monkeypatch.setenv("TEACHER_MODEL_ENDPOINT", server.url)
        monkeypatch.setenv("TEACHER_MODEL_KEY", KEY)
        yield server


def stored_rows(folder: Path, count: int) -> Rows:
    """So many rows, every tenth of which is like the one before."""
    folder.mkdir(exist_ok=True)
    numbers = [number - (number % 10 == 9) for number in range(count)]
    rows = [
        example(number).model_copy(update={"example_id": f"row-{place}"})
        for place, number in enumerate(numbers)
    ]
    write_examples(rows, folder / "train.jsonl")
    return Rows(
        artifact=ArtifactStore().put(folder),
        file="train.jsonl",
        rows=count,
        sha256=sha256_of(folder / "train.jsonl"),
    )


def labelled(
    folder: Path, count: int, deployment: str | None = None, **settings: Any
) -> TeacherLabels:
    """Label so many rows, every tenth of which is like the one before, in a run of its own."""
    train = stored_rows(folder, count)
    recipe = {"concurrency": CONCURRENCY, "sdk": "openai", "outage_s": 5} | settings
    teacher = TeacherRecipe.model_validate(recipe)

    @flow(name="labels")
    def run() -> list[TeacherLabels]:
        if deployment or teacher.processes > 1:
            ask_in_processes(train, PROMPT, teacher, "gpt-test", deployment)
        return [label(train, PROMPT, teacher, "gpt-test")]

    with results_in_store():
        (labels,) = run()
    return labels


def answers_in(database: Database) -> Counter[str]:
    """How many calls of the ledger answered each request; all were made by one run."""
    query = select(CALLS.c.run, CALLS.c.request_key).where(CALLS.c.outcome == "answer")
    rows = database.run(lambda connection: connection.execute(query).all())
    assert len({row.run for row in rows}) == 1
    return Counter(row.request_key for row in rows)


def children(server: ChatEndpoint) -> list[psutil.Process]:
    """The processes that ask the endpoint for this one."""
    return children_that(
        lambda each: any(
            link.raddr and link.raddr.port == server.port for link in each.net_connections()
        )
    )


def test_two_processes_write_the_files_of_one_and_ask_each_row_once(
    databases: Callable[[str], Database],
    endpoint: ChatEndpoint,
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
) -> None:
    caplog.set_level(logging.INFO)
    seen: set[int] = set()
    done = threading.Event()

    def watch() -> None:
        while not done.wait(0.05):
            seen.update(process.pid for process in children(endpoint))

    watcher = threading.Thread(target=watch)
    watcher.start()
    database = databases("two")
    try:
        two = labelled(tmp_path / "rows", 600, processes=2)
    finally:
        done.set()
        watcher.join()
    assert len(seen) == 2, "both have asked"
    assert "540 calls made, in 2 parts" in caplog.text
    assert Counter(call.question for call in endpoint.calls).most_common(1)[0][1] == 1
    assert len(endpoint.calls) == len(answers_in(database)) == 540
    assert endpoint.most_in_flight <= CONCURRENCY
    databases("one")
    one = labelled(tmp_path / "rows", 600)
    assert len(endpoint.calls) == 2 * 540
    assert two.artifact.sha256 == one.artifact.sha256
    assert (two.accepted, two.usage, two.asked) == (600, one.usage, 0)
    calls = [sum(total.calls for total in labels.paid) for labels in (two, one)]
    assert calls == [540, 540]
    # With few calls to make, no other process is started.
    database = databases("few")
    labelled(tmp_path / "few", 30, processes=2)
    assert "27 calls to make: one process makes them" in caplog.text


def test_a_runs_budget_holds_across_its_processes(
    databases: Callable[[str], Database], endpoint: ChatEndpoint, tmp_path: Path
) -> None:
    database = databases("budget")
    budget = {"calls": 120}
    with pytest.raises(BudgetReached) as caught:
        labelled(tmp_path / "rows", 600, processes=2, budget=budget)
    assert "teacher.budget.calls: 120 of 120 spent in this run" in str(caught.value)
    assert len(endpoint.calls) == 120
    assert sum(answers_in(database).values()) == 120
    # The next run goes on from there.
    labels = labelled(tmp_path / "rows", 600, processes=2)
    assert (labels.accepted, len(endpoint.calls)) == (600, 540)


def one_that_asks_killed(server: ChatEndpoint) -> AbstractContextManager[list[int]]:
    """Kill one of the processes that ask, once there are some answers; see `one_killed`."""
    return one_killed(lambda: len(server.answered) >= 100, lambda: children(server))


def check_nothing_is_twice(
    labels: TeacherLabels, database: Database, endpoint: ChatEndpoint
) -> None:
    """Check that 900 rows have labels, and that of their 810 requests none was answered twice, but
    for those that a killed process waited for."""
    assert labels.accepted == 900
    answers = answers_in(database)
    assert (len(answers), set(answers.values())) == (810, {1})
    lost = sum(total.calls for total in labels.paid if total.outcome == "lost")
    assert lost <= CONCURRENCY // 2
    assert 810 <= len(endpoint.calls) <= 810 + lost
    print(f"\n{len(endpoint.calls)} calls for 810 requests, {lost} of them lost")


def test_what_a_killed_process_leaves_is_asked_by_another_and_nothing_twice(
    databases: Callable[[str], Database],
    endpoint: ChatEndpoint,
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
) -> None:
    database = databases("killed")
    with one_that_asks_killed(endpoint) as killed:
        labels = labelled(tmp_path / "rows", 900, processes=2)
    assert killed
    assert "has ended early (its process was killed" in caplog.text
    check_nothing_is_twice(labels, database, endpoint)
    databases("whole")
    assert labelled(tmp_path / "rows", 900).artifact.sha256 == labels.artifact.sha256


@pytest.mark.parametrize("databases", ["sqlite"], indirect=True)
def test_runs_of_a_deployment_do_the_same(
    databases: Callable[[str], Database],
    endpoint: ChatEndpoint,
    prefect_server: OwnPrefect,
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
) -> None:
    caplog.set_level(logging.INFO)
    database = databases("served")
    with (
        served(prefect_server, "label_parts") as deployment,
        one_that_asks_killed(endpoint) as killed,
    ):
        labels = labelled(tmp_path / "rows", 900, deployment, processes=2)
    assert killed
    assert "has ended early" in caplog.text
    assert "calls made, in 2 parts" in caplog.text
    check_nothing_is_twice(labels, database, endpoint)


def test_of_two_runs_at_once_one_waits_for_the_other(
    databases: Callable[[str], Database], endpoint: ChatEndpoint, tmp_path: Path
) -> None:
    databases("twins")
    both_begin = threading.Barrier(2, timeout=60)

    def run(processes: int) -> TeacherLabels:
        both_begin.wait()
        return labelled(tmp_path / f"rows-{processes}", 600, processes=processes)

    with ThreadPoolExecutor() as pool:
        # By one process and by several: the lease is the same.
        runs = [pool.submit(copy_context().run, run, processes) for processes in (1, 2)]
        one, other = (run.result() for run in runs)
    assert one.artifact.sha256 == other.artifact.sha256
    assert len(endpoint.calls) == 540


@pytest.mark.parametrize("databases", ["sqlite"], indirect=True)
def test_a_child_that_is_not_as_its_run_asks_nothing(
    databases: Callable[[str], Database], endpoint: ChatEndpoint, tmp_path: Path
) -> None:
    """It has another teacher or another database, or its run has ended."""
    database = databases("own")

    @flow(name="part")
    def run(job: LabelJob) -> int:
        return ask_part(job)

    with leased("ask") as lease:
        job = LabelJob(
            rows=stored_rows(tmp_path / "rows", 30),
            prompt=PROMPT,
            teacher=TeacherRecipe.model_validate({"sdk": "openai"}),
            run="a-run",
            recipe="mine",
            identities=("gpt-test",),
            database=database.identity,
            lease=lease,
            parts=2,
        )
        with pytest.raises(DataError, match="TEACHER_MODEL_NAME: makes the teacher gpt-test here"):
            run(job.model_copy(update={"identities": ("gpt-other",)}))
        ended = Lease(key="ask", holder="another run")
        with pytest.raises(ParentEnded, match="the run that asked for this work has ended"):
            run(job.model_copy(update={"lease": ended}))
        # The rows are in the store of the home.
        own = {name: os.environ[name] for name in ("DISTILLERY_LABELS", "DISTILLERY_HOME")}
        databases("other")
        os.environ["DISTILLERY_HOME"] = own["DISTILLERY_HOME"]
        with pytest.raises(DataError, match="DISTILLERY_LABELS: another database than that of"):
            run(job)
        assert not endpoint.calls
        os.environ.update(own)
        assert run(job) > 0
    assert endpoint.calls


RUN = """
import sys
from pathlib import Path
import test_label_parts as here
here.parts_module.CALLS_OF_A_PART = 20
here.labelled(Path(sys.argv[1]), 900, sys.argv[2], processes=2)
"""
LEASE_S = 3


@pytest.mark.parametrize("databases", ["sqlite"], indirect=True)
def test_a_new_run_waits_for_what_a_killed_ones_children_still_ask(
    databases: Callable[[str], Database],
    endpoint: ChatEndpoint,
    prefect_server: OwnPrefect,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Nobody tells the children here that their run is dead: they ask all of it."""
    endpoint.script = lambda call: replace(good(call), delay=0.15)
    databases("orphans")
    monkeypatch.setattr(locks, "_open", cache(lambda url: Leases(url, LEASE_S)))
    rows = tmp_path / "rows"
    paths = [COUNTING, Path(__file__).parent, PROJECT / "tests" / "support", PROJECT]
    settings = {
        "COUNT_FILE": str(tmp_path / "counted"),
        "LEASE_SECONDS": str(LEASE_S),
        "PREFECT_API_URL": prefect_server.url,
        "PYTHONPATH": os.pathsep.join(map(str, paths)),
    }
    with served(prefect_server, "label_parts", **settings) as deployment:
        run = subprocess.Popen(
            [sys.executable, "-c", RUN, str(rows), deployment], env=os.environ | settings
        )
        try:
            wait_for("answers of its children", lambda: len(endpoint.answered) >= 100, 120)
        finally:
            run.kill()
            run.wait()
        labels = labelled(rows, 900)
    assert labels.accepted == 900
    asked = Counter(call.question for call in endpoint.calls)
    assert asked.most_common(1)[0][1] == 1
    assert len(asked) == 810
    assert sum(total.calls for total in labels.paid) == 0


def test_an_error_of_the_teacher_is_told_by_the_run_itself(
    databases: Callable[[str], Database], endpoint: ChatEndpoint, tmp_path: Path
) -> None:
    databases("wrong")
    endpoint.script = lambda call: Reply({"error": {"message": "no such key"}}, 401)
    with pytest.raises(CredentialsError) as caught:
        labelled(tmp_path / "rows", 600, processes=2)
    assert "\n" not in str(caught.value)
    assert len(endpoint.calls) <= 2 * CONCURRENCY
