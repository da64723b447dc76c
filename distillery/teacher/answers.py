"""How a teacher's answer is read: its letter, the probabilities of all letters, its reason; and how several of one row
become one label."""

import json
import math
import re
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from distillery.records import LETTERS

_MARK = re.compile(
    r"^\W*(?:(?:so|therefore|thus)\W+)?(?:the\s+)?(?:(?:correct|best|right|final)\s+)?"
    r"(?:answer|option|choice)\b(?:\s+(?:is|would\s+be)\b)?\s*[:=-]?\s*",
    re.IGNORECASE,
)

_MARK_ALONE = re.compile(r"((?:answer|option|choice)(?:\s+is)?\s*:)\s*\n\s*", re.IGNORECASE)

_LETTER_ALONE = re.compile(r"[(\[]?([A-Za-z])[)\]]?[.:,]?")

_LETTER_FIRST = re.compile(
    r"(?:[(\[]([A-Z])[)\]]|([A-Z])(?:[).:,]|\s*[-–—](?=\s)|(?=\s*\n)))[.:]?\s*(?=\S)"
)

_OTHER_LETTER = re.compile(r"(?<![\w'])([A-Z])(?![\w'])(?!(?<=[AI])\s+[a-z])")


def parse_answer(text: str, choices: Sequence[str]) -> str | None:
    """The letter that `text` answers with, out of those of `choices` (the option texts), or None where it is none or
    more than one.

    Read are a letter alone ("B", "(B)", "B.", "**B**"), a letter before other text ("B) some text"), an option's exact
    text, and each of these after "Answer:", "The answer is" and the like at the start of a line. A letter within a
    sentence is not read: "A good choice is B" is None. What stands before </think> is not looked at.
    """
    body = re.sub(r"[*`]", "", text.rpartition("</think>")[2]).strip()
    body = _MARK_ALONE.sub(r"\1 ", body)
    if body.startswith("<think>"):
        return None
    marked = [body_after for line in body.splitlines() if (body_after := _after_mark(line))]
    letters = {_read(rest, choices) for rest in marked or [body]}
    return letters.pop() if len(letters) == 1 else None


def _after_mark(line: str) -> str:
    found = _MARK.match(line)
    return line[found.end() :].strip() if found else ""


def _read(body: str, choices: Sequence[str]) -> str | None:
    """The letter of a text that starts with its answer: by letter and by option text, which must not disagree."""
    letters = LETTERS[: len(choices)]
    named = {
        letter
        for letter, choice in zip(letters, choices, strict=True)
        if body and _plain(body) == _plain(choice)
    }
    if (alone := _LETTER_ALONE.fullmatch(body)) and alone[1].upper() in letters:
        named.add(alone[1].upper())
    elif (first := _LETTER_FIRST.match(body)) and (letter := first[1] or first[2]) in letters:
        named |= {letter} | _letters_named(body[first.end() :], letter, choices)
    return named.pop() if len(named) == 1 else None


def _letters_named(rest: str, letter: str, choices: Sequence[str]) -> set[str]:
    """The options that the text after a leading letter speaks of; its own text counts as nothing else."""
    letters = LETTERS[: len(choices)]
    if _plain(rest) == _plain(choices[letters.index(letter)]):
        return set()
    by_text = {
        other
        for other, choice in zip(letters, choices, strict=True)
        if _plain(rest) == _plain(choice)
    }
    return by_text | {found for found in _OTHER_LETTER.findall(rest) if found in letters}


def _plain(text: str) -> str:
    return " ".join(re.sub(r"[*`]", "", text).split()).strip(" \"'“”.").casefold()


def distribution(
    top_logprobs: Iterable[tuple[str, float]], letters: Sequence[str]
) -> dict[str, float] | None:
    """The teacher's probabilities of `letters` (they sum to 1) from the alternatives at the answer's token, or None
    where no letter is among them.

    Spellings of a letter with blanks around it (" A", "A") are summed, and the letters are normalised among themselves.
    A letter that is not listed gets the least listed probability, which it can't have exceeded, or, where that is
    smaller, an equal share with the other missing letters of what all listed tokens leave. -9999 stands for a token
    outside the list, of 20 at most (OpenAI's API reference, chat completions, logprobs and top_logprobs).
    """
    listed = [
        (token, math.exp(min(value, 0.0))) for token, value in top_logprobs if value > -9999.0
    ]
    found: dict[str, float] = {}
    for token, probability in listed:
        if (letter := letter_of(token)) in letters:
            found[letter] = found.get(letter, 0.0) + probability
    if not sum(found.values()):
        return None
    missing = [letter for letter in letters if letter not in found]
    if missing:
        left = max(1.0 - sum(p for _, p in listed), 0.0) / len(missing)
        found |= dict.fromkeys(missing, min(left, min(p for _, p in listed)))
    total = sum(found.values())
    return {letter: found[letter] / total for letter in letters}


def letter_of(token: str) -> str:
    """A token less the blanks around it, which some endpoints write as their tokenizer does, and less what a letter is
    written in: brackets, JSON's quotes and brace, the marks after it."""
    return token.strip(' \t\r\n▁ĠĊ"()[]{}*.:,')


def parse_json(text: str, choices: Sequence[str]) -> str | None:
    """The letter of {"answer": LETTER}, after any thinking; of an endpoint that takes no JSON schema, whatever
    `parse_answer` reads."""
    try:
        value = json.loads(text.rpartition("</think>")[2])
    except ValueError:
        return parse_answer(text, choices)
    except RecursionError:
        return None
    answer = value.get("answer") if isinstance(value, dict) else None
    return answer if isinstance(answer, str) and answer in LETTERS[: len(choices)] else None


def rationale_of(text: str) -> str:
    """What stands before the line with the answer, after any thinking."""
    lines = text.rpartition("</think>")[2].strip().splitlines()
    marked = [
        number
        for number, line in enumerate(lines)
        if _after_mark(re.sub(r"[*`]", "", line).strip())
    ]
    return "\n".join(lines[: marked[-1]]).strip() if marked else ""


def rotated_order(count: int, order: int) -> list[int]:
    """The `order`-th order of `count` options: each place's option, all turned by `order` places. With as many orders
    as options each option stands at each place once."""
    return [(place + order) % count for place in range(count)]


@dataclass(frozen=True)
class Answer:
    """One accepted answer to a row, in the row's own letters."""

    letter: str
    distribution: dict[str, float] | None = None


@dataclass(frozen=True)
class CombinedAnswer:
    letter: str
    distribution: dict[str, float] | None
    confidence: float | None


def in_own_letters(
    letter: str, distribution: dict[str, float] | None, order: Sequence[int]
) -> Answer:
    """An answer to the options as they were shown, as one to the row; `order` holds the row's option at each place."""
    own = {LETTERS[place]: LETTERS[option] for place, option in enumerate(order)}
    if distribution is None:
        return Answer(own[letter])
    known = {own[shown]: p for shown, p in distribution.items()}
    return Answer(own[letter], {name: known[name] for name in sorted(known)})


def combine_answers(
    answers: Sequence[Answer], letters: Sequence[str], soft: bool
) -> CombinedAnswer | None:
    """One label of a row's answers: the majority's letter; None where two letters share the first place.

    Its confidence is the share of answers that agree, or, of a single one, its letter's probability. Its distribution
    is the mean of the answers' own, where all have one, else, if `soft` is set and there are several, their shares."""
    if len(answers) == 1:
        (only,) = answers
        confidence = only.distribution[only.letter] if only.distribution else None
        return CombinedAnswer(only.letter, only.distribution, confidence)
    counts = Counter(answer.letter for answer in answers)
    own = [answer.distribution for answer in answers if answer.distribution]
    all_have_one = len(own) == len(answers)
    if all_have_one:
        distribution = {letter: sum(one[letter] for one in own) / len(own) for letter in letters}
    else:
        distribution = {letter: counts[letter] / len(answers) for letter in letters}
    (first, most), *others = counts.most_common()
    tied = [first] + [letter for letter, count in others if count == most]
    # A tie of votes alone tells nothing; the probabilities behind them may.
    best = max(tied, key=lambda letter: distribution[letter])
    if (
        len(tied) > 1
        and sum(math.isclose(distribution[letter], distribution[best]) for letter in tied) > 1
    ):
        return None
    return CombinedAnswer(
        best, distribution if all_have_one or soft else None, counts[best] / len(answers)
    )
