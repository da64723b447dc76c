"""Counts what a run really does, in all of its processes, and changes how long it takes: Python
imports it when this folder is on PYTHONPATH.

Into the file that COUNT_FILE names goes one line for each optimiser step ("step", by PyTorch's own
hook for all optimisers), each chat completion that is asked for over HTTP ("request", where the
openai SDK's httpx2 sends it) and each process that serves a model ("serve", by the audit event of
subprocess.Popen), and the key of each shard whose answers are kept ("answer-shard-..."). Lines
this short are appended whole. Files COUNT_FILE.step, COUNT_FILE.request and COUNT_FILE.row (of a
shard) hold seconds that each of these takes longer, while they are there, and COUNT_FILE.stub the
seconds that a row of a shard takes with a stub in place of the student. RETRY_SECONDS is the time
between the tries of a stage, which is ten seconds and then a minute otherwise; LEASE_SECONDS is how
long the lease of a dead process lasts.
"""

import asyncio
import os
import sys
import time
from typing import Any

_hooked: set[str] = set()


def count(what: str) -> None:
    with open(os.environ["COUNT_FILE"], "a") as file:
        file.write(f"{what}\n")


def watch(event: str, arguments: tuple[Any, ...]) -> None:
    """An audit hook: Python calls it for every event, so the modules are hooked as soon as they are
    there."""
    if event == "subprocess.Popen" and "distillery.serving" in map(str, arguments[1]):
        count("serve")
    elif event == "import":
        hook("torch.optim.optimizer", "register_optimizer_step_post_hook", count_steps)
        hook("httpx2", "AsyncClient", count_requests)
        hook("tasks.stage", "RETRIES", hasten)
        hook("distillery.inference.shards", "answer_shard", slow_rows)
        hook("tasks.shards", "sharded", stub_rows)
        hook("tasks.results", "DistilleryStore", count_shards)
        hook("distillery.storage.leases", "Leases", shorten)


def hook(module: str, name: str, by: Any) -> None:
    found = getattr(sys.modules.get(module), name, None)
    if found is not None and module not in _hooked:
        _hooked.add(module)
        by(found)


def delay(what: str) -> float:
    try:
        with open(f"{os.environ['COUNT_FILE']}.{what}") as file:
            return float(file.read())
    except FileNotFoundError:
        return 0.0


def count_steps(register: Any) -> None:
    def counted(_optimiser: Any, _arguments: Any, _keywords: Any) -> None:
        count("step")
        time.sleep(delay("step"))

    register(counted)


def count_requests(client: Any) -> None:
    send = client.send

    async def counted(self: Any, request: Any, **options: Any) -> Any:
        if request.url.path.endswith("/chat/completions"):
            count("request")
            await asyncio.sleep(delay("request"))
        return await send(self, request, **options)

    client.send = counted


def slow_rows(answer: Any) -> None:
    def slowly(student: Any, shard: Any, *arguments: Any) -> Any:
        *others, progress = arguments

        def told(done: int) -> None:
            time.sleep(delay("row"))
            progress(done)

        return answer(student, shard, *others, told)

    sys.modules["distillery.inference.shards"].answer_shard = slowly  # type: ignore[attr-defined]


def stub_rows(sharded: Any) -> None:
    """`sharded` is distillery.inference.shards."""
    answer_each = sharded.answer_each

    def answered(student: Any, rows: Any, prompt: Any) -> Any:
        seconds = delay("stub")
        if not seconds:
            yield from answer_each(student, rows, prompt)
            return
        started = time.monotonic()
        for number, row in enumerate(rows, 1):
            # By the clock, so that what a sleep takes longer is not summed up.
            time.sleep(max(0.0, started + number * seconds - time.monotonic()))
            yield sharded.Prediction(
                line=row.line, example_id=row.example_id, answer="A", probabilities={"A": 1.0}
            )

    sharded.answer_each = answered


def count_shards(store: Any) -> None:
    write = store.write_path

    def counted(self: Any, path: str, content: bytes, _sync: bool = True) -> None:
        write(self, path, content)
        if path.startswith("answer-shard-"):
            count(path)

    store.write_path = counted


def hasten(retries: Any) -> None:
    """Change the list itself, which all stages share."""
    if "RETRY_SECONDS" in os.environ:
        delays = retries["retry_delay_seconds"]
        delays[:] = [float(os.environ["RETRY_SECONDS"])] * len(delays)


def shorten(leases: Any) -> None:
    if "LEASE_SECONDS" in os.environ:
        leases.__init__.__defaults__ = (None, float(os.environ["LEASE_SECONDS"]))


if "COUNT_FILE" in os.environ:
    sys.addaudithook(watch)
