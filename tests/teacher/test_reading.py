"""Reading answers: in each form that teachers write, of options and of classes."""

import json
import random
import time
from pathlib import Path
from typing import Any

import pytest

from distillery.records import LETTERS
from distillery.teacher.reading import parse_answer, parse_class, rationale_of

CHOICES = ("bank", "vitamin C", "A dog")
FIVE = ("bank", "vitamin C", "A dog", "the answer", "New York.")
CLASSES = ("order", "order status", "credit_limit", "credit_score", "Refund", "none of these")

WRITTEN = Path(__file__).with_name("written_answers")
"""Answers in the styles of several families of models, written for this test: style, options,
text, and the answer that a careful reader takes from it, or null. The reader was developed by
development.jsonl; held_out.jsonl was written before it and is for measuring alone."""


def written(file: str) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (WRITTEN / file).read_text("utf-8").splitlines()]


@pytest.mark.parametrize(
    ("file", "precision", "recall"),
    [("development.jsonl", 0.995, 0.95), ("held_out.jsonl", 0.995, 0.95)],
)
def test_precision_and_recall_on_written_answers(
    file: str, precision: float, recall: float
) -> None:
    rows = written(file)
    assert len(rows) >= 200
    read = right = 0
    wrong = []
    for row in rows:
        answer = parse_answer(row["text"], row["options"])
        read += answer is not None
        right += answer is not None and answer == row["answer"]
        if answer is not None and answer != row["answer"]:
            wrong.append((row["text"], answer, row["answer"]))
    answered = sum(row["answer"] is not None for row in rows)
    assert right >= precision * read, wrong
    assert right >= recall * answered, f"{right} of {answered} answers are read"


REASONS = (
    "Option {other} is too small, so it is not that.",
    "{other} is wrong.",
    "It could be {other} or {third}.",
    "One might think the answer is {other}.",
    "The answer is not {other}.",
    "({other}) {text} is the most common mistake.",
    "A teacher would say more.",
    "I first thought of {other}, {text}.",
    "- **{other}**: no.",
    "Is it {other}?",
)
ANSWERS = (
    "Answer: {letter}",
    "**Answer:** ({letter})",
    "So the answer is {letter}, {own}.",
    "The correct answer is **{letter}. {own}**",
    "\\boxed{{{letter}}}",
    '```json\n{{"answer": "{letter}"}}\n```',
    "I would choose option {letter}.",
    "Therefore, {letter} is the correct answer.",
    "{letter}",
)


def test_the_answer_after_any_reason_is_read() -> None:
    chance = random.Random(7)
    for _ in range(500):
        options = chance.sample(["bank", "mall", "new york", "a shop", "oak tree", "7", "red"], 4)
        letter, other, third = chance.sample(LETTERS[:4], 3)
        values = {"letter": letter, "other": other, "third": third}
        values["own"] = options[LETTERS.index(letter)]
        values["text"] = options[LETTERS.index(other)]
        reasons = [reason.format(**values) for reason in chance.choices(REASONS, k=3)]
        answer = chance.choice(ANSWERS).format(**values)
        text = "\n".join([*reasons, answer])
        assert parse_answer(text, options) == letter, text
        second = f"{text}\nAnswer: {other}"
        assert parse_answer(second, options) is None, second


def test_questions_and_letters_in_prose_are_no_answers() -> None:
    for text in ("A bank is a place.", "I need a dog.", "Plan B failed.", "C. S. Lewis wrote it."):
        assert parse_answer(text, FIVE) is None, text
    nine = [f"text {number}" for number in range(9)]
    assert parse_answer("I, as a language model, have no opinion.", nine) is None


def test_reading_takes_time_in_proportion_to_the_text() -> None:
    started = time.process_time()
    for part in ("the answer is B. ", "Answer: most likely ", "\\boxed{", '{"a":', "- ", "A, B "):
        parse_answer(part * 5000, CHOICES)
    assert time.process_time() - started < 4


@pytest.mark.parametrize("gap", ["\n", "*\n", " \n", ">", ".", ")", "-", ":", ","])
@pytest.mark.parametrize("before", ["A", "answer", "oven."])
def test_a_long_gap_takes_time_in_proportion_to_its_length(before: str, gap: str) -> None:
    text = before + gap * 20_000 + "x"
    started = time.process_time()
    parse_answer(text, CHOICES)
    rationale_of(text, CHOICES, by_letter=True)
    assert time.process_time() - started < 2


@pytest.mark.parametrize(
    "text",
    [
        "B",
        "(B)",
        "[B]",
        "B.",
        "B)",
        "b",
        " B \n",
        "**B**",
        "`B`",
        "B) vitamin C",
        "(B) vitamin C",
        "B. Because it heals scurvy",
        "**B)** vitamin C",
        "B - vitamin C",
        "B\nIt heals scurvy.",
        "vitamin C",
        '"Vitamin  c."',
        "Answer: B",
        "Answer:\n\n(B)",
        "**Answer:** B",
        "The answer is B.",
        "The correct answer is: (B) vitamin C",
        "So, the best choice is B",
        "Option B",
        "Answer: vitamin C",
        "A good choice is B",
        "Among A through E, the answer is B, vitamin C.",
        "Option A is too small, so it is not that.\nAnswer: B",
        "It heals scurvy. A dog does not.\n\nFinal answer: **B**",
        "<think>Perhaps A. No, (C).</think>\n\nB",
        "<think>Answer: A</think>Answer: B",
    ],
)
def test_an_answer_is_read(text: str) -> None:
    assert parse_answer(text, FIVE) == "B"


@pytest.mark.parametrize(
    "text",
    [
        "",
        "F",
        "(F)",
        "AB",
        "A good way is by sea",
        "A or B",
        "A, B",
        "A. B",
        "(A) or (B)",
        "B) bank",
        "B) or C)",
        "Both A and B",
        "Answer: A or B",
        "Answer: A\nAnswer: B",
        "Answer: unknown",
        "I think it is a bank",
        "I can't tell",
        "<think>The answer is B",
        "none of them",
        "error: too many requests",
    ],
)
def test_text_that_names_no_option_or_several_is_none(text: str) -> None:
    assert parse_answer(text, FIVE) is None


def test_an_options_text_may_start_with_a_letter_or_hold_one() -> None:
    assert parse_answer("A dog", FIVE) == "C"
    assert parse_answer("Answer: A dog", FIVE) == "C"
    assert parse_answer("C) A dog", FIVE) == "C"
    assert parse_answer("New York", FIVE) == "E"
    assert parse_answer("The answer", FIVE) == "D"
    assert parse_answer("A", ("B", "C")) == "A"
    assert parse_answer("B", ("B", "C")) is None, "the letter says the second, the text the first"
    assert parse_answer("same", ("same", "same")) is None


@pytest.mark.parametrize(
    "text",
    [
        '{"answer": "B"}',
        '["B"]',
        '\n{\n  "answer":"B"\n}\n',
        '{"reason": "It heals scurvy", "answer": "B"}',
        '<think>Perhaps {"answer": "A"}?</think>\n{"answer": "B"}',
        '```json\n{"answer": "b"}\n```',
        'Sure: {"answer": "B) vitamin C"}',
        '{"reason": "{A} is out", "letter": "B"}',
        "B",
        "Answer: B",
        "(B) vitamin C",
    ],
)
def test_json_is_read_and_what_an_endpoint_without_it_says(text: str) -> None:
    assert parse_answer(text, CHOICES) == "B"


@pytest.mark.parametrize(
    "text",
    [
        "",
        "{}",
        "null",
        "1",
        "NaN",
        '{"answer": null}',
        '{"answer": 1}',
        '{"answer": ["B"]}',
        '{"answer": "D"}',
        '{"answer": "AB"}',
        '{"answer": ""}',
        '{"letters": "B"}',
        '{"answer": "B"',
        "[" * 100_000,
        '{"a":' * 100_000,
    ],
    ids=lambda text: text[:20] or "empty",
)
def test_json_without_one_of_the_letters_is_none(text: str) -> None:
    assert parse_answer(text, CHOICES) is None


@pytest.mark.parametrize(
    ("text", "rationale"),
    [
        ("It heals.\nA dog does not.\n\nAnswer: B", "It heals.\nA dog does not."),
        ("It heals.\n**Answer:** B", "It heals."),
        ("<think>Well.\nAnswer: A</think>\nIt heals.\nThe answer is B.", "It heals."),
        (
            "First: Answer it.\nAnswer: A\nNo.\nAnswer: B",
            "First: Answer it.\nAnswer: A\nNo.",
        ),
        ("It heals. A dog does not. So the answer is B.", "It heals. A dog does not."),
        ("It heals.\n\nB", "It heals."),
        ("Assistant:\nIt heals.\nSo it fits.\nAnswer: B", "It heals.\nSo it fits."),
        ("Answer: B\n\nIt heals.", ""),
        ("Answer: B", ""),
        ("B", ""),
        ("", ""),
    ],
)
def test_the_rationale_is_what_precedes_the_answer(text: str, rationale: str) -> None:
    assert rationale_of(text, CHOICES, by_letter=True) == rationale


def test_a_rationales_answer_is_its_marked_line() -> None:
    assert parse_answer("A dog is no cure, C is out.\nAnswer: B", CHOICES) == "B"


@pytest.mark.parametrize(
    ("text", "name"),
    [
        ('{"answer": "credit_limit"}', "credit_limit"),
        (' {"answer":"order status"}\n', "order status"),
        ('{"answer": "refund"}', "Refund"),
        ('"refund"', "Refund"),
        ("order", "order"),
        ("order status", "order status"),
        ("  Order  Status.\n", "order status"),
        ("**REFUND**", "Refund"),
        ("“none of these”", "none of these"),
        ("Answer: credit_score", "credit_score"),
        ("**Answer:** order", "order"),
        ("It was paid twice.\n\nThe answer is Refund.", "Refund"),
        ("<think>Perhaps order. No.</think>Refund", "Refund"),
        ("<think>Answer: order</think>\nAnswer: Refund", "Refund"),
        ("This is no order. The answer is order status, since it asks for one.", "order status"),
        ('```json\n{"answer": "refund"}\n```', "Refund"),
    ],
)
def test_a_class_is_read(text: str, name: str) -> None:
    assert parse_class(text, CLASSES) == name


@pytest.mark.parametrize(
    "text",
    [
        "",
        "<think>order",
        "{}",
        '{"answer": "parcel"}',
        '{"answer": null}',
        '{"answer": ["order", "Refund"]}',
        "[" * 100_000,
        "order or Refund",
        "Answer: order\nAnswer: Refund",
        "It is about an order",
        "credit",
        "credit limit",
    ],
)
def test_no_class_or_several_are_none(text: str) -> None:
    assert parse_class(text, CLASSES) is None


def test_case_and_numbers_tell_classes_apart() -> None:
    assert parse_class("bill", ("Bill", "bill")) == "bill"
    assert parse_class("BILL", ("Bill", "bill")) is None
    for text in ("10", '{"answer": 10}', '{"answer": "10"}', "Answer: 10"):
        assert parse_class(text, ("1", "10")) == "10"


@pytest.mark.parametrize(
    ("name", "other"),
    [
        ("definitely yes", "yes"),
        ("Likely", "Unlikely"),
        ("letter of credit", "credit"),
        ("option trading", "trading"),
        ("Option A", "A"),
        ("Choice 1", "1"),
        ("hence", "thus"),
        ("clearly spam", "spam"),
    ],
)
def test_a_class_that_begins_as_a_lead_in_does_is_read_whole(name: str, other: str) -> None:
    as_json = json.dumps({"answer": name})
    for text in (name, as_json, f"Sure: {as_json}", f"Answer: {name}", f"The answer is {name}."):
        assert parse_class(text, (name, other)) == name, text
    assert parse_class(f"Answer: {other}", (name, other)) == other


def test_a_text_or_json_value_that_is_a_class_is_taken_as_it_is() -> None:
    names = ("...", "$", "> 5", "- x", "*", "</s>", "x")
    for name in names:
        as_json = json.dumps({"answer": name})
        for text in (name, as_json, json.dumps(name), f"```json\n{as_json}\n```"):
            assert parse_class(text, names) == name, text
    assert parse_class("ß", ("ß", "ss")) == "ß"


def test_a_class_in_a_denial_is_none() -> None:
    assert parse_class("I don't think spam is correct", ("spam", "ham")) is None


@pytest.mark.parametrize(
    ("text", "answer"),
    [
        ("A", "A"),
        ("B. river, since", "B"),
        ("(B) It is", "B"),
        ("river", "B"),
        ('{"answer": "B"}', "B"),
        ('{"answer": "B', None),
        ("I think it is A, since bread is warm there. However, the option B also", None),
        ("The answer is A, if we", None),
        ("The answer is A", None),
        ("A, if we", None),
        ("A or", None),
        ("moon", None),
    ],
)
def test_a_text_that_was_cut_off_must_begin_with_its_answer(text: str, answer: str | None) -> None:
    options = ("oven", "river", "moon", "moonlight")
    assert parse_answer(text, options, cut_off=True) == answer
