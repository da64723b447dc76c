"""The teacher: a chat-completions endpoint, asked through azure-ai-inference (the lab's way) or the openai SDK.

Retries live here and nowhere else: tenacity around one call, the SDK's own retries off, each try let through by the
run's pace and budget (pace.py). What the endpoint says in an error is shown only with the key cut out, and the SDK's
exceptions, which hold whole responses, go no further than the two clients below.
"""

import asyncio
import math
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from types import TracebackType
from typing import Any, Self
from urllib.parse import urlsplit

from tenacity import (
    AsyncRetrying,
    RetryCallState,
    retry_if_exception,
    wait_exponential,
    wait_random,
)

from distillery.errors import CredentialsError, TeacherError, TeacherUnavailable
from distillery.prompts import Message
from distillery.recipe import TeacherRecipe
from distillery.records import Usage
from distillery.settings import is_loopback
from distillery.teacher.budget import Spending
from distillery.teacher.clients import Answered, AzureClient, CallOptions, ChatClient, OpenAIClient
from distillery.teacher.endpoint import Endpoint, token_scope
from distillery.teacher.failures import MALFORMED, CallFailed
from distillery.teacher.pace import Pace
from distillery.teacher.reply import Completion, letter_at_answer, mapping_of, storable, usage_of

MOST_LOGPROBS = 20
"""How many alternatives a token may list: OpenAI's and Azure's limit for top_logprobs. Some endpoints allow 5."""


BACKOFF = wait_exponential(multiplier=0.5, max=30) + wait_random(0, 0.5)

PROBE: list[Message] = [
    {"role": "system", "content": "Your output should only be one of the two choices: 'A' or 'B'."},
    {
        "role": "user",
        "content": "Question: Which is larger?\nAnswer Choices:\n(A) a mouse\n(B) a house",
    },
]


@dataclass(frozen=True)
class ProbeResult:
    """`answers`: one question got some text back. `log_probabilities`: and these with it."""

    answers: bool
    log_probabilities: bool
    model_version: str
    latency_ms: float


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
        self._pace = pace or Pace(
            recipe.concurrency, recipe.requests_per_minute, recipe.tokens_per_minute
        )
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
        client = AzureClient if self._endpoint.sdk == "azure-ai-inference" else OpenAIClient
        self._client: ChatClient = client(
            self._endpoint, self._recipe, self._credential, self._redact
        )
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
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
        paid = (
            isinstance(error, CallFailed) and error.status == MALFORMED and self._gave_completions
        )
        return isinstance(error, CallFailed) and error.is_worth_a_retry and not paid

    def _gives_up(self, state: RetryCallState) -> bool:
        # In an outage, tries are rare and spread over all questions: none would come to its last for long.
        is_away = self._pace.is_open and self._pace.silent_s >= self._recipe.outage_s
        return is_away or state.attempt_number >= self._recipe.attempts

    async def _send_once(
        self, messages: list[Message], body: dict[str, Any]
    ) -> tuple[dict[str, Any], float]:
        text = "".join(message["content"] for message in messages)
        # A cap must hold whatever the text: a byte-level tokenizer makes no more tokens than bytes. The pace may err.
        most = Usage(
            prompt_tokens=len(text.encode()) + 16, completion_tokens=self._recipe.max_tokens
        )
        tokens = math.ceil(len(text) * self._tokens_per_character) + 16 + self._recipe.max_tokens
        asked_at = await self._pace.turn(tokens)
        try:
            reserved = await self._spending.reserve(most)
            used: Usage | None = None
            try:
                started = time.perf_counter()
                payload, headers = await self._complete(messages, body)
                latency_ms = (time.perf_counter() - started) * 1000
                used = usage_of(payload)
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
            self._tokens_per_character = (
                max(seen, self._tokens_per_character) if self._counted else seen
            )
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
        if (
            options.top_logprobs
            and self._demands
            and not self._gave_log_probabilities
            and not blocked
        ):
            raise self._no_log_probabilities("leaves them out")

    def _no_log_probabilities(self, how: str) -> TeacherError:
        return TeacherError(
            f"teacher.soft_labels: asks for log-probabilities, and {self._endpoint.url} {how}; "
            "set teacher.soft_labels: false, or take a teacher that gives them"
        )

    def _final(self, failure: CallFailed) -> Exception:
        url, model = self._endpoint.url, self._endpoint.model
        if failure.status in (401, 403):
            return CredentialsError(
                f"{self._login_name()} refused by {url} ({failure.status}); {self._login_hint()}"
            )
        if failure.status == 404 or failure.code.lower() in (
            "unknown_model",
            "model_not_found",
            "deploymentnotfound",
        ):
            return TeacherError(
                f"TEACHER_MODEL_NAME {model}: not found at TEACHER_MODEL_ENDPOINT {url} ({failure.status}); check both"
            )
        if failure.is_worth_a_retry and failure.status != MALFORMED:
            overloaded = failure.status == 429
            return TeacherUnavailable(
                f"TEACHER_MODEL_ENDPOINT {url}: {self._trouble(failure)}", overloaded=overloaded
            )
        return TeacherError(
            f"TEACHER_MODEL_ENDPOINT {url}: gives no completion ({failure.status}: {failure.message[:200]}); "
            "check that it is a chat-completions endpoint and takes these teacher settings"
        )

    def _trouble(self, failure: CallFailed) -> str:
        tries = (
            f"after {self._recipe.attempts} tries"
            if self._recipe.attempts > 1
            else "and teacher.attempts is 1"
        )
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
        choice = mapping_of(choices[0]) if isinstance(choices, list) and choices else {}
        message = mapping_of(choice.get("message"))
        refusal = message.get("refusal") if not message.get("content") else None
        text = storable(self._redact(str(refusal or message.get("content") or "")))
        last = self._recipe.answers.form == "rationale"
        letter, pairs = letter_at_answer(
            mapping_of(choice.get("logprobs")).get("content"), text, letters, last
        )
        return Completion(
            text=text,
            finish_reason="refusal" if refusal else str(choice.get("finish_reason") or ""),
            top_logprobs=pairs,
            answer_letter=letter,
            usage=usage_of(payload) or Usage(),
            model_version=storable(str(payload.get("model") or "")),
        )


def _wait(state: RetryCallState) -> float:
    """Seconds before the next try: exponential with jitter. Where the endpoint says how long, the pace holds all."""
    failure = state.outcome.exception() if state.outcome else None
    if isinstance(failure, CallFailed) and failure.retry_after is not None:
        return wait_random(0, 0.25)(state)
    return BACKOFF(state)


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
