"""A stand-in of OpenAI's Batch API for tests: real HTTP on 127.0.0.1, with files, batches and chat
completions. What becomes of each batch and of each of its lines is the test's to say.

with BatchEndpoint(lambda number: Plan(looks=2)) as service:
    ... service.url, service.batches, service.answered
"""

import json
import os
import random
import re
import signal
import threading
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any, Literal, Self
from urllib.parse import parse_qs, urlsplit

from chat_endpoint import Call, Script, good

Fate = Literal["answer", "twice", "garbled", "missing", "filtered", "overloaded", "refused"]
"""What becomes of a line: an answer, two lines with an answer, half of a line with one, no line at
all, or an error."""

ERRORS: dict[Fate, tuple[int, str, str]] = {
    "filtered": (400, "content_filter", "the prompt was filtered"),
    "overloaded": (429, "rate_limit_exceeded", "too many requests"),
    "refused": (400, "invalid_request", "no such parameter"),
}


@dataclass(frozen=True)
class Plan:
    """What becomes of a batch. `looks`: how often it is seen under way before it ends. `answers`:
    how many of its lines are answered before it expires or is cancelled. `code` and `error`: why it
    failed."""

    status: Literal["completed", "failed", "expired", "cancelled"] = "completed"
    looks: int = 1
    fate: Callable[[str, int], Fate] = lambda _question, _number: "answer"
    answers: int | None = None
    code: str = "token_limit_exceeded"
    error: str = "Enqueued token limit reached"


@dataclass
class StoredFile:
    """A file that the service has."""

    file_id: str
    name: str
    content: bytes
    created_at: int = field(default_factory=lambda: int(time.time()))

    def as_json(self) -> dict[str, Any]:
        return {
            "id": self.file_id,
            "object": "file",
            "bytes": len(self.content),
            "created_at": self.created_at,
            "filename": self.name,
            "purpose": "batch",
            "status": "processed",
        }


@dataclass
class ServedBatch:
    """A batch that the service has."""

    batch_id: str
    request: dict[str, Any]
    plan: Plan
    status: str = "validating"
    looks: int = 0
    output: str | None = None
    errors: str | None = None
    counts: dict[str, int] = field(default_factory=dict)
    ended_at: dict[str, int] = field(default_factory=dict)
    created_at: int = field(default_factory=lambda: int(time.time()))

    def as_json(self) -> dict[str, Any]:
        failed = None
        if self.status == "failed":
            error = {"code": self.plan.code, "message": self.plan.error, "line": None}
            failed = {"object": "list", "data": [error]}
        return {
            "id": self.batch_id,
            "object": "batch",
            "endpoint": self.request["endpoint"],
            "input_file_id": self.request["input_file_id"],
            "completion_window": self.request["completion_window"],
            "metadata": self.request.get("metadata"),
            "status": self.status,
            "errors": failed,
            "output_file_id": self.output,
            "error_file_id": self.errors,
            "created_at": self.created_at,
            **self.ended_at,
            "request_counts": self.counts or {"total": 0, "completed": 0, "failed": 0},
        }


class BatchEndpoint:
    """`requests` are all HTTP requests so far, as "POST /files". `sent` counts the lines of all
    batches, `answered` those that were answered (and are billed), `asked` the direct questions,
    each by question. `kill`: the number of a request at which `victim` is killed, before or after
    the service has done what it asks. `lost`: the numbers of requests whose responses are lost.
    `failing`: the status that requests of these numbers get, which do nothing. `before`: called
    with each request before it is answered. `pending`: how often a file is looked at before it is
    processed; `unreadable`: whether it never can be. `unlisted`: how many lists show nothing of
    what is there; `oldest_first`: their order."""

    def __init__(
        self, plan: Callable[[int], Plan] = lambda _number: Plan(), script: Script = good
    ) -> None:
        self.plan, self.script = plan, script
        self.requests: list[str] = []
        self.files: dict[str, StoredFile] = {}
        self.batches: dict[str, ServedBatch] = {}
        self.sent: Counter[str] = Counter()
        self.answered: Counter[str] = Counter()
        self.asked: Counter[str] = Counter()
        self.kill: tuple[int, Literal["before", "after"]] | None = None
        self.victim = self.made = self.pending = 0
        self.unlisted = 0
        self.unreadable = self.oldest_first = False
        self.lost: set[int] = set()
        self.failing: dict[int, int] = {}
        self.before: Callable[[str], None] = lambda _request: None
        self.lock = threading.RLock()

    def __enter__(self) -> Self:
        service = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def do_GET(self) -> None:
                service.handle(self)

            do_POST = do_DELETE = do_GET

            def log_message(self, *_: object) -> None:
                return

        class Server(ThreadingHTTPServer):
            def handle_error(self, *_: object) -> None:
                """A client that is killed closes no connection."""

        self._server = Server(("127.0.0.1", 0), Handler)
        self._server.daemon_threads = True
        self._thread = threading.Thread(target=self._server.serve_forever, args=(0.05,))
        self._thread.start()
        self.url = f"http://127.0.0.1:{self._server.server_port}/v1"
        return self

    def __exit__(self, *error: object) -> None:
        self._server.shutdown()
        self._thread.join()
        self._server.server_close()

    def handle(self, request: BaseHTTPRequestHandler) -> None:
        """Answer one request."""
        body = request.rfile.read(int(request.headers.get("content-length", 0)))
        parts = urlsplit(request.path)
        path = parts.path.removeprefix("/v1")
        with self.lock:
            number = len(self.requests)
            self.requests.append(f"{request.command} {re.sub(r'(file|batch)-[0-9]+', 'ID', path)}")
            if self.kill == (number, "before"):
                os.kill(self.victim, signal.SIGKILL)
                return
            self.before(self.requests[number])
            if number in self.failing:
                status, reply = self.failing[number], {"error": {"message": "try again later"}}
            else:
                status, reply = self.reply(request, path, parse_qs(parts.query), body)
            if self.kill == (number, "after"):
                os.kill(self.victim, signal.SIGKILL)
                return
            if number in self.lost:
                request.close_connection = True
                return
        content = reply if isinstance(reply, bytes) else json.dumps(reply).encode()
        kind = "application/octet-stream" if isinstance(reply, bytes) else "application/json"
        request.send_response(status)
        request.send_header("Content-Type", kind)
        request.send_header("Content-Length", str(len(content)))
        request.end_headers()
        request.wfile.write(content)

    def reply(
        self,
        request: BaseHTTPRequestHandler,
        path: str,
        query: dict[str, list[str]],
        body: bytes,
    ) -> tuple[int, Any]:
        """Return a request's status and JSON, or bytes."""
        if request.command == "POST" and path == "/files":
            name, content = uploaded(request.headers["content-type"], body)
            file = self.keep(name, content)
            return 200, file.as_json()
        if request.command == "POST" and path == "/batches":
            return 200, self.make_batch(json.loads(body)).as_json()
        if request.command == "POST" and path == "/chat/completions":
            asked = json.loads(body)
            self.asked[question_of(asked)] += 1
            reply = self.script(Call(len(self.requests), path, {}, asked, time.monotonic()))
            return reply.status, reply.body
        found = re.fullmatch(r"/(files|batches)(?:/([^/]+)(/content|/cancel)?)?", path)
        if not found:
            return 404, {"error": {"message": f"no {path}"}}
        kept: dict[str, Any] = self.files if found[1] == "files" else self.batches
        if found[2] is None:
            listed = [entry.as_json() for entry in kept.values()]
            if self.unlisted:
                self.unlisted -= 1
                listed = []
            return 200, page_of(listed if self.oldest_first else listed[::-1], query)
        if found[2] not in kept:
            return 404, {"error": {"message": f"no such object: {found[2]}"}}
        if request.command == "DELETE":
            del kept[found[2]]
            return 200, {"id": found[2], "object": "file", "deleted": True}
        if found[3] == "/cancel":
            kept[found[2]].status = "cancelled"
            return 200, kept[found[2]].as_json()
        if found[3]:
            return 200, self.files[found[2]].content
        if found[1] == "batches":
            self.go_on(kept[found[2]])
        told = kept[found[2]].as_json()
        if found[1] == "files" and self.pending:
            self.pending -= 1
            told["status"] = "pending"
        elif found[1] == "files" and self.unreadable:
            told["status"] = "error"
        return 200, told

    def keep(self, name: str, content: bytes) -> StoredFile:
        """Keep a file."""
        self.made += 1
        file = StoredFile(f"file-{self.made}", name, content)
        self.files[file.file_id] = file
        return file

    def make_batch(self, request: dict[str, Any]) -> ServedBatch:
        """Make a batch of an uploaded file."""
        number = len(self.batches)
        batch = ServedBatch(f"batch-{number + 1}", request, self.plan(number))
        self.batches[batch.batch_id] = batch
        return batch

    def go_on(self, batch: ServedBatch) -> None:
        """Let a batch go on to its end, one step at each look."""
        batch.looks += 1
        if batch.status not in ("validating", "in_progress"):
            return
        if batch.looks <= batch.plan.looks:
            batch.status = "in_progress"
            return
        batch.status = batch.plan.status
        batch.ended_at = {f"{batch.status}_at": int(time.time())}
        if batch.status != "failed":
            self.answer(batch)

    def answer(self, batch: ServedBatch) -> None:
        """Write a batch's output and error files, in another order than that of its requests."""
        lines = self.files[batch.request["input_file_id"]].content.splitlines()
        out: list[dict[str, Any]] = []
        bad: list[dict[str, Any]] = []
        garbled = b""
        most = len(lines) if batch.plan.answers is None else batch.plan.answers
        for number, line in enumerate(map(json.loads, lines)):
            question = question_of(line["body"])
            fate = batch.plan.fate(question, self.sent[question])
            self.sent[question] += 1
            told = {"id": f"batch_req_{number}", "custom_id": line["custom_id"], "error": None}
            if number >= most:
                error = {"code": "batch_expired", "message": "not executed before the batch ended"}
                bad.append({**told, "response": None, "error": error})
            elif fate in ("answer", "twice", "garbled"):
                self.answered[question] += 1
                call = Call(number, line["url"], {}, line["body"], time.monotonic())
                response = {"status_code": 200, "request_id": "", "body": self.script(call).body}
                answered = [{**told, "response": response}]
                if fate == "garbled":
                    garbled += jsonl(answered)[:-99] + b"\n"
                else:
                    out += answered * (2 if fate == "twice" else 1)
            elif fate != "missing":
                status, code, message = ERRORS[fate]
                answer = {"error": {"code": code, "message": message}}
                bad.append({**told, "response": {"status_code": status, "body": answer}})
        random.Random(batch.batch_id).shuffle(out)
        batch.counts = {"total": len(lines), "completed": len(out), "failed": len(bad)}
        if out or garbled:
            batch.output = self.keep("output.jsonl", garbled + jsonl(out)).file_id
        if bad:
            batch.errors = self.keep("errors.jsonl", jsonl(bad)).file_id


def jsonl(lines: list[dict[str, Any]]) -> bytes:
    return b"".join(json.dumps(line).encode() + b"\n" for line in lines)


def question_of(body: dict[str, Any]) -> str:
    return str(body["messages"][-1]["content"])


def uploaded(content_type: str, body: bytes) -> tuple[str, bytes]:
    """Return the name and the content of the file in a form."""
    boundary = content_type.partition("boundary=")[2].strip('"').encode()
    for part in body.split(b"--" + boundary):
        head, _, content = part.partition(b"\r\n\r\n")
        name = re.search(rb'filename="([^"]*)"', head)
        if name:
            return name[1].decode(), content.removesuffix(b"\r\n")
    raise ValueError("no file in the form")


def page_of(entries: list[dict[str, Any]], query: dict[str, list[str]]) -> dict[str, Any]:
    """Return one page of a list, from the entry behind `after` on."""
    after, limit = query.get("after", [""])[0], int(query.get("limit", ["20"])[0])
    ids = [entry["id"] for entry in entries]
    start = ids.index(after) + 1 if after in ids else 0
    page = entries[start : start + limit]
    return {"object": "list", "data": page, "has_more": start + limit < len(entries)}
