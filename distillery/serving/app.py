"""The server's routes: POST /v1/chat/completions, GET /v1/models and GET /healthz.

All of them are there without /v1 too, for azure-ai-inference. Answers are built from the openai
package's own types.
"""

import asyncio
import json
import logging
import secrets
import time
import uuid
from collections.abc import AsyncIterator
from concurrent.futures import ThreadPoolExecutor
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

from distillery.errors import DistilleryError
from distillery.inference.onnx_student import OnnxStudent
from distillery.serving.completion import Job, Piece, answer_pieces
from distillery.serving.requests import ApiError, parse_request, read_body

_log = logging.getLogger(__name__)


class ModelServer:
    """The routes and what they share: the student, the model's name and the key.

    The student is not thread-safe: only the one thread of `worker` uses it, so requests are
    answered one at a time. The event loop stays free for everything else.
    """

    def __init__(self, student: OnnxStudent, model_name: str, api_key: SecretStr | None) -> None:
        self.student = student
        self.name = model_name
        self.key = api_key.get_secret_value().encode() if api_key else b""
        self.model = Model(
            id=model_name, object="model", created=int(time.time()), owned_by="distillery"
        )
        self.worker = ThreadPoolExecutor(max_workers=1, thread_name_prefix="student")

    async def list_models(self, request: Request) -> Response:
        self.check_key(request)
        return JSONResponse({"object": "list", "data": [as_json(self.model)]})

    async def show_model(self, request: Request) -> Response:
        self.check_key(request)
        self.check_model(request.path_params["name"])
        return JSONResponse(as_json(self.model))

    async def chat(self, request: Request) -> Response:
        self.check_key(request)
        chat = parse_request(await read_body(request))
        self.check_model(chat.model)
        job = Job(chat)
        answer = AnswerBuilder(job, self.name)
        if chat.stream:
            pieces = self.stream(job)
            # The first piece is awaited here, so that an error still has its status code.
            first = await anext(pieces)
            return StreamingResponse(
                answer_events(first, pieces, answer), media_type="text/event-stream"
            )
        return JSONResponse(as_json(answer.completion(await self.collect(job, request))))

    def check_key(self, request: Request) -> None:
        given = request.headers.get("api-key")
        if not given:
            given = request.headers.get("authorization", "").removeprefix("Bearer ")
        if self.key and not secrets.compare_digest(given.encode(), self.key):
            raise ApiError(401, "Incorrect API key provided.", code="invalid_api_key")

    def check_model(self, name: str | None) -> None:
        if name not in (None, self.name):
            message = f"The model {name!r} does not exist; this server has {self.name!r}."
            raise ApiError(404, message, code="model_not_found", param="model")

    async def collect(self, job: Job, request: Request) -> list[Piece]:
        """Return the whole answer. It is given up between two tokens if the client has gone."""

        def work() -> list[Piece]:
            return list(answer_pieces(self.student, job))

        answer = asyncio.get_running_loop().run_in_executor(self.worker, work)
        try:
            while True:
                done, _ = await asyncio.wait([answer], timeout=1.0)
                if done:
                    return await answer
                if await request.is_disconnected():
                    job.cancelled.set()
        finally:
            job.cancelled.set()

    async def stream(self, job: Job) -> AsyncIterator[Piece]:
        """Yield the answer's pieces as the worker thread makes them."""
        loop = asyncio.get_running_loop()
        queue: asyncio.Queue[Piece | Exception] = asyncio.Queue()

        def work() -> None:
            try:
                for piece in answer_pieces(self.student, job):
                    loop.call_soon_threadsafe(queue.put_nowait, piece)
            except Exception as error:
                # Any error has to reach the request, which waits for the queue.
                loop.call_soon_threadsafe(queue.put_nowait, error)

        self.worker.submit(work)
        while True:
            piece = await queue.get()
            if isinstance(piece, Exception):
                raise piece
            yield piece
            if piece.finish_reason:
                return


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
            piece = await anext(pieces)
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


def create_app(student: OnnxStudent, model_name: str, api_key: SecretStr | None) -> FastAPI:
    """Return the server's application. Without a key it answers anyone who reaches it."""
    server = ModelServer(student, model_name, api_key)

    @asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        yield
        server.worker.shutdown(wait=False, cancel_futures=True)

    app = FastAPI(docs_url=None, redoc_url=None, openapi_url=None, lifespan=lifespan)
    for prefix in ("", "/v1"):
        app.add_route(f"{prefix}/chat/completions", server.chat, methods=["POST"])
        app.add_route(f"{prefix}/models", server.list_models, methods=["GET"])
        app.add_route(f"{prefix}/models/{{name:path}}", server.show_model, methods=["GET"])
    app.add_route("/healthz", answer_healthy, methods=["GET"])
    for kind in (ApiError, DistilleryError, HTTPException, Exception):
        app.add_exception_handler(kind, answer_error)
    return app


async def answer_healthy(_: Request) -> Response:
    return JSONResponse({"status": "ok"})


async def answer_error(_: Request, error: Exception) -> Response:
    return to_api_error(error).response


def to_api_error(error: Exception) -> ApiError:
    if isinstance(error, ApiError):
        return error
    if isinstance(error, HTTPException):
        return ApiError(error.status_code, str(error.detail))
    if isinstance(error, DistilleryError):
        return ApiError(500, str(error))
    # The text of a library's error is for the server's log only.
    return ApiError(500, f"The server failed ({type(error).__name__}).")
