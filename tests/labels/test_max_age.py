"""Answers that are too old: asked again and replaced, and no others."""

import asyncio
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest
from chat_endpoint import Call, ChatEndpoint, Reply, good, said
from pydantic import SecretStr
from sqlalchemy import create_engine, update

from distillery.errors import BudgetReached
from distillery.labels.files import read_labels
from distillery.labels.labelling import label
from distillery.labels.quote import quote
from distillery.labels.store import TABLE, LabelStore
from distillery.recipe import PromptRecipe, TeacherRecipe
from distillery.records import Example
from distillery.teacher.endpoint import Endpoint

PROMPT = PromptRecipe()


def example(number: int) -> Example:
    return Example(example_id=f"row-{number}", question=f"After {number}?", choices=("x", "y", "z"))


ROWS = [example(number) for number in range(12)]


class Answers:
    """The label database of a test."""

    def __init__(self, folder: Path) -> None:
        self.url, self.out = f"sqlite:///{folder / 'labels.db'}", folder / "out"

    def label(self, server: ChatEndpoint, **recipe: Any) -> int:
        """Label ROWS and return how many were asked."""
        teacher = TeacherRecipe.model_validate(recipe)
        where = Endpoint(server.url, "gpt-test", SecretStr("key"), "gpt-test", "openai")
        with LabelStore(self.url, max_age=teacher.max_age) as store:
            return asyncio.run(label(ROWS, PROMPT, teacher, where, store, self.out)).asked

    def letters(self) -> dict[str, str]:
        """Return the labels of the last labelling, by row."""
        return {row: label.answer for row, label in read_labels(self.out).items()}

    def age(self, days: float, *rows: str) -> None:
        """Make the answers to these rows older."""
        then = datetime.now(UTC) - timedelta(days=days)
        old = update(TABLE).where(TABLE.c.example_id.in_(rows)).values(created_at=then)
        engine = create_engine(self.url)
        with engine.begin() as connection:
            connection.execute(old)
        engine.dispose()


@pytest.fixture
def answers(tmp_path: Path) -> Answers:
    return Answers(tmp_path)


def test_only_old_answers_are_asked_again_and_replaced(answers: Answers) -> None:
    with ChatEndpoint() as server:
        assert answers.label(server, max_age=30) == 12
        assert answers.label(server, max_age=30) == 0
        answers.age(31, "row-3", "row-4")
        assert answers.label(server) == 0, "without max_age they count for ever"
        before = answers.letters()

        def otherwise(call: Call) -> Reply:
            letter = str(good(call).body["choices"][0]["message"]["content"])
            return said({"A": "B", "B": "C", "C": "A"}[letter])

        server.script = otherwise
        assert answers.label(server, max_age=30) == 2
        after = answers.letters()
        changed = {row for row, letter in after.items() if letter != before[row]}
        assert changed == {"row-3", "row-4"}
        assert answers.label(server, max_age=30) == 0, "the new answers are stored"
        assert answers.label(server) == 0
        assert answers.letters() == after


def test_equal_answers_give_equal_files(answers: Answers) -> None:
    with ChatEndpoint() as server:
        answers.label(server, max_age=30)
        before = {path.name: path.read_bytes() for path in answers.out.iterdir()}
        answers.age(31, *(row.example_id for row in ROWS))
        assert answers.label(server, max_age=30) == 12
    assert {path.name: path.read_bytes() for path in answers.out.iterdir()} == before


def test_an_old_answer_stays_until_its_successor_is_stored(answers: Answers) -> None:
    with ChatEndpoint() as server:
        answers.label(server)
        answers.age(31, *(row.example_id for row in ROWS))
        with pytest.raises(BudgetReached):
            answers.label(server, max_age=30, budget={"calls": 5})
        assert answers.label(server) == 0
        assert answers.label(server, max_age=30) == 7


def test_a_quote_counts_old_answers(answers: Answers) -> None:
    with ChatEndpoint() as server:
        answers.label(server)
    answers.age(31, "row-3")
    for max_age, calls in ((None, 0), (30, 1), (40, 0)):
        with LabelStore(answers.url, max_age=max_age) as store:
            assert quote(ROWS, PROMPT, TeacherRecipe(), "gpt-test", store).calls == calls
