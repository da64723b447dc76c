"""A call that gave no completion: what the endpoint said, whether to try again, and the error that
the user sees."""

import email.utils
import json
import math
import re
import time
from collections.abc import Callable, Mapping
from typing import Any
from urllib.parse import urlsplit

from tenacity import wait_exponential, wait_random

from distillery.errors import (
    CredentialsError,
    DistilleryError,
    TeacherError,
    TeacherUnavailable,
    one_line,
)
from distillery.records import Usage
from distillery.teacher.endpoint import Endpoint

BACKOFF = wait_exponential(multiplier=0.5, max=30) + wait_random(0, 0.5)
"""How long to wait before the next try."""

MALFORMED = 200
"""The status of a response that is not a chat completion."""

UNKNOWN_MODEL_CODES = ("unknown_model", "model_not_found", "deploymentnotfound")

CONTENT_FILTER_WORDS = ("content_filter", "responsibleaipolicy", "content management policy")

CONTEXT_LENGTH_WORDS = ("context_length", "context length")

TOO_LARGE = "request_too_large"
"""The finish_reason of a question that the endpoint refuses for its size, at no cost."""

LIMIT_AND_REQUESTED = re.compile(r"limit:? ([\d,]+),.*requested:? ([\d,]+)")
"""In a 429 as OpenAI writes it: Rate limit reached for MODEL on tokens per min (TPM): Limit 30000,
Used 29000, Requested 2000; or, where no waiting helps, Request too large for MODEL: Limit 30000,
Requested 49137."""


class CallFailed(Exception):
    """One try that gave no completion. `status` is the HTTP status, MALFORMED, or None if no whole
    response came. `code`, `param` and `message` are what the error's body says, passed through
    `redact`, so that they do not contain the key. `retry_after` is in seconds. `is_alone`: whether
    only this question has to wait so long, since others are answered."""

    def __init__(
        self,
        status: int | None,
        body: str,
        headers: Mapping[str, str] | None = None,
        *,
        redact: Callable[[str], str] = str,
        timed_out: bool = False,
    ) -> None:
        code, param, message = error_details(body)
        self.status = status
        self.code = redact(code)
        self.param = redact(param)
        self.message = redact(message)
        self.timed_out = timed_out
        self.headers = headers or {}
        self.retry_after = parse_retry_after(self.headers)
        self.is_alone = False
        super().__init__(f"status {status}: {one_line(self.message)}")

    @property
    def is_worth_a_retry(self) -> bool:
        """Whether the same call may succeed later."""
        if self.status is None:
            return True
        if self.question_refusal:
            return False
        return self.status in (MALFORMED, 408, 409, 429) or self.status >= 500

    @property
    def question_refusal(self) -> str:
        """Why the endpoint refuses this question, though it may answer others: content_filter,
        context_length_exceeded or TOO_LARGE, as a completion's finish_reason; "" if that is not the
        case."""
        text = f"{self.code} {self.message}".lower()
        if self.status == 429:
            found = LIMIT_AND_REQUESTED.search(text)
            limit, requested = map(number_of, found.groups()) if found else (0, 0)
            is_over = requested > limit
            return TOO_LARGE if is_over or "request too large" in text else ""
        if self.status not in (400, 413, 422):
            return ""
        if any(word in text for word in CONTENT_FILTER_WORDS):
            return "content_filter"
        if any(word in text for word in CONTEXT_LENGTH_WORDS):
            return "context_length_exceeded"
        return TOO_LARGE if self.status == 413 else ""

    def billed_usage(self, prompt_tokens: int) -> Usage | None:
        """Return what the call may be billed for; None if nobody knows, since no whole completion
        came back. A prompt that was read and refused may be billed, another error is not
        (learn.microsoft.com/azure/ai-foundry/openai/how-to/manage-costs)."""
        if self.status in (None, MALFORMED):
            return None
        if self.status == 408 or self.question_refusal not in ("", TOO_LARGE):
            return Usage(prompt_tokens=prompt_tokens)
        return Usage()


def number_of(text: str) -> int:
    """Return a number that may have commas after its thousands; 0 without digits."""
    return int(text.replace(",", "") or 0)


def error_details(body: str) -> tuple[str, str, str]:
    """Return (code, param, message) of an error's body: {"error": ...} as OpenAI and Azure write
    it, {"detail": ...} as FastAPI does, or plain text."""
    try:
        parsed = json.loads(body)
    except (ValueError, RecursionError):
        parsed = body
    error = parsed.get("error", parsed) if isinstance(parsed, dict) else parsed
    if not isinstance(error, dict):
        return "", "", " ".join(str(error).split())
    code = error.get("code") or ""
    param = error.get("param") or refused_field(parsed.get("detail"))
    message = error.get("message") or body
    return str(code), str(param), " ".join(str(message).split())


def refused_field(detail: Any) -> str:
    """Return the path of the first field that FastAPI refuses, such as body.logprobs, or ""."""
    if isinstance(detail, list) and detail:
        detail = detail[0]
    path = detail.get("loc") if isinstance(detail, dict) else None
    if not isinstance(path, list):
        return ""
    return ".".join(map(str, path))


def parse_retry_after(headers: Mapping[str, str]) -> float | None:
    """Return the seconds to wait by Azure's retry-after-ms or HTTP's Retry-After (seconds or a
    date), at least 0; None if there is no such header or no sense in it."""
    milliseconds = headers.get("retry-after-ms", "")
    value = headers.get("retry-after", "")
    if not milliseconds and not value:
        return None
    try:
        seconds = float(milliseconds) / 1000 if milliseconds else float(value)
    except ValueError:
        try:
            seconds = email.utils.parsedate_to_datetime(value).timestamp() - time.time()
        except ValueError:
            return None
    return max(seconds, 0.0) if math.isfinite(seconds) else None


def final_error(
    failure: CallFailed, endpoint: Endpoint, attempts: int, timeout_s: float
) -> DistilleryError:
    """Return the error that ends a call after its last try, with the settings to look at."""
    status, url, variables = failure.status, endpoint.url, endpoint.variables
    if status in (401, 403):
        if not endpoint.needs_login:
            return CredentialsError(
                f"{variables}_KEY: refused by {url} ({status}); check that it is the key of "
                f"{variables}_ENDPOINT"
            )
        return CredentialsError(
            f"azure-identity's login: refused by {url} ({status}); give it the role Cognitive "
            f"Services User on that resource, or set {variables}_KEY"
        )
    unknown_model = failure.code.lower() in UNKNOWN_MODEL_CODES
    if status in (404, 410) and endpoint.successor and not unknown_model:
        return TeacherError(
            f"{variables}_ENDPOINT {url}: not found ({status}); Azure retired its model "
            f"inference API on 2026-08-26: set {variables}_ENDPOINT={endpoint.successor.url}"
        )
    target = urlsplit(failure.headers.get("location", ""))
    if status in (301, 302, 303, 307, 308) and target.path:
        return TeacherError(
            f"{variables}_ENDPOINT {url}: redirects ({status}) to {target.netloc}{target.path}, "
            "where the key is not sent; set the address that answers itself"
        )
    if status == 404 or unknown_model:
        return TeacherError(
            f"{variables}_NAME {endpoint.model}: not found at {variables}_ENDPOINT {url} "
            f"({status}); check both"
        )
    if failure.is_worth_a_retry and status != MALFORMED:
        trouble = describe_trouble(failure, attempts, timeout_s, endpoint.section)
        return TeacherUnavailable(
            f"{variables}_ENDPOINT {url}: {trouble}",
            overloaded=status == 429,
            waited=failure.retry_after is not None,
        )
    return TeacherError(
        f"{variables}_ENDPOINT {url}: returned no chat completion ({status}: "
        f"{one_line(failure.message)}); check that it is a chat-completions endpoint and accepts "
        f"these {endpoint.section} settings"
    )


def describe_trouble(failure: CallFailed, attempts: int, timeout_s: float, section: str) -> str:
    """Return what went wrong in all tries of a call, and what to do about it."""
    tries = "after 1 try" if attempts == 1 else f"after {attempts} tries"
    if failure.status == 429:
        return (
            f"too many requests (429) {tries}; lower {section}.concurrency or raise "
            f"{section}.attempts"
        )
    if failure.status is not None:
        return f"fails with {failure.status} {tries}; try again later"
    if failure.timed_out:
        return (
            f"no answer within {timeout_s:g} s {tries}; raise {section}.timeout_s or try again "
            "later"
        )
    return f"can't be reached {tries} ({one_line(failure.message)}); check the URL and that it runs"
