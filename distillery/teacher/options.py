"""What a call asks for beside the messages, in the form that the endpoint accepts."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, Literal, Self

if TYPE_CHECKING:
    from openai.types.shared_params import ResponseFormatJSONSchema

MOST_LOGPROBS = 20
"""The most alternatives that a token may list at OpenAI and Azure."""

FEWER_LOGPROBS = 5
"""The most at some other endpoints."""


@dataclass(frozen=True)
class CallOptions:
    """The parameters of a call. `top_logprobs` 0 asks for no log-probabilities; `schema` holds the
    answer to a JSON schema; `stop` are texts that end it."""

    max_tokens: int
    temperature: float | None
    top_logprobs: int
    schema: bool = False
    stop: tuple[str, ...] = ()
    max_tokens_name: Literal["max_tokens", "max_completion_tokens"] = "max_tokens"

    def body(
        self,
        letters: Sequence[str],
        schema: Mapping[str, Any] | None = None,
        by_text: bool = False,
    ) -> dict[str, Any]:
        """Return the part of the request's JSON that these options make. The answer is one of
        `letters`, or written as `schema` says. `by_text`: they are texts, and the answer is the
        likeliest of them, by an extension of vLLM's that our own server has."""
        body: dict[str, Any] = {self.max_tokens_name: self.max_tokens}
        if by_text:
            body["structured_outputs"] = {"choice": list(letters)}
        if self.schema and schema is not None:
            body["response_format"] = response_format(schema)
        elif self.schema:
            body["response_format"] = answer_schema(letters)
        if self.stop:
            body["stop"] = list(self.stop)
        if self.temperature is not None:
            body["temperature"] = self.temperature
        if self.top_logprobs:
            body["logprobs"] = True
            body["top_logprobs"] = self.top_logprobs
        return body

    def without_refused(self, message: str) -> Self | None:
        """Return these options without the one that the endpoint refuses in `message`; None if it
        names none of them."""
        text = message.lower()
        if self.schema and ("response_format" in text or "schema" in text):
            return replace(self, schema=False)
        if self.top_logprobs and ("logprob" in text or "log prob" in text):
            if "top_logprobs" in text and self.top_logprobs > FEWER_LOGPROBS:
                return replace(self, top_logprobs=FEWER_LOGPROBS)
            return replace(self, top_logprobs=0)
        if self.temperature is not None and "temperature" in text:
            return replace(self, temperature=None)
        if self.max_tokens_name == "max_tokens" and "max_tokens" in text:
            return replace(self, max_tokens_name="max_completion_tokens")
        return None


def answer_schema(letters: Sequence[str]) -> "ResponseFormatJSONSchema":
    """Return the response format {"answer": LETTER}."""
    return response_format(
        {
            "type": "object",
            "properties": {"answer": {"type": "string", "enum": list(letters)}},
            "required": ["answer"],
            "additionalProperties": False,
        }
    )


def response_format(schema: Mapping[str, Any]) -> "ResponseFormatJSONSchema":
    """Return the response format of a JSON object that meets a schema, as OpenAI and Azure take it
    (OpenAI's API reference, response_format)."""
    return {
        "type": "json_schema",
        "json_schema": {"name": "answer", "strict": is_strict(schema), "schema": dict(schema)},
    }


def is_strict(schema: Any) -> bool:
    """Return whether a schema is one that `strict` takes: each object in it requires all of its
    properties and allows no others (OpenAI's guide, structured outputs, supported schemas)."""
    if isinstance(schema, Mapping):
        if "properties" in schema or schema.get("type") == "object":
            needed = set(schema.get("properties", ())) <= set(schema.get("required", ()))
            if not needed or schema.get("additionalProperties") is not False:
                return False
        return all(map(is_strict, schema.values()))
    if isinstance(schema, list | tuple):
        return all(map(is_strict, schema))
    return True
