"""Labelling runs against a ChatEndpoint, in this process and in one of their own."""

import json
import sqlite3
import subprocess
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from chat_endpoint import ChatEndpoint
from pydantic import SecretStr

from distillery.labels.files import LabelCounts
from distillery.labels.labelling import Progress, label
from distillery.labels.store import LabelStore
from distillery.recipe import PromptRecipe, TeacherRecipe
from distillery.records import Example
from distillery.teacher.endpoint import Endpoint, Sdk
from distillery.teacher.ledger import Payer

KEY = "key-7f3a-very-secret"
PROMPT = PromptRecipe()
FILES = ("labels.jsonl", "rejected.jsonl", "train_data.jsonl")


def example(number: int, **values: Any) -> Example:
    """Return a row with three options whose question names its number."""
    row = Example(
        example_id=f"row-{number}",
        question=f"What comes after {number}? “é”",
        choices=("one", "two", "three"),
        answer_key="A",
    )
    return row.model_copy(update=values)


def endpoint_of(server: ChatEndpoint, sdk: Sdk = "openai", identity: str = "gpt-test") -> Endpoint:
    """Return the server as an endpoint of the model gpt-test, opened by KEY."""
    return Endpoint(server.url, "gpt-test", SecretStr(KEY), identity, sdk)


async def labelled(
    server: ChatEndpoint,
    url: str,
    out: Path,
    rows: int | Iterable[Example] = 20,
    sdk: Sdk = "openai",
    progress: Progress | None = None,
    **recipe: Any,
) -> LabelCounts:
    """Label these rows, or as many examples, with the label store at `url`.

    `recipe` holds settings of the teacher; outages of 30 s are waited out if it says nothing else.
    """
    examples = [example(number) for number in range(rows)] if isinstance(rows, int) else rows
    teacher = TeacherRecipe(**{"outage_s": 30} | recipe)
    with LabelStore(url) as store:
        return await label(
            examples, PROMPT, teacher, endpoint_of(server, sdk), store, out, progress
        )


def read_lines(path: Path) -> list[dict[str, Any]]:
    """Return the values of a file of JSON lines."""
    return [json.loads(line) for line in path.read_text().splitlines()]


def read_all(out: Path) -> list[bytes]:
    """Return the bytes of each of FILES."""
    return [(out / name).read_bytes() for name in FILES]


def stored_keys(database: Path) -> set[str]:
    """Return the keys of all answers that are committed at this moment."""
    connection = sqlite3.connect(database, timeout=60)
    rows = connection.execute("SELECT request_key FROM teacher_answers").fetchall()
    connection.close()
    return {key for (key,) in rows}


RUN = """
import asyncio, sys
from pathlib import Path
from pydantic import SecretStr
from distillery.labels.store import LabelStore
from distillery.labels.labelling import label
from distillery.recipe import PromptRecipe, TeacherRecipe
from distillery.records import Example
from distillery.teacher.endpoint import Endpoint
from distillery.teacher.ledger import Payer
server, key, database, rows, out, recipe, run, name = sys.argv[1:]
with open(rows) as lines:
    examples = [Example.model_validate_json(line) for line in lines]
endpoint = Endpoint(server, "gpt-test", SecretStr(key), "gpt-test", "openai")
teacher = TeacherRecipe.model_validate_json(recipe)
with LabelStore(database) as store:
    payer = Payer(run, name)
    asyncio.run(label(examples, PromptRecipe(), teacher, endpoint, store, Path(out), payer=payer))
"""


def run_process(
    server: ChatEndpoint,
    url: str,
    out: Path,
    examples: Sequence[Example],
    recipe: TeacherRecipe,
    key: str = KEY,
    payer: Payer | None = None,
    first: str = "",
    stderr: int | None = subprocess.PIPE,
) -> subprocess.Popen[bytes]:
    """Start a process that labels `examples` as `labelled` does, on behalf of `payer`, and may be
    killed. It runs the code `first` before. Where nobody reads its error, pass
    None as `stderr`: a full pipe holds it up."""
    rows = out.with_name(f"{out.name}.rows")
    rows.write_text("".join(row.model_dump_json() + "\n" for row in examples))
    payer = payer or Payer()
    settings = [server.url, key, url, str(rows), str(out), recipe.model_dump_json()]
    settings += [payer.run, payer.recipe]
    return subprocess.Popen([sys.executable, "-c", first + RUN, *settings], stderr=stderr)
