"""A failed call: what the body and the headers of the endpoint's error say."""

import email.utils
import json
from types import SimpleNamespace

import pytest

from distillery.records import Usage
from distillery.teacher.failures import CallFailed

NOW = 1.7e9


@pytest.mark.parametrize(
    ("headers", "seconds"),
    [
        ({"retry-after": "86400"}, 86400),
        ({"retry-after": "0.5"}, 0.5),
        ({"retry-after": "-3"}, 0),
        ({"retry-after": email.utils.formatdate(NOW + 20, usegmt=True)}, 20),
        ({"retry-after": email.utils.formatdate(NOW - 20, usegmt=True)}, 0),
        ({"retry-after-ms": "1500", "retry-after": "2"}, 1.5),
        ({}, None),
    ],
)
def test_retry_after_is_read_as_seconds(
    headers: dict[str, str], seconds: float | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("distillery.teacher.failures.time", SimpleNamespace(time=lambda: NOW))
    assert CallFailed(429, "", headers).retry_after == seconds


@pytest.mark.parametrize("value", ["soon", "nan", "inf", ""])
def test_a_senseless_retry_after_is_none(value: str) -> None:
    assert CallFailed(429, "", {"retry-after": value}).retry_after is None


@pytest.mark.parametrize(
    ("body", "details"),
    [
        ('{"error": {"code": "c", "param": "p", "message": "no\\n way"}}', ("c", "p", "no way")),
        ('{"code": "c", "message": "no way"}', ("c", "", "no way")),
        ('{"error": "no way"}', ("", "", "no way")),
        (
            '{"detail": [{"loc": ["body", "logprobs"]}], "message": "m"}',
            ("", "body.logprobs", "m"),
        ),
        ('{"detail": [{"loc": null}], "message": "m"}', ("", "", "m")),
        ("no  way", ("", "", "no way")),
        ("[" * 100_000, ("", "", "[" * 100_000)),
    ],
    ids=["OpenAI", "bare", "text in error", "FastAPI", "no loc", "text", "too deep"],
)
def test_the_body_of_an_error_is_read_in_each_form(
    body: str, details: tuple[str, str, str]
) -> None:
    failure = CallFailed(400, body)
    assert (failure.code, failure.param, failure.message) == details


@pytest.mark.parametrize(
    ("status", "message", "refusal"),
    [
        (429, "Request too large for gpt-4o on tokens per min (TPM)", "request_too_large"),
        (429, "tokens per min (TPM): Limit 30000, Requested 49137.", "request_too_large"),
        (429, "Rate limit reached: Limit 30000, Used 29500, Requested 900.", ""),
        (429, "Rate limit reached: Limit 30,000, Used 29,500, Requested 900.", ""),
        (429, "tokens per min (TPM): Limit 3,000, Requested 49,137.", "request_too_large"),
        (429, "Please retry after 60 seconds.", ""),
        (413, "", "request_too_large"),
        (413, "maximum context length is 10", "context_length_exceeded"),
        (400, "content management policy", "content_filter"),
        (400, "Limit 30000, Requested 49137.", ""),
    ],
)
def test_whether_a_refusal_is_for_the_question_alone(
    status: int, message: str, refusal: str
) -> None:
    failure = CallFailed(status, json.dumps({"error": {"message": message}}))
    assert failure.question_refusal == refusal
    assert failure.is_worth_a_retry == (status == 429 and not refusal)
    free = refusal in ("", "request_too_large")
    assert failure.billed_usage(40) == Usage(prompt_tokens=0 if free else 40)
