"""Runs that ask in batches against a BatchEndpoint, in this process and in one of their own."""

import json
import os
import sqlite3
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, Self

from batch_endpoint import BatchEndpoint
from label_runs import KEY, PROMPT
from pydantic import SecretStr

from distillery.labels.batch_files import Share
from distillery.labels.batch_run import ask_in_batches
from distillery.labels.files import LabelCounts
from distillery.labels.labelling import label
from distillery.labels.store import LabelStore
from distillery.recipe import TeacherRecipe
from distillery.records import Example
from distillery.teacher.endpoint import Endpoint
from distillery.teacher.ledger import Payer

PRICES = {"input": 2.0, "output": 8.0}

BATCH = {"poll_s": 0.02, "wait_s": 30, "direct_below": 0}

LEASE_S = 1.2
"""So long a killed process keeps its batches from others."""


def batch_teacher(batch: dict[str, Any] | None = None, **settings: Any) -> TeacherRecipe:
    """Return a teacher that is asked in batches, and looked at often."""
    asked = {"batch": BATCH | (batch or {}), "prices": PRICES, "attempts": 3} | settings
    return TeacherRecipe.model_validate(asked)


def batch_endpoint_of(service: BatchEndpoint) -> Endpoint:
    """Return the stand-in as an endpoint of the model gpt-test."""
    return Endpoint(service.url, "gpt-test", SecretStr(KEY), "gpt-test", "openai")


async def asked_in_batches(
    service: BatchEndpoint,
    url: str,
    rows: Sequence[Example],
    teacher: TeacherRecipe,
    payer: Payer | None = None,
) -> None:
    """Ask these rows in batches, with the label store at `url`."""
    share = Share(lambda: rows, teacher, "label")
    with LabelStore(url) as store:
        await ask_in_batches(
            [share],
            PROMPT,
            batch_endpoint_of(service),
            store,
            payer=payer,
            lease_s=LEASE_S,
        )


NURSERY = """
import asyncio, json, os, signal, sys
from types import SimpleNamespace
from batch_runs import asked_in_batches
from distillery.labels.batch_book import BatchBook
from distillery.recipe import TeacherRecipe
from distillery.records import Example
import openai, alembic.command
for line in sys.stdin:
    given = json.loads(line)
    if pid := os.fork():
        print(pid, flush=True)
        print(os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]), flush=True)
        continue
    sys.stdin.readline()
    if given["die"]:
        name, when = given["die"]
        method = getattr(BatchBook, name)
        def dying(*arguments, **settings):
            if when == "after":
                method(*arguments, **settings)
            os.kill(os.getpid(), signal.SIGKILL)
        setattr(BatchBook, name, dying)
    rows = [Example.model_validate(row) for row in given["rows"]]
    teacher = TeacherRecipe.model_validate(given["teacher"])
    service = SimpleNamespace(url=given["address"])
    try:
        asyncio.run(asked_in_batches(service, given["url"], rows, teacher))
    finally:
        os._exit(0)
"""


class Nursery:
    """A process that has imported all that a run needs, and starts runs as its children, which may
    be killed."""

    def __enter__(self) -> Self:
        self._process = subprocess.Popen(
            [sys.executable, "-c", NURSERY],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            env=os.environ | {"PYTHONPATH": str(Path(__file__).parent)},
            text=True,
        )
        return self

    def __exit__(self, *error: object) -> None:
        self._process.communicate()

    def begin(
        self,
        service: BatchEndpoint,
        url: str,
        rows: Sequence[Example],
        teacher: TeacherRecipe,
        die: tuple[str, str] | None = None,
    ) -> int:
        """Begin to ask these rows as `asked_in_batches` does, and return the run's process id.
        `die`: the method of BatchBook before or after which it kills itself."""
        given = {
            "address": service.url,
            "url": url,
            "rows": [row.model_dump() for row in rows],
            "teacher": teacher.model_dump(),
            "die": die,
        }
        self._write(json.dumps(given))
        service.victim = int(self._read())
        self._write("go")
        return service.victim

    def end(self) -> int:
        """Return the exit status of the run, negative for a signal, once it has ended."""
        return int(self._read())

    def _write(self, line: str) -> None:
        assert self._process.stdin is not None
        self._process.stdin.write(line + "\n")
        self._process.stdin.flush()

    def _read(self) -> str:
        assert self._process.stdout is not None
        return self._process.stdout.readline()


async def labelled_in_batches(
    service: BatchEndpoint,
    url: str,
    rows: Sequence[Example],
    teacher: TeacherRecipe,
    payer: Payer | None = None,
) -> LabelCounts:
    """Ask these rows in batches, and directly what is left then; return what came of it."""
    await asked_in_batches(service, url, rows, teacher, payer)
    with TemporaryDirectory() as folder, LabelStore(url) as store:
        endpoint = batch_endpoint_of(service)
        return await label(
            rows, PROMPT, teacher, endpoint, store, Path(folder) / "out", payer=payer
        )


def rows_of(url: str, query: str) -> list[dict[str, Any]]:
    """Return the rows of a query to the SQLite database at `url`."""
    connection = sqlite3.connect(url.removeprefix("sqlite:///"), timeout=60)
    connection.row_factory = sqlite3.Row
    found = [dict(row) for row in connection.execute(query)]
    connection.close()
    return found


def calls_in(url: str) -> list[dict[str, Any]]:
    """Return the ledger's entries, as they were written."""
    return rows_of(url, "SELECT * FROM teacher_calls ORDER BY rowid")


def cents(calls: Sequence[dict[str, Any]]) -> float:
    """Return what calls cost, in hundredths of the currency."""
    return 100 * float(sum(call["cost"] for call in calls))


def left_in_book(url: str) -> tuple[int, int]:
    """Return the batches that are not collected, and the requests in batches."""
    batches = rows_of(url, "SELECT 1 FROM teacher_batches WHERE state != 'collected'")
    lines = rows_of(url, "SELECT 1 FROM teacher_batch_lines WHERE batch_id != ''")
    return len(batches), len(lines)
