"""The requests for a row: its prompt in each order of its options, each with its key."""

import heapq
from collections.abc import Callable, Iterable, Mapping, Sequence
from hashlib import sha256
from typing import Any, NamedTuple

from distillery.data.readers import shown
from distillery.errors import DataError
from distillery.prompts import Message, render_messages
from distillery.recipe import PromptRecipe, Recipe, TeacherRecipe
from distillery.records import LONGEST_OPTION, Example, digest_of
from distillery.teacher.answers import rotated_order


def request_key(
    identity: str,
    messages: list[Message],
    settings: TeacherRecipe,
    vote: int = 0,
    schema: Mapping[str, Any] | None = None,
    choice: Sequence[str] = (),
) -> str:
    """Return the key that the label store keeps the answer under, a SHA-256 in hex.

    It covers what is asked of whom: the teacher's identity, the messages, the temperature, the
    token limit, whether log-probabilities or JSON are wanted, the schema that a written answer is
    held to, the texts that end it, the texts of which the likeliest is the answer (`choice`), and
    the number of the vote. It covers neither the URL, the SDK and the API key nor the position of
    the row, nor the order in which the schema names the fields, which an answer is put into when it
    is read, nor that of the texts: if these change, nothing is asked again.
    """
    asked: dict[str, Any] = {
        "teacher": identity,
        "messages": messages,
        "temperature": settings.temperature,
        "max_tokens": settings.max_tokens,
        "soft_labels": settings.asks_log_probabilities,
    }
    # Added only where they are used, so that answers from before these settings existed are found.
    if settings.answers.form == "json":
        asked["form"] = "json"
        if schema is not None:
            asked["schema"] = schema
    if settings.stop:
        asked["stop"] = settings.stop
    if choice:
        asked["choice"] = sorted(choice)
    if vote:
        asked["vote"] = vote
    return digest_of(asked)


class Question(NamedTuple):
    """One request for a row. `order[i]` is the index of the i-th option shown in row.options.
    `by_text`: the answer is the likeliest of the options' texts."""

    key: str
    messages: list[Message]
    order: tuple[int, ...]
    row: Example
    by_text: bool = False

    @property
    def names(self) -> tuple[str, ...]:
        """Return what the answer may say: the letters of the options, from A, the classes, or the
        options' texts, two of which may be equal."""
        return self.row.options if self.by_text else self.row.keys

    @property
    def schema(self) -> dict[str, Any] | None:
        """Return the schema that a written answer meets; None for any other answer."""
        return schema_of(self.row)

    @property
    def options(self) -> list[str]:
        """Return the texts of the options in the order shown."""
        return [self.row.options[option] for option in self.order]


def schema_of(row: Example) -> dict[str, Any] | None:
    """Return the schema that a row's written answer meets; None for any other answer."""
    return row.format.json_schema if row.format else None


def questions(
    row: Example, prompt: PromptRecipe, recipe: TeacherRecipe, identity: str
) -> list[Question]:
    """Return the requests for a row: for each of answers.orders, each of answers.votes. Rows
    without options of their own have one order."""
    asked = []
    schema, by_text = schema_of(row), prompt.answer == "text"
    orders = min(recipe.answers.orders, len(row.choices)) if row.choices else 1
    for number in range(orders):
        order = rotated_order(len(row.options), number)
        shown = row
        if number:
            choices = tuple(row.choices[option] for option in order)
            shown = row.model_copy(update={"choices": choices})
        messages = render_messages(shown, prompt)
        if recipe.answers.form == "rationale":
            user = messages[-1]
            content = f"{user['content']}\n\n{recipe.answers.instruction}"
            messages = [*messages[:-1], {**user, "content": content}]
        for vote in range(recipe.answers.votes):
            choice = row.options if by_text else ()
            key = request_key(identity, messages, recipe, vote, schema, choice)
            asked.append(Question(key, messages, order, row, by_text))
    return asked


def check_of_train_rows(recipe: Recipe) -> Callable[[Iterable[Example]], None] | None:
    """Return what raises DataError for train rows that the recipe's teacher can't be asked; None
    where there is nothing to check."""
    return refuse_long_options if recipe.prompt.answer == "text" else None


def refuse_long_options(rows: Iterable[Example]) -> None:
    """Raise DataError for a row with an option whose likelihood the run's own server would not
    tell."""
    for row in rows:
        for number, text in enumerate(row.choices, 1):
            if len(text) > LONGEST_OPTION:
                raise DataError(
                    f"row {row.example_id} ({shown(row.question)}): option {number} has "
                    f"{len(text):,} characters, and the run's own teacher is asked by text for "
                    f"options of at most {LONGEST_OPTION:,}; shorten it, remove the row, or set "
                    "prompt.answer: letter"
                )


def hashed_rows(examples: Iterable[Example], count: int) -> list[Example]:
    """Return `count` rows, chosen by a hash of their ids so that new rows replace few of them."""
    return heapq.nsmallest(
        count, examples, key=lambda row: sha256(row.example_id.encode()).digest()
    )
