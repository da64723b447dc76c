"""A student behind OpenAI's chat-completions API, for any OpenAI or azure-ai-inference client.

    python -m distillery.serving FOLDER --name support-mood          # the key, if any, in DISTILLERY_SERVER_KEY

POST /v1/chat/completions, GET /v1/models, GET /healthz; the same without /v1, for azure-ai-inference. The messages go
through the model's own chat template just as they are. Requests are answered one at a time by one worker thread, and
each takes only the passes it needs: one for max_tokens 1. Sampling is greedy where no temperature is given, and
log-probabilities are those of temperature 1. With vLLM's `structured_outputs: {"choice": [TEXT, ...]}` the answer is
the likeliest of these texts, as a student with prompt.answer: text chooses it.
"""

import argparse
import asyncio
import json
import logging
import math
import os
import secrets
import select
import socket
import subprocess
import sys
import tempfile
import threading
import time
import uuid
from collections.abc import AsyncIterator, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Annotated, Any, Literal

import numpy as np
from fastapi import FastAPI, Request, Response
from fastapi.responses import JSONResponse, StreamingResponse
from pydantic import BaseModel, ConfigDict, Field, SecretStr, ValidationError
from starlette.exceptions import HTTPException

from distillery.errors import CredentialsError, DistilleryError, ModelError
from distillery.inference import Logits, OnnxStudent, log_softmax
from distillery.processes import end_with
from distillery.settings import is_loopback, load_environment

KEY_VARIABLE = "DISTILLERY_SERVER_KEY"
LARGEST_BODY = 4 << 20
_START_SECONDS = 300.0
_STOP_SECONDS = 5.0
_log = logging.getLogger(__name__)


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid")


class TextPart(_Strict):
    type: Literal["text"]
    text: str


class ChatMessage(_Strict):
    role: Literal["system", "user", "assistant"]
    content: str | list[TextPart]
    name: str | None = None

    @property
    def text(self) -> str:
        return self.content if isinstance(self.content, str) else "".join(part.text for part in self.content)


class TextFormat(_Strict):
    type: Literal["text"]


class StructuredOutputs(_Strict):
    """vLLM's; of its forms, a choice among texts."""

    choice: Annotated[list[Annotated[str, Field(min_length=1)]], Field(min_length=1, max_length=64)]


class StreamOptions(BaseModel):
    include_usage: bool = False


_Stop = Annotated[str, Field(min_length=1)]


class ChatRequest(_Strict):
    """What this server understands of OpenAI's request; anything else is refused by name rather than passed over.
    Fields that only describe the caller are taken and not used."""

    messages: list[ChatMessage] = Field(min_length=1)
    model: str | None = None
    max_tokens: int | None = Field(None, ge=1)
    max_completion_tokens: int | None = Field(None, ge=1)
    temperature: float | None = Field(None, ge=0, le=2)
    top_p: float | None = Field(None, gt=0, le=1)
    seed: int | None = Field(None, ge=0)
    stop: _Stop | Annotated[list[_Stop], Field(max_length=4)] | None = None
    logprobs: bool | None = None
    top_logprobs: int | None = Field(None, ge=0, le=20)
    n: Literal[1] | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    response_format: TextFormat | None = None
    structured_outputs: StructuredOutputs | None = None
    frequency_penalty: Literal[0] | None = None
    presence_penalty: Literal[0] | None = None
    user: Any = None
    metadata: Any = None
    store: Any = None

    @property
    def limit(self) -> int | None:
        return self.max_completion_tokens or self.max_tokens

    @property
    def stops(self) -> list[str]:
        return [self.stop] if isinstance(self.stop, str) else self.stop or []


class ApiError(Exception):
    """An error in OpenAI's form."""

    def __init__(self, status: int, message: str, code: str | None = None, param: str | None = None) -> None:
        super().__init__(message)
        self.status = status
        kind = "server_error" if status >= 500 else "invalid_request_error"
        self.body = {"error": {"message": message, "type": kind, "param": param, "code": code}}

    @property
    def response(self) -> JSONResponse:
        headers = {"WWW-Authenticate": "Bearer"} if self.status == 401 else None
        return JSONResponse(self.body, self.status, headers)


@dataclass
class Piece:
    """A part of an answer: text that is settled, and the log-probabilities of the tokens taken since the last part."""

    text: str
    logprobs: list[dict[str, Any]]
    finish_reason: str | None = None


@dataclass
class Job:
    """One request on its way through the worker thread. `cancelled`: the client has gone."""

    request: ChatRequest
    prompt_tokens: int = 0
    completion_tokens: int = 0
    cancelled: threading.Event = field(default_factory=threading.Event)

    @property
    def usage(self) -> dict[str, int]:
        prompt, completion = self.prompt_tokens, self.completion_tokens
        return {"prompt_tokens": prompt, "completion_tokens": completion, "total_tokens": prompt + completion}


def complete(student: OnnxStudent, job: Job) -> Iterator[Piece]:
    """The answer in pieces; the last one has the finish reason. Text that may be the start of a stop text is held back.

    Raises ApiError where the messages leave no room in the context."""
    request = job.request
    prompt = student.tokenizer.encode_chat([{"role": m.role, "content": m.text} for m in request.messages])
    job.prompt_tokens = len(prompt)
    room = student.context_length - len(prompt)
    if room < 1:
        raise ApiError(
            400,
            f"This model's maximum context length is {student.context_length} tokens; the messages have {len(prompt)}.",
            code="context_length_exceeded",
            param="messages",
        )
    if request.structured_outputs:
        yield _chosen(student, job, prompt, request.structured_outputs.choice)
        return
    steps = student.steps(
        prompt,
        min(request.limit or room, room),
        temperature=request.temperature or 0.0,
        top_p=request.top_p or 1.0,
        seed=request.seed,
    )
    stream = student.text_stream()
    held, entries, reason = "", [], "length"
    for token, logits in steps:
        if token in student.end_ids:
            reason = "stop"
            break
        job.completion_tokens += 1
        held += stream.decode(token)
        if request.logprobs:
            entries.append(_token_logprobs(student, token, logits, request.top_logprobs or 0))
        end, settled = _stop_at(held, request.stops)
        if end is not None:
            held, reason = held[:end], "stop"
            break
        if settled:
            yield Piece(held[:settled], entries)
            held, entries = held[settled:], []
    yield Piece(held, entries, reason)


def _chosen(student: OnnxStudent, job: Job, prompt: list[int], choice: list[str]) -> Piece:
    """The likeliest text as the whole answer. Its log-probabilities are those among the texts, an entry in all."""
    texts = [student.tokenizer.encode_text(text) for text in choice]
    if len(prompt) + max(map(len, texts)) > student.context_length:
        raise ApiError(400, "The messages and a choice are longer than the context.", "context_length_exceeded")
    probabilities = student.text_probabilities(prompt, texts)
    order = sorted(range(len(choice)), key=lambda i: -probabilities[i])
    job.completion_tokens = len(texts[order[0]])
    entries = [
        {
            "token": choice[i],
            "logprob": _number(math.log(probabilities[i] or math.nan)),
            "bytes": list(choice[i].encode()),
        }
        for i in order
    ]
    top = entries[: job.request.top_logprobs or 0]
    return Piece(choice[order[0]], [{**entries[0], "top_logprobs": top}] if job.request.logprobs else [], "stop")


def _stop_at(text: str, stops: list[str]) -> tuple[int | None, int]:
    """Where the first stop text begins, if one is there; how many characters can't belong to one that is to come."""
    found = [at for at in (text.find(stop) for stop in stops) if at >= 0]
    partial = [n for stop in stops for n in range(1, len(stop)) if text.endswith(stop[:n])]
    return min(found, default=None), len(text) - max(partial, default=0)


def _token_logprobs(student: OnnxStudent, token: int, logits: Logits, top: int) -> dict[str, Any]:
    """One entry of choices[].logprobs.content."""
    logprobs = log_softmax(logits)
    best: list[int] = []
    if top:
        some = np.argpartition(-logprobs, min(top, len(logprobs) - 1))[:top]
        best = some[np.argsort(-logprobs[some], kind="stable")].tolist()
    return {
        **_named(student, token, float(logprobs[token])),
        "top_logprobs": [_named(student, other, float(logprobs[other])) for other in best],
    }


def _named(student: OnnxStudent, token: int, logprob: float) -> dict[str, Any]:
    text = student.token_text(token)
    in_full = "\ufffd" not in text
    return {"token": text, "logprob": _number(logprob), "bytes": list(text.encode()) if in_full else None}


def _number(logprob: float) -> float:
    """JSON knows no infinity; OpenAI writes -9999 for what is all but impossible."""
    return logprob if math.isfinite(logprob) else -9999.0


class _Server:
    """The routes' state: the student, its one worker thread, the name and the key."""

    def __init__(self, student: OnnxStudent, model_name: str, api_key: SecretStr | None) -> None:
        self.student = student
        self.name = model_name
        self.key = api_key.get_secret_value().encode() if api_key else b""
        self.created = int(time.time())
        self.worker = ThreadPoolExecutor(max_workers=1, thread_name_prefix="student")

    def authorise(self, request: Request) -> None:
        given = request.headers.get("api-key") or request.headers.get("authorization", "").removeprefix("Bearer ")
        if self.key and not secrets.compare_digest(given.encode(), self.key):
            raise ApiError(401, "Incorrect API key provided.", code="invalid_api_key")

    async def models(self, request: Request) -> Response:
        self.authorise(request)
        return JSONResponse({"object": "list", "data": [self.model]})

    async def one_model(self, request: Request) -> Response:
        self.authorise(request)
        self.check_model(request.path_params["name"])
        return JSONResponse(self.model)

    @property
    def model(self) -> dict[str, Any]:
        return {"id": self.name, "object": "model", "created": self.created, "owned_by": "distillery"}

    def check_model(self, name: str | None) -> None:
        if name not in (None, self.name):
            message = f"The model {name!r} does not exist; this server has {self.name!r}."
            raise ApiError(404, message, code="model_not_found", param="model")

    async def chat(self, request: Request) -> Response:
        self.authorise(request)
        chat = _parse(await _body(request))
        self.check_model(chat.model)
        job = Job(chat)
        head = {"id": f"chatcmpl-{uuid.uuid4().hex}", "created": int(time.time()), "model": self.name}
        if chat.stream:
            pieces = self.stream(job)
            # The first piece is awaited here, so that an error still has its status code.
            first = await anext(pieces)
            return StreamingResponse(_events(first, pieces, job, head), media_type="text/event-stream")
        return JSONResponse(_completion(await self.collect(job, request), job, head))

    async def collect(self, job: Job, request: Request) -> list[Piece]:
        """The whole answer; given up between two tokens when the client has gone."""
        done = asyncio.get_running_loop().run_in_executor(self.worker, self.work, job)
        try:
            while not (await asyncio.wait([done], timeout=1.0))[0]:
                if await request.is_disconnected():
                    job.cancelled.set()
            return await done
        finally:
            job.cancelled.set()

    def work(self, job: Job) -> list[Piece]:
        pieces = []
        for piece in complete(self.student, job) if not job.cancelled.is_set() else ():
            pieces.append(piece)
            if job.cancelled.is_set():
                break
        return pieces

    async def stream(self, job: Job) -> AsyncIterator[Piece]:
        """The answer's pieces as the worker thread makes them."""
        loop = asyncio.get_running_loop()
        queue: asyncio.Queue[Piece | BaseException] = asyncio.Queue()

        def produce() -> None:
            try:
                for piece in complete(self.student, job) if not job.cancelled.is_set() else ():
                    loop.call_soon_threadsafe(queue.put_nowait, piece)
                    if job.cancelled.is_set():
                        return
            except Exception as error:
                # Whatever it is: the request waits for it.
                loop.call_soon_threadsafe(queue.put_nowait, error)

        self.worker.submit(produce)
        while True:
            piece = await queue.get()
            if isinstance(piece, BaseException):
                raise piece
            yield piece
            if piece.finish_reason:
                return


async def _body(request: Request) -> bytes:
    body = bytearray()
    async for part in request.stream():
        body += part
        if len(body) > LARGEST_BODY:
            raise ApiError(400, f"The request is larger than {LARGEST_BODY} bytes.", code="request_too_large")
    return bytes(body)


def _parse(body: bytes) -> ChatRequest:
    try:
        request = ChatRequest.model_validate_json(body)
    except ValidationError as error:
        detail = error.errors(include_url=False, include_input=False)[0]
        param = ".".join(str(part) for part in detail["loc"]) or None
        message = "not supported by this server" if detail["type"] == "extra_forbidden" else detail["msg"]
        raise ApiError(400, f"{param or 'body'}: {message}", param=param) from error
    if request.top_logprobs is not None and not request.logprobs:
        raise ApiError(400, "top_logprobs: needs logprobs: true", param="top_logprobs")
    return request


def _completion(pieces: list[Piece], job: Job, head: dict[str, Any]) -> dict[str, Any]:
    choice = {
        "index": 0,
        "message": {"role": "assistant", "content": "".join(piece.text for piece in pieces), "refusal": None},
        "logprobs": _logprobs(job, [entry for piece in pieces for entry in piece.logprobs]),
        "finish_reason": pieces[-1].finish_reason if pieces else "stop",
    }
    return {**head, "object": "chat.completion", "choices": [choice], "usage": job.usage}


def _logprobs(job: Job, entries: list[dict[str, Any]]) -> dict[str, Any] | None:
    return {"content": entries, "refusal": None} if job.request.logprobs else None


async def _events(first: Piece, rest: AsyncIterator[Piece], job: Job, head: dict[str, Any]) -> AsyncIterator[str]:
    """The answer as server-sent events."""
    usage = bool(job.request.stream_options and job.request.stream_options.include_usage)

    def event(choices: list[dict[str, Any]], **more: Any) -> str:
        chunk = {**head, "object": "chat.completion.chunk", "choices": choices, **more}
        return f"data: {json.dumps(chunk, separators=(',', ':'))}\n\n"

    def delta(content: dict[str, Any], reason: str | None = None, logprobs: Any = None) -> str:
        return event([{"index": 0, "delta": content, "logprobs": logprobs, "finish_reason": reason}])

    try:
        yield delta({"role": "assistant", "content": ""})
        piece = first
        while True:
            if piece.text or piece.logprobs:
                yield delta({"content": piece.text}, logprobs=_logprobs(job, piece.logprobs))
            if piece.finish_reason:
                break
            piece = await anext(rest)
        yield delta({}, piece.finish_reason)
        if usage:
            yield event([], usage=job.usage)
        yield "data: [DONE]\n\n"
    except Exception as error:
        _log.warning("an answer broke off", exc_info=error)
        yield f"data: {json.dumps(_api_error(error).body)}\n\n"
    finally:
        job.cancelled.set()


def create_app(student: OnnxStudent, model_name: str, api_key: SecretStr | None) -> FastAPI:
    """The server's application; without a key it answers anyone who reaches it."""
    server = _Server(student, model_name, api_key)

    @asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        yield
        server.worker.shutdown(wait=False, cancel_futures=True)

    app = FastAPI(docs_url=None, redoc_url=None, openapi_url=None, lifespan=lifespan)
    for prefix in ("", "/v1"):
        app.add_route(f"{prefix}/chat/completions", server.chat, methods=["POST"])
        app.add_route(f"{prefix}/models", server.models, methods=["GET"])
        app.add_route(f"{prefix}/models/{{name:path}}", server.one_model, methods=["GET"])
    app.add_route("/healthz", _healthy, methods=["GET"])
    app.add_exception_handler(ApiError, _answer_error)
    app.add_exception_handler(DistilleryError, _answer_error)
    app.add_exception_handler(HTTPException, _answer_error)
    app.add_exception_handler(Exception, _answer_error)
    return app


async def _healthy(_: Request) -> Response:
    return JSONResponse({"status": "ok"})


async def _answer_error(_: Request, error: Exception) -> Response:
    return _api_error(error).response


def _api_error(error: Exception) -> ApiError:
    if isinstance(error, ApiError):
        return error
    if isinstance(error, HTTPException):
        return ApiError(error.status_code, str(error.detail))
    if isinstance(error, DistilleryError):
        return ApiError(500, str(error))
    # What a library says is for the server's log.
    return ApiError(500, f"The server failed ({type(error).__name__}).")


def serve(
    folder: Path,
    model_name: str,
    host: str = "127.0.0.1",
    port: int = 8080,
    api_key: SecretStr | None = None,
    *,
    threads: int | None = None,
    parent: int | None = None,
) -> None:
    """Serves until a signal ends it; prints its URL as one JSON line first. Port 0 takes a free one. With `parent`, a
    process id, it also ends when that process does.

    Raises CredentialsError for an address that others can reach without a key; ModelError for a bad folder or port."""
    import uvicorn

    if not is_loopback(host) and not (api_key and api_key.get_secret_value()):
        raise CredentialsError(f"--host {host}: other machines reach it, so set {KEY_VARIABLE}, or use 127.0.0.1")
    if parent is not None:
        end_with(parent)
    app = create_app(OnnxStudent(folder, threads), model_name, api_key)
    with _bound(host, port) as bound:
        address, taken = bound.getsockname()[:2]
        place = f"[{address}]" if ":" in address else address
        print(json.dumps({"url": f"http://{place}:{taken}/v1", "model": model_name}), flush=True)
        config = uvicorn.Config(app, log_level="warning", access_log=False, timeout_graceful_shutdown=2)
        uvicorn.Server(config).run(sockets=[bound])


def _bound(host: str, port: int) -> socket.socket:
    try:
        family = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0][0]
        bound = socket.create_server((host, port), family=family, backlog=2048)
    except (OSError, OverflowError) as error:
        raise ModelError(f"--host {host} --port {port}: can't be had ({error}); take others") from error
    # Inherited by each connection; without it an answer's second packet waits 40 ms for the client's delayed ACK.
    bound.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    return bound


@dataclass(frozen=True)
class Served:
    """A running server: `url` ends in /v1, `key` opens it."""

    url: str
    key: SecretStr
    process: subprocess.Popen[bytes]


@contextmanager
def served(folder: Path, model_name: str, threads: int | None = None) -> Iterator[Served]:
    """A server of `folder` in a process of its own on 127.0.0.1, gone afterwards whatever happens, even to us.

    Raises ModelError where it doesn't start."""
    key = secrets.token_urlsafe(32)
    command = [sys.executable, "-m", "distillery.serving", str(folder), "--name", model_name]
    command += ["--port", "0", "--parent", str(os.getpid())]
    command += [] if threads is None else ["--threads", str(threads)]
    with tempfile.TemporaryFile() as log:
        process = subprocess.Popen(  # noqa: S603 - our own interpreter and module
            command,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=log,
            env=os.environ | {KEY_VARIABLE: key},
        )
        try:
            yield Served(_wait_until_ready(process, folder, log), SecretStr(key), process)
        finally:
            _stop(process)


def _wait_until_ready(process: subprocess.Popen[bytes], folder: Path, log: IO[bytes]) -> str:
    import httpx

    assert process.stdout is not None  # noqa: S101 - it is a pipe
    ready, _, _ = select.select([process.stdout], [], [], _START_SECONDS)
    line = process.stdout.readline() if ready else b""
    if not line:
        log.seek(0)
        last = log.read().decode(errors="replace").strip().rpartition("\n")[2]
        raise ModelError(last or f"{folder}: its server does not start within {_START_SECONDS:.0f} s")
    url = str(json.loads(line)["url"])
    try:
        # No proxy from the environment: this is our own machine.
        with httpx.Client(trust_env=False, timeout=_START_SECONDS) as client:
            client.get(url.removesuffix("/v1") + "/healthz").raise_for_status()
    except httpx.HTTPError as error:
        raise ModelError(f"{folder}: its server at {url} does not answer ({type(error).__name__})") from error
    return url


def _stop(process: subprocess.Popen[bytes]) -> None:
    process.terminate()
    try:
        process.wait(_STOP_SECONDS)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()
    if process.stdout:
        process.stdout.close()


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m distillery.serving", description="Serve a model folder.")
    parser.add_argument("folder", type=Path)
    parser.add_argument("--name", required=True, help="the model's name in requests")
    parser.add_argument("--host", default="127.0.0.1")
    parser.add_argument("--port", type=int, default=8080)
    parser.add_argument("--threads", type=int, help="cores for one operation")
    parser.add_argument("--parent", type=int, help="end with this process")
    options = parser.parse_args()
    load_environment()
    key = os.environ.get(KEY_VARIABLE, "")
    try:
        serve(
            options.folder,
            options.name,
            options.host,
            options.port,
            SecretStr(key) if key else None,
            threads=options.threads,
            parent=options.parent,
        )
    except DistilleryError as error:
        sys.exit(str(error))


if __name__ == "__main__":
    main()
