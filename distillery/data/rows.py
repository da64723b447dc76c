"""data/rows"""

import hashlib
import json
import re
import unicodedata
from collections import Counter
from dataclasses import dataclass, replace
from typing import Any

from distillery.data.readers import Table
from distillery.errors import DataError
from distillery.recipe import Columns, DatasetRecipe
from distillery.records import LETTERS, Example, digest_of

JUDGED = ("validation", "test")

MOST_LISTED = 20

_SURROGATE = re.compile("[\ud800-\udfff]")

ROLES = ("gold", "train", "validation", "test")

FITTED = ("gold", "train")


@dataclass(frozen=True, slots=True)
class Row:
    where: str
    example: Example
    content: str
    place: float


Splits = dict[str, list[Row]]


def to_example(values: dict[str, Any], columns: Columns, where: str) -> Example:
    """One row, as `prepare` reads it; the answer may be missing. Raises DataError, which starts with `where`."""
    identified = columns.id is not None and columns.id in values
    return _row(where, values, columns, 0, identified).example


# Validating


def validated_rows(table: Table, recipe: DatasetRecipe, role: str) -> list[Row]:
    columns = recipe.columns
    needed = {"question": columns.question, "choices": columns.choices}
    if role != "train":
        needed["answer"] = columns.answer
    for setting, column in needed.items():
        if column not in table.columns:
            raise DataError(
                f"{table.name}: no column {column!r}, only {', '.join(map(repr, table.columns))}; "
                f"set dataset.columns.{setting} to the one that is meant"
            )
    identified = columns.id is not None and columns.id in table.columns
    rows = [_row(where, values, columns, recipe.seed, identified) for where, values in table.rows]
    for row in rows:
        refuse_unanswered(row, columns.answer, role)
    return rows


def _row(where: str, values: dict[str, Any], columns: Columns, seed: int, identified: bool) -> Row:
    question = _text(values.get(columns.question), where, columns.question)
    labels, choices = _options(values.get(columns.choices), where, columns.choices)
    concept = values.get(columns.concept) if columns.concept else None
    content = digest_of([normalised(question), sorted(normalised(choice) for choice in choices)])
    example = Example(
        example_id=_text(values.get(str(columns.id)), where, str(columns.id))
        if identified
        else content,
        question=question,
        concept="" if concept in (None, "") else _text(concept, where, str(columns.concept)),
        choices=choices,
        answer_key=_answer(values.get(columns.answer), labels, where, columns.answer),
    )
    return Row(where, example, content, _place(seed, content))


def _text(value: Any, where: str, field: str) -> str:
    """The text without white space around it; a whole number counts as text."""
    if value is None:
        raise DataError(f"{where}: {field}: missing; fill it in or remove the row")
    if isinstance(value, bool) or not isinstance(value, str | int):
        raise DataError(
            f"{where}: {field}: {type(value).__name__} where text belongs; correct the row"
        )
    text = str(value).strip()
    if not text:
        raise DataError(f"{where}: {field}: empty; fill it in or remove the row")
    if _SURROGATE.search(text):
        raise DataError(
            f"{where}: {field}: half of a surrogate pair, which is no character; correct the row"
        )
    return text


def _options(value: Any, where: str, field: str) -> tuple[list[str], tuple[str, ...]]:
    """The labels and the texts of a row's options."""
    if isinstance(value, str):
        try:
            value = json.loads(value)
        except ValueError as error:
            raise DataError(
                f'{where}: {field}: no JSON ({error}); write {{"label": [...], "text": [...]}} or a list of texts'
            ) from error
    labels, texts = (
        (value.get("label"), value.get("text")) if isinstance(value, dict) else (None, value)
    )
    if not isinstance(texts, list):
        raise DataError(
            f'{where}: {field}: neither {{"label": [...], "text": [...]}} nor a list of texts'
        )
    if not 2 <= len(texts) <= len(LETTERS):
        raise DataError(
            f"{where}: {field}: {len(texts)} options; there must be 2 to {len(LETTERS)}"
        )
    choices = tuple(_text(text, where, f"{field}: option {n}") for n, text in enumerate(texts, 1))
    return _labels(labels, len(choices), where, field), choices


def _labels(labels: Any, count: int, where: str, field: str) -> list[str]:
    if labels is None:
        return list(LETTERS[:count])
    if not isinstance(labels, list) or len(labels) != count:
        raise DataError(
            f"{where}: {field}: the labels are not as many as the {count} texts; correct the row"
        )
    texts = [_text(label, where, f"{field}: label {n}") for n, label in enumerate(labels, 1)]
    if len(set(texts)) < count:
        raise DataError(
            f"{where}: {field}: two options of one label among {', '.join(texts)}; correct the row"
        )
    return texts


def _answer(value: Any, labels: list[str], where: str, field: str) -> str | None:
    """The letter of the label that `value` names; None where it is empty."""
    if value is None or (isinstance(value, str) and not value.strip()):
        return None
    label = _text(value, where, field)
    if label not in labels:
        raise DataError(
            f"{where}: {field}: {label!r} is no option; the options are {', '.join(labels)}"
        )
    return LETTERS[labels.index(label)]


def refuse_unanswered(row: Row, field: str, role: str) -> None:
    if role != "train" and row.example.answer_key is None:
        raise DataError(
            f"{row.where}: {field}: empty, but rows of {role} need an answer; "
            f"fill it in, or set dataset.splits.{role} to a split with answers"
        )


def normalised(text: str) -> str:
    return " ".join(unicodedata.normalize("NFKC", text).casefold().split())


def _place(seed: int, content: str) -> float:
    """A number in [0, 1): SHA-256 of seed and content, divided by 2^256."""
    return int.from_bytes(hashlib.sha256(f"{seed}:{content}".encode()).digest()) / 2**256


def by_position(row: Row) -> tuple[float, bool, str]:
    """By place; of equal content, the row with an answer first."""
    return row.place, row.example.answer_key is None, row.example.model_dump_json()


def with_ids(rows: list[Row]) -> list[Row]:
    """Ids that are content hashes made unique: a second row of equal content gets -2, and so on."""
    seen: Counter[str] = Counter()
    named = []
    for row in rows:
        if row.example.example_id == row.content:
            seen[row.content] += 1
            if seen[row.content] > 1:
                example = row.example.model_copy(
                    update={"example_id": f"{row.content}-{seen[row.content]}"}
                )
                row = replace(row, example=example)
        named.append(row)
    return named
