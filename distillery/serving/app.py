"""serving/app"""

import asyncio
import json
import logging
import secrets
import time
import uuid
from collections.abc import AsyncIterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager
from typing import Any

from fastapi import FastAPI, Request, Response
from fastapi.responses import JSONResponse, StreamingResponse
from pydantic import SecretStr
from starlette.exceptions import HTTPException

from distillery.errors import DistilleryError
from distillery.inference.onnx_student import OnnxStudent
from distillery.serving.completion import Job, Piece, complete
from distillery.serving.requests import ApiError, parse_request, read_body

_log = logging.getLogger(__name__)


class _ModelWorker:
    """The routes' state: the student, its one worker thread, the name and the key."""

    def __init__(self, student: OnnxStudent, model_name: str, api_key: SecretStr | None) -> None:
        self.student = student
        self.name = model_name
        self.key = api_key.get_secret_value().encode() if api_key else b""
        self.created = int(time.time())
        self.worker = ThreadPoolExecutor(max_workers=1, thread_name_prefix="student")

    def authorise(self, request: Request) -> None:
        given = request.headers.get("api-key") or request.headers.get(
            "authorization", ""
        ).removeprefix("Bearer ")
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
        return {
            "id": self.name,
            "object": "model",
            "created": self.created,
            "owned_by": "distillery",
        }

    def check_model(self, name: str | None) -> None:
        if name not in (None, self.name):
            message = f"The model {name!r} does not exist; this server has {self.name!r}."
            raise ApiError(404, message, code="model_not_found", param="model")

    async def chat(self, request: Request) -> Response:
        self.authorise(request)
        chat = parse_request(await read_body(request))
        self.check_model(chat.model)
        job = Job(chat)
        head = {
            "id": f"chatcmpl-{uuid.uuid4().hex}",
            "created": int(time.time()),
            "model": self.name,
        }
        if chat.stream:
            pieces = self.stream(job)
            # The first piece is awaited here, so that an error still has its status code.
            first = await anext(pieces)
            return StreamingResponse(
                _events(first, pieces, job, head), media_type="text/event-stream"
            )
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


def _completion(pieces: list[Piece], job: Job, head: dict[str, Any]) -> dict[str, Any]:
    choice = {
        "index": 0,
        "message": {
            "role": "assistant",
            "content": "".join(piece.text for piece in pieces),
            "refusal": None,
        },
        "logprobs": _logprobs(job, [entry for piece in pieces for entry in piece.logprobs]),
        "finish_reason": pieces[-1].finish_reason if pieces else "stop",
    }
    return {**head, "object": "chat.completion", "choices": [choice], "usage": job.usage}


def _logprobs(job: Job, entries: list[dict[str, Any]]) -> dict[str, Any] | None:
    return {"content": entries, "refusal": None} if job.request.logprobs else None


async def _events(
    first: Piece, rest: AsyncIterator[Piece], job: Job, head: dict[str, Any]
) -> AsyncIterator[str]:
    """The answer as server-sent events."""
    usage = bool(job.request.stream_options and job.request.stream_options.include_usage)

    def event(choices: list[dict[str, Any]], **more: Any) -> str:
        chunk = {**head, "object": "chat.completion.chunk", "choices": choices, **more}
        return f"data: {json.dumps(chunk, separators=(',', ':'))}\n\n"

    def delta(content: dict[str, Any], reason: str | None = None, logprobs: Any = None) -> str:
        return event(
            [{"index": 0, "delta": content, "logprobs": logprobs, "finish_reason": reason}]
        )

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
    server = _ModelWorker(student, model_name, api_key)

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
