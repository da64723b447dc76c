"""The requests that the server takes, and the errors that it answers with, in OpenAI's form."""

import asyncio
import json
from collections.abc import Mapping
from typing import Annotated, Any, Literal

from fastapi import Request
from fastapi.responses import JSONResponse
from openai.types.shared import ErrorObject
from pydantic import (
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    ValidationError,
    field_validator,
)

from distillery.serving.limits import (
    LARGEST_BODY,
    LARGEST_SEED,
    LONGEST_CHOICE,
    LONGEST_NAME,
    LONGEST_SCHEMA,
    LONGEST_STOP,
    MOST_BODY_BYTES,
    MOST_CHOICES,
    MOST_MESSAGES,
    MOST_PARTS,
    MOST_STOPS,
    MOST_TOKENS,
    Limits,
)


def whole_number(value: Any) -> Any:
    """Return 16 for 16.0, which JSON Schema counts as an integer."""
    if isinstance(value, float) and value.is_integer():
        return int(value)
    return value


TokenCount = Annotated[int, Field(ge=1, le=MOST_TOKENS), BeforeValidator(whole_number)]
Seed = Annotated[int, Field(ge=0, le=LARGEST_SEED), BeforeValidator(whole_number)]
AlternativeCount = Annotated[int, Field(ge=0, le=20), BeforeValidator(whole_number)]
AnswerCount = Annotated[int, Field(ge=1, le=1), BeforeValidator(whole_number)]


class StrictModel(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True)


class TextPart(StrictModel):
    type: Literal["text"]
    text: str


class ChatMessage(StrictModel):
    role: Literal["system", "user", "assistant"]
    content: str | Annotated[list[TextPart], Field(max_length=MOST_PARTS)]
    name: str | None = Field(None, max_length=LONGEST_NAME)

    @property
    def text(self) -> str:
        if isinstance(self.content, str):
            return self.content
        return "".join(part.text for part in self.content)


class TextFormat(StrictModel):
    type: Literal["text"]


class ObjectFormat(StrictModel):
    type: Literal["json_object"]


class AnswerSchema(StrictModel):
    """The JSON Schema that the answer is held to. With `strict`, one with a keyword that answers
    can't be held to is refused; else such a keyword is passed over."""

    name: str = Field(max_length=LONGEST_NAME)
    description: str | None = Field(None, max_length=LONGEST_SCHEMA)
    schema_: dict[str, Any] = Field(alias="schema")
    strict: bool | None = None

    @field_validator("schema_")
    @classmethod
    def check_size(cls, schema: dict[str, Any]) -> dict[str, Any]:
        if len(json.dumps(schema)) > LONGEST_SCHEMA:
            raise ValueError(f"a schema may have {LONGEST_SCHEMA} characters")
        return schema


class SchemaFormat(StrictModel):
    type: Literal["json_schema"]
    json_schema: AnswerSchema


ResponseFormat = Annotated[TextFormat | ObjectFormat | SchemaFormat, Field(discriminator="type")]


ChoiceText = Annotated[str, Field(min_length=1, max_length=LONGEST_CHOICE)]


class StructuredOutputs(StrictModel):
    """An extension of vLLM's. Of its forms this server takes `choice`: one of several texts."""

    choice: Annotated[list[ChoiceText], Field(min_length=1, max_length=MOST_CHOICES)]


class StreamOptions(BaseModel):
    model_config = ConfigDict(strict=True)

    include_usage: bool = False


StopText = Annotated[str, Field(min_length=1, max_length=LONGEST_STOP)]


class ChatRequest(StrictModel):
    """The part of OpenAI's request that this server supports.

    Any other field is refused by name rather than ignored. Fields that only describe the caller
    (user, metadata, store) are accepted and not used.
    """

    messages: list[ChatMessage] = Field(min_length=1, max_length=MOST_MESSAGES)
    model: str | None = Field(None, max_length=LONGEST_NAME)
    max_tokens: TokenCount | None = None
    max_completion_tokens: TokenCount | None = None
    temperature: float | None = Field(None, ge=0, le=2)
    top_p: float | None = Field(None, gt=0, le=1)
    seed: Seed | None = None
    stop: StopText | Annotated[list[StopText], Field(max_length=MOST_STOPS)] | None = None
    logprobs: bool | None = None
    top_logprobs: AlternativeCount | None = None
    n: AnswerCount | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    response_format: ResponseFormat | None = None
    structured_outputs: StructuredOutputs | None = None
    frequency_penalty: Annotated[float, Field(ge=0, le=0)] | None = None
    presence_penalty: Annotated[float, Field(ge=0, le=0)] | None = None
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
        self,
        status: int,
        message: str,
        code: str | None = None,
        param: str | None = None,
        headers: Mapping[str, str] | None = None,
    ) -> None:
        super().__init__(message)
        self.status = status
        self.headers = dict(headers or {})
        kind = "server_error" if status >= 500 else "invalid_request_error"
        self.error = ErrorObject(message=message, type=kind, param=param, code=code)

    @property
    def body(self) -> dict[str, Any]:
        return {"error": self.error.model_dump(exclude_unset=True)}

    @property
    def response(self) -> JSONResponse:
        return JSONResponse(self.body, self.status, self.headers)


def check_content_type(request: Request) -> None:
    """Raise ApiError for a body that is not declared as JSON. A browser lets a page of another site
    send other bodies without asking first."""
    given = request.headers.get("content-type", "")
    if given.partition(";")[0].strip().lower() != "application/json":
        raise ApiError(415, "Send the header Content-Type: application/json.")


class Bodies:
    """The bodies that are being read. Where they are too many, or too large together, the one that
    began first is given up: others are there in moments."""

    def __init__(self, limits: Limits) -> None:
        self.limits = limits
        self.sizes: dict[asyncio.Timeout, int] = {}

    async def read(self, request: Request) -> bytes:
        """Return a request's body. Raises ApiError if it is larger than LARGEST_BODY, is not there
        in `body_s`, or is given up for others."""
        closed = {"Connection": "close"}
        deadline = asyncio.timeout(self.limits.body_s)
        try:
            async with deadline:
                body, size = bytearray(), 0
                self.make_room(deadline, 0)
                async for part in request.stream():
                    size += len(part)
                    if size <= LARGEST_BODY:
                        body += part
                        self.make_room(deadline, size)
                    # The rest is read and dropped, as clients look for an answer when they have
                    # sent all; but there is an end to that.
                    elif size > 4 * LARGEST_BODY:
                        break
        except TimeoutError as error:
            raise ApiError(
                408,
                f"The request did not come within {self.limits.body_s:g} s, or too slowly while "
                "many others came.",
                headers=closed,
            ) from error
        finally:
            self.sizes.pop(deadline, None)
        if size > LARGEST_BODY:
            raise ApiError(
                413,
                f"The request is larger than {LARGEST_BODY} bytes.",
                code="request_too_large",
                headers=closed,
            )
        return bytes(body)

    def make_room(self, deadline: asyncio.Timeout, size: int) -> None:
        """Count `size` bytes of the body with this deadline, and give up older ones for it."""
        if deadline.expired():
            return
        self.sizes[deadline] = size
        while len(self.sizes) > self.limits.reading or sum(self.sizes.values()) > MOST_BODY_BYTES:
            oldest = next(iter(self.sizes))
            del self.sizes[oldest]
            if not oldest.expired():
                oldest.reschedule(0)


def parse_request(body: bytes) -> ChatRequest:
    """Return the request of a JSON body. Raises ApiError with the first wrong field's name."""
    try:
        request = ChatRequest.model_validate_json(body)
    except ValidationError as error:
        detail = error.errors(include_url=False, include_input=False)[0]
        param = ".".join(str(part)[:100] for part in detail["loc"]) or None
        message = detail["msg"]
        if detail["type"] == "extra_forbidden":
            message = "not supported by this server"
        raise ApiError(400, f"{param or 'body'}: {message}", param=param) from error
    if request.top_logprobs is not None and not request.logprobs:
        raise ApiError(400, "top_logprobs: needs logprobs: true", param="top_logprobs")
    return request
