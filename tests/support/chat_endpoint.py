"""A chat-completions endpoint for tests: real HTTP/1.1 on 127.0.0.1, answering each request by a
script; with a certificate, over TLS.

with ChatEndpoint(good) as server:      # or a function Call -> Reply, or replies() for a list
    ... server.url, server.calls, server.most_in_flight
"""

import asyncio
import json
import math
import re
import socket
import ssl
import struct
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, Self

from azurite_server import Certificate

REASONS = {
    200: "OK",
    400: "Bad Request",
    401: "Unauthorized",
    404: "Not Found",
    410: "Gone",
    429: "Too Many Requests",
}


@dataclass(frozen=True)
class Call:
    """One request as it came: `number` counts from 0, `at` is time.monotonic()."""

    number: int
    path: str
    headers: dict[str, str]
    body: dict[str, Any]
    at: float

    @property
    def question(self) -> str:
        return str(self.body["messages"][-1]["content"]) if self.body else ""

    @property
    def key(self) -> str:
        return self.headers.get("authorization", "").removeprefix("Bearer ")


@dataclass(frozen=True)
class Reply:
    """What to answer: a JSON body (or raw text), once the event `wait` is set, if there is one, and
    `delay` seconds have passed.

    `drop` closes the connection instead, `reset` so that the other side gets an error. `half`
    breaks off in the middle of the body; `drip` sends it over so many seconds. `wait` is set by the
    script, which runs in the endpoint's own loop, or never.
    """

    body: Any = None
    status: int = 200
    headers: dict[str, str] = field(default_factory=dict)
    delay: float = 0.0
    wait: asyncio.Event | None = None
    drop: bool = False
    reset: bool = False
    half: bool = False
    drip: float = 0.0


Script = Callable[[Call], Reply]


Spelled = Sequence[tuple[bytes, dict[bytes, float]]]
"""The tokens of a written answer, each with the probabilities of its alternatives."""


def completion(
    text: str,
    *,
    top: dict[str, float] | None = None,
    tokens: Spelled = (),
    finish_reason: str = "stop",
) -> dict[str, Any]:
    """A completion's JSON. `top` holds probabilities: with them, each token of `text` (cut at
    blanks) lists them. `tokens`: those of a written answer, which list their own."""
    choice: dict[str, Any] = {
        "index": 0,
        "message": {"role": "assistant", "content": text, "refusal": None},
        "logprobs": None,
        "finish_reason": finish_reason,
    }
    if top is not None:
        pairs = [
            {"token": token, "logprob": math.log(p), "bytes": None} for token, p in top.items()
        ]
        words = text.split(" ")
        parts = [word if at == 0 else f" {word}" for at, word in enumerate(words)]
        choice["logprobs"] = {
            "content": [
                {"token": token, "logprob": -0.1, "bytes": None, "top_logprobs": pairs}
                for token in parts
            ],
            "refusal": None,
        }
    if tokens:
        entries = [spelled_entry(token, alternatives) for token, alternatives in tokens]
        choice["logprobs"] = {"content": entries, "refusal": None}
    return {
        "id": "chatcmpl-1",
        "object": "chat.completion",
        "created": 1,
        "model": "teacher-2026-01-01",
        "choices": [choice],
        "usage": {"prompt_tokens": 40, "completion_tokens": 1, "total_tokens": 41},
    }


def spelled_entry(token: bytes, alternatives: dict[bytes, float]) -> dict[str, Any]:
    """A token as OpenAI lists it: its text, which may be a part of a character, and its bytes."""
    listed = [
        {"token": text.decode("utf-8", "replace"), "logprob": math.log(p), "bytes": list(text)}
        for text, p in alternatives.items()
    ]
    named = {"token": token.decode("utf-8", "replace"), "bytes": list(token)}
    return {**named, "logprob": math.log(alternatives[token]), "top_logprobs": listed}


def said(text: str, **settings: Any) -> Reply:
    return Reply(completion(text, **settings))


def refused(status: int, message: str, *, code: str = "", param: str = "", **headers: str) -> Reply:
    """An error in OpenAI's form; `headers` with underscores for dashes."""
    body = {
        "error": {
            "message": message,
            "type": "invalid_request_error",
            "code": code or None,
            "param": param or None,
        }
    }
    return Reply(body, status, {name.replace("_", "-"): value for name, value in headers.items()})


def good(call: Call) -> Reply:
    """A letter that depends on the question alone, with log-probabilities where they are asked
    for."""
    letter = "ABC"[sum(call.question.encode()) % 3]
    top = {letter: 0.7, f" {letter}": 0.1, **{other: 0.08 for other in "ABC" if other != letter}}
    return said(letter, top=top if call.body.get("logprobs") else None)


def replies(first: Sequence[Reply], then: Script = good) -> Script:
    """Answers the first requests by the list, the rest by `then`."""
    return lambda call: first[call.number] if call.number < len(first) else then(call)


class ChatEndpoint:
    """`calls` are all requests so far, `answered` the (question, time.monotonic()) of those
    answered in full, and `billed` their usage, where the answer counts it."""

    def __init__(self, script: Script = good, certificate: Certificate | None = None) -> None:
        self.script = script
        self.certificate = certificate
        self.calls: list[Call] = []
        self.answered: list[tuple[str, float]] = []
        self.billed: list[dict[str, Any]] = []
        self.most_in_flight = 0
        self._in_flight = 0

    def __enter__(self) -> Self:
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, daemon=True)
        self._thread.start()
        self._server = asyncio.run_coroutine_threadsafe(self._start(), self._loop).result()
        host, self.port = self._server.sockets[0].getsockname()[:2]
        self.url = f"{'https' if self.certificate else 'http'}://{host}:{self.port}/v1"
        return self

    def __exit__(self, *error: object) -> None:
        asyncio.run_coroutine_threadsafe(self._stop(), self._loop).result()
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._loop.close()

    async def _start(self) -> asyncio.Server:
        context = None
        if self.certificate:
            context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
            context.load_cert_chain(self.certificate.cert, self.certificate.key)
        return await asyncio.start_server(self._serve, "127.0.0.1", 0, ssl=context)

    async def _stop(self) -> None:
        self._server.close()
        connections = [task for task in asyncio.all_tasks() if task is not asyncio.current_task()]
        for task in connections:
            task.cancel()
        await asyncio.gather(*connections, return_exceptions=True)

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            while True:
                call = await self._read(reader)
                self._in_flight += 1
                self.most_in_flight = max(self.most_in_flight, self._in_flight)
                try:
                    kept = await self._answer(call, writer)
                finally:
                    self._in_flight -= 1
                if not kept:
                    return
        except (ConnectionError, asyncio.IncompleteReadError, asyncio.CancelledError):
            return
        finally:
            writer.close()

    async def _read(self, reader: asyncio.StreamReader) -> Call:
        head = (await reader.readuntil(b"\r\n\r\n")).decode("latin-1")
        request, *lines = head.strip().split("\r\n")
        headers = {
            name.lower(): value.strip()
            for name, _, value in (line.partition(":") for line in lines)
        }
        body = await reader.readexactly(int(headers.get("content-length", 0)))
        call = Call(
            len(self.calls),
            request.split()[1],
            headers,
            json.loads(body or b"{}"),
            time.monotonic(),
        )
        self.calls.append(call)
        return call

    async def _answer(self, call: Call, writer: asyncio.StreamWriter) -> bool:
        reply = self.script(call)
        if reply.wait:
            await reply.wait.wait()
        await asyncio.sleep(reply.delay)
        if reply.reset:
            # Closed with time 0 to linger: TCP sends RST, not FIN.
            writer.get_extra_info("socket").setsockopt(
                socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0)
            )
            writer.transport.abort()
        if reply.drop or reply.reset:
            return False
        text = reply.body if isinstance(reply.body, str) else json.dumps(reply.body)
        kind = "text/html" if isinstance(reply.body, str) else "application/json"
        headers = {"Content-Type": kind, "Content-Length": str(len(text.encode())), **reply.headers}
        head = f"HTTP/1.1 {reply.status} {REASONS.get(reply.status, 'Error')}\r\n"
        lines = "".join(f"{name}: {value}\r\n" for name, value in headers.items())
        sent = f"{head}{lines}\r\n{text}".encode()
        sent = sent[: -len(text) // 2] if reply.half else sent
        size = len(sent) // 20 + 1 if reply.drip else len(sent)
        for at in range(0, len(sent), size):
            writer.write(sent[at : at + size])
            await writer.drain()
            await asyncio.sleep(reply.drip * size / len(sent))
        if reply.half:
            return False
        if reply.status == 200:
            self.answered.append((call.question, time.monotonic()))
            if isinstance(reply.body, dict) and reply.body.get("usage"):
                self.billed.append(reply.body["usage"])
        return True


def shorter(call: Call) -> Reply:
    """Prefer the shorter of two texts, as a judge."""
    shown = re.findall(r"\[Answer [AB]\]\n(.*?)\n\[The end", call.question, re.DOTALL)
    first, second = map(len, shown)
    return said("C" if first == second else "A" if first < second else "B")
