"""A chat-completions endpoint that answers some time after it was asked, for so many calls at a
time: `python -m benchmarks.slow_endpoint [LATENCY_S PLACES SPREAD]`, by default 0.2, 64 and 0.
Latencies are evenly spread over LATENCY_S * (1 - SPREAD) to LATENCY_S * (1 + SPREAD).

Its first line of output is its URL. A call that finds every place taken waits for one. GET /count
tells how many calls came, and the CPU seconds that they took. It ends when its standard input, a
pipe or a terminal, does.
"""

import asyncio
import json
import math
import os
import subprocess
import sys
import time
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache
from http import HTTPStatus
from pathlib import Path
from random import Random
from typing import Any
from zlib import crc32

LETTERS = "ABC"
_ALTERNATIVES = 20


class Places:
    """Calls under way and calls that wait. An answer is sent about `latency` seconds after its call
    got a place."""

    def __init__(self, latency: float, places: int, spread: float) -> None:
        self._least, self._most, self._free = latency * (1 - spread), latency * (1 + spread), places
        self._random = Random(0)
        self._waiting: deque[Callable[[], None]] = deque()
        self.calls = 0

    def take(self, answer: Callable[[], None]) -> None:
        self.calls += 1
        if self._free:
            self._free -= 1
            self._start(answer)
        else:
            self._waiting.append(answer)

    def _start(self, answer: Callable[[], None]) -> None:
        asyncio.get_running_loop().call_later(
            self._random.uniform(self._least, self._most), self._end, answer
        )

    def _end(self, answer: Callable[[], None]) -> None:
        answer()
        if self._waiting:
            self._start(self._waiting.popleft())
        else:
            self._free += 1


class Connection(asyncio.Protocol):
    """HTTP/1.1 as the SDKs speak it: kept alive, with Content-Length. No framework, whose CPU time
    the contestants on a small machine would share."""

    def __init__(self, places: Places) -> None:
        self._places = places
        self._received = b""

    def connection_made(self, transport: Any) -> None:
        self._transport = transport

    def data_received(self, data: bytes) -> None:
        self._received += data
        while (end := self._received.find(b"\r\n\r\n")) >= 0:
            head = self._received[:end].lower()
            _, found, after = head.partition(b"\r\ncontent-length:")
            whole = end + 4 + (int(after.split(b"\r\n", 1)[0]) if found else 0)
            if len(self._received) < whole:
                return
            body, self._received = self._received[end + 4 : whole], self._received[whole:]
            self._heed(head, body)

    def _heed(self, head: bytes, body: bytes) -> None:
        if head.startswith(b"get /count "):
            self._transport.write(
                response({"calls": self._places.calls, "cpu_s": time.process_time()})
            )
        else:
            answer = completion(body)
            self._places.take(lambda: self._transport.write(answer))


def completion(body: bytes) -> bytes:
    """The response: a letter that depends on the question alone."""
    asked = json.loads(body)
    messages = asked.get("messages")
    question = str(messages[-1]["content"]) if messages else ""
    return _completion(
        LETTERS[crc32(question.encode()) % len(LETTERS)], bool(asked.get("logprobs"))
    )


@cache
def _completion(letter: str, log_probabilities: bool) -> bytes:
    choice: dict[str, Any] = {
        "index": 0,
        "message": {"role": "assistant", "content": letter, "refusal": None},
        "finish_reason": "stop",
        "logprobs": None,
    }
    if log_probabilities:
        others = [other for other in LETTERS if other != letter]
        tokens = [
            letter,
            *others,
            *(f"t{number}" for number in range(_ALTERNATIVES - len(LETTERS))),
        ]
        top = [_token(token, math.log(0.7) - 2.0 * place) for place, token in enumerate(tokens)]
        choice["logprobs"] = {"content": [top[0] | {"top_logprobs": top}], "refusal": None}
    return response(
        {
            "id": "chatcmpl-1",
            "object": "chat.completion",
            "created": 1,
            "model": "teacher-2026-01-01",
            "choices": [choice],
            "usage": {
                "prompt_tokens": 90,
                "completion_tokens": 1,
                "total_tokens": 91,
                "prompt_tokens_details": {"cached_tokens": 0},
            },
        }
    )


def _token(token: str, logprob: float) -> dict[str, Any]:
    return {"token": token, "logprob": logprob, "bytes": list(token.encode())}


def response(value: Any, status: int = 200) -> bytes:
    body = json.dumps(value).encode()
    lines = [
        f"HTTP/1.1 {status} {HTTPStatus(status).phrase}",
        "Content-Type: application/json",
        f"Content-Length: {len(body)}",
    ]
    return "\r\n".join([*lines, "", ""]).encode() + body


async def serve(latency: float = 0.2, places: float = 64, spread: float = 0.0) -> None:
    shared = Places(latency, int(places), spread)
    server = await asyncio.get_running_loop().create_server(
        lambda: Connection(shared), "127.0.0.1", 0, backlog=1024
    )
    await until_stdin_ends(server)


async def until_stdin_ends(server: asyncio.Server) -> None:
    """Print the server's address, and return when standard input ends."""
    loop, ended = asyncio.get_running_loop(), asyncio.Event()
    print(f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}/v1", flush=True)

    def read_stdin() -> None:
        if not os.read(sys.stdin.fileno(), 65536):
            ended.set()

    loop.add_reader(sys.stdin, read_stdin)
    await ended.wait()


@contextmanager
def serving(module: str, *arguments: str) -> Iterator[str]:
    """Run a module that serves until its standard input ends, for as long as the block; yield the
    URL that it prints first. Raises RuntimeError if it prints none."""
    with subprocess.Popen(
        [sys.executable, "-m", module, *arguments],
        cwd=Path(__file__).resolve().parents[1],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    ) as process:
        assert process.stdin
        assert process.stdout
        try:
            url = process.stdout.readline().strip()
            if not url:
                raise RuntimeError(f"{module}: ended before it served; its error is above")
            yield url
        finally:
            process.stdin.close()


if __name__ == "__main__":
    asyncio.run(serve(*map(float, sys.argv[1:])))
