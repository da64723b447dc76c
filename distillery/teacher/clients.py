"""teacher/clients"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal, Protocol
from urllib.parse import urlsplit
from urllib.request import getproxies

from distillery.prompts import Message
from distillery.recipe import TeacherRecipe
from distillery.settings import is_loopback
from distillery.teacher.endpoint import Endpoint, token_scope
from distillery.teacher.failures import MALFORMED, CallFailed, Redact

Answered = tuple[dict[str, Any], Mapping[str, str]]
"""A response: its JSON and its headers, with names in small letters."""

FEWER_LOGPROBS = 5


@dataclass(frozen=True)
class CallOptions:
    """What a call asks for, in the way that this endpoint takes; `top_logprobs` 0 asks for no log-probabilities.
    `schema`: hold the answer to a JSON schema."""

    max_tokens: int
    temperature: float | None
    top_logprobs: int
    schema: bool = False
    max_tokens_name: Literal["max_tokens", "max_completion_tokens"] = "max_tokens"

    def body(self, letters: Sequence[str]) -> dict[str, Any]:
        body: dict[str, Any] = {self.max_tokens_name: self.max_tokens}
        if self.schema:
            body["response_format"] = {"type": "json_schema", "json_schema": _schema(letters)}
        if self.temperature is not None:
            body["temperature"] = self.temperature
        if self.top_logprobs:
            body |= {"logprobs": True, "top_logprobs": self.top_logprobs}
        return body

    def without(self, refused: str) -> "CallOptions | None":
        """These options less what `refused` (the endpoint's words) speaks of; None where it speaks of none of them."""
        text = refused.lower()
        if self.schema and ("response_format" in text or "json_schema" in text or "schema" in text):
            return replace(self, schema=False)
        if self.top_logprobs and ("logprob" in text or "log prob" in text):
            fewer = "top_logprobs" in text and self.top_logprobs > FEWER_LOGPROBS
            return replace(self, top_logprobs=FEWER_LOGPROBS if fewer else 0)
        if self.temperature is not None and "temperature" in text:
            return replace(self, temperature=None)
        if self.max_tokens_name == "max_tokens" and "max_tokens" in text:
            return replace(self, max_tokens_name="max_completion_tokens")
        return None


def _schema(letters: Sequence[str]) -> dict[str, Any]:
    """Structured outputs as OpenAI and Azure take them (OpenAI's API reference, response_format)."""
    answer = {"type": "string", "enum": list(letters)}
    schema = {
        "type": "object",
        "properties": {"answer": answer},
        "required": ["answer"],
        "additionalProperties": False,
    }
    return {"name": "answer", "strict": True, "schema": schema}


class ChatClient(Protocol):
    """An SDK that sends one chat-completions request and gives back the response. Raises CallFailed."""

    async def complete(self, messages: list[Message], body: dict[str, Any]) -> Answered: ...

    async def close(self) -> None: ...


class AzureClient:
    """azure-ai-inference. `credential` is an async azure-identity credential, for an endpoint without a key."""

    def __init__(
        self, endpoint: Endpoint, recipe: TeacherRecipe, credential: Any, redact: Redact
    ) -> None:
        from azure.ai.inference.aio import ChatCompletionsClient
        from azure.core.credentials import AzureKeyCredential

        key = endpoint.key.get_secret_value() if endpoint.key else "none"
        self._model = endpoint.model
        self._redact = redact
        # The key also travels in an api-key header, which the SDK would send on to wherever it is redirected.
        self._client = ChatCompletionsClient(
            endpoint.url,
            credential or AzureKeyCredential(key),
            credential_scopes=[token_scope(endpoint.url)],
            retry_total=0,
            permit_redirects=False,
            transport=_transport(recipe.concurrency, _has_proxy(endpoint.url)),
            connection_timeout=recipe.timeout_s,
            read_timeout=recipe.timeout_s,
        )

    async def complete(self, messages: list[Message], body: dict[str, Any]) -> Answered:
        from azure.core.exceptions import AzureError

        # Azure drops or refuses what its own schema lacks, log-probabilities among it, unless this header is there.
        headers = (
            {"extra-parameters": "pass-through"}
            if set(body) & {"logprobs", "max_completion_tokens"}
            else {}
        )
        answered: list[Any] = []
        try:
            completion: Any = await self._client.complete(
                {"model": self._model, "messages": messages, **body},
                headers=headers,
                raw_response_hook=lambda response: answered.append(response.http_response.headers),
            )
            payload: dict[str, Any] = completion.as_dict()
        except (AzureError, ValueError, AttributeError, TypeError, RecursionError) as error:
            failure = self._failure(error)
        else:
            return payload, answered[-1] if answered else {}
        # Raised here, so that the SDK's exception, which holds the whole response, is no context of it.
        raise failure

    def _failure(self, error: Exception) -> CallFailed:
        from azure.core.exceptions import (
            AzureError,
            ClientAuthenticationError,
            HttpResponseError,
            IncompleteReadError,
            ServiceRequestTimeoutError,
            ServiceResponseTimeoutError,
        )

        response = getattr(error, "response", None)
        if isinstance(error, ClientAuthenticationError):
            return CallFailed(getattr(response, "status_code", None) or 401, "")
        if (
            isinstance(error, HttpResponseError)
            and response is not None
            and not isinstance(error, IncompleteReadError)
        ):
            return CallFailed(
                response.status_code, _text_of(response), response.headers, redact=self._redact
            )
        if not isinstance(error, AzureError):
            return CallFailed(MALFORMED, "no JSON of a chat completion")
        timed_out = isinstance(error, ServiceRequestTimeoutError | ServiceResponseTimeoutError)
        return CallFailed(None, str(error), redact=self._redact, timed_out=timed_out)

    async def close(self) -> None:
        await self._client.close()


def _text_of(response: Any) -> str:
    try:
        return str(response.text())
    except ValueError:
        return ""


def _has_proxy(url: str) -> bool:
    """Whether a proxy of the environment may be on the way; it is for the world outside, not for this machine's own.
    Where none is, aiohttp must not look for one: it does so in threads, twice a call, and the calls queue there."""
    return not is_loopback(urlsplit(url).hostname or "") and bool(
        getproxies().keys() & {"http", "https"}
    )


def _transport(connections: int, environment: bool) -> Any:
    """aiohttp as azure-core sets it up, with a connection for each call at a time (its own limit is 100)."""
    import aiohttp
    from azure.core.pipeline.transport import AioHttpTransport

    session = aiohttp.ClientSession(
        connector=aiohttp.TCPConnector(limit=connections),
        cookie_jar=aiohttp.DummyCookieJar(),
        auto_decompress=False,
        trust_env=environment,
    )
    return AioHttpTransport(session=session, session_owner=True)


class OpenAIClient:
    """The openai SDK. `credential` as in AzureClient."""

    def __init__(
        self, endpoint: Endpoint, recipe: TeacherRecipe, credential: Any, redact: Redact
    ) -> None:
        from openai import AsyncOpenAI, DefaultAsyncHttpxClient

        key: Any = endpoint.key.get_secret_value() if endpoint.key else "none"
        if credential:
            from azure.identity.aio import get_bearer_token_provider

            key = get_bearer_token_provider(credential, token_scope(endpoint.url))
        self._model = endpoint.model
        self._redact = redact
        self._client = AsyncOpenAI(
            base_url=endpoint.url,
            api_key=key,
            max_retries=0,
            timeout=recipe.timeout_s,
            # A proxy of the environment is for the world outside, not for a server on this machine.
            http_client=DefaultAsyncHttpxClient(
                trust_env=not is_loopback(urlsplit(endpoint.url).hostname or "")
            ),
        )

    async def complete(self, messages: list[Message], body: dict[str, Any]) -> Answered:
        from azure.core.exceptions import AzureError
        from openai import OpenAIError

        chat: Any = self._client.chat.completions.with_raw_response
        try:
            # In extra_body the messages go as they are; as an argument, the SDK walks through them by their types.
            asked = {"messages": messages, **body}
            response = await chat.create(model=self._model, messages=[], extra_body=asked)
            payload = json.loads(response.content)
        except (OpenAIError, AzureError, ValueError, RecursionError) as error:
            failure = self._failure(error)
        else:
            if isinstance(payload, dict):
                return payload, response.headers
            failure = CallFailed(MALFORMED, "no JSON of a chat completion")
        raise failure

    def _failure(self, error: Exception) -> CallFailed:
        from azure.core.exceptions import ClientAuthenticationError
        from openai import APIStatusError, APITimeoutError

        if isinstance(error, ClientAuthenticationError):
            return CallFailed(401, "")
        if isinstance(error, APIStatusError):
            return CallFailed(
                error.status_code, error.response.text, error.response.headers, redact=self._redact
            )
        if isinstance(error, ValueError | RecursionError):
            return CallFailed(MALFORMED, "no JSON of a chat completion")
        return CallFailed(
            None,
            str(error.__cause__ or error),
            redact=self._redact,
            timed_out=isinstance(error, APITimeoutError),
        )

    async def close(self) -> None:
        await self._client.close()
