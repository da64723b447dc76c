"""The server's routes: POST /v1/chat/completions, GET /v1/models, /openapi.json, and for those who
run it GET /healthz (it lives), /health (it takes requests) and /metrics.

Those of /v1 are there without it too, for azure-ai-inference. Answers are built from the openai
package's own types.
"""

import asyncio
import json
import logging
import secrets
import time
import uuid
from collections.abc import AsyncIterator, Collection
from contextlib import asynccontextmanager
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

from distillery.serving.completion import Job, Piece
from distillery.serving.hosts import HostCheck
from distillery.serving.limits import MOST_BODY_BYTES, Limits, retry_after
from distillery.serving.metrics import CONTENT_TYPE, Metrics
from distillery.serving.openapi import openapi_document
from distillery.serving.requests import ApiError, Bodies, check_content_type, parse_request
from distillery.serving.rounds import Rounds, Told
from distillery.serving.student import ServedStudent

_log = logging.getLogger(__name__)

GIVEN_UP = Piece("", [], "stop")
"""Stands for the answer that nobody waits for any more."""


class ModelServer:
    """The routes and what they share: the student, the model's name, the key and the limits.

    The student is asked in a thread of its own, see Rounds. The event loop stays free for all else,
    save while weights are loaded, or ONNX Runtime GenAI computes a pass for a model that takes no
    rows together: both let no other thread run.
    """

    def __init__(
        self,
        student: ServedStudent,
        model_name: str,
        api_key: SecretStr | None,
        limits: Limits,
        shared_prefix: bool,
    ) -> None:
        self.name = model_name
        self.key = api_key.get_secret_value().encode() if api_key else b""
        self.limits = limits
        self.model = Model(
            id=model_name, object="model", created=int(time.time()), owned_by="distillery"
        )
        self.rounds = Rounds(student, shared_prefix)
        self.bodies = Bodies(limits)
        self.jobs: dict[Job, asyncio.Future[None]] = {}
        """The requests that wait or are answered, and the ends of their answers."""
        self.bytes = 0
        """The bytes of these requests."""
        self.tasks: set[asyncio.Task[None]] = set()
        self.metrics = Metrics()
        self.stops = False
        """Whether the server takes no more requests."""

    async def show_ready(self, _: Request) -> Response:
        """Answer whether the server takes requests; `answer_healthy` says that it lives."""
        if self.stops:
            return stopping().response
        return JSONResponse({"status": "ok"})

    async def show_metrics(self, request: Request) -> Response:
        self.check_key(request)
        return Response(self.metrics.text(), media_type=CONTENT_TYPE)

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
        """Answer a request, and count its status."""
        try:
            response = await self.answer(request)
        except Exception as error:
            self.metrics.requests.labels(str(to_api_error(error).status)).inc()
            raise
        self.metrics.requests.labels("200").inc()
        return response

    async def answer(self, request: Request) -> Response:
        self.check_key(request)
        check_content_type(request)
        body = await self.bodies.read(request)
        chat = parse_request(body)
        self.check_model(chat.model)
        job = Job(chat, len(body))
        self.check_room(job)
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

    def check_room(self, job: Job) -> None:
        """Raise ApiError if there are too many requests, or too much text in them, or if the server
        stops."""
        if self.stops:
            raise stopping()
        if self.places >= self.limits.queue or self.bytes + job.size > MOST_BODY_BYTES:
            raise ApiError(
                429,
                f"{self.places} requests are waiting already; try again.",
                code="rate_limit_exceeded",
                headers={"Retry-After": str(retry_after(self.places, self.rounds.answer_s))},
            )

    @property
    def places(self) -> int:
        """How many requests wait or are answered."""
        return len(self.jobs)

    def start(self, job: Job, request: Request, tell: Told) -> asyncio.Future[None]:
        """Answer a job in turn, and `tell` each piece from the worker thread. The future ends with
        the answer, or when the client has gone or it takes too long."""

        def timed(piece: Piece) -> None:
            job.spoke = job.spoke or time.monotonic()
            tell(piece)

        future = self.jobs[job] = self.rounds.add(job, timed)
        self.bytes += job.size
        self.metrics.waiting.inc()
        watch = asyncio.create_task(self.watch(job, request))
        # The event loop itself holds no task.
        self.tasks.add(watch)

        def ended(done: asyncio.Future[None]) -> None:
            del self.jobs[job]
            self.bytes -= job.size
            watch.cancel()
            # Where the client has gone, nobody else asks for its error.
            if not done.cancelled():
                done.exception()
            self.metrics.ended(job)

        future.add_done_callback(ended)
        watch.add_done_callback(self.tasks.discard)
        return future

    async def outcome(self, job: Job, future: asyncio.Future[None]) -> None:
        """Wait for the end of a job. Raises what went wrong."""
        await asyncio.wait([future])
        if job.refusal:
            raise job.refusal
        if not future.cancelled():
            future.result()

    async def stream(self, job: Job, request: Request) -> AsyncIterator[Piece]:
        """Yield the answer's pieces as the worker thread makes them."""
        loop = asyncio.get_running_loop()
        queue: asyncio.Queue[Piece | None] = asyncio.Queue()

        def tell(piece: Piece) -> None:
            loop.call_soon_threadsafe(queue.put_nowait, piece)

        future = self.start(job, request, tell)
        future.add_done_callback(lambda _: queue.put_nowait(None))
        while piece := await queue.get():
            yield piece
        await self.outcome(job, future)

    async def watch(self, job: Job, request: Request) -> None:
        """Give a job up when its client has gone, or when it takes too long."""
        try:
            async with asyncio.timeout(self.limits.answer_s):
                while (await request.receive())["type"] != "http.disconnect":
                    pass
        except TimeoutError:
            job.refusal = ApiError(
                503,
                f"The answer is not complete after {self.limits.answer_s:g} s; ask for fewer "
                "tokens, or try again.",
                code="timeout",
            )
        self.give_up(job)

    def give_up(self, job: Job) -> None:
        """End a job for its client at once, and in the student's thread before the next pass."""
        self.rounds.give_up(job)
        if job in self.jobs:
            self.jobs[job].cancel()

    async def drain(self) -> None:
        """Take no more requests, and give up those that are not answered within `drain_s`."""
        self.stops = True
        deadline = time.monotonic() + self.limits.drain_s
        while self.jobs and time.monotonic() < deadline:
            await asyncio.sleep(0.05)
        for job in list(self.jobs):
            job.refusal = stopping()
            self.give_up(job)


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
        server.rounds.close()

    app = FastAPI(docs_url=None, redoc_url=None, openapi_url=None, lifespan=lifespan)
    for prefix in ("", "/v1"):
        app.add_route(f"{prefix}/chat/completions", server.chat, methods=["POST"])
        app.add_route(f"{prefix}/models", server.list_models, methods=["GET"])
        app.add_route(f"{prefix}/models/{{name:path}}", server.show_model, methods=["GET"])
        app.add_route(f"{prefix}/openapi.json", server.show_openapi, methods=["GET"])
    app.state.server = server
    app.add_route("/healthz", answer_healthy, methods=["GET"])
    app.add_route("/health", server.show_ready, methods=["GET"])
    app.add_route("/metrics", server.show_metrics, methods=["GET"])
    for kind in (ApiError, HTTPException, Exception):
        app.add_exception_handler(kind, answer_error)
    app.add_middleware(HostCheck, hosts=hosts)
    return app


async def answer_healthy(_: Request) -> Response:
    return JSONResponse({"status": "ok"})


def stopping() -> ApiError:
    return ApiError(
        503,
        "The server stops; ask again when it is back.",
        code="server_stopping",
        headers={"Retry-After": "1", "Connection": "close"},
    )


async def answer_error(_: Request, error: Exception) -> Response:
    return to_api_error(error).response


def to_api_error(error: Exception) -> ApiError:
    if isinstance(error, ApiError):
        return error
    if isinstance(error, HTTPException):
        return ApiError(error.status_code, str(error.detail), headers=error.headers)
    # The text of an error may tell of the machine: it is for the server's log only.
    return ApiError(500, f"The server failed ({type(error).__name__}).")
