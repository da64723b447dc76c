"""The teacher's answers: the probabilities of all letters, and one label from several answers to a
row. reading.py reads their texts."""

import math
from collections import Counter
from collections.abc import Iterable, Sequence
from functools import lru_cache
from typing import NamedTuple


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


@lru_cache
def rotated_order(count: int, order: int) -> tuple[int, ...]:
    """Return the `order`-th order of `count` options: the option shown at each position. Each
    order is the one before rotated by one position, so that over `count` orders each option is
    shown once at each position."""
    return tuple((position + order) % count for position in range(count))


class Answer(NamedTuple):
    """One accepted answer to a row, in the row's own letters, or a class."""

    letter: str
    distribution: dict[str, float] | None = None


class CombinedAnswer(NamedTuple):
    """The label that a row's answers give. `confidence`: the share of answers that agree, or the
    probability of a single answer's letter. `references`: further texts, each as good."""

    letter: str
    distribution: dict[str, float] | None
    confidence: float | None
    references: tuple[str, ...] = ()


def in_own_order(
    letter: str, distribution: dict[str, float] | None, order: Sequence[int], keys: Sequence[str]
) -> Answer:
    """Translate an answer from the order that was shown into the row's own; `order` holds the
    option of the row at each position shown, and `keys` the letters or classes."""
    if distribution is None:
        return Answer(keys[order[keys.index(letter)]])
    own = {}
    for position, option in enumerate(order):
        own[keys[position]] = keys[option]
    translated = {own[shown]: probability for shown, probability in distribution.items()}
    return Answer(own[letter], dict(sorted(translated.items())))


def of_options(
    text: str, distribution: dict[str, float] | None, options: Sequence[str], keys: Sequence[str]
) -> Answer:
    """Translate an answer by the text of an option into the letter of the first option that has it.
    Options with equal texts share the text's probability evenly. `keys`: the options' letters."""
    letter = keys[options.index(text)]
    if distribution is None:
        return Answer(letter)
    equal = Counter(options)
    shares = [distribution[option] / equal[option] for option in options]
    return Answer(letter, dict(zip(keys, shares, strict=True)))


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


def combine_written(answers: Sequence[Answer], texts: bool) -> CombinedAnswer:
    """Return the label that a row's written `answers` (at least one) give: the one that most of
    them are, the first of equally frequent ones. Of free `texts`, of which hardly two are equal, it
    is the first, and each other one is a reference."""
    counts = Counter(answer.letter for answer in answers)
    if texts:
        first, *others = counts
        return CombinedAnswer(first, None, None, tuple(others))
    best = max(counts, key=counts.__getitem__)
    confidence = counts[best] / len(answers) if len(answers) > 1 else None
    return CombinedAnswer(best, None, confidence)
