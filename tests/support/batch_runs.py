"""Runs that ask in batches against a BatchEndpoint, in this process and in one of their own."""

import sqlite3
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from batch_endpoint import BatchEndpoint
from label_runs import KEY, PROMPT
from pydantic import SecretStr

from distillery.labels.batch_run import Share, ask_in_batches
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


RUN = """
import asyncio, sys
from pathlib import Path
from batch_runs import asked_in_batches
from distillery.recipe import TeacherRecipe
from distillery.records import Example
from types import SimpleNamespace
address, url, rows, teacher = sys.argv[1:]
examples = [Example.model_validate_json(line) for line in Path(rows).read_text().splitlines()]
service = SimpleNamespace(url=address)
asyncio.run(
    asked_in_batches(service, url, examples, TeacherRecipe.model_validate_json(teacher))
)
"""


def batch_process(
    service: BatchEndpoint, url: str, folder: Path, rows: Sequence[Example], teacher: TeacherRecipe
) -> subprocess.Popen[bytes]:
    """Start a process that asks as `asked_in_batches` does, and may be killed."""
    file = folder / "rows.jsonl"
    file.write_text("".join(row.model_dump_json() + "\n" for row in rows))
    settings = [service.url, url, str(file), teacher.model_dump_json()]
    return subprocess.Popen([sys.executable, "-c", RUN, *settings], stderr=subprocess.PIPE)


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
    return 100 * sum(call["cost"] for call in calls)


def left_in_book(url: str) -> tuple[int, int]:
    """Return the batches that are not collected, and the requests in batches."""
    batches = rows_of(url, "SELECT 1 FROM teacher_batches WHERE state != 'collected'")
    lines = rows_of(url, "SELECT 1 FROM teacher_batch_lines WHERE batch_id != ''")
    return len(batches), len(lines)
