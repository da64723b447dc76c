"""The load that benchmarks/serving.py makes, on a tiny model. Nothing is timed."""

import asyncio
import random
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from own_server import OwnServer, own_server, wait_until

from benchmarks.serving import (
    CONTESTS,
    USERS,
    Load,
    answer,
    any_request,
    leave_early,
    percentiles,
    ratio_min,
    session,
)
from distillery.serving.requests import ChatRequest
from distillery.serving.student import ServedStudent

MESSAGES: Any = [{"role": "user", "content": "Where is bread warm?"}]


@pytest.fixture(scope="module")
def running(tiny_onnx: Callable[..., Path]) -> Iterator[OwnServer]:
    with own_server(ServedStudent(tiny_onnx("llama"), threads=1)) as started:
        yield started


def asked(running: OwnServer, bodies: list[dict[str, Any]]) -> Load:
    """What users find who ask all of it at once."""
    load = Load()

    async def ask() -> None:
        async with session() as http:
            url = f"{running.url}/v1/chat/completions"
            await asyncio.gather(*(answer(http, url, body, load) for body in bodies))

    asyncio.run(ask())
    return load


def test_answers_and_their_tokens_are_counted(running: OwnServer) -> None:
    choice, generation = ({"messages": MESSAGES, **body} for body in CONTESTS.values())
    load = asked(running, [choice] * 3)
    assert (len(load.answer_s), load.tokens, load.first_s, load.errors) == (3, 3, [], 0)
    load = asked(running, [generation] * 2)
    assert (len(load.answer_s), len(load.first_s), load.errors) == (2, 2, 0)
    assert load.tokens > 2
    assert all(first < whole for first, whole in zip(load.first_s, load.answer_s, strict=True))


def test_what_is_no_answer_is_an_error(running: OwnServer, tiny_onnx: Callable[..., Path]) -> None:
    class Failing(ServedStudent):
        def steps(self, *arguments: Any, **settings: Any) -> Any:
            yield from list(super().steps(*arguments, **settings))[:3]
            raise ValueError("no")

    assert asked(running, [{"messages": MESSAGES, "max_tokens": 0}]).errors == 1
    generation = {"messages": MESSAGES, **CONTESTS["generation"]}
    with own_server(Failing(tiny_onnx("llama"), threads=1)) as failing:
        load = asked(failing, [generation])
    assert (load.errors, load.answer_s) == (1, [])
    assert asked(failing, [generation]).errors == 1


def test_clients_that_leave_keep_nothing(running: OwnServer) -> None:
    async def leave() -> None:
        async with session() as http:
            body = {"messages": MESSAGES, "max_tokens": 900}
            await leave_early(http, f"{running.url}/v1/chat/completions", body, 0.02)

    asyncio.run(leave())
    assert wait_until(lambda: running.server.places == 0)


def test_the_soak_asks_what_the_server_takes() -> None:
    draw = random.Random(0)
    kinds = [ChatRequest.model_validate(any_request(draw, [MESSAGES])) for _ in range(200)]
    assert {request.limit == 1 for request in kinds} == {True, False}
    assert {bool(request.stream) for request in kinds} == {True, False}
    assert any(request.stop for request in kinds)
    assert any(request.response_format for request in kinds)


def test_the_worst_load_decides() -> None:
    table: dict[str, Any] = {}
    for users in USERS:
        rate = 30.0 if users == 8 else 50.0
        table[str(users)] = {"ours": {"tokens_s": rate}, "llama_cpp": {"tokens_s": 20.0}}
    assert ratio_min(table, "tokens_s") == 1.5
    assert ratio_min(None, "tokens_s") is None


def test_percentiles_are_of_what_was_seen() -> None:
    seconds = [number / 100 for number in range(100, 0, -1)]
    assert percentiles(seconds) == {"p50": 0.51, "p95": 0.96, "p99": 1.0}
    assert percentiles([0.5]) == {"p50": 0.5, "p95": 0.5, "p99": 0.5}
