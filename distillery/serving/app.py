"""The server's routes: POST /v1/chat/completions, GET /v1/models, /openapi.json and /healthz.

All of them are there without /v1 too, for azure-ai-inference. Answers are built from the openai
package's own types.
"""

import asyncio
import json
import logging
import secrets
import time
import uuid
from collections.abc import AsyncIterator, Callable, Collection
from contextlib import asynccontextmanager
from threading import Lock
from typing import Any, Literal

from fastapi import FastAPI, Request, Response
from fastapi.responses import JSONResponse, StreamingResponse
from openai.types import Model
from openai.types.chat import (
    ChatCompletion,
    ChatCompletionChunk,
    ChatCompletionMessage,
    ChatCompletionTokenLogprob,
)
from openai.types.chat.chat_completion import Choice, ChoiceLogprobs
from openai.types.chat.chat_completion_chunk import Choice as ChunkChoice
from openai.types.chat.chat_completion_chunk import ChoiceDelta
from openai.types.chat.chat_completion_chunk import ChoiceLogprobs as ChunkLogprobs
from pydantic import BaseModel, SecretStr
from starlette.exceptions import HTTPException

from distillery.errors import AnswerStopped
from distillery.serving.completion import Job, Piece, answer_pieces
from distillery.serving.hosts import HostCheck
from distillery.serving.limits import MOST_BODY_BYTES, Limits, retry_after
from distillery.serving.openapi import openapi_document
from distillery.serving.requests import ApiError, Bodies, check_content_type, parse_request
from distillery.serving.student import ServedStudent

_log = logging.getLogger(__name__)

Told = Callable[[Piece], None]

GIVEN_UP = Piece("", [], "stop")
"""Stands for the answer that nobody waits for any more."""


class ModelServer:
    """The routes and what they share: the student, the model's name, the key and the limits.

    The student is not thread-safe: only the one thread of its `worker` uses it, so requests are
    answered one at a time. The event loop stays free for everything else, save while ONNX Runtime
    GenAI computes a pass of generated text, or weights are loaded: both let no other thread run.
    """

    def __init__(
        self,
        student: ServedStudent,
        model_name: str,
        api_key: SecretStr | None,
        limits: Limits,
        shared_prefix: bool,
    ) -> None:
        self.student = student
        self.name = model_name
        self.key = api_key.get_secret_value().encode() if api_key else b""
        self.limits = limits
        self.shared_prefix = shared_prefix
        self.model = Model(
            id=model_name, object="model", created=int(time.time()), owned_by="distillery"
        )
        self.worker = student.worker
        # One is answered and one is ready behind it, so that the worker never waits for the loop.
        self.turns = asyncio.Semaphore(2)
        self.bodies = Bodies(limits)
        self.places = 0
        self.bytes = 0
        # Seconds that the worker takes for an answer, by the last ones.
        self.answer_s = 0.0
        self.tasks: set[asyncio.Task[Any]] = set()
        # Guards `answering`: the job in the worker's hands.
        self.lock = Lock()
        self.answering: Job | None = None

    async def list_models(self, request: Request) -> Response:
        self.check_key(request)
        return JSONResponse({"object": "list", "data": [as_json(self.model)]})

    async def show_model(self, request: Request) -> Response:
        self.check_key(request)
        self.check_model(request.path_params["name"])
        return JSONResponse(as_json(self.model))

    async def show_openapi(self, request: Request) -> Response:
        self.check_key(request)
        return JSONResponse(openapi_document(bool(self.key)))

    async def chat(self, request: Request) -> Response:
        self.check_key(request)
        check_content_type(request)
        body = await self.bodies.read(request)
        chat = parse_request(body)
        self.check_model(chat.model)
        job = Job(chat, len(body))
        self.take_place(job)
        answer = AnswerBuilder(job, self.name)
        if chat.stream:
            pieces = self.stream(job, request)
            # The first piece is awaited here, so that an error still has its status code.
            first = await anext(pieces, GIVEN_UP)
            return StreamingResponse(
                answer_events(first, pieces, answer), media_type="text/event-stream"
            )
        whole: list[Piece] = []
        await self.outcome(job, self.start(job, request, whole.append))
        return JSONResponse(as_json(answer.completion(whole)))

    def check_key(self, request: Request) -> None:
        given = request.headers.get("api-key")
        if not given:
            given = request.headers.get("authorization", "").removeprefix("Bearer ")
        if self.key and not secrets.compare_digest(given.encode(), self.key):
            raise ApiError(
                401,
                "Incorrect API key provided.",
                code="invalid_api_key",
                headers={"WWW-Authenticate": "Bearer"},
            )

    def check_model(self, name: str | None) -> None:
        if name not in (None, self.name):
            message = f"The model {name[:100]!r} does not exist; this server has {self.name!r}."
            raise ApiError(404, message, code="model_not_found", param="model")

    def take_place(self, job: Job) -> None:
        """Count a request. Raises ApiError if there are too many, or too much text in them."""
        if self.places >= self.limits.queue or self.bytes + job.size > MOST_BODY_BYTES:
            raise ApiError(
                429,
                f"{self.places} requests are waiting already; try again.",
                code="rate_limit_exceeded",
                headers={"Retry-After": str(retry_after(self.places, self.answer_s))},
            )
        self.places += 1
        self.bytes += job.size

    def start(self, job: Job, request: Request, tell: Told) -> asyncio.Task[None]:
        """Answer a job in turn, and `tell` each piece from the worker thread. The task ends with
        the answer, or when the client has gone or it takes too long."""
        task = asyncio.create_task(self.in_turn(job, tell))
        watch = asyncio.create_task(self.watch(job, request, task))
        # The event loop itself holds no task.
        self.tasks |= {task, watch}

        def ended(_: asyncio.Task[None]) -> None:
            self.places -= 1
            self.bytes -= job.size
            self.tasks.discard(task)
            watch.cancel()

        task.add_done_callback(ended)
        watch.add_done_callback(self.tasks.discard)
        return task

    async def in_turn(self, job: Job, tell: Told) -> None:
        async with self.turns:
            loop = asyncio.get_running_loop()
            await loop.run_in_executor(self.worker, self.work, job, tell)

    async def outcome(self, job: Job, task: asyncio.Task[None]) -> None:
        """Wait for the end of a job's task. Raises what went wrong."""
        await asyncio.wait([task])
        if job.late:
            raise ApiError(
                503,
                f"The answer is not complete after {self.limits.answer_s:g} s; ask for fewer "
                "tokens, or try again.",
                code="timeout",
            )
        if not task.cancelled():
            task.result()

    async def stream(self, job: Job, request: Request) -> AsyncIterator[Piece]:
        """Yield the answer's pieces as the worker thread makes them."""
        loop = asyncio.get_running_loop()
        queue: asyncio.Queue[Piece | None] = asyncio.Queue()

        def tell(piece: Piece) -> None:
            loop.call_soon_threadsafe(queue.put_nowait, piece)

        task = self.start(job, request, tell)
        task.add_done_callback(lambda _: queue.put_nowait(None))
        while piece := await queue.get():
            yield piece
        await self.outcome(job, task)

    def work(self, job: Job, tell: Told) -> None:
        """Answer a job, in the worker thread."""
        with self.lock:
            if job.cancelled.is_set():
                return
            self.answering = job
            self.student.stop.clear()
        begun = time.monotonic()
        try:
            for piece in answer_pieces(self.student, job):
                tell(piece)
        except AnswerStopped:
            _log.info("an answer was given up")
        finally:
            taken = time.monotonic() - begun
            self.answer_s = 0.8 * self.answer_s + 0.2 * taken if self.answer_s else taken
            with self.lock:
                self.answering = None
                self.student.stop.clear()
            if not self.shared_prefix:
                self.student.forget()

    async def watch(self, job: Job, request: Request, task: asyncio.Task[None]) -> None:
        """Give a job up when its client has gone, or when it takes too long."""
        try:
            async with asyncio.timeout(self.limits.answer_s):
                while (await request.receive())["type"] != "http.disconnect":
                    pass
        except TimeoutError:
            job.late = True
        with self.lock:
            job.cancelled.set()
            if self.answering is job:
                self.student.stop.set()
                return
        # It waits, for its turn or in front of the worker, which passes it over.
        task.cancel()


class AnswerBuilder:
    """Builds the response to one job, whole or as chunks that share an id."""

    def __init__(self, job: Job, model_name: str) -> None:
        self.job = job
        self.id = f"chatcmpl-{uuid.uuid4().hex}"
        self.created = int(time.time())
        self.model = model_name

    def completion(self, pieces: list[Piece]) -> ChatCompletion:
        """Return the whole answer; a cancelled one has no pieces."""
        entries: list[ChatCompletionTokenLogprob] = []
        for piece in pieces:
            entries += piece.logprobs
        logprobs = None
        if self.job.request.logprobs:
            logprobs = ChoiceLogprobs(content=entries, refusal=None)
        text = "".join(piece.text for piece in pieces)
        reason = pieces[-1].finish_reason if pieces else None
        choice = Choice(
            index=0,
            message=ChatCompletionMessage(role="assistant", content=text, refusal=None),
            logprobs=logprobs,
            finish_reason=reason or "stop",
        )
        return ChatCompletion(
            id=self.id,
            object="chat.completion",
            created=self.created,
            model=self.model,
            choices=[choice],
            usage=self.job.usage,
        )

    def chunk(
        self,
        delta: ChoiceDelta,
        entries: list[ChatCompletionTokenLogprob] | None = None,
        finish_reason: Literal["stop", "length"] | None = None,
    ) -> ChatCompletionChunk:
        logprobs = None
        if self.job.request.logprobs and entries is not None:
            logprobs = ChunkLogprobs(content=entries, refusal=None)
        choice = ChunkChoice(index=0, delta=delta, logprobs=logprobs, finish_reason=finish_reason)
        return self.chunk_of([choice])

    def usage_chunk(self) -> ChatCompletionChunk:
        chunk = self.chunk_of([])
        chunk.usage = self.job.usage
        return chunk

    def chunk_of(self, choices: list[ChunkChoice]) -> ChatCompletionChunk:
        return ChatCompletionChunk(
            id=self.id,
            object="chat.completion.chunk",
            created=self.created,
            model=self.model,
            choices=choices,
        )


async def answer_events(
    piece: Piece, pieces: AsyncIterator[Piece], answer: AnswerBuilder
) -> AsyncIterator[str]:
    """Yield the answer as server-sent events: the first `piece`, then the other `pieces`."""
    job = answer.job
    options = job.request.stream_options
    try:
        yield event(answer.chunk(ChoiceDelta(role="assistant", content="")))
        while True:
            if piece.text or piece.logprobs:
                delta = ChoiceDelta(content=piece.text)
                yield event(answer.chunk(delta, piece.logprobs))
            if piece.finish_reason:
                break
            piece = await anext(pieces, GIVEN_UP)
        yield event(answer.chunk(ChoiceDelta(), finish_reason=piece.finish_reason))
        if options and options.include_usage:
            yield event(answer.usage_chunk())
        yield "data: [DONE]\n\n"
    except Exception as error:
        _log.warning("an answer broke off", exc_info=error)
        yield f"data: {json.dumps(to_api_error(error).body)}\n\n"
    finally:
        job.cancelled.set()


def event(chunk: ChatCompletionChunk) -> str:
    # In ASCII: some clients split lines at U+2028 and the like, which would cut a chunk in two.
    return f"data: {json.dumps(as_json(chunk), separators=(',', ':'))}\n\n"


def as_json(answer: BaseModel) -> dict[str, Any]:
    """Return an answer without the fields that this server does not set."""
    return answer.model_dump(mode="json", exclude_unset=True)


def create_app(
    student: ServedStudent,
    model_name: str,
    api_key: SecretStr | None,
    *,
    hosts: Collection[str] = (),
    limits: Limits | None = None,
    shared_prefix: bool = True,
) -> FastAPI:
    """Return the server's application. Without a key it answers anyone who reaches it under one of
    the names `hosts`, as localhost, or by an address. With `shared_prefix`, a prompt is computed
    from where it departs from the one before."""
    server = ModelServer(student, model_name, api_key, limits or Limits(), shared_prefix)

    @asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        yield
        server.worker.shutdown(wait=False, cancel_futures=True)
        student.stop.set()

    app = FastAPI(docs_url=None, redoc_url=None, openapi_url=None, lifespan=lifespan)
    for prefix in ("", "/v1"):
        app.add_route(f"{prefix}/chat/completions", server.chat, methods=["POST"])
        app.add_route(f"{prefix}/models", server.list_models, methods=["GET"])
        app.add_route(f"{prefix}/models/{{name:path}}", server.show_model, methods=["GET"])
        app.add_route(f"{prefix}/openapi.json", server.show_openapi, methods=["GET"])
    app.state.server = server
    app.add_route("/healthz", answer_healthy, methods=["GET"])
    for kind in (ApiError, HTTPException, Exception):
        app.add_exception_handler(kind, answer_error)
    app.add_middleware(HostCheck, hosts=hosts)
    return app


async def answer_healthy(_: Request) -> Response:
    return JSONResponse({"status": "ok"})


async def answer_error(_: Request, error: Exception) -> Response:
    return to_api_error(error).response


def to_api_error(error: Exception) -> ApiError:
    if isinstance(error, ApiError):
        return error
    if isinstance(error, HTTPException):
        return ApiError(error.status_code, str(error.detail), headers=error.headers)
    # The text of an error may tell of the machine: it is for the server's log only.
    return ApiError(500, f"The server failed ({type(error).__name__}).")
