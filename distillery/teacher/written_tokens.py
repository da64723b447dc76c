"""The tokens of a written answer, cut to the text that becomes the label.

A label's text may stand between thinking, blanks, a fence of Markdown and the end of the turn, and
an object's label has its blanks in other places than the answer. Its tokens must spell it.
"""

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

from distillery.data.answer_tokens import AnswerToken, spelled
from distillery.teacher.reading import object_span

Pair = tuple[bytes, float]
"""A token, and the natural logarithm of its probability."""


def tokens_of_label(
    tokens: Sequence[AnswerToken], label: str, schema: Mapping[str, Any] | None
) -> tuple[AnswerToken, ...] | None:
    """Return the tokens of a label, given those of the answer after any thinking; with a schema,
    those of its object, with the blanks of `answers.canonical`. None where they spell another text,
    such as an object with its fields in another order."""
    body = spelled(tokens).decode("utf-8", "replace")
    if schema is not None:
        start, end = object_span(body)
        tokens = within(tokens, len(body[:start].encode()), len(body[:end].encode()))
    if spelled(tokens) != label.encode() and schema is not None:
        tokens = with_blanks_of_canonical(tokens)
    return tuple(tokens) if spelled(tokens) == label.encode() else None


def within(tokens: Sequence[AnswerToken], start: int, end: int) -> list[AnswerToken]:
    """Return the tokens of the bytes from `start` to `end` of what tokens spell, and the end of the
    turn if it comes right behind."""
    found, after = [], 0
    for token in tokens:
        first, after = after, after + len(token.text)
        is_end = not token.text and first == end
        if is_end or (first < end and start < after):
            found.append(cut(token, max(start - first, 0), max(after - end, 0)))
    return found


def cut(token: AnswerToken, before: int, after: int) -> AnswerToken:
    """Return a token without so many bytes at its beginning and end. Where they are blanks, its
    candidates go without theirs, as what they say of the text; otherwise they say nothing of it."""
    if not before and not after:
        return token
    text = token.text[before : len(token.text) - after]
    if (token.text[:before] + token.text[len(token.text) - after :]).strip():
        return AnswerToken(text, ())
    pairs = []
    for candidate, log in token.candidates:
        candidate = candidate.lstrip() if before else candidate
        candidate = candidate.rstrip() if after else candidate
        if candidate:
            pairs.append((candidate, log))
    return AnswerToken(text, merged(pairs))


def merged(pairs: Iterable[Pair]) -> tuple[Pair, ...]:
    """Return candidates, the likeliest first. The probabilities of those with equal bytes are
    added, and all are divided by their sum if it is above 1."""
    logs: dict[bytes, list[float]] = {}
    for text, log in pairs:
        logs.setdefault(text, []).append(log)
    sums = {text: log_sum(found) for text, found in logs.items()}
    excess = max(log_sum(list(sums.values())), 0.0) if sums else 0.0
    found = [(text, log - excess) for text, log in sums.items()]
    return tuple(sorted(found, key=lambda pair: -pair[1]))


def log_sum(logs: Sequence[float]) -> float:
    """Return the logarithm of the sum of probabilities, given as logarithms."""
    if len(logs) == 1:
        return logs[0]
    highest = max(logs)
    return highest + math.log(math.fsum(math.exp(log - highest) for log in logs))


class Place(NamedTuple):
    """A place in a JSON text: within a string, behind a backslash in it, or behind a colon or comma
    whose blank is still to be written."""

    in_string: bool = False
    escaped: bool = False
    blank_due: bool = False


def with_blanks_of_canonical(tokens: Sequence[AnswerToken]) -> list[AnswerToken]:
    """Return the tokens of a JSON text, and their candidates, with blanks where `answers.canonical`
    has them. A blank goes to the token behind it; tokens of blanks alone are left out."""
    place = Place()
    found = []
    for token in tokens:
        text, behind = with_blanks(token.text, place)
        pairs = []
        for candidate, log in token.candidates:
            written, _ = with_blanks(candidate, place)
            # One of blanks alone does not tell what follows them; b"" is the end of the turn.
            if written or not candidate:
                pairs.append((written, log))
        if text or not token.text:
            found.append(AnswerToken(text, merged(pairs)))
        place = behind
    return found


def with_blanks(text: bytes, place: Place) -> tuple[bytes, Place]:
    """Return a part of a JSON text with blanks behind colons and commas alone, and the place that
    it leads to from `place`."""
    in_string, escaped, blank_due = place
    written = bytearray()
    for byte in text:
        if in_string:
            written.append(byte)
            in_string = escaped or byte != ord('"')
            escaped = not escaped and byte == ord("\\")
        elif byte not in b" \t\r\n":
            if blank_due:
                written += b" "
            written.append(byte)
            in_string = byte == ord('"')
            blank_due = byte in b":,"
    return bytes(written), Place(in_string, escaped, blank_due)
