"""The requests that the server takes, and the errors that it answers with, in OpenAI's form."""

from typing import Annotated, Any, Literal

from fastapi import Request
from fastapi.responses import JSONResponse
from openai.types.shared import ErrorObject
from pydantic import BaseModel, ConfigDict, Field, ValidationError

LARGEST_BODY = 4 << 20
"""Bytes of the largest request."""


class StrictModel(BaseModel):
    model_config = ConfigDict(extra="forbid")


class TextPart(StrictModel):
    type: Literal["text"]
    text: str


class ChatMessage(StrictModel):
    role: Literal["system", "user", "assistant"]
    content: str | list[TextPart]
    name: str | None = None

    @property
    def text(self) -> str:
        if isinstance(self.content, str):
            return self.content
        return "".join(part.text for part in self.content)


class TextFormat(StrictModel):
    type: Literal["text"]


class StructuredOutputs(StrictModel):
    """An extension of vLLM's. Of its forms this server takes `choice`: one of several texts."""

    choice: Annotated[list[Annotated[str, Field(min_length=1)]], Field(min_length=1, max_length=64)]


class StreamOptions(BaseModel):
    include_usage: bool = False


StopText = Annotated[str, Field(min_length=1)]


class ChatRequest(StrictModel):
    """The part of OpenAI's request that this server supports.

    Any other field is refused by name rather than ignored. Fields that only describe the caller
    (user, metadata, store) are accepted and not used.
    """

    messages: list[ChatMessage] = Field(min_length=1)
    model: str | None = None
    max_tokens: int | None = Field(None, ge=1)
    max_completion_tokens: int | None = Field(None, ge=1)
    temperature: float | None = Field(None, ge=0, le=2)
    top_p: float | None = Field(None, gt=0, le=1)
    seed: int | None = Field(None, ge=0)
    stop: StopText | Annotated[list[StopText], Field(max_length=4)] | None = None
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
        """The most tokens that the answer may have, if the request says."""
        return self.max_completion_tokens or self.max_tokens

    @property
    def stops(self) -> list[str]:
        if isinstance(self.stop, str):
            return [self.stop]
        return self.stop or []


class ApiError(Exception):
    """An error that is answered with `status`, in OpenAI's form."""

    def __init__(
        self, status: int, message: str, code: str | None = None, param: str | None = None
    ) -> None:
        super().__init__(message)
        self.status = status
        kind = "server_error" if status >= 500 else "invalid_request_error"
        self.error = ErrorObject(message=message, type=kind, param=param, code=code)

    @property
    def body(self) -> dict[str, Any]:
        return {"error": self.error.model_dump(exclude_unset=True)}

    @property
    def response(self) -> JSONResponse:
        headers = {"WWW-Authenticate": "Bearer"} if self.status == 401 else None
        return JSONResponse(self.body, self.status, headers)


async def read_body(request: Request) -> bytes:
    """Return the request's body. Raises ApiError if it is larger than LARGEST_BODY."""
    body = bytearray()
    async for part in request.stream():
        body += part
        if len(body) > LARGEST_BODY:
            raise ApiError(
                400, f"The request is larger than {LARGEST_BODY} bytes.", code="request_too_large"
            )
    return bytes(body)


def parse_request(body: bytes) -> ChatRequest:
    """Return the request of a JSON body. Raises ApiError with the first wrong field's name."""
    try:
        request = ChatRequest.model_validate_json(body)
    except ValidationError as error:
        detail = error.errors(include_url=False, include_input=False)[0]
        param = ".".join(str(part) for part in detail["loc"]) or None
        message = detail["msg"]
        if detail["type"] == "extra_forbidden":
            message = "not supported by this server"
        raise ApiError(400, f"{param or 'body'}: {message}", param=param) from error
    if request.top_logprobs is not None and not request.logprobs:
        raise ApiError(400, "top_logprobs: needs logprobs: true", param="top_logprobs")
    return request
