"""teacher/failures"""

import email.utils
import json
import math
import time
from collections.abc import Callable, Mapping
from typing import Any

Redact = Callable[[str], str]

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
        return (
            self.status is None or self.status in (MALFORMED, 408, 409, 429) or self.status >= 500
        )

    @property
    def of_this_call_alone(self) -> str:
        """Why this one question is refused and others need not be, or nothing."""
        if self.status not in (400, 413, 422):
            return ""
        text = f"{self.code} {self.message}".lower()
        if (
            "content_filter" in text
            or "responsibleaipolicy" in text
            or "content management policy" in text
        ):
            return "content_filter"
        return (
            "context_length_exceeded"
            if "context_length" in text or "context length" in text
            else ""
        )


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
    return (
        str(error.get("code") or ""),
        str(error.get("param") or _place(parsed.get("detail"))),
        message,
    )


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
