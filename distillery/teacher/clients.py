"""The two SDKs that send a request: azure-ai-inference, as the lab uses it, and openai.

Their own retries are off. Their exceptions, which hold whole responses, go no further than this
module: a client raises CallFailed, outside the handler, so that they are not in its context either.
"""

import json
from collections.abc import Awaitable, Callable, Mapping
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol
from urllib.request import getproxies

from distillery.prompts import Message
from distillery.teacher.endpoint import Endpoint, token_scope
from distillery.teacher.failures import MALFORMED, CallFailed

if TYPE_CHECKING:
    from azure.core.credentials_async import AsyncTokenCredential
    from azure.core.pipeline import PipelineResponse
    from azure.core.pipeline.transport import AioHttpTransport
    from openai import AsyncOpenAI


class Response(NamedTuple):
    """The JSON object of a response, and its headers, whose names are found in lower case."""

    payload: dict[str, Any]
    headers: Mapping[str, str]


class ChatClient(Protocol):
    """Sends one request for a chat completion: `messages` and the other parameters, `body`."""

    async def complete(self, messages: list[Message], body: dict[str, Any]) -> Response:
        """Return the response. Raises CallFailed."""
        ...

    async def close(self) -> None: ...


def open_client(
    endpoint: Endpoint,
    credential: "AsyncTokenCredential | None",
    concurrency: int,
    timeout_s: float,
) -> ChatClient:
    """Return a client of the endpoint's SDK. `credential` is for an endpoint without a key."""
    if endpoint.sdk == "azure-ai-inference":
        return AzureClient(endpoint, credential, concurrency, timeout_s)
    return OpenAIClient(endpoint, credential, timeout_s)


class AzureClient:
    """A client that uses azure-ai-inference."""

    def __init__(
        self,
        endpoint: Endpoint,
        credential: "AsyncTokenCredential | None",
        concurrency: int,
        timeout_s: float,
    ) -> None:
        from azure.ai.inference.aio import ChatCompletionsClient
        from azure.core.credentials import AzureKeyCredential

        key = endpoint.key.get_secret_value() if endpoint.key else "none"
        self._endpoint = endpoint
        # The SDK also sends the key in a header api-key, and would send that on to wherever it is
        # redirected.
        self._client = ChatCompletionsClient(
            endpoint.url,
            credential or AzureKeyCredential(key),
            credential_scopes=[token_scope(endpoint.url)],
            retry_total=0,
            permit_redirects=False,
            transport=azure_transport(concurrency, needs_proxy(endpoint)),
            connection_timeout=timeout_s,
            read_timeout=timeout_s,
        )

    async def complete(self, messages: list[Message], body: dict[str, Any]) -> Response:
        from azure.core.exceptions import AzureError

        headers = {}
        # Without this header, Azure drops or refuses what its own schema lacks.
        if "logprobs" in body or "max_completion_tokens" in body:
            headers["extra-parameters"] = "pass-through"
        responses: list[PipelineResponse[Any, Any]] = []
        try:
            await self._client.complete(
                {"model": self._endpoint.model, "messages": messages, **body},
                headers=headers,
                raw_response_hook=responses.append,
            )
            # The SDK has read it; to write its model out again would take a tenth of a call's time.
            response = responses[-1].http_response
            return Response(dict(response.json()), response.headers)
        except (AzureError, ValueError, AttributeError, TypeError, RecursionError) as error:
            failure = self._failure(error)
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

        redact = self._endpoint.redact
        if isinstance(error, ClientAuthenticationError):
            return CallFailed(error.status_code or 401, "")
        cut_off = isinstance(error, IncompleteReadError)
        if isinstance(error, HttpResponseError) and error.response is not None and not cut_off:
            response: Any = error.response
            return CallFailed(
                response.status_code, text_of(response), response.headers, redact=redact
            )
        if not isinstance(error, AzureError):
            return CallFailed(MALFORMED, "no JSON of a chat completion")
        timed_out = isinstance(error, ServiceRequestTimeoutError | ServiceResponseTimeoutError)
        return CallFailed(None, str(error), redact=redact, timed_out=timed_out)

    async def close(self) -> None:
        await self._client.close()


def text_of(response: Any) -> str:
    """Return the body of an Azure SDK's response, or "" if it is not text."""
    try:
        return str(response.text())
    except ValueError:
        return ""


def needs_proxy(endpoint: Endpoint) -> bool:
    """Return whether a proxy named in the environment may be on the way. Where there is none,
    aiohttp must not look for one: it does so in threads, twice a call, and the calls queue there.
    """
    return not endpoint.is_local and not getproxies().keys().isdisjoint({"http", "https"})


def azure_transport(connections: int, trust_env: bool) -> "AioHttpTransport":
    """Return aiohttp as azure-core sets it up, with enough connections for all calls at a time; by
    default there are at most 100."""
    import aiohttp
    from azure.core.pipeline.transport import AioHttpTransport

    session = aiohttp.ClientSession(
        connector=aiohttp.TCPConnector(limit=connections),
        cookie_jar=aiohttp.DummyCookieJar(),
        auto_decompress=False,
        trust_env=trust_env,
    )
    return AioHttpTransport(session=session, session_owner=True)


class OpenAIClient:
    """A client that uses openai."""

    def __init__(
        self,
        endpoint: Endpoint,
        credential: "AsyncTokenCredential | None",
        timeout_s: float,
    ) -> None:
        self._endpoint = endpoint
        self._client = open_openai(endpoint, credential, timeout_s)

    async def complete(self, messages: list[Message], body: dict[str, Any]) -> Response:
        from azure.core.exceptions import AzureError
        from openai import OpenAIError

        try:
            # In extra_body the messages are sent as they are; as an argument, the SDK would walk
            # through them by their types.
            response = await self._client.chat.completions.with_raw_response.create(
                model=self._endpoint.model,
                messages=[],
                extra_body={"messages": messages, **body},
            )
            payload = json.loads(response.content)
            if isinstance(payload, dict):
                return Response(payload, response.headers)
            failure = CallFailed(MALFORMED, "no JSON of a chat completion")
        except (OpenAIError, AzureError, ValueError, RecursionError) as error:
            failure = openai_failure(error, self._endpoint)
        raise failure

    async def close(self) -> None:
        await self._client.close()


def open_openai(
    endpoint: Endpoint, credential: "AsyncTokenCredential | None", timeout_s: float
) -> "AsyncOpenAI":
    """Return the openai SDK's client of an endpoint, without retries of its own. `credential` is
    for an endpoint without a key."""
    from openai import AsyncOpenAI, DefaultAsyncHttpxClient

    key: str | Callable[[], Awaitable[str]] = "none"
    if endpoint.key:
        key = endpoint.key.get_secret_value()
    elif credential:
        from azure.identity.aio import get_bearer_token_provider

        key = get_bearer_token_provider(credential, token_scope(endpoint.url))
    return AsyncOpenAI(
        base_url=endpoint.url,
        api_key=key,
        max_retries=0,
        timeout=timeout_s,
        # A redirect would send the key on. A proxy named in the environment is not for a server on
        # this machine.
        http_client=DefaultAsyncHttpxClient(
            follow_redirects=False, trust_env=not endpoint.is_local
        ),
    )


def openai_failure(error: Exception, endpoint: Endpoint) -> CallFailed:
    """Return the failure that an exception of the openai SDK, or of azure-identity, stands for."""
    from azure.core.exceptions import ClientAuthenticationError
    from openai import APIStatusError, APITimeoutError

    redact = endpoint.redact
    if isinstance(error, ClientAuthenticationError):
        return CallFailed(401, "")
    if isinstance(error, APIStatusError):
        response = error.response
        return CallFailed(error.status_code, response.text, response.headers, redact=redact)
    if isinstance(error, ValueError | RecursionError):
        return CallFailed(MALFORMED, "no JSON of a chat completion")
    timed_out = isinstance(error, APITimeoutError)
    text = str(error.__cause__ or error)
    return CallFailed(None, text, redact=redact, timed_out=timed_out)
