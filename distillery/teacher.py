"""The teacher: a chat-completions endpoint, asked through azure-ai-inference (the lab's way) or the openai SDK.

Retries live here and nowhere else: tenacity around one call, the SDK's own retries off, each try let through by the
run's pace and budget (pace.py). What the endpoint says in an error is shown only with the key cut out, and the SDK's
exceptions, which hold whole responses, go no further than the two clients below.
"""

import asyncio
import email.utils
import json
import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from types import TracebackType
from typing import Any, Literal, Protocol, Self
from urllib.parse import urlsplit, urlunsplit
from urllib.request import getproxies

from pydantic import SecretStr
from tenacity import (
    AsyncRetrying,
    RetryCallState,
    retry_if_exception,
    wait_exponential,
    wait_random,
)

from distillery.answers import letter_of
from distillery.errors import CredentialsError, TeacherError, TeacherUnavailable
from distillery.pace import Pace, Spending
from distillery.prompts import Message
from distillery.recipe import TeacherRecipe
from distillery.records import Usage
from distillery.settings import TeacherSettings, is_loopback

Sdk = Literal["azure-ai-inference", "openai"]
Redact = Callable[[str], str]

MOST_LOGPROBS = 20
"""How many alternatives a token may list: OpenAI's and Azure's limit for top_logprobs. Some endpoints allow 5."""
FEWER_LOGPROBS = 5
BACKOFF = wait_exponential(multiplier=0.5, max=30) + wait_random(0, 0.5)

_INFERENCE_HOSTS = (".inference.ai.azure.com", ".models.ai.azure.com")
_AZURE_HOSTS = (*_INFERENCE_HOSTS, ".services.ai.azure.com", ".openai.azure.com", ".cognitiveservices.azure.com")
PROBE: list[Message] = [
    {"role": "system", "content": "Your output should only be one of the two choices: 'A' or 'B'."},
    {"role": "user", "content": "Question: Which is larger?\nAnswer Choices:\n(A) a mouse\n(B) a house"},
]


@dataclass(frozen=True)
class Endpoint:
    """Where the teacher answers. `identity` names it in the label store; `key` is None where azure-identity logs in,
    or where a server on this machine asks for none."""

    url: str
    model: str
    key: SecretStr | None
    identity: str
    sdk: Sdk


Answered = tuple[dict[str, Any], Mapping[str, str]]
"""A response: its JSON and its headers, with names in small letters."""


@dataclass(frozen=True)
class Completion:
    """One answer. `top_logprobs` are the (token, log-probability) pairs at the first token that is one of the letters
    (after a rationale: the last), `answer_letter`; both None where the endpoint gave none. `latency_ms` is that of the
    call that succeeded."""

    text: str
    finish_reason: str
    top_logprobs: tuple[tuple[str, float], ...] | None = None
    answer_letter: str | None = None
    usage: Usage = field(default_factory=Usage)
    model_version: str = ""
    latency_ms: float = 0.0
    attempts: int = 1


@dataclass(frozen=True)
class ProbeResult:
    """`answers`: one question got some text back. `log_probabilities`: and these with it."""

    answers: bool
    log_probabilities: bool
    model_version: str
    latency_ms: float


def resolve_endpoint(recipe: TeacherRecipe, settings: TeacherSettings | None = None) -> Endpoint:
    """The endpoint that TEACHER_MODEL_* name. Raises CredentialsError with the names that are missing or wrong."""
    settings = settings or TeacherSettings()
    names = {"TEACHER_MODEL_NAME": settings.model.strip(), "TEACHER_MODEL_ENDPOINT": settings.endpoint.strip()}
    key = settings.key.get_secret_value().strip()
    missing = [name for name, value in names.items() if not value]
    if missing:
        missing += [] if key else ["TEACHER_MODEL_KEY"]
        raise CredentialsError(
            f"{', '.join(missing)}: not set; set them in the environment or in .env (see sample.env)"
        )
    url = _base_url(names["TEACHER_MODEL_ENDPOINT"])
    _check_key(key, url)
    model = names["TEACHER_MODEL_NAME"]
    sdk = infer_sdk(url) if recipe.sdk == "auto" else recipe.sdk
    return Endpoint(url, model, SecretStr(key) if key else None, recipe.identity or model, sdk)


def infer_sdk(url: str) -> Sdk:
    """azure-ai-inference for hosts of Azure's model inference API; openai for Azure's v1 endpoint and all others."""
    parts = urlsplit(url)
    host = parts.hostname or ""
    foundry = host.endswith(".services.ai.azure.com") and parts.path.startswith("/models")
    return "azure-ai-inference" if foundry or host.endswith(_INFERENCE_HOSTS) else "openai"


def _base_url(text: str) -> str:
    """The URL before /chat/completions, as both SDKs want it; a bare Azure OpenAI host gets its v1 path."""
    try:
        parts = urlsplit(text)
        valid = parts.scheme in ("http", "https") and bool(parts.hostname) and parts.port != 0
    except ValueError:
        valid = False
    if not valid:
        raise CredentialsError("TEACHER_MODEL_ENDPOINT: no URL; it starts with https:// and names a host")
    if "@" in parts.netloc:
        raise CredentialsError("TEACHER_MODEL_ENDPOINT: holds a user name; put the key in TEACHER_MODEL_KEY")
    path = parts.path.rstrip("/").removesuffix("/chat/completions")
    if not path and (parts.hostname or "").endswith((".openai.azure.com", ".services.ai.azure.com")):
        path = "/openai/v1"
    return urlunsplit((parts.scheme, parts.netloc, path, "", ""))


def _check_key(key: str, url: str) -> None:
    host = urlsplit(url).hostname or ""
    if not key and not is_loopback(host) and not host.endswith(_AZURE_HOSTS):
        raise CredentialsError(
            f"TEACHER_MODEL_KEY: not set, and {host} is no Azure host that azure-identity could log in to; "
            "set the key (any word where the server asks for none)"
        )
    if key and not (key.isascii() and key.isprintable()):
        raise CredentialsError("TEACHER_MODEL_KEY: has characters that no key has; copy it again")


def token_scope(url: str) -> str:
    """The Entra ID scope: that of Azure AI services, or Azure ML's for its serverless endpoints (the SDK's default).
    Sources: learn.microsoft.com/azure/developer/ai/how-to/switching-endpoints; the README of azure-ai-inference."""
    serverless = (urlsplit(url).hostname or "").endswith(_INFERENCE_HOSTS)
    return "https://ml.azure.com/.default" if serverless else "https://cognitiveservices.azure.com/.default"


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
    schema = {"type": "object", "properties": {"answer": answer}, "required": ["answer"], "additionalProperties": False}
    return {"name": "answer", "strict": True, "schema": schema}


MALFORMED = 200
"""The status of a response that is no chat completion."""


class CallFailed(Exception):
    """One call that gave no completion. `status` is None where no response came; `message` holds no key."""

    def __init__(
        self,
        status: int | None,
        message: str,
        headers: Mapping[str, str] | None = None,
        *,
        redact: Redact = str,
        timed_out: bool = False,
    ) -> None:
        self.status = status
        self.timed_out = timed_out
        self.headers = headers or {}
        self.retry_after = _retry_after(self.headers)
        self.code, self.param, self.message = (redact(part) for part in _details(message))
        super().__init__(f"status {status}: {self.message[:200]}")

    @property
    def is_worth_a_retry(self) -> bool:
        return self.status is None or self.status in (MALFORMED, 408, 409, 429) or self.status >= 500

    @property
    def of_this_call_alone(self) -> str:
        """Why this one question is refused and others need not be, or nothing."""
        if self.status not in (400, 413, 422):
            return ""
        text = f"{self.code} {self.message}".lower()
        if "content_filter" in text or "responsibleaipolicy" in text or "content management policy" in text:
            return "content_filter"
        return "context_length_exceeded" if "context_length" in text or "context length" in text else ""


def _details(body: str) -> tuple[str, str, str]:
    """(code, param, message) of an error body: {"error": ...} as OpenAI and Azure write it, {"detail": ...} or text."""
    try:
        parsed = json.loads(body)
    except ValueError:
        parsed = body
    error = parsed.get("error", parsed) if isinstance(parsed, dict) else parsed
    if not isinstance(error, dict):
        return "", "", " ".join(str(error).split())
    message = " ".join(str(error.get("message") or body).split())
    return str(error.get("code") or ""), str(error.get("param") or _place(parsed.get("detail"))), message


def _place(detail: Any) -> str:
    first = detail[0] if isinstance(detail, list) and detail else detail
    return ".".join(str(part) for part in first.get("loc", ())) if isinstance(first, dict) else ""


def _retry_after(headers: Mapping[str, str]) -> float | None:
    """Seconds to wait, from Azure's retry-after-ms or HTTP's Retry-After (seconds or a date), or None."""
    milliseconds, value = headers.get("retry-after-ms", ""), headers.get("retry-after", "")
    try:
        if milliseconds or value:
            seconds = float(milliseconds) / 1000 if milliseconds else float(value)
            return max(seconds, 0.0) if math.isfinite(seconds) else None
        return None
    except ValueError:
        pass
    try:
        return max(email.utils.parsedate_to_datetime(value).timestamp() - time.time(), 0.0)
    except ValueError:
        return None


class ChatClient(Protocol):
    """An SDK that sends one chat-completions request and gives back the response. Raises CallFailed."""

    async def complete(self, messages: list[Message], body: dict[str, Any]) -> Answered: ...

    async def close(self) -> None: ...


class _AzureClient:
    """azure-ai-inference. `credential` is an async azure-identity credential, for an endpoint without a key."""

    def __init__(self, endpoint: Endpoint, recipe: TeacherRecipe, credential: Any, redact: Redact) -> None:
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
        headers = {"extra-parameters": "pass-through"} if set(body) & {"logprobs", "max_completion_tokens"} else {}
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
        if isinstance(error, HttpResponseError) and response is not None and not isinstance(error, IncompleteReadError):
            return CallFailed(response.status_code, _text_of(response), response.headers, redact=self._redact)
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
    return not is_loopback(urlsplit(url).hostname or "") and bool(getproxies().keys() & {"http", "https"})


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


class _OpenAIClient:
    """The openai SDK. `credential` as in _AzureClient."""

    def __init__(self, endpoint: Endpoint, recipe: TeacherRecipe, credential: Any, redact: Redact) -> None:
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
            http_client=DefaultAsyncHttpxClient(trust_env=not is_loopback(urlsplit(endpoint.url).hostname or "")),
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
            return CallFailed(error.status_code, error.response.text, error.response.headers, redact=self._redact)
        if isinstance(error, ValueError | RecursionError):
            return CallFailed(MALFORMED, "no JSON of a chat completion")
        return CallFailed(
            None, str(error.__cause__ or error), redact=self._redact, timed_out=isinstance(error, APITimeoutError)
        )

    async def close(self) -> None:
        await self._client.close()


class Teacher:
    """The teacher, to be asked within `async with`. What it refuses once is not sent to it again in this run."""

    def __init__(
        self,
        recipe: TeacherRecipe,
        endpoint: Endpoint,
        *,
        pace: Pace | None = None,
        spending: Spending | None = None,
        demand_log_probabilities: bool = True,
    ) -> None:
        self._recipe = recipe
        self._endpoint = endpoint
        self._pace = pace or Pace(recipe)
        self._spending = spending or Spending(recipe.budget, recipe.prices)
        self._demands = demand_log_probabilities
        self._gave_completions = self._gave_log_probabilities = False
        self._options = CallOptions(
            recipe.max_tokens,
            recipe.temperature,
            top_logprobs=MOST_LOGPROBS if recipe.asks_log_probabilities else 0,
            schema=recipe.answers.form == "json",
        )
        # Until the first answer tells, more than most languages'.
        self._tokens_per_character = 1.0
        self._counted = False

    async def __aenter__(self) -> Self:
        self._credential = await self._log_in()
        client = _AzureClient if self._endpoint.sdk == "azure-ai-inference" else _OpenAIClient
        self._client: ChatClient = client(self._endpoint, self._recipe, self._credential, self._redact)
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        await self._client.close()
        if self._credential:
            await self._credential.close()

    async def ask(self, messages: list[Message], letters: Sequence[str]) -> Completion:
        """The teacher's answer; one that its content filter refuses comes back without text, and so does a malformed
        one of an endpoint that has given completions.

        Raises CredentialsError (401, 403), TeacherUnavailable after teacher.attempts tries, BudgetReached, TeacherError
        for all else that no other question would fare better with, and Stopped when the pace is stopped."""
        while True:
            options = self._options
            try:
                payload, latency_ms, attempts = await self._send(messages, options, letters)
            except CallFailed as failure:
                if reason := failure.of_this_call_alone:
                    return Completion(text="", finish_reason=reason)
                if failure.status == MALFORMED and self._gave_completions:
                    return Completion(text="", finish_reason="malformed")
                self._adapt(options, failure)
            else:
                found = self._read(payload, letters)
                self._require_log_probabilities(options, found)
                return replace(found, latency_ms=latency_ms, attempts=attempts)

    async def _send(
        self, messages: list[Message], options: CallOptions, letters: Sequence[str]
    ) -> tuple[dict[str, Any], float, int]:
        retrying = AsyncRetrying(
            stop=self._gives_up,
            wait=_wait,
            retry=retry_if_exception(self._is_worth_a_retry),
            reraise=True,
        )
        body = options.body(letters)
        answer: tuple[dict[str, Any], float] = await retrying(self._send_once, messages, body)
        return *answer, int(retrying.statistics["attempt_number"])

    def _is_worth_a_retry(self, error: BaseException) -> bool:
        # A whole answer that is no completion is paid for; until a completion has come it may be a gateway's.
        paid = isinstance(error, CallFailed) and error.status == MALFORMED and self._gave_completions
        return isinstance(error, CallFailed) and error.is_worth_a_retry and not paid

    def _gives_up(self, state: RetryCallState) -> bool:
        # In an outage, tries are rare and spread over all questions: none would come to its last for long.
        is_away = self._pace.is_open and self._pace.silent_s >= self._recipe.outage_s
        return is_away or state.attempt_number >= self._recipe.attempts

    async def _send_once(self, messages: list[Message], body: dict[str, Any]) -> tuple[dict[str, Any], float]:
        text = "".join(message["content"] for message in messages)
        # A cap must hold whatever the text: a byte-level tokenizer makes no more tokens than bytes. The pace may err.
        most = Usage(prompt_tokens=len(text.encode()) + 16, completion_tokens=self._recipe.max_tokens)
        tokens = math.ceil(len(text) * self._tokens_per_character) + 16 + self._recipe.max_tokens
        asked_at = await self._pace.turn(tokens)
        try:
            reserved = await self._spending.reserve(most)
            used: Usage | None = None
            try:
                started = time.perf_counter()
                payload, headers = await self._complete(messages, body)
                latency_ms = (time.perf_counter() - started) * 1000
                used = _usage(payload)
                self._pace.succeeded(headers)
                self._gave_completions = True
                if used:
                    self._learn(len(text), tokens, used)
                return payload, latency_ms
            except CallFailed as failure:
                # Of what never came back whole nobody knows what it cost. A prompt that was read and refused may be
                # billed (learn.microsoft.com/azure/ai-foundry/openai/how-to/manage-costs); another error is not.
                read = failure.status == 408 or failure.of_this_call_alone
                refused = Usage(prompt_tokens=tokens - self._recipe.max_tokens) if read else Usage()
                used = None if failure.status in (None, MALFORMED) else refused
                if failure.is_worth_a_retry:
                    self._pace.failed(asked_at, failure.retry_after, failure.headers)
                else:
                    self._pace.succeeded(failure.headers)
                raise
            finally:
                self._spending.settle(reserved, used)
        finally:
            self._pace.done(asked_at)

    async def _complete(self, messages: list[Message], body: dict[str, Any]) -> Answered:
        try:
            async with asyncio.timeout(self._recipe.timeout_s):
                return await self._client.complete(messages, body)
        except TimeoutError:
            raise CallFailed(None, "timeout", timed_out=True) from None

    def _learn(self, characters: int, estimated: int, used: Usage) -> None:
        """Takes the most tokens a character that were seen for what comes."""
        if characters:
            seen = used.prompt_tokens / characters
            self._tokens_per_character = max(seen, self._tokens_per_character) if self._counted else seen
            self._counted = True
        self._pace.settle(used.prompt_tokens + used.completion_tokens - estimated)

    def _adapt(self, tried: CallOptions, failure: CallFailed) -> None:
        """Takes back what the endpoint refuses; raises the error that ends the run where that is not the matter."""
        if failure.status not in (400, 422):
            raise self._final(failure) from None
        if self._options != tried:
            return
        adapted = tried.without(failure.param or failure.message)
        if adapted is None:
            raise self._final(failure) from None
        if tried.top_logprobs and not adapted.top_logprobs and self._demands:
            raise self._no_log_probabilities(f"refuses them ({failure.status})") from None
        self._options = adapted

    def _require_log_probabilities(self, options: CallOptions, completion: Completion) -> None:
        if completion.top_logprobs is not None:
            self._gave_log_probabilities = True
            return
        blocked = not completion.text or completion.finish_reason == "content_filter"
        if options.top_logprobs and self._demands and not self._gave_log_probabilities and not blocked:
            raise self._no_log_probabilities("leaves them out")

    def _no_log_probabilities(self, how: str) -> TeacherError:
        return TeacherError(
            f"teacher.soft_labels: asks for log-probabilities, and {self._endpoint.url} {how}; "
            "set teacher.soft_labels: false, or take a teacher that gives them"
        )

    def _final(self, failure: CallFailed) -> Exception:
        url, model = self._endpoint.url, self._endpoint.model
        if failure.status in (401, 403):
            return CredentialsError(f"{self._login_name()} refused by {url} ({failure.status}); {self._login_hint()}")
        if failure.status == 404 or failure.code.lower() in ("unknown_model", "model_not_found", "deploymentnotfound"):
            return TeacherError(
                f"TEACHER_MODEL_NAME {model}: not found at TEACHER_MODEL_ENDPOINT {url} ({failure.status}); check both"
            )
        if failure.is_worth_a_retry and failure.status != MALFORMED:
            overloaded = failure.status == 429
            return TeacherUnavailable(f"TEACHER_MODEL_ENDPOINT {url}: {self._trouble(failure)}", overloaded=overloaded)
        return TeacherError(
            f"TEACHER_MODEL_ENDPOINT {url}: gives no completion ({failure.status}: {failure.message[:200]}); "
            "check that it is a chat-completions endpoint and takes these teacher settings"
        )

    def _trouble(self, failure: CallFailed) -> str:
        tries = f"after {self._recipe.attempts} tries" if self._recipe.attempts > 1 else "and teacher.attempts is 1"
        if failure.status == 429:
            return f"too many requests (429) {tries}; lower teacher.concurrency or raise teacher.attempts"
        if failure.status is not None:
            return f"fails with {failure.status} {tries}; try again later"
        if failure.timed_out:
            return f"no answer within {self._recipe.timeout_s:g} s {tries}; raise teacher.timeout_s or try again later"
        return f"can't be reached {tries} ({failure.message[:200]}); check the URL and that it runs"

    def _login_name(self) -> str:
        return "azure-identity's login:" if self._credential else "TEACHER_MODEL_KEY:"

    def _login_hint(self) -> str:
        if self._credential:
            return "give it the role Cognitive Services User there, or set TEACHER_MODEL_KEY"
        return "check that it is the key of TEACHER_MODEL_ENDPOINT"

    async def _log_in(self) -> Any:
        """An azure-identity credential that has given a token, for an Azure endpoint without a key; None otherwise."""
        if self._endpoint.key or is_loopback(urlsplit(self._endpoint.url).hostname or ""):
            return None
        from azure.core.exceptions import ClientAuthenticationError
        from azure.identity.aio import DefaultAzureCredential

        credential = DefaultAzureCredential()
        try:
            await credential.get_token(token_scope(self._endpoint.url))
        except ClientAuthenticationError:
            await credential.close()
            raise CredentialsError(
                "TEACHER_MODEL_KEY: not set, and azure-identity finds no login; set the key, or run 'az login'"
            ) from None
        return credential

    def _redact(self, text: str) -> str:
        """`text` without the key; a word of a few letters is no secret, and may well stand in an answer."""
        key = self._endpoint.key.get_secret_value() if self._endpoint.key else ""
        return text.replace(key, "***") if len(key) >= 8 else text

    def _read(self, payload: dict[str, Any], letters: Sequence[str]) -> Completion:
        """The first choice of a chat-completions response; no choices is an answer without text."""
        choices = payload.get("choices")
        choice = _mapping(choices[0]) if isinstance(choices, list) and choices else {}
        message = _mapping(choice.get("message"))
        refusal = message.get("refusal") if not message.get("content") else None
        text = storable(self._redact(str(refusal or message.get("content") or "")))
        last = self._recipe.answers.form == "rationale"
        letter, pairs = _at_answer(_mapping(choice.get("logprobs")).get("content"), text, letters, last)
        return Completion(
            text=text,
            finish_reason="refusal" if refusal else str(choice.get("finish_reason") or ""),
            top_logprobs=pairs,
            answer_letter=letter,
            usage=_usage(payload) or Usage(),
            model_version=storable(str(payload.get("model") or "")),
        )


def _usage(payload: dict[str, Any]) -> Usage | None:
    """What the endpoint counted; None where it counted nothing."""
    usage = _mapping(payload.get("usage"))
    prompt_tokens = _count(usage.get("prompt_tokens"))
    cached = _count(_mapping(usage.get("prompt_tokens_details")).get("cached_tokens"))
    if not prompt_tokens:
        return None
    return Usage(
        prompt_tokens=prompt_tokens,
        completion_tokens=_count(usage.get("completion_tokens")),
        cached_tokens=min(cached, prompt_tokens),
    )


def _mapping(value: Any) -> dict[str, Any]:
    return value if isinstance(value, dict) else {}


def _count(value: Any) -> int:
    return value if isinstance(value, int) and 0 <= value < 2**31 else 0


def _wait(state: RetryCallState) -> float:
    """Seconds before the next try: exponential with jitter. Where the endpoint says how long, the pace holds all."""
    failure = state.outcome.exception() if state.outcome else None
    if isinstance(failure, CallFailed) and failure.retry_after is not None:
        return wait_random(0, 0.25)(state)
    return BACKOFF(state)


def _at_answer(
    tokens: Any, text: str, letters: Sequence[str], last: bool = False
) -> tuple[str | None, tuple[tuple[str, float], ...] | None]:
    """The letter and the alternatives at the first token that is a letter (or the last), after any thinking; without
    such a token (None, ()), and (None, None) where the response holds no log-probabilities at all."""
    tokens = [token for token in tokens if isinstance(token, dict)] if isinstance(tokens, list) else []
    if not any(token.get("top_logprobs") for token in tokens):
        return None, None
    passed = ""
    found: tuple[str | None, tuple[tuple[str, float], ...]] = (None, ())
    for token in tokens:
        thinking = "</think>" in text and "</think>" not in passed
        passed += str(token.get("token") or "")
        letter = letter_of(str(token.get("token") or ""))
        if letter in letters and not thinking:
            listed = token.get("top_logprobs")
            alternatives = [one for one in listed if isinstance(one, dict)] if isinstance(listed, list) else []
            pairs = [(str(one.get("token") or ""), one.get("logprob")) for one in alternatives]
            found = letter, tuple((name, float(value)) for name, value in pairs if isinstance(value, int | float))
            if not last:
                break
    return found


def storable(text: str) -> str:
    """`text` without what UTF-8 or PostgreSQL can't hold: lone surrogates and NUL."""
    return text.encode("utf-8", "replace").decode().replace("\0", "\ufffd")


async def probe(recipe: TeacherRecipe, endpoint: Endpoint) -> ProbeResult:
    """Asks one short question and says what came. Raises what `Teacher.ask` does, after two tries at most."""
    wanted = recipe.model_copy(update={"soft_labels": True, "attempts": min(recipe.attempts, 2)})
    async with Teacher(wanted, endpoint, demand_log_probabilities=False) as teacher:
        completion = await teacher.ask(PROBE, ("A", "B"))
    return ProbeResult(
        answers=bool(completion.text.strip()),
        log_probabilities=completion.top_logprobs is not None,
        model_version=completion.model_version,
        latency_ms=completion.latency_ms,
    )
