"""What holds for whatever a teacher writes: an answer is one of the options or none, nothing is
raised, and how an answer is decorated changes nothing. hypothesis makes the texts, the same ones in
every run."""

import json
import math
from collections.abc import Callable, Sequence

import pytest
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st

from distillery.records import LETTERS
from distillery.teacher.answers import (
    Answer,
    combine_answers,
    distribution,
    in_own_order,
    rotated_order,
)
from distillery.teacher.reading import parse_answer, parse_class, rationale_of

pytestmark = pytest.mark.security

FIXED = settings(
    derandomize=True,
    deadline=None,
    max_examples=150,
    suppress_health_check=[HealthCheck.too_slow],
)

WORDS = ("oven", "river", "rain cloud", "New York", "the moon", "vitamin C", "42", "oak", "Straße")

FRAGMENTS = (
    *("A", "B", "(C)", "D.", "**B**", "oven", "river", "the moon", "42", "Answer:", "answer is"),
    *(
        "The correct answer is",
        "Final answer",
        "\\boxed{",
        "}",
        "{",
        '{"answer": "',
        '"}',
        "[",
        "]",
    ),
    *("```json\n", "\n```", "<think>", "</think>", "<|im_end|>", "Question: ", "or", "and", "not"),
    *("is correct", "I choose", "if", "wait, no", "but", "I am not sure", "\n", " ", ".", ",", "?"),
    *(
        "\ud800",
        "\x00",
        "\u2028",
        "İ",
        "答案：",
        "- ",
        "# ",
        "$",
        "\\(",
        "\\text{",
        "1e999",
        "null",
    ),
)
"""Pieces that mean something to the reader, and characters that have broken readers."""

REASONS = (
    "Bread is warm there",
    "Water flows past it",
    "This follows from the text",
    "People know this well",
    "Its colour tells so",
    "Scurvy heals by it",
    "Nothing here is hard",
)
"""Sentences that name no option."""

LEANING = (
    *("Option A is too small", "The answer is B", "It could be C", "A or B", "One might say D"),
    *("river is wrong", "I first thought of oven", "Answer: C", "oven is correct", "Not A"),
)
"""Sentences that speak for an option, or against one."""

MARKED = (
    "Answer: {}",
    "answer: {}",
    "**Answer:** {}",
    "Answer:\n{}",
    "The answer is {}.",
    "So the correct answer is: {}",
    "Final answer: {}",
    "\\boxed{{{}}}",
    "I would choose {}.",
)

choices = st.lists(st.sampled_from(WORDS), min_size=2, max_size=6, unique=True)
any_text = st.one_of(
    st.text(max_size=60),
    st.lists(st.sampled_from(FRAGMENTS), max_size=14).map("".join),
    st.lists(st.sampled_from(FRAGMENTS), max_size=14).map(" ".join),
)
neutral = st.lists(st.sampled_from(REASONS), max_size=4).map(lambda parts: sentences(parts))
leaning = st.lists(st.sampled_from(REASONS + LEANING), max_size=4).map(
    lambda parts: sentences(parts)
)


def sentences(parts: Sequence[str]) -> str:
    return "".join(f"{part}. " for part in parts)


def decorated(text: str, mark: str, frame: str) -> str:
    return frame.format(f"{mark}{text}{mark}")


@FIXED
@given(any_text, choices, st.booleans())
def test_an_answer_is_one_of_the_options_or_none(
    text: str, options: list[str], cut_off: bool
) -> None:
    assert parse_answer(text, options, cut_off) in {None, *LETTERS[: len(options)]}
    assert parse_class(text, options, cut_off) in {None, *options}
    for by_letter in (True, False):
        reason = rationale_of(text, options, by_letter)
        assert reason == reason.strip()


@FIXED
@given(any_text, st.lists(st.text(min_size=1, max_size=8), min_size=2, max_size=5, unique=True))
def test_options_of_any_characters_raise_nothing(text: str, options: list[str]) -> None:
    own = [f"x{text} {option}" for option in options]
    assert parse_answer(text, options) in {None, *LETTERS[: len(options)]}
    assert parse_class(text, options) in {None, *options}
    if "</think>" not in text and own[0] == own[0].strip():
        assert parse_class(own[0], own) == own[0], "an option as it stands is the answer"
    assert parse_class(json.dumps({"answer": options[0]}), options) == options[0]


@FIXED
@given(any_text, choices)
def test_a_text_that_was_cut_off_says_no_more_than_a_whole_one(
    text: str, options: list[str]
) -> None:
    assert parse_answer(text, options, cut_off=True) in {None, parse_answer(text, options)}
    assert parse_class(text, options, cut_off=True) in {None, parse_class(text, options)}


@FIXED
@given(neutral, choices, st.integers(0, 5), st.sampled_from(MARKED), st.sampled_from(" \n"))
def test_a_reason_and_then_the_answer_reads_the_answer(
    reason: str, options: list[str], number: int, mark: str, between: str
) -> None:
    number %= len(options)
    letter, option = LETTERS[number], options[number]
    for named in (letter, f"({letter})", f"{letter}. {option}", option):
        text = f"{reason}{between}{mark.format(named)}"
        assert parse_answer(text, options) == letter, text
        assert parse_answer(f"<think>The answer is Z, {option}.</think>{text}", options) == letter
    assert parse_class(f"{reason}{between}{mark.format(option)}", options) == option


@FIXED
@given(leaning, choices, st.integers(0, 5), st.sampled_from(MARKED))
def test_whatever_the_reason_says_another_answer_is_never_read(
    reason: str, options: list[str], number: int, mark: str
) -> None:
    number %= len(options)
    text = f"{reason}\n{mark.format(LETTERS[number])}"
    assert parse_answer(text, options) in {None, LETTERS[number]}, text


@FIXED
@given(neutral, choices, st.sampled_from(MARKED), st.sampled_from(MARKED), st.data())
def test_two_answers_are_none(
    reason: str, options: list[str], mark: str, second: str, data: st.DataObject
) -> None:
    one, other = data.draw(st.permutations(range(len(options))))[:2]
    for named in (LETTERS, options):
        twice = f"{reason}{mark.format(named[one])}\n{second.format(named[other])}"
        assert parse_answer(twice, options) is None, twice
        joined = mark.format(f"{named[one]} or {named[other]}")
        assert parse_answer(reason + joined, options) is None, joined


@FIXED
@given(
    choices,
    st.integers(0, 5),
    st.sampled_from(["", "**", "`", '"', "*"]),
    st.sampled_from(["{}", " {}\n", "\n\n{}\t", "{}.", "Answer: {}", "```\n{}\n```", "> {}"]),
    st.sampled_from([str.lower, str.upper, str.title, str]),
)
def test_case_fences_and_blanks_change_no_answer(
    options: list[str], number: int, mark: str, frame: str, case: Callable[[str], str]
) -> None:
    number %= len(options)
    letter, option = LETTERS[number], options[number]
    # STRASSE has a letter more than Straße, and is not read.
    assume(len(case(option)) == len(option))
    assert parse_answer(decorated(letter, mark, frame), options) == letter
    text = decorated(case(option), mark, frame)
    assert parse_answer(text, options) == letter, text
    assert parse_class(text, options) == option, text
    as_json = json.dumps({"reason": "Water flows.", "answer": case(option)})
    assert parse_answer(as_json, options) == letter
    assert parse_answer(f"```json\n{as_json}\n```", options) == letter


@FIXED
@given(choices, st.integers(0, 5), st.sampled_from(MARKED))
def test_a_letter_and_its_text_say_the_same_in_every_order(
    options: list[str], number: int, mark: str
) -> None:
    wanted = options[number % len(options)]
    for turn in range(len(options)):
        order = rotated_order(len(options), turn)
        shown = [options[option] for option in order]
        letter = LETTERS[shown.index(wanted)]
        by_text = parse_answer(mark.format(wanted), shown)
        assert by_text == parse_answer(mark.format(letter), shown) == letter
        assert in_own_order(letter, None, order, LETTERS) == Answer(LETTERS[options.index(wanted)])


tokens = st.sampled_from([*"ABCDE", " A", "(B)", '"C"', "The", "", "▁D", "\ud800"])
log_probabilities = st.one_of(
    st.floats(-30, 1), st.just(-9999.0), st.just(-math.inf), st.just(-1e308), st.just(-1000.0)
)


@FIXED
@given(st.lists(st.tuples(tokens, log_probabilities), max_size=20), st.integers(2, 5))
def test_probabilities_are_those_of_the_letters_and_sum_to_one(
    listed: list[tuple[str, float]], count: int
) -> None:
    letters = LETTERS[:count]
    found = distribution(listed, letters)
    if found is not None:
        assert list(found) == list(letters)
        assert all(0 <= probability <= 1 for probability in found.values())
        assert math.isclose(sum(found.values()), 1)
        assert distribution(listed[::-1], letters) is not None


@FIXED
@given(st.lists(st.sampled_from("ABCD"), min_size=1, max_size=9), st.booleans())
def test_the_label_of_several_answers_is_the_only_one_given_most_often(
    given_letters: list[str], soft: bool
) -> None:
    found = combine_answers([Answer(letter) for letter in given_letters], LETTERS[:4], soft)
    most = max(given_letters.count(letter) for letter in "ABCD")
    winners = [letter for letter in "ABCD" if given_letters.count(letter) == most]
    assert (found.letter if found else None) == (winners[0] if len(winners) == 1 else None)
