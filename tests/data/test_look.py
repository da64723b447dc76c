"""What is found in tables as people bring them: columns, classes, bad rows and doubts."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from texts import texts, write_csv

from distillery.data.look import (
    Look,
    contradictions,
    count_copies,
    count_near_duplicates,
    doubtful_labels,
    lengths,
    look,
    one_typing_error,
    same_spelling,
)
from distillery.errors import DataError


def renamed(rows: list[dict[str, Any]], text: str, label: str) -> list[dict[str, Any]]:
    return [{text: row["text"], label: row["label"]} for row in rows]


def look_at(tmp_path: Path, rows: list[dict[str, Any]], **named: Any) -> Look:
    if all(isinstance(value, str | int) for row in rows for value in row.values()):
        return look([Path(write_csv(tmp_path / "rows.csv", rows))], **named)
    file = tmp_path / "rows.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return look([file], **named)


def refusal(tmp_path: Path, rows: list[dict[str, Any]], **named: Any) -> str:
    with pytest.raises(DataError) as caught:
        look_at(tmp_path, rows, **named)
    assert "\n" not in str(caught.value)
    return str(caught.value)


@pytest.mark.parametrize(
    ("text", "label", "reasons"),
    [
        ("Message", "Intent", ("by name", "by name")),
        ("was", "wer", ("texts that hardly ever repeat", "few values that repeat")),
        ("utterance_", "nr", ("by name", "few values that repeat")),
    ],
)
def test_columns_are_found_by_name_or_content(
    tmp_path: Path, text: str, label: str, reasons: tuple[str, str]
) -> None:
    rows = [{"number": n, **row} for n, row in enumerate(renamed(texts(60, 20), text, label))]
    found = look_at(tmp_path, rows)
    assert found.chosen == ((text,), label, *reasons, "classify", None)
    assert len(found.answered) == 60
    assert found.unanswered == 20
    assert found.classes == {"bread": 20, "cloud": 20, "river": 20}


def test_a_title_stands_ahead_of_the_text_and_named_columns_win(tmp_path: Path) -> None:
    rows = [{"title": f"no {n}", **row, "year": n % 3} for n, row in enumerate(texts(30))]
    assert look_at(tmp_path, rows).chosen.texts == ("title", "text")
    found = look_at(tmp_path, rows, texts=["text"], label="year")
    named = ("named by --text", "named by --label")
    assert found.chosen == (("text",), "year", *named, "classify", None)
    assert look_at(tmp_path, rows).rows[3].example.question == f"no 3\n{rows[3]['text']}"


def test_a_topic_in_free_words_is_no_label(tmp_path: Path) -> None:
    rows = [{**row, "topic": f"about thing {n}"} for n, row in enumerate(texts(30))]
    assert look_at(tmp_path, rows).chosen.label == "label"


OPTIONS = ["an oven", "a bridge", "rain"]


@pytest.mark.parametrize(
    "written",
    [
        lambda options: options,
        lambda options: {"label": ["A", "B", "C"], "text": options},
        lambda options: json.dumps(options),
    ],
)
def test_rows_with_options_are_found(tmp_path: Path, written: Callable[[Any], Any]) -> None:
    rows = [
        {"question": f"What is {n}?", "options": written(OPTIONS), "tags": ["a", "b"]}
        for n in range(20)
    ]
    for n, row in enumerate(rows[:12]):
        row["answer"] = "ABC"[n % 3] if n % 2 else OPTIONS[n % 3]
    found = look_at(tmp_path, rows)
    assert (found.kind, found.chosen.options, found.chosen.label) == ("choice", "options", "answer")
    assert [row.example.answer_key for row in found.answered] == list("ABC") * 4
    assert (found.unanswered, found.rows[0].example.choices) == (8, tuple(OPTIONS))
    unusual = [
        {"question": row["question"], "offers": row["options"], "right": row.get("answer", "")}
        for row in rows
    ]
    assert look_at(tmp_path, unusual, label="right", kind="choice").chosen.options == "offers"


def test_what_is_not_clear_of_options_is_one_line(tmp_path: Path) -> None:
    rows: list[dict[str, Any]]
    rows = [{"question": f"What is {n}?", "choices": OPTIONS, "key": "A"} for n in range(9)]
    assert "no column looks like the right option among 'question', 'key'" in refusal(
        tmp_path, rows
    )
    both = [{**row, "options": OPTIONS} for row in rows]
    assert "any of the columns 'choices', 'options'; leave the others out" in refusal(
        tmp_path, both
    )
    two = [{**row, "label": "A", "answer": "A"} for row in rows]
    assert "may be in any of the columns 'label', 'answer'; name it" in refusal(tmp_path, two)
    assert "no column looks like options among 'text', 'label'" in refusal(
        tmp_path, texts(30), kind="choice"
    )
    # Lists of texts under another name are no options, unless the task is named.
    tagged = [{**row, "tokens": ["a", "b"]} for row in texts(30)]
    assert look_at(tmp_path, tagged).kind == "classify"
    repeated = [{**row, "key": "home", "choices": ["home", "home", "inn"]} for row in rows]
    assert "'home' is the text of several options, so write the label" in refusal(
        tmp_path, repeated, label="key"
    )


def test_options_that_are_not_seen_as_such_are_told(tmp_path: Path) -> None:
    rows = [
        {"Frage": f"Was ist {n}?", "Antworten": [f"a{n}", f"b{n}"], "Loesung": f"b{n}"}
        for n in range(9)
    ]
    hint = "if 'Antworten' holds the options of each row, say --task choice too"
    assert hint in refusal(tmp_path, rows)
    assert refusal(tmp_path, rows, label="Loesung").startswith(
        "'Loesung' says which one of 'Antworten' is right: where the rows have options of their "
        "own, say --task choice --text Frage --label Loesung, and else"
    )
    assert look_at(tmp_path, rows, label="Loesung", kind="choice").chosen.options == "Antworten"
    apart = [
        {"question": f"Which {n}?", "option_a": "oven", "option_b": "rain", "answer": "AB"[n % 2]}
        for n in range(20)
    ]
    assert refusal(tmp_path, apart).startswith(
        "the columns 'option_a', 'option_b' look like options of each row; put them into one column"
    )
    assert look_at(tmp_path, apart, kind="classify", label="answer", texts=["question"]).classes
    lettered = [
        {"question": f"Which {n}?", "A": f"oven {n}", "B": "rain", "answer": "AB"[n % 2]}
        for n in range(20)
    ]
    assert refusal(tmp_path, lettered).startswith("the columns 'A', 'B' look like options of each")
    said = [{**row, "answer": row[row["answer"]]} for row in lettered]
    assert "; if 'A', 'B' are the options of each row, put them into one column" in refusal(
        tmp_path, said
    )
    assert "; if 'A', 'B' are the options of each row" in refusal(tmp_path, said, kind="choice")
    assert refusal(tmp_path, said, label="answer").startswith(
        "the columns 'A', 'B' look like options of each"
    )
    votes = [
        {"text": f"A message {n}", "a": "xy"[n % 2], "b": "xy"[n // 3 % 2], "label": "xy"[n % 2]}
        for n in range(100)
    ]
    assert look_at(tmp_path, votes, label="label").kind == "classify"
    by_letter = [{**row, "label": "ab"[n % 2]} for n, row in enumerate(votes)]
    assert refusal(tmp_path, by_letter, label="label").startswith("the columns 'a', 'b' look like")
    marks = [{**row, "a": n % 7, "b": n % 3} for n, row in enumerate(texts(30))]
    assert look_at(tmp_path, marks).chosen.label == "label"
    piped = [{"question": f"Which {n}?", "options": f"{n}|x", "answer": f"{n}"} for n in range(20)]
    for kind in (None, "choice"):
        assert refusal(tmp_path, piped, kind=kind).endswith(
            "; if 'options' holds the options of each row, write them as a list of texts such as "
            '["bank", "library"], in place of \'0|x\''
        )


def test_a_question_with_two_right_options_is_told(tmp_path: Path) -> None:
    rows = [
        {"question": "Where?", "choices": ["inn", "bank"], "answer": "inn"},
        {"question": "Where?", "choices": ["bank", "inn"], "answer": "A"},
        {"question": "Where?", "choices": ["bank", "inn"], "answer": "B"},
    ]
    (line,) = contradictions(look_at(tmp_path, rows).rows)
    assert line.startswith("one question, several right options: 'inn' in ")
    assert "rows.jsonl:1, 'bank' in " in line


def test_what_stays_open_is_one_line_with_the_columns(tmp_path: Path) -> None:
    rows = texts(30)
    two = [{**row, "topic": row["label"]} for row in rows]
    assert refusal(tmp_path, two) == (
        "the label may be any of the columns 'label', 'topic'; name it, such as --label label"
    )
    two = [{**row, "message": row["text"]} for row in rows]
    assert "any of the columns 'text', 'message'; name it, such as --text text, or" in refusal(
        tmp_path, two
    )
    none = [{"text": row["text"]} for row in rows]
    assert "no column looks like a label" in refusal(tmp_path, none)
    none = [{"label": row["label"]} for row in rows]
    assert "no column besides 'label' looks like texts" in refusal(tmp_path, none)
    assert refusal(tmp_path, rows, label="tone") == (
        "--label tone: no such column, only 'text', 'label'"
    )
    assert "it is the label's column, too" in refusal(
        tmp_path, rows, texts=["label"], label="label"
    )
    one = [{**row, "label": "bread"} for row in rows]
    assert "has 1 labels, and a classifier needs two or more" in refusal(tmp_path, one)


def test_a_file_that_is_no_table_with_names_is_one_line(tmp_path: Path) -> None:
    rows = texts(30)
    headless = renamed(rows, str(rows[0]["text"]), "bread")
    assert "put the names of the columns into the file's first line" in refusal(tmp_path, headless)
    file = tmp_path / "semi.csv"
    file.write_text("text;label\na, b;c\n")
    with pytest.raises(DataError, match="separated by semicolons; save it with commas"):
        look([file])
    file.write_text("text,label\n")
    with pytest.raises(DataError, match="empty, without a single row"):
        look([file])


def test_bad_rows_are_told_and_the_others_read(tmp_path: Path) -> None:
    file = tmp_path / "rows.jsonl"
    lines = [json.dumps(row) for row in texts(30)]
    lines[2] = '{"text": "'
    lines[4] = json.dumps({"text": "  ", "label": "bread"})
    lines[6] = json.dumps({"text": "of two", "label": ["bread", "river"]})
    file.write_text("\n".join(lines) + "\n")
    found = look([file])
    assert len(found.rows) == 27
    assert [str(row).split(": ")[:2] for row in found.bad] == [
        [f"{file}:3", found.bad[0].reason.split(": ")[0]],
        [f"{file}:5", "text"],
        [f"{file}:7", "label"],
    ]
    assert "no JSON object" in found.bad[0].reason


def test_ids_count_only_if_all_are_there_and_different(tmp_path: Path) -> None:
    rows = [{"id": n, **row} for n, row in enumerate(texts(30))]
    assert look_at(tmp_path, rows).with_ids
    rows[3]["id"] = rows[4]["id"]
    assert not look_at(tmp_path, rows).with_ids
    rows[3]["id"] = ""
    assert not look_at(tmp_path, rows).with_ids


def test_copies_contradictions_and_near_duplicates(tmp_path: Path) -> None:
    rows = texts(60)
    rows.append({"text": rows[0]["text"].upper(), "label": "bread"})
    rows.append({"text": rows[1]["text"], "label": "cloud"})
    rows.append({"text": f"{rows[2]['text']} indeed", "label": ""})
    found = look_at(tmp_path, rows)
    assert count_copies(found.rows) == 2
    assert count_near_duplicates(found.rows) == 3
    file = tmp_path / "rows.csv"
    assert contradictions(found.rows) == [
        f"one text, several labels: 'river' in {file}:3, 'cloud' in {file}:63; correct one"
    ]
    longest = max(rows, key=lambda row: len(row["text"]))
    assert lengths(found.rows).longest == len(longest["text"])


def test_labels_that_may_be_one_class_are_told(tmp_path: Path) -> None:
    rows = texts(60)
    rows[0]["label"] = "Bread"
    rows[1]["label"] = "rivre"
    lines = doubtful_labels(look_at(tmp_path, rows))
    file = tmp_path / "rows.csv"
    assert [line.split(";")[0] for line in lines] == [
        f"{file}:2: label 'Bread' (1 row) differs by case, spaces or punctuation from 'bread' "
        "(19 rows)",
        f"{file}:3: label 'rivre' (1 row) differs by one letter from 'river' (19 rows)",
    ]
    assert doubtful_labels(look_at(tmp_path, texts(60))) == []


@pytest.mark.parametrize(
    ("first", "second", "alike"),
    [
        ("refund", "refunds", True),
        ("refund", "refnud", True),
        ("refund", "revund", True),
        ("refund", "rebind", False),
        ("card 1", "card 2", False),
        ("aab", "ab", True),
    ],
)
def test_one_typing_error(first: str, second: str, alike: bool) -> None:
    assert one_typing_error(first, second) is alike
    assert one_typing_error(second, first) is alike


def test_signs_alone_are_labels_of_their_own() -> None:
    assert same_spelling("Book flight", "book_flight")
    assert not same_spelling("+", "-")
