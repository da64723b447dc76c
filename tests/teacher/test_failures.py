"""A failed call: what the body and the headers of the endpoint's error say."""

import email.utils
from types import SimpleNamespace

import pytest

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
