"""A teacher that is asked for the likelihood of the options' texts: one of the run's own, served in
this process."""

import asyncio
import json
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from label_runs import FILES, read_all, read_lines
from own_server import in_this_process

from distillery.errors import DataError, TeacherError
from distillery.inference.batch_student import load_scorer
from distillery.labels.exports import export_rows
from distillery.labels.files import LabelCounts
from distillery.labels.labelling import label
from distillery.labels.questions import questions, refuse_long_options
from distillery.labels.store import LabelStore
from distillery.models.class_tokens import ClassTokens
from distillery.recipe import PromptRecipe, TeacherRecipe
from distillery.records import LONGEST_OPTION, Example
from distillery.serving.student import ServedStudent
from distillery.teacher.endpoint import Endpoint

BY_TEXT = PromptRecipe(system="", user="{question}", answer="text")
OPTIONS = (
    ("oven", "a river bank", "a cloud over the river"),
    ("a", "7", "one of the five choices"),
    ("The oven", "the oven", "oven, or bread", "oven", "o"),
    tuple(f"room {number}" for number in range(26)),
)
ROWS = [
    Example(example_id=f"row-{number}", question=f"Where is bread {number}?", choices=choices)
    for number, choices in enumerate(OPTIONS * 3)
]
NOBODY = "http://127.0.0.1:9/v1"


@pytest.fixture(scope="module")
def folder(tiny_onnx: Callable[..., Path]) -> Path:
    return tiny_onnx("llama")


@pytest.fixture(scope="module")
def server(folder: Path) -> Iterator[str]:
    with in_this_process(ServedStudent(folder, threads=1)) as url:
        yield url


def labelled(
    server: str,
    database: str,
    out: Path,
    rows: list[Example] = ROWS,
    prompt: PromptRecipe = BY_TEXT,
    **settings: Any,
) -> LabelCounts:
    values = {"kind": "local", "soft_labels": True, "attempts": 1, "outage_s": 0, **settings}
    teacher = TeacherRecipe.model_validate(values).for_own_model(prompt)
    endpoint = Endpoint(server, "tiny", None, "tiny", "openai")
    with LabelStore(database) as store:
        return asyncio.run(label(rows, prompt, teacher, endpoint, store, out))


def scored(folder: Path, rows: list[Example]) -> list[dict[str, float]]:
    """Each row's probabilities by letter, as batch inference has them."""
    scorer = load_scorer(folder, threads=1)
    found = scorer.probabilities([scorer.render(row, BY_TEXT) for row in rows])
    return [dict(zip(row.keys, each, strict=True)) for row, each in zip(rows, found, strict=True)]


def test_labels_have_the_scorers_probabilities(
    server: str, folder: Path, url: str, tmp_path: Path
) -> None:
    counts = labelled(server, url, tmp_path / "out")
    assert (counts.accepted, counts.asked) == (len(ROWS), len(ROWS))
    labels = read_lines(tmp_path / "out" / "labels.jsonl")
    train = read_lines(tmp_path / "out" / "train_data.jsonl")
    for row, expected, one, learnt in zip(ROWS, scored(folder, ROWS), labels, train, strict=True):
        best = max(expected, key=expected.__getitem__)
        assert one["answer"] == best
        # Of 26 options, the server tells the 20 likeliest.
        assert one["distribution"] == pytest.approx(
            expected, abs=1e-6 if len(row.choices) <= 20 else 0.02
        )
        assert one["confidence"] == one["distribution"][best]
        said = row.choices[row.keys.index(best)]
        assert learnt == {"Question": row.question, "Answer": said}
    again = labelled(NOBODY, url, tmp_path / "again")
    assert (again.accepted, again.asked) == (len(ROWS), 0), "all answers are in the store"
    assert read_all(tmp_path / "again") == read_all(tmp_path / "out")
    with LabelStore(url) as store:
        assert export_rows(store, tmp_path / "rows.jsonl", "question-answer") == len(ROWS)
    exported = read_lines(tmp_path / "rows.jsonl")
    assert sorted(map(json.dumps, exported)) == sorted(map(json.dumps, train))


def test_hard_labels_have_no_probabilities(server: str, url: str, tmp_path: Path) -> None:
    counts = labelled(server, url, tmp_path / "out", soft_labels=False)
    assert counts.accepted == len(ROWS)
    assert all(one["distribution"] is None for one in read_lines(tmp_path / "out" / FILES[0]))


def test_options_of_one_text_share_its_probability_and_are_no_label(
    server: str, folder: Path, url: str, tmp_path: Path
) -> None:
    row = ROWS[0]
    (shares,) = scored(folder, [row])
    likeliest = row.choices[row.keys.index(max(shares, key=shares.__getitem__))]
    other = next(text for text in row.choices if text != likeliest)
    rows = [
        row.model_copy(update={"example_id": "clear", "choices": (other, likeliest, other)}),
        row.model_copy(update={"example_id": "unclear", "choices": (likeliest, other, likeliest)}),
    ]
    taken = {"minimum_accepted": 0}
    counts = labelled(server, url, tmp_path / "out", rows, filters=taken)
    assert (counts.accepted, counts.rejected) == (1, 1)
    (one,) = read_lines(tmp_path / "out" / "labels.jsonl")
    assert (one["example_id"], one["answer"]) == ("clear", "B")
    assert one["distribution"] == pytest.approx(scored(folder, rows)[0], abs=1e-6)
    assert one["distribution"]["A"] == one["distribution"]["C"]
    (rejected,) = read_lines(tmp_path / "out" / "rejected.jsonl")
    assert rejected == {
        "example_id": "unclear",
        "reason": "two options have the text of the answer",
        "raw": likeliest,
    }
    again = labelled(NOBODY, url, tmp_path / "again", rows, filters=taken)
    assert again.asked == 0, "an answer that is no label is not asked for again"


def test_an_option_that_the_server_would_refuse_is_told_beforehand(
    server: str, url: str, tmp_path: Path
) -> None:
    longest = ROWS[0].model_copy(update={"choices": ("o" * LONGEST_OPTION, "oven")})
    refuse_long_options([longest])
    with pytest.raises(TeacherError, match=r"0 of 1 rows have a label.*longer than the teacher's"):
        labelled(server, url, tmp_path / "out", [longest])
    longer = longest.model_copy(update={"choices": ("oven", "o" * (LONGEST_OPTION + 1))})
    with pytest.raises(DataError) as caught:
        refuse_long_options([longest, longer])
    assert str(caught.value).startswith(
        "row row-0 ('Where is bread 0?'): option 2 has 16,385 characters, and the run's own "
        "teacher is asked by text for options of at most 16,384; shorten it, remove the row, or "
    )
    with pytest.raises(TeacherError, match=r"400: structured_outputs\.choice"):
        labelled(server, url, tmp_path / "more", [longer])


def test_a_request_by_text_is_another_one() -> None:
    """Its options count, in any order, since the prompt need not show them."""
    teacher, row = TeacherRecipe(kind="local"), ROWS[0]

    def key(row: Example, prompt: PromptRecipe) -> str:
        (question,) = questions(row, prompt, teacher, "tiny")
        return question.key

    shown = PromptRecipe(user="{question}\n{choices}")
    by_text = shown.model_copy(update={"answer": "text"})
    assert key(row, shown) != key(row, by_text)
    turned = row.model_copy(update={"choices": row.choices[::-1]})
    other = row.model_copy(update={"choices": ("oven", "a river bank")})
    assert key(row, BY_TEXT) == key(turned, BY_TEXT)
    assert len({key(each, BY_TEXT) for each in (row, other, ROWS[1])}) == 3


def test_an_answer_is_that_of_its_text_in_any_order(server: str, url: str, tmp_path: Path) -> None:
    labelled(server, url, tmp_path / "out", ROWS[:1])
    turned = [ROWS[0].model_copy(update={"choices": ROWS[0].choices[::-1]})]
    assert labelled(NOBODY, url, tmp_path / "turned", turned).asked == 0
    (first,) = read_lines(tmp_path / "out" / "labels.jsonl")
    (second,) = read_lines(tmp_path / "turned" / "labels.jsonl")
    letters = dict(zip("ABC", "CBA", strict=True))
    assert second["answer"] == letters[first["answer"]]
    assert second["distribution"] == {
        letter: first["distribution"][letters[letter]] for letter in "ABC"
    }


def test_prompts_that_show_the_options_may_show_them_in_several_orders(
    server: str, url: str, tmp_path: Path
) -> None:
    prompt = PromptRecipe(system="", user="{question}\n{choices}", answer="text")
    counts = labelled(server, url, tmp_path / "out", ROWS[:1], prompt, answers={"orders": 3})
    assert counts.asked == 3
    (one,) = read_lines(tmp_path / "out" / "labels.jsonl")
    assert sum(one["distribution"].values()) == pytest.approx(1)


def test_a_class_that_begins_another_keeps_its_own_probability(
    tiny_onnx: Callable[..., Path], url: str, tmp_path: Path
) -> None:
    """A teacher of the run's own says each class as a whole, like a text."""
    folder = shutil.copytree(tiny_onnx("llama"), tmp_path / "classifier")
    names = ("order", "order status", "Order", "none")
    ClassTokens(classes=names, tokens=(301, 300, 302, 305)).write(folder)
    prompt = PromptRecipe(system="", user="{text}", answer="class")
    rows = [row.model_copy(update={"choices": (), "classes": names}) for row in ROWS]
    scorer = load_scorer(folder, threads=1)
    expected = scorer.probabilities([scorer.render(row, prompt) for row in rows])
    with in_this_process(ServedStudent(folder, threads=1)) as server:
        labelled(server, url, tmp_path / "out", rows, prompt)
    labels = read_lines(tmp_path / "out" / "labels.jsonl")
    for one, shares in zip(labels, expected, strict=True):
        assert one["answer"] == names[shares.index(max(shares))]
        assert one["distribution"] == pytest.approx(dict(zip(names, shares, strict=True)), abs=1e-6)
