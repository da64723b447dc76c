"""The journal: what a run that was killed, or whose database stayed away, had paid for."""

import asyncio
import contextlib
import json
import os
import random
import resource
import signal
import sqlite3
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import chat_endpoint
import pytest
from chat_endpoint import Call, ChatEndpoint, Reply, completion, good
from filelock import FileLock
from label_runs import PROMPT, endpoint_of, example, read_lines
from postgres_server import Postgres
from sqlalchemy import create_engine, text
from sqlalchemy.engine import make_url
from typer.testing import CliRunner

from distillery.commands.labels import app
from distillery.errors import StoreError, StoreUnavailable
from distillery.labels.journal import (
    Journal,
    Recovered,
    address_of,
    examine,
    hash_of,
    if_abandoned,
    journal_folder,
    left_beside,
    line_of,
    of_other_databases,
    prefixes_of,
    read_journal,
    values_of,
)
from distillery.labels.labelling import label
from distillery.labels.questions import request_key
from distillery.labels.store import SLOW_COMMIT_S, LabelStore, StoredAnswer
from distillery.prompts import render_messages
from distillery.recipe import TeacherRecipe
from distillery.storage.database import Database, checked_url
from distillery.teacher.ledger import Call as Entry


def stored(number: int, **values: Any) -> StoredAnswer:
    answer = StoredAnswer(
        request_key=f"{number:064x}",
        teacher="gpt-4o",
        answer="A",
        distribution={"A": 0.1 + 0.2, "B": 0.7},
        raw="Antwort: Ä “A”\n",
        prompt_tokens=40,
        completion_tokens=1,
        latency_ms=12.5,
        attempts=2,
        model_version="v1",
        example_id=f"row-{number}",
        prompt=f"What comes after {number}?",
        tokens=bytes(range(256)),
    )
    return answer._replace(**values)


def entry(number: int, **values: Any) -> Entry:
    """A call's beginning; with an outcome, its end."""
    call = Entry(
        run="run-1",
        recipe="mine",
        teacher="gpt-4o",
        purpose="label",
        outcome="lost",
        request_key=f"{number:064x}",
        prompt_tokens=900,
        completion_tokens=64,
        is_counted=False,
        prices={"input": 2.5, "output": 10.0},
        call_id=f"call-{number}",
    )
    return replace(call, **values)


def ended(number: int) -> Entry:
    return entry(number, outcome="answer", prompt_tokens=40, completion_tokens=1, is_counted=True)


def journals() -> list[Path]:
    return sorted(journal_folder().glob("*"))


def ledger(url: str) -> dict[str, tuple[str, int]]:
    """The outcome and the prompt tokens of each call in the database, by its id."""
    engine = create_engine(checked_url(url, False))
    with engine.connect() as connection:
        query = text("SELECT call_id, outcome, prompt_tokens FROM teacher_calls")
        found = {row[0]: (row[1], row[2]) for row in connection.execute(query)}
    engine.dispose()
    return found


def examined(url: str) -> list[Recovered]:
    with contextlib.closing(Database(url)) as database:
        return examine(database)


def wait_until(happened: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 60
    while not happened():
        assert time.monotonic() < deadline
        time.sleep(0.005)


@contextmanager
def locked(database: Path) -> Iterator[None]:
    """An SQLite database that nobody else can write to meanwhile."""
    connection = sqlite3.connect(database, isolation_level=None)
    connection.execute("BEGIN IMMEDIATE")
    yield
    connection.execute("ROLLBACK")
    connection.close()


KILLED = """
import os, signal, sys
sys.path[:0] = sys.argv[2:]
from test_journal import ended, entry, stored
from distillery.labels.store import LabelStore
store = LabelStore(sys.argv[1])
for number in range(5):
    store.begin(entry(number))
for number in range(3):
    store.add(stored(number), ended(number))
store.record(entry(3, outcome="retried", prompt_tokens=0, completion_tokens=0))
os.kill(os.getpid(), signal.SIGKILL)
"""


def killed(url: str, tmp_path: Path) -> Path:
    """The journal of a process that was killed before it could commit: three answers, a try that
    failed and a call that was under way."""
    LabelStore(url).close()
    with locked(tmp_path / "labels.db"):
        folders = [str(Path(__file__).parent), str(Path(chat_endpoint.__file__).parent)]
        command = [sys.executable, "-c", KILLED, url, *folders]
        done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == -signal.SIGKILL, done.stderr
    (journal,) = journal_folder().glob("*.jsonl")
    return journal


def check_recovered(url: str) -> None:
    with LabelStore(url) as store:
        keys = [f"{number:064x}" for number in range(9)]
        assert store.get_many(keys) == {keys[number]: stored(number) for number in range(3)}
    lost, of_answer = ("lost", 900), ("answer", 40)
    assert ledger(url) == {
        **{f"call-{number}": of_answer for number in range(3)},
        "call-3": ("retried", 0),
        "call-4": lost,
    }


def test_what_is_committed_is_in_no_journal(url: str) -> None:
    with LabelStore(url) as store:
        assert journals() == [], "a store that is only read has none"
        store.begin(entry(1))
        store.begin(entry(2))
        store.add(stored(1), ended(1))
        store.flush()
        (journal,) = journal_folder().glob("*.jsonl")
        content = journal.read_text()
        assert "call-2" in content
        assert "call-1" not in content
        assert "What comes after" not in content
        assert journal.stat().st_mode & 0o777 == 0o600
        assert journal_folder().stat().st_mode & 0o777 == 0o700
    assert journals() == []
    assert ledger(url) == {"call-1": ("answer", 40), "call-2": ("lost", 900)}


def test_a_killed_process_loses_no_answer_and_no_call(url: str, tmp_path: Path) -> None:
    killed(url, tmp_path)
    (left,) = examined(url)
    with LabelStore(url) as store:
        assert store.recovered == [left]
    assert (left.answers, left.calls, left.lost, left.unreadable) == (3, 4, 1, 0)
    check_recovered(url)
    assert journals() == []


def test_a_journal_that_is_taken_in_twice_changes_nothing(url: str, tmp_path: Path) -> None:
    journal = killed(url, tmp_path)
    content = journal.read_bytes()
    check_recovered(url)
    with LabelStore(url) as store:
        store.accept([stored(0, answer="B")])
    journal.write_bytes(content)
    with LabelStore(url) as store:
        assert len(store.recovered) == 1
        assert store.get_many([f"{0:064x}"])[f"{0:064x}"].answer == "B"
        store.accept([stored(0)])
        store.delete(rows=["nobody"])
    assert len(ledger(url)) == 5


@pytest.mark.parametrize("damage", ["cut", "changed", "nonsense"])
def test_a_damaged_line_costs_no_other(url: str, tmp_path: Path, damage: str) -> None:
    journal = killed(url, tmp_path)
    whole = journal.read_bytes()
    # A part of a line that is not whole, as of a process that was killed while it wrote.
    lines = {
        "cut": b'deadbeef ["answer",{"row":{"request_key":"0000000',
        "changed": whole.splitlines()[1].replace(b"mine", b"mime") + b"\n",
        "nonsense": b"\xff\x00[[[[[\n" + b"[" * 100_000,
    }
    journal.write_bytes(whole + lines[damage])
    check_recovered(url)
    (kept,) = journals()
    assert kept == journal.with_suffix(".unreadable")
    assert kept.read_bytes().rstrip(b"\n") == lines[damage].rstrip(b"\n")
    assert kept.stat().st_mode & 0o777 == 0o600


def test_a_cut_answer_is_a_call_that_was_lost(url: str, tmp_path: Path) -> None:
    journal = killed(url, tmp_path)
    lines = journal.read_bytes().splitlines(keepends=True)
    ends = [number for number, line in enumerate(lines) if b'["answer"' in line]
    journal.write_bytes(b"".join(lines[: ends[2]]) + lines[ends[2]][:-300])
    with LabelStore(url) as store:
        (recovered,) = store.recovered
    assert (recovered.answers, recovered.lost, recovered.unreadable) == (2, 3, 1)
    assert ledger(url)["call-2"] == ("lost", 900)


def test_a_journal_goes_into_no_other_database(url: str, tmp_path: Path) -> None:
    journal = killed(url, tmp_path)
    with LabelStore(f"sqlite:///{tmp_path / 'other.db'}") as other:
        assert other.recovered == []
    assert journal.exists()


def test_databases_that_have_had_one_address_are_told_apart(url: str, tmp_path: Path) -> None:
    """As those behind a tunnel that leads here today and there tomorrow."""
    journal = killed(url, tmp_path)
    for path in tmp_path.glob("labels.db*"):
        path.rename(tmp_path / f"first-{path.name}")
    with LabelStore(url) as second:
        assert second.recovered == []
        assert of_other_databases(second.database) == [journal]
        assert left_beside(second.database) == []
    for path in tmp_path.glob("first-*"):
        path.rename(tmp_path / path.name.removeprefix("first-"))
    check_recovered(url)


def test_a_copy_of_a_database_does_not_get_its_journals(url: str, tmp_path: Path) -> None:
    journal = killed(url, tmp_path)
    with sqlite3.connect(tmp_path / "labels.db") as database:
        database.execute(f"VACUUM INTO '{tmp_path / 'copy.db'}'")
    database.close()
    with LabelStore(f"sqlite:///{tmp_path / 'copy.db'}") as copy:
        assert copy.recovered == []
    assert journal.exists()


@pytest.mark.parametrize("had", ["no ids", "none"])
def test_a_journal_of_before_databases_had_ids_is_found(url: str, tmp_path: Path, had: str) -> None:
    journal = killed(url, tmp_path)
    with contextlib.closing(Database(url)) as database:
        today, *_ = prefixes_of(database)
        address = address_of(database.url)
    before = hash_of(address if had == "no ids" else [*address, "None"])
    assert journal.name.startswith(today)
    for path in journals():
        path.rename(path.with_name(path.name.replace(today, before)))
    check_recovered(url)
    assert journals() == []


def test_databases_are_told_apart_without_their_users_and_passwords() -> None:
    def hashed(url: str) -> str:
        return hash_of(address_of(make_url(url)))

    one = hashed("postgresql://me:secret@db.example/labels")
    assert one == hashed("postgresql://you@db.example/labels?sslpassword=secret")
    others = [
        "postgresql://me@db.example/other",
        "postgresql://me@db2.example/labels",
        "postgresql://me@db.example:5433/labels",
        "postgresql://me@/labels?host=/run/one",
        "postgresql://me@/labels?host=/run/two",
        "sqlite:////labels",
    ]
    assert len({one, *map(hashed, others)}) == 7


def test_the_journal_of_a_living_store_is_left_to_it(url: str) -> None:
    with LabelStore(url) as store:
        store.begin(entry(1))
        with LabelStore(url) as other:
            assert other.recovered == []
            assert examined(url) == []
        store.record(ended(1))
    assert ledger(url) == {"call-1": ("answer", 40)}


def test_a_database_that_fails_for_good_leaves_all_in_the_journal(url: str, tmp_path: Path) -> None:
    store = LabelStore(url)
    store.add(stored(0))
    store.flush()
    with sqlite3.connect(tmp_path / "labels.db") as other:
        other.execute("ALTER TABLE teacher_answers RENAME TO hidden")
    store.begin(entry(1))
    store.add(stored(1), ended(1))
    with pytest.raises(StoreError, match=r"1 answers are safe in \S+\.jsonl: the next run on this"):
        store.flush()
    with pytest.raises(StoreError, match=r"2 answers are safe in .*`distillery labels recover`"):
        store.add(stored(2))
    with pytest.raises(StoreError):
        store.begin(entry(3))
    with pytest.raises(StoreError):
        store.close()
    with sqlite3.connect(tmp_path / "labels.db") as other:
        other.execute("ALTER TABLE hidden RENAME TO teacher_answers")
    other.close()
    with LabelStore(url) as store:
        (recovered,) = store.recovered
        assert (recovered.answers, recovered.calls, recovered.lost) == (2, 1, 0)
        keys = [f"{number:064x}" for number in range(3)]
        assert store.get_many(keys) == {keys[number]: stored(number) for number in range(3)}


def test_a_journal_that_has_no_room_ends_the_asking(url: str) -> None:
    """The kernel refuses to let any file grow beyond 3 MB: the journal is the first."""
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    store, begun = LabelStore(url), 0
    resource.setrlimit(resource.RLIMIT_FSIZE, (3_000_000, limits[1]))
    try:
        refusal = ""
        while not refusal and begun < 10_000:
            try:
                store.begin(entry(begun))
            except StoreError as error:
                refusal = str(error)
            else:
                begun += 1
        assert "can't be written (File too large)" in refusal
        assert "and nothing more is asked" in refusal
        assert "\n" not in refusal
        with pytest.raises(StoreError, match="can't be written"):
            store.add(stored(0), ended(0))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    store.close()
    assert 1000 < begun < 10_000
    assert journals() == []
    assert len(ledger(url)) == begun
    with LabelStore(url) as store:
        assert store.get_many([f"{0:064x}"]) == {f"{0:064x}": stored(0)}


def test_a_folder_that_takes_no_journal_is_told_before_any_call(url: str, home: Path) -> None:
    home.mkdir()
    (home / "journals").write_text("a file")
    with (
        ChatEndpoint() as server,
        LabelStore(url) as store,
        pytest.raises(StoreError, match=r"DISTILLERY_HOME .*journals/.*: can't be written"),
    ):
        asyncio.run(
            label([example(1)], PROMPT, TeacherRecipe(), endpoint_of(server), store, home / "out")
        )
    assert server.calls == []


def numbered(call: Call) -> Reply:
    """A good answer whose number of tokens tells the call."""
    body = completion("ABC"[call.number % 3])
    usage = {"prompt_tokens": 40, "completion_tokens": 1 + call.number}
    return Reply({**body, "usage": usage}, delay=random.uniform(0, 0.02))


PARENT = """
import asyncio, os, sys, traceback
from pathlib import Path
import alembic.command, openai, psycopg
from pydantic import SecretStr
from distillery.labels.store import LabelStore
from distillery.labels.labelling import label
from distillery.recipe import PromptRecipe, TeacherRecipe
from distillery.records import Example
from distillery.teacher.endpoint import Endpoint
server, database, rows, out = sys.argv[1:]
with open(rows) as lines:
    examples = [Example.model_validate_json(line) for line in lines]
teacher = TeacherRecipe(concurrency=8)
for run in sys.stdin:
    child = os.fork()
    if child:
        print(child, flush=True)
        print(os.waitpid(child, 0)[1], flush=True)
        continue
    endpoint = Endpoint(server, "gpt-test", SecretStr(run.strip()), "gpt-test", "openai")
    try:
        with LabelStore(database) as store:
            asyncio.run(label(examples, PromptRecipe(), teacher, endpoint, store, Path(out)))
    except BaseException:
        traceback.print_exc()
        os._exit(1)
    os._exit(0)
"""


class Runs:
    """Labelling runs, each a process that may be killed; forked, so that they start at once."""

    def __init__(self, server: ChatEndpoint, url: str, folder: Path, rows: int) -> None:
        file = folder / "rows.jsonl"
        file.write_text("".join(example(number).model_dump_json() + "\n" for number in range(rows)))
        command = [sys.executable, "-c", PARENT, server.url, url, str(file), str(folder / "out")]
        self._parent = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )
        self._pid = 0

    def start(self, name: str) -> None:
        assert self._parent.stdin
        self._parent.stdin.write(f"{name}\n")
        self._parent.stdin.flush()
        self._pid = self._number()

    def kill(self) -> None:
        os.kill(self._pid, signal.SIGKILL)
        assert self._number() == signal.SIGKILL

    def wait(self) -> None:
        assert self._number() == 0

    def close(self) -> None:
        assert self._parent.stdin
        self._parent.stdin.close()
        self._parent.wait(30)

    def _number(self) -> int:
        assert self._parent.stdout
        return int(self._parent.stdout.readline())


@pytest.mark.slow
@pytest.mark.timeout(600)
@pytest.mark.parametrize("kind", ["sqlite", "postgresql"])
def test_killed_twenty_times_every_call_and_every_answer_is_there(
    kind: str, url: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What the endpoint did and what the database says are compared call by call: each answer's
    number of tokens is another.

    A call is lost where its process was killed while it was under way: before the endpoint got it,
    before it answered, or before the process had read the answer. It is an entry of its own then,
    and the row is asked again. With PostgreSQL, the server is away twice, for LABEL_OUTAGE_S
    seconds (5): a process is killed meanwhile, and the next one goes on five seconds later; another
    one waits until it is back."""
    outage_s = float(os.environ.get("LABEL_OUTAGE_S", "5"))
    monkeypatch.setenv("DISTILLERY_STORE_WAIT", str(outage_s + 115))
    server_of_labels = Postgres() if kind == "postgresql" else None
    if server_of_labels:
        server_of_labels.start()
        url = server_of_labels.url()
    chance, rows, kills = random.Random(7), 900, 20
    killed_at: list[float] = []
    with ChatEndpoint(numbered) as server:
        runs = Runs(server, url, tmp_path, rows)

        def answered_more(count: int) -> None:
            wanted = len(server.answered) + count
            wait_until(lambda: len(server.answered) >= wanted)

        for number in range(kills):
            runs.start(f"run-{number}")
            answered_more(chance.randint(1, 50))
            time.sleep(chance.uniform(0, 0.05))
            if server_of_labels and number in (6, 13):
                server_of_labels.stop()
                time.sleep(3)
                asked = len(server.calls)
                time.sleep(outage_s - 3)
                assert len(server.calls) == asked, "no call begins while the database is away"
                if number == 6:
                    runs.kill()
                    killed_at.append(time.monotonic())
                    runs.start("run-6-again")
                    time.sleep(5)
                    assert len(server.calls) == asked
                server_of_labels.start()
                answered_more(20)
            runs.kill()
            killed_at.append(time.monotonic())
        runs.start("last")
        runs.wait()
        runs.close()
    with LabelStore(url) as store:
        assert store.recovered == []
        check_call_by_call(url, store, server, killed_at, rows)
    assert journals() == []
    if server_of_labels:
        server_of_labels.__exit__()


def check_call_by_call(
    url: str, store: LabelStore, server: ChatEndpoint, killed_at: list[float], rows: int
) -> None:
    """Compare the database with what the endpoint did."""
    recipe, keys = TeacherRecipe(concurrency=8), dict[str, str]()
    for number in range(rows):
        messages = render_messages(example(number), PROMPT)
        keys[messages[-1]["content"]] = request_key("gpt-test", messages, recipe)
    answers = store.get_many(keys.values())
    assert len(answers) == rows
    engine = create_engine(checked_url(url, False))
    with engine.connect() as connection:
        query = "SELECT request_key, outcome, completion_tokens, is_counted FROM teacher_calls"
        entries = connection.execute(text(query)).all()
    engine.dispose()
    # Every answer in the database is that of one call of the endpoint, and in the ledger once.
    counted = {entry.completion_tokens - 1: entry for entry in entries if entry.is_counted}
    lost = Counter(entry.request_key for entry in entries if entry.outcome == "lost")
    assert len(counted) + lost.total() == len(entries)
    assert len(counted) == rows
    for number, found in counted.items():
        assert found.outcome == "answer"
        assert keys[server.calls[number].question] == found.request_key
        assert answers[found.request_key].completion_tokens == found.completion_tokens
    # Every other call of the endpoint is an entry of its own, and was under way at a kill.
    others = [call for call in server.calls if call.number not in counted]
    asked = Counter(keys[call.question] for call in others)
    assert all(lost[key] >= count for key, count in asked.items())
    assert max(Counter(call.key for call in others).values(), default=0) <= 8
    assert all(call.key != "last" for call in others)
    # An answer that was given and never read was given at a kill, or sent to what it had left.
    given: dict[str, list[float]] = {}
    for question, at in server.answered:
        given.setdefault(question, []).append(at)
    unread = [at for times in given.values() for at in sorted(times)[:-1]]
    assert all(any(abs(at - kill) < 5 for kill in killed_at) for at in unread)
    print(
        f"{len(server.calls)} calls in {len(killed_at) + 1} runs: {len(counted)} answers; "
        f"{lost.total()} calls lost, of which the endpoint got {len(others)} and answered "
        f"{len(unread)}"
    )
    assert lost.total() <= 8 * len(killed_at)


@pytest.mark.slow
def test_a_database_that_stays_away_ends_the_run_and_costs_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("DISTILLERY_STORE_WAIT", "2")
    rows = [example(number) for number in range(300)]
    with Postgres() as database, ChatEndpoint(numbered) as server:
        store, script, late = LabelStore(database.url()), server.script, list[bool]()
        recipe = TeacherRecipe(concurrency=8)

        def stops_it(call: Call) -> Reply:
            if call.number == 100:
                database.stop()
            late.append(store.is_away)
            return script(call)

        server.script = stops_it
        run = label(rows, PROMPT, recipe, endpoint_of(server), store, tmp_path / "out")
        with pytest.raises(StoreUnavailable, match=r"\d+ answers are safe in") as ended_by:
            asyncio.run(run)
        assert "\n" not in str(ended_by.value)
        with pytest.raises(StoreUnavailable):
            store.close()
        given = len(server.answered)
        assert given == len(server.calls) < 300
        assert sum(late) <= 8, (
            "only calls that were on their way come after the first failed commit"
        )
        server.script = script
        database.start()
        with LabelStore(database.url(), wait_s=30) as store:
            assert store.recovered[0].answers > 0
            counts = asyncio.run(
                label(rows, PROMPT, TeacherRecipe(), endpoint_of(server), store, tmp_path / "out")
            )
        assert counts.asked == 300 - given
        assert len(server.calls) == 300
    assert len(read_lines(tmp_path / "out" / "labels.jsonl")) == 300


async def test_the_beginning_of_a_call_is_written_before_it_is_made(
    url: str, tmp_path: Path
) -> None:
    begun: list[bool] = []

    def script(call: Call) -> Reply:
        (journal,) = journal_folder().glob("*.jsonl")
        begun.append(b'["begun"' in journal.read_bytes())
        return good(call)

    with ChatEndpoint(script) as server, LabelStore(url) as store:
        rows = [example(number) for number in range(5)]
        await label(rows, PROMPT, TeacherRecipe(), endpoint_of(server), store, tmp_path / "out")
    assert begun == [True] * 5


def rewritten(journal: Path, change: Callable[[str, dict[str, Any]], None]) -> None:
    """Change the values of each line of a journal, with checksums that fit again."""
    lines = []
    for line in journal.read_bytes().splitlines():
        kind, values = json.loads(line.partition(b" ")[2])
        change(kind, values)
        lines.append(line_of(kind, values))
    journal.write_bytes(b"".join(lines))


@pytest.mark.parametrize("damage", ["another column", "no value"])
def test_a_row_that_the_database_refuses_costs_no_other(
    url: str, tmp_path: Path, damage: str
) -> None:
    journal = killed(url, tmp_path)

    def spoil(kind: str, values: dict[str, Any]) -> None:
        if kind == "answer" and values["row"]["example_id"] == "row-1":
            row = values["row"]
            row.update({"colour": "red"} if damage == "another column" else {"raw": None})

    rewritten(journal, spoil)
    for _ in range(2):
        with LabelStore(url) as store:
            keys = [f"{number:064x}" for number in range(3)]
            assert set(store.get_many(keys)) == {keys[0], keys[2]}
    (kept,) = journals()
    assert kept == journal.with_suffix(".unreadable")
    assert b"row-1" in kept.read_bytes()
    assert kept.read_bytes().count(b"\n") == 1


def test_a_journal_of_another_form_stays(url: str, tmp_path: Path) -> None:
    journal = killed(url, tmp_path)
    rewritten(journal, lambda kind, values: values.update(form=2) if kind == "journal" else None)
    content = journal.read_bytes()
    with LabelStore(url) as store:
        (left,) = store.recovered
        assert "written by another version" in left.trouble
        store.add(stored(8))
    assert journal.read_bytes() == content
    assert left == examined(url)[0]


def test_a_journal_that_cannot_be_read_closes_no_store(url: str, tmp_path: Path) -> None:
    journal = killed(url, tmp_path)
    journal.unlink()
    journal.mkdir()
    with LabelStore(url) as store:
        assert "can't be used" in store.recovered[0].trouble
        store.add(stored(8))


def test_lines_may_end_as_on_windows(url: str, tmp_path: Path) -> None:
    journal = killed(url, tmp_path)
    journal.write_bytes(journal.read_bytes().replace(b"\n", b"\r\n"))
    check_recovered(url)
    assert journals() == []


def test_a_deleted_answer_does_not_come_back(url: str, tmp_path: Path) -> None:
    """More lines than SMALL are open, so that the file is not rewritten."""
    with contextlib.closing(Database(url)) as database:
        journal = Journal(database)
    row = {"row": {**stored(0)._asdict(), "created_at": datetime.now(UTC)}}
    first = journal.write("answer", {**row, "since": None, "call": None})
    for number in range(300):
        journal.write("begun", values_of(entry(number)))
    content = journal.path.read_bytes()
    journal.settle([first])
    assert journal.path.read_bytes().startswith(content), "it is still there"
    contents = read_journal(journal.path)
    assert (contents.items, len(contents.lost)) == ([], 300)
    journal.close()
    assert [path.suffix for path in journals()] == [".jsonl"]


def test_a_file_that_cannot_be_replaced_stays(url: str) -> None:
    with LabelStore(url) as store:
        store.begin(entry(1))
        (journal,) = journal_folder().glob("*.jsonl")
        # No file can be made under this name.
        beside = journal.with_suffix(".next")
        beside.mkdir()
        store.add(stored(1), ended(1))
        store.flush()
        assert b'"settled"' in journal.read_bytes()
        beside.rmdir()
        store.add(stored(2))
        store.flush()
        assert b"What comes after" not in journal.read_bytes()
    assert journals() == []


def test_a_journal_is_looked_at_by_one_process_at_a_time(url: str, tmp_path: Path) -> None:
    journal = killed(url, tmp_path)
    found: list[int] = []

    def look() -> None:
        with LabelStore(url) as store:
            found.append(len(store.get_many([f"{0:064x}"])))

    lock = FileLock(journal_folder().with_suffix(".lock"))
    other = threading.Thread(target=look)
    with lock:
        with if_abandoned(journal):
            other.start()
            time.sleep(0.5)
        assert found == []
    other.join(30)
    assert found == [1], "what another process had held meanwhile is taken in"


@pytest.mark.skipif(os.geteuid() != 0, reason="needs to mount a file system")
def test_a_full_disk_keeps_the_answers_of_calls_under_way(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Database and journal share a disk of 8 MB, which is full when the answers come."""
    disk = tmp_path / "disk"
    disk.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=8m", "none", str(disk)])
    if mounted.returncode:
        pytest.skip("may not mount a file system")
    try:
        monkeypatch.setenv("DISTILLERY_HOME", str(disk))
        url = f"sqlite:///{disk / 'labels.db'}"
        store = LabelStore(url)
        for number in range(64):
            store.begin(entry(number))
        filler = disk / "filler"
        with filler.open("wb", buffering=0) as file, contextlib.suppress(OSError):
            while file.write(bytes(512)):
                pass
        for number in range(64):
            with contextlib.suppress(StoreError):
                store.add(stored(number, raw="x" * 5000), ended(number))
        with pytest.raises(StoreError):
            store.begin(entry(64))
        # The database may have got room too, since the spare file is gone.
        with contextlib.suppress(StoreError):
            store.close()
        filler.unlink()
        with LabelStore(url) as store:
            keys = [f"{number:064x}" for number in range(64)]
            assert len(store.get_many(keys)) == 64
    finally:
        subprocess.run(["umount", "--lazy", str(disk)], check=True)


def test_a_slow_commit_is_an_outage(url: str, tmp_path: Path) -> None:
    """SQLite waits 30 s for another writer before it says so."""
    with LabelStore(url) as store:
        with locked(tmp_path / "labels.db"):
            store.add(stored(1))
            time.sleep(SLOW_COMMIT_S + 1)
            assert store.is_away
        store.flush()
        assert not store.is_away


def test_a_container_is_told_that_the_journal_vanishes(
    url: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = LabelStore(url)
    with sqlite3.connect(tmp_path / "labels.db") as other:
        other.execute("ALTER TABLE teacher_answers RENAME TO hidden")
    other.close()
    monkeypatch.setenv("DISTILLERY_CONTAINER", "1")
    store.add(stored(1))
    with pytest.raises(StoreError, match=r"1 answers are in .* and vanish with this container"):
        store.flush()
    with pytest.raises(StoreError):
        store.close()


def test_journals_that_deletion_does_not_reach_are_named(
    url: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The database may be the same one under another address."""
    journal = killed(url, tmp_path)
    monkeypatch.setenv("DISTILLERY_LABELS", f"sqlite:///{tmp_path / 'other.db'}")
    told = CliRunner().invoke(app, ["delete", "--rejected"]).output
    assert told.startswith("0 answers deleted\n")
    (line,) = [line for line in told.splitlines() if line.startswith(f"{journal}: ")]
    assert "may hold answers too" in line
    assert journal.exists()


def test_a_dry_run_of_recovery_upgrades_no_database(
    url: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("DISTILLERY_LABELS", url)
    told = CliRunner().invoke(app, ["recover", "--dry-run"])
    assert told.output == "0 answers would be taken in from 0 journals\n"
    assert not (tmp_path / "labels.db").exists()
    journal = killed(url, tmp_path)
    told = CliRunner().invoke(app, ["recover", "--dry-run"])
    assert "3 answers would be taken in from 1 journals" in told.output
    with sqlite3.connect(tmp_path / "labels.db") as database:
        database.execute("UPDATE distillery_version SET version_num = '0009'")
    database.close()
    before = (tmp_path / "labels.db").read_bytes()
    told = CliRunner().invoke(app, ["recover", "--dry-run"])
    assert "is of an older version of Distillery" in str(told.exception)
    assert (tmp_path / "labels.db").read_bytes() == before
    assert journal.exists()
