"""teacher/reply"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from distillery.records import Usage
from distillery.teacher.answers import letter_of


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


def usage_of(payload: dict[str, Any]) -> Usage | None:
    """What the endpoint counted; None where it counted nothing."""
    usage = mapping_of(payload.get("usage"))
    prompt_tokens = _count(usage.get("prompt_tokens"))
    cached = _count(mapping_of(usage.get("prompt_tokens_details")).get("cached_tokens"))
    if not prompt_tokens:
        return None
    return Usage(
        prompt_tokens=prompt_tokens,
        completion_tokens=_count(usage.get("completion_tokens")),
        cached_tokens=min(cached, prompt_tokens),
    )


def mapping_of(value: Any) -> dict[str, Any]:
    return value if isinstance(value, dict) else {}


def _count(value: Any) -> int:
    return value if isinstance(value, int) and 0 <= value < 2**31 else 0


def letter_at_answer(
    tokens: Any, text: str, letters: Sequence[str], last: bool = False
) -> tuple[str | None, tuple[tuple[str, float], ...] | None]:
    """The letter and the alternatives at the first token that is a letter (or the last), after any thinking; without
    such a token (None, ()), and (None, None) where the response holds no log-probabilities at all."""
    tokens = (
        [token for token in tokens if isinstance(token, dict)] if isinstance(tokens, list) else []
    )
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
            alternatives = (
                [one for one in listed if isinstance(one, dict)] if isinstance(listed, list) else []
            )
            pairs = [(str(one.get("token") or ""), one.get("logprob")) for one in alternatives]
            found = (
                letter,
                tuple(
                    (name, float(value)) for name, value in pairs if isinstance(value, int | float)
                ),
            )
            if not last:
                break
    return found


def storable(text: str) -> str:
    """`text` without what UTF-8 or PostgreSQL can't hold: lone surrogates and NUL."""
    return text.encode("utf-8", "replace").decode().replace("\0", "\ufffd")
