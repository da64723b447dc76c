"""Reading the teacher's answers: the letter, the probabilities of all letters, the rationale; and
one label from several answers to a row."""

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
"""What marks an answer at the start of a line: "Answer:", "So, the best choice is"."""

_MARK_ALONE = re.compile(r"((?:answer|option|choice)(?:\s+is)?\s*:)\s*\n\s*", re.IGNORECASE)

_LETTER_ALONE = re.compile(r"[(\[]?([A-Za-z])[)\]]?[.:,]?")

_LETTER_FIRST = re.compile(
    r"(?:[(\[]([A-Z])[)\]]|([A-Z])(?:[).:,]|\s*[-–—](?=\s)|(?=\s*\n)))[.:]?\s*(?=\S)"
)

_OTHER_LETTER = re.compile(r"(?<![\w'])([A-Z])(?![\w'])(?!(?<=[AI])\s+[a-z])")


def parse_answer(text: str, choices: Sequence[str]) -> str | None:
    """Return the letter that `text` answers with, or None if it names no option or several.

    `choices` are the texts of the options as they were shown. Accepted are a letter alone ("B",
    "(B)", "B.", "**B**"), a letter before other text ("B) some text"), the exact text of an option,
    and each of these after "Answer:", "The answer is" and the like at the start of a line. A letter
    inside a sentence is not accepted: "A good choice is B" gives None. Everything up to </think> is
    ignored.
    """
    body = without_emphasis(after_thinking(text)).strip()
    body = _MARK_ALONE.sub(r"\1 ", body)
    if body.startswith("<think>"):
        return None
    answers = []
    for line in body.splitlines():
        marked = text_after_mark(line)
        if marked:
            answers.append(marked)
    if not answers:
        answers.append(body)
    letters = {parse_marked_answer(answer, choices) for answer in answers}
    if len(letters) != 1:
        return None
    return letters.pop()


def parse_marked_answer(text: str, choices: Sequence[str]) -> str | None:
    """Return the letter that `text` starts with or whose option it is; None if these disagree, or
    if the text after the letter names another option."""
    letters = LETTERS[: len(choices)]
    named = letters_of_text(text, choices)
    alone = _LETTER_ALONE.fullmatch(text)
    first = _LETTER_FIRST.match(text)
    if alone and alone[1].upper() in letters:
        named.add(alone[1].upper())
    elif first:
        letter = first[1] or first[2]
        rest = text[first.end() :]
        if letter in letters:
            named.add(letter)
            # The option's own text may contain another letter or be another option's as well.
            if normalized(rest) != normalized(choices[letters.index(letter)]):
                named |= letters_of_text(rest, choices)
                named |= set(_OTHER_LETTER.findall(rest)) & set(letters)
    if len(named) != 1:
        return None
    return named.pop()


def letters_of_text(text: str, choices: Sequence[str]) -> set[str]:
    """Return the letters of the options whose text is `text`."""
    letters: set[str] = set()
    if not text:
        return letters
    for letter, choice in zip(LETTERS, choices, strict=False):
        if normalized(text) == normalized(choice):
            letters.add(letter)
    return letters


def text_after_mark(line: str) -> str:
    """Return what follows "Answer:" or the like at the start of a line; "" without such a mark."""
    found = _MARK.match(line)
    if not found:
        return ""
    return line[found.end() :].strip()


def after_thinking(text: str) -> str:
    """Return what follows the last </think>, or all of `text`."""
    return text.rpartition("</think>")[2]


def without_emphasis(text: str) -> str:
    """Return `text` without Markdown's * and `."""
    return re.sub(r"[*`]", "", text)


def normalized(text: str) -> str:
    """Return `text` as options are compared: without emphasis, quotes, case and extra spaces."""
    return " ".join(without_emphasis(text).split()).strip(" \"'“”.").casefold()


def parse_json(text: str, choices: Sequence[str]) -> str | None:
    """Return the letter of {"answer": LETTER}, after any thinking. Text that is not JSON, which an
    endpoint without JSON schemas may send, is read by `parse_answer`."""
    try:
        value = json.loads(after_thinking(text))
    except ValueError:
        return parse_answer(text, choices)
    except RecursionError:
        return None
    answer = value.get("answer") if isinstance(value, dict) else None
    if isinstance(answer, str) and answer in LETTERS[: len(choices)]:
        return answer
    return None


def parse_class(text: str, classes: Sequence[str]) -> str | None:
    """Return the class that `text` answers with, or None if it names none or several.

    Accepted are {"answer": CLASS}, the class alone, and the class after "Answer:", "The answer is"
    and the like at the start of a line, without regard to case, quotes and emphasis. Everything up
    to </think> is ignored."""
    body = after_thinking(text).strip()
    if body.startswith("<think>"):
        return None
    try:
        value = json.loads(body)
    except (ValueError, RecursionError):
        value = None
    if isinstance(value, dict):
        value = value.get("answer")
        if isinstance(value, int) and not isinstance(value, bool):
            value = str(value)
    given = [body] if not isinstance(value, str) else [value]
    if not isinstance(value, str):
        for line in without_emphasis(body).splitlines():
            marked = text_after_mark(line)
            if marked:
                given.append(marked)
    named: set[str] = set()
    for answer in given:
        exact = [name for name in classes if name == answer]
        named |= set(exact or classes_of_text(answer, classes))
    if len(named) != 1:
        return None
    return named.pop()


def classes_of_text(text: str, classes: Sequence[str]) -> list[str]:
    """Return the classes whose name `text` is, without regard to case, quotes and emphasis."""
    return [name for name in classes if normalized(name) == normalized(text)]


def rationale_of(text: str) -> str:
    """Return what precedes the last line with an answer, without any thinking."""
    lines = after_thinking(text).strip().splitlines()
    for number in reversed(range(len(lines))):
        if text_after_mark(without_emphasis(lines[number]).strip()):
            return "\n".join(lines[:number]).strip()
    return ""


def letter_of(token: str) -> str:
    """Return a token without what may surround its letter: blanks, also as some tokenizers write
    them, brackets, the quotes and braces of JSON, and punctuation."""
    return token.strip(' \t\r\n▁ĠĊ"()[]{}*.:,')


def distribution(
    top_logprobs: Iterable[tuple[str, float]], letters: Sequence[str]
) -> dict[str, float] | None:
    """Return the teacher's probabilities of `letters`, which sum to 1, from the (token, log
    probability) pairs at the token of the answer; None if none of these tokens is a letter.

    The probabilities of the spellings of a letter (" A", "A") are added, and the letters are
    normalised among themselves. A letter that is not listed gets the lowest listed probability,
    which its own cannot exceed, or its equal share of what the listed tokens leave, whichever is
    lower. -9999 stands for a token outside the list of at most 20 (OpenAI's API reference, chat
    completions, logprobs and top_logprobs).
    """
    listed: list[float] = []
    found: dict[str, float] = {}
    for token, log_probability in top_logprobs:
        if log_probability <= -9999.0:
            continue
        probability = math.exp(min(log_probability, 0.0))
        listed.append(probability)
        letter = token if token in letters else letter_of(token)
        if letter in letters:
            found[letter] = found.get(letter, 0.0) + probability
    if not sum(found.values()):
        return None
    missing = [letter for letter in letters if letter not in found]
    if missing:
        share = max(1.0 - sum(listed), 0.0) / len(missing)
        for letter in missing:
            found[letter] = min(share, min(listed))
    total = sum(found.values())
    return {letter: found[letter] / total for letter in letters}


def rotated_order(count: int, order: int) -> list[int]:
    """Return the `order`-th order of `count` options: the option shown at each position. Each
    order is the one before rotated by one position, so that over `count` orders each option is
    shown once at each position."""
    return [(position + order) % count for position in range(count)]


@dataclass(frozen=True)
class Answer:
    """One accepted answer to a row, in the row's own letters, or a class."""

    letter: str
    distribution: dict[str, float] | None = None


@dataclass(frozen=True)
class CombinedAnswer:
    """The label that a row's answers give. `confidence`: the share of answers that agree, or the
    probability of a single answer's letter."""

    letter: str
    distribution: dict[str, float] | None
    confidence: float | None


def in_own_order(
    letter: str, distribution: dict[str, float] | None, order: Sequence[int], keys: Sequence[str]
) -> Answer:
    """Translate an answer from the order that was shown into the row's own; `order` holds the
    option of the row at each position shown, and `keys` the letters or classes."""
    own = {}
    for position, option in enumerate(order):
        own[keys[position]] = keys[option]
    if distribution is None:
        return Answer(own[letter])
    translated = {own[shown]: probability for shown, probability in distribution.items()}
    return Answer(own[letter], dict(sorted(translated.items())))


def combine_answers(
    answers: Sequence[Answer], letters: Sequence[str], soft: bool
) -> CombinedAnswer | None:
    """Return the label that a row's `answers` (at least one) give: the letter of the majority.

    If all answers have a distribution, the label's is their mean, and decides a tie of votes.
    Otherwise it is the shares of the votes if `soft` is set, or None. Returns None if a tie is not
    decided.
    """
    if len(answers) == 1:
        answer = answers[0]
        confidence = answer.distribution[answer.letter] if answer.distribution else None
        return CombinedAnswer(answer.letter, answer.distribution, confidence)
    counts = Counter(answer.letter for answer in answers)
    distributions = [answer.distribution for answer in answers if answer.distribution]
    all_have_one = len(distributions) == len(answers)
    combined = {}
    for letter in letters:
        if all_have_one:
            combined[letter] = sum(known[letter] for known in distributions) / len(answers)
        else:
            combined[letter] = counts[letter] / len(answers)
    most = max(counts.values())
    tied = [letter for letter, count in counts.items() if count == most]
    best = max(tied, key=lambda letter: combined[letter])
    for letter in tied:
        if letter != best and math.isclose(combined[letter], combined[best]):
            return None
    return CombinedAnswer(best, combined if all_have_one or soft else None, most / len(answers))
