"""Reading the JSON of a chat completion. An endpoint may send anything, so that each part is
checked for its type and replaced by its default if it is of another."""

import math
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

from distillery.data.answer_tokens import AnswerToken
from distillery.records import Usage
from distillery.teacher.answers import letter_of
from distillery.teacher.ledger import Call
from distillery.teacher.reading import after_thinking
from distillery.teacher.written_tokens import Pair, merged, within

Pairs = tuple[tuple[str, float], ...]
"""The alternatives at a token: (token, natural logarithm of its probability)."""

UNLISTED = -9999.0
"""What stands for the logarithm of a token outside the list of the likeliest (OpenAI's API
reference, chat completions, logprobs)."""

REPLACEMENT = "\ufffd".encode()
"""What endpoints write for a token that is a part of a character."""

_CONTROL = re.compile(r"<\|[^|<>]*\|>|</s>|<eos>|<end_of_turn>")
"""A token that is no text, as families of models name theirs. As an answer's last token, or as an
alternative, it is the end of the turn."""


@dataclass(frozen=True)
class Completion:
    """One answer. `top_logprobs` are the alternatives at the first token that is one of the
    letters (after a rationale: the last), and `answer_letter` is that letter. For classes they are
    the classes that the listed tokens begin, and the class that was written. For an answer that was
    chosen (`is_chosen`) they are the listed classes or texts, and the chosen one. Without such a
    token they are () and None; if the endpoint sent no log-probabilities, both are None. `tokens`
    are those of a written answer, as `tokens_of_answer` returns them. `latency_ms` is the duration
    of the successful try of `attempts` tries. `call` is the ledger's entry of that try, for whoever
    reads the text to record with its outcome; None where it is recorded already."""

    text: str
    finish_reason: str
    top_logprobs: Pairs | None = None
    answer_letter: str | None = None
    tokens: tuple[AnswerToken, ...] | None = None
    usage: Usage = field(default_factory=Usage)
    model_version: str = ""
    latency_ms: float = 0.0
    attempts: int = 1
    call: Call | None = None


def read_completion(
    payload: dict[str, Any],
    letters: Sequence[str],
    last: bool,
    redact: Callable[[str], str],
    stops: Sequence[str] = (),
    own_server: bool = False,
) -> Completion:
    """Return the first choice of a chat completion; without choices, an answer without text.
    `letters` and `last` as in `letter_at_answer`; an answer without letters is a written one, which
    ended before one of `stops`, if any. The text is passed through `redact`. `own_server`: the
    reply is of our own server, where classes and texts are chosen; an endpoint's are written token
    by token, and one of theirs that is a whole class may begin another one."""
    choices = list_of(payload.get("choices"))
    choice = mapping_of(choices[0]) if choices else {}
    message = mapping_of(choice.get("message"))
    text = message.get("content")
    finish_reason = choice.get("finish_reason")
    if not text and message.get("refusal"):
        text = message["refusal"]
        finish_reason = "refusal"
    text = storable(redact(str(text or "")))
    tokens = list_of(mapping_of(choice.get("logprobs")).get("content"))
    entries = [mapping_of(token) for token in tokens]
    letter: str | None
    pairs: Pairs | None
    if own_server and is_chosen(entries, letters):
        letter, pairs = str(entries[0]["token"]), alternatives_of(entries[0])
    # A key of several characters may span several tokens.
    elif any(len(letter) > 1 for letter in letters):
        letter, pairs = class_at_answer(entries, letters)
    else:
        letter, pairs = letter_at_answer(entries, text, letters, last)
    written = None if letters else tokens_of_answer(entries, text, redact, stops)
    return Completion(
        text=text,
        finish_reason=str(finish_reason or ""),
        top_logprobs=pairs,
        answer_letter=letter,
        tokens=written,
        usage=usage_of(payload) or Usage(),
        model_version=storable(str(payload.get("model") or "")),
    )


def is_chosen(tokens: list[dict[str, Any]], letters: Sequence[str]) -> bool:
    """Return whether an answer was chosen among `letters`, which may be classes or texts, and not
    written token by token: it is one token, as our own server has it, and that token and all its
    alternatives are letters."""
    if len(tokens) != 1 or not tokens[0].get("top_logprobs"):
        return False
    known = set(letters)
    listed = [other for other, _ in alternatives_of(tokens[0])]
    return known.issuperset([str(tokens[0].get("token")), *listed])


def letter_at_answer(
    tokens: list[dict[str, Any]], text: str, letters: Sequence[str], last: bool
) -> tuple[str | None, Pairs | None]:
    """Return the letter and the alternatives at the first token (`last`: the last) that is one of
    `letters` and comes after any thinking; (None, ()) if no token is, and (None, None) if no token
    lists alternatives. `tokens` are the entries of logprobs.content, `text` is all that they say.
    """
    if not any(token.get("top_logprobs") for token in tokens):
        return None, None
    thinking = "</think>" in text
    passed = ""
    found: tuple[str | None, Pairs] = None, ()
    for token in tokens:
        written = str(token.get("token") or "")
        letter = letter_of(written)
        if thinking:
            passed += written
            thinking = "</think>" not in passed
        elif letter in letters:
            found = letter, alternatives_of(token)
            if not last:
                break
    return found


def class_at_answer(
    tokens: list[dict[str, Any]], classes: Sequence[str]
) -> tuple[str | None, Pairs | None]:
    """Return the class that is written first after any thinking, and each class that the listed
    alternatives could have begun, with the logarithm of its probability; (None, ()) and
    (None, None) as in `letter_at_answer`.

    Along the tokens of the class, each token's alternatives tell the probability of the classes
    that part there; classes that begin with the same alternative share its probability."""
    if not any(token.get("top_logprobs") for token in tokens):
        return None, None
    written = [str(token.get("token") or "") for token in tokens]
    start = 0
    for index, text in enumerate(written):
        if "</think>" in text:
            start = index + 1
    start = after_key(written, start)
    for index in range(start, len(written)):
        rest = begun("".join(written[index:]))
        found = [name for name in classes if rest.startswith(begun(name))]
        if found and begun(written[index]):
            # Of "order" and "order status", the longer one is written.
            return max(found, key=len), shares_along(tokens[index:], written[index:], classes)
    return None, ()


def after_key(written: Sequence[str], start: int) -> int:
    """Return where the value of {"answer": CLASS} begins among tokens that are read from `start`
    on: its key may be a class's name, too. It is `start` for an answer in another form."""
    passed = ""
    for index in range(start, len(written)):
        passed += written[index]
        if passed.strip() and not passed.lstrip().startswith("{"):
            return start
        _, key, rest = passed.partition('"answer"')
        if key and ":" in rest:
            return index + 1
    return start


def shares_along(
    tokens: list[dict[str, Any]], written: Sequence[str], classes: Sequence[str]
) -> Pairs:
    """Return (class, log probability) of the classes that the alternatives along `tokens` could
    have begun; see `class_at_answer`. Where the answer ends with a class, others that go on from
    there have no share, as the alternatives after the last token are not listed."""
    shares: dict[str, float] = {}
    before, reached = "", 1.0
    open_classes = list(classes)
    for token, text in zip(tokens, written, strict=True):
        taken = 0.0
        for other, log_probability in alternatives_of(token):
            share = reached * math.exp(min(log_probability, 0.0))
            if begun(other) == begun(text):
                taken += share
                continue
            names = begun_by(before + begun(other, before), open_classes)
            for name in names:
                shares[name] = shares.get(name, 0.0) + share / len(names)
        before += begun(text, before)
        open_classes = begun_by(before, open_classes)
        reached = taken
        if len(open_classes) <= 1 or taken <= 0:
            break
    ended = [name for name in open_classes if begun(name) == before]
    left = ended or open_classes
    for name in left:
        shares[name] = shares.get(name, 0.0) + reached / len(left)
    return tuple((name, math.log(share)) for name, share in shares.items() if share > 0)


def begun_by(text: str, classes: Sequence[str]) -> list[str]:
    """Return the classes that begin with `text`; where there are none, the longest one that `text`
    begins with; none for an empty text."""
    if not text:
        return []
    found = [name for name in classes if begun(name).startswith(text)]
    if not found:
        within = [name for name in classes if text.startswith(begun(name))]
        found = sorted(within, key=len)[-1:]
    return found


def begun(text: str, before: str = "") -> str:
    """Return a text as the beginnings of classes are compared: in lower case, and where nothing
    stands `before`, without what may surround an answer."""
    text = text.replace("▁", " ").replace("Ġ", " ").casefold()
    return text if before else text.lstrip(' \t\r\n"([{*:')


def alternatives_of(token: dict[str, Any]) -> Pairs:
    """Return the alternatives that a token lists, without those that have no finite number, which
    no database takes."""
    pairs = []
    for alternative in map(mapping_of, list_of(token.get("top_logprobs"))):
        value = alternative.get("logprob")
        if isinstance(value, int | float):
            try:
                logprob = float(value)
            except OverflowError:
                continue
            if math.isfinite(logprob):
                pairs.append((str(alternative.get("token") or ""), logprob))
    return tuple(pairs)


def tokens_of_answer(
    entries: list[dict[str, Any]],
    text: str,
    redact: Callable[[str], str],
    stops: Sequence[str] = (),
) -> tuple[AnswerToken, ...] | None:
    """Return the tokens of an answer `text` after any thinking, without the blanks around it, and
    the end of the turn where the endpoint lists it. None where no token lists alternatives, or
    where the tokens do not spell the text.

    `entries` are those of logprobs.content. Some endpoints list there also the tokens of the one of
    `stops` that ended the answer: these are left out."""
    if not any(entry.get("top_logprobs") for entry in entries):
        return None
    spoken = []
    for number, entry in enumerate(entries):
        written = bytes_of(entry)
        # One that is no text is the end of the turn, if it is the last.
        if written or (written is not None and number == len(entries) - 1):
            spoken.append((entry, written))
    whole = b"".join(written for _, written in spoken)
    body = after_thinking(text).encode()
    thought = max(whole.rfind(b"</think>"), 0)
    for stop in map(str.encode, stops):
        position = whole.find(stop, thought)
        if position >= 0 and stop not in body:
            whole = whole[:position]
    start = whole.rfind(body)
    behind = whole[start + len(body) :].decode("utf-8", "replace")
    if not body or start < 0 or behind.strip():
        return None
    # Thinking may be long.
    first = 0
    while len(spoken[first][1]) <= start:
        start -= len(spoken[first][1])
        first += 1
    tokens = [
        AnswerToken(written, candidates_of(entry, written)) for entry, written in spoken[first:]
    ]
    found = tuple(within(tokens, start, start + len(body)))
    # The text is without the key; an alternative that nobody chose may not be.
    listed = b"\n".join(other for token in found for other, _ in token.candidates)
    alternatives = listed.decode("utf-8", "replace")
    return found if redact(alternatives) == alternatives else None


def candidates_of(entry: dict[str, Any], written: bytes) -> tuple[Pair, ...]:
    """Return the alternatives at a token, `written` among them, as bytes; those that have no number
    or that are a part of a character that nobody can tell are left out."""
    listed = [mapping_of(alternative) for alternative in list_of(entry.get("top_logprobs"))]
    texts = [bytes_of(alternative) for alternative in listed]
    if written not in texts:
        listed.append(entry)
        texts.append(written)
    pairs = []
    for alternative, text in zip(listed, texts, strict=True):
        log = alternative.get("logprob")
        if text is None or REPLACEMENT in text:
            continue
        # A little above 0 some round theirs. The comparison is right of any number, also of NaN.
        if isinstance(log, int | float) and UNLISTED < log < 1:
            pairs.append((text, min(float(log), 0.0)))
    return merged(pairs)


def bytes_of(entry: dict[str, Any]) -> bytes | None:
    """Return the bytes that a token stands for: its `bytes` where it has them, else its text in
    UTF-8; b"" for one that is no text. None if there is neither.

    A token without text and bytes begins a character that only a later one completes, as vLLM has
    it: it is None too."""
    name, numbers = entry.get("token"), entry.get("bytes")
    if not isinstance(name, str):
        name = ""
    if _CONTROL.fullmatch(name):
        return b""
    if isinstance(numbers, list) and (numbers or name):
        try:
            return bytes(numbers)
        except (ValueError, TypeError):
            pass
    return name.encode("utf-8", "replace") or None


def usage_of(payload: dict[str, Any]) -> Usage | None:
    """Return the tokens that the endpoint counted; None if it counted none."""
    usage = mapping_of(payload.get("usage"))
    prompt_tokens = count_of(usage.get("prompt_tokens"))
    if not prompt_tokens:
        return None
    cached = count_of(mapping_of(usage.get("prompt_tokens_details")).get("cached_tokens"))
    return Usage(
        prompt_tokens=prompt_tokens,
        completion_tokens=count_of(usage.get("completion_tokens")),
        cached_tokens=min(cached, prompt_tokens),
    )


def mapping_of(value: Any) -> dict[str, Any]:
    """Return `value` if it is a JSON object, else an empty one."""
    return value if isinstance(value, dict) else {}


def list_of(value: Any) -> list[Any]:
    """Return `value` if it is a JSON array, else an empty one."""
    return value if isinstance(value, list) else []


def count_of(value: Any) -> int:
    """Return `value` if it is a number of tokens, else 0."""
    return value if isinstance(value, int) and 0 <= value < 2**31 else 0


def storable(text: str) -> str:
    """Return `text` with what UTF-8 or PostgreSQL cannot store (lone surrogates, NUL) replaced."""
    return text.encode("utf-8", "replace").decode().replace("\0", "\ufffd")
