"""Add the texts of task.other, which belong to none of the other classes, as rows of a class.

A text's role depends on its content, the recipe's seed and the recipe's shares alone, so that rows
added to the texts or to the data move none.
"""

import logging
from collections.abc import Iterator, Mapping
from dataclasses import replace

from distillery.data.readers import Table, listed, read_files
from distillery.data.rows import Row, RowReader, validated_rows
from distillery.data.splits import Splits, drop_copies, sort_key
from distillery.errors import DataError
from distillery.recipe import OtherRecipe

_log = logging.getLogger(__name__)

SHARES = {"gold": 0.7, "validation": 0.1, "test": 0.2}
"""What the roles count in the dealing of the texts where dataset.carve gives them no share."""


def other_rows(other: OtherRecipe, reader: RowReader, seed: int) -> Iterator[Row]:
    """Yield the rows of task.other.files, with its class as their answer.

    Their ids and labels are passed over. Raises DataError for a file, row or column."""
    columns = reader.columns.model_copy(update={"id": None, "choices": None})
    reader = replace(reader, columns=columns)
    label = {columns.answer: other.label}
    for table in read_files("task.other.files", other.files):
        answered = ((where, {**values, **label}) for where, values in table.rows)
        yield from validated_rows(
            table._replace(rows=answered), reader, "train", seed, refuse_other_columns
        )


def refuse_other_columns(table: Table, reader: RowReader) -> None:
    """Raise DataError if the table lacks a column of the data's text."""
    for column in (reader.columns.question, *reader.fields):
        if column is not None and column not in table.columns:
            raise DataError(
                f"{table.name}: no column {column!r}, only {listed(list(table.columns))}; "
                "the files of task.other need the text in the same columns as those of the dataset"
            )


class OtherTexts:
    """What became of the texts of task.other: how many there are, how many of them stand in the
    data with a label, and how many are left to learn from."""

    def __init__(self, shares: Mapping[str, float]) -> None:
        """`shares` are those of dataset.carve, for test of all rounds."""
        self._shares = shares
        self._texts = self._copies = self._gold = 0
        self._example = ""

    def added(self, splits: Splits, rows: list[Row]) -> Splits:
        """Return the splits with the rows of task.other in gold, validation and test.

        Copies are dropped: of each other, of rows with an answer, and rows of train without one
        that are copies of them."""
        first = drop_copies(sorted(rows, key=sort_key))
        answered = {}
        for role_rows in splits.values():
            for row in role_rows:
                if row.example.answer_key is not None:
                    answered[row.content] = row.where
        added = [row for row in first if row.content not in answered]
        copies = [row for row in first if row.content in answered]
        if copies and not self._copies:
            self._example = f"{copies[0].where} = {answered[copies[0].content]}"
        weights = {role: self._shares[role] for role in SHARES if role in self._shares}
        for role, share in SHARES.items():
            if role in splits or role == "gold":
                weights.setdefault(role, share)
        dealt = deal(added, weights, self._shares)
        self._texts += len(first)
        self._copies += len(copies)
        self._gold += len(dealt["gold"])
        contents = {row.content for row in added}
        merged = dict(splits)
        merged["train"] = [row for row in splits["train"] if row.content not in contents]
        for role, role_rows in dealt.items():
            merged[role] = sorted([*splits.get(role, []), *role_rows], key=sort_key)
        return merged

    def conclude(self) -> None:
        """Log how many texts are left out. Raises DataError if none is left for gold."""
        if self._copies:
            _log.warning(
                "task.other.files: %d of %d texts stand in the data with a label, such as %s, "
                "and are left out",
                self._copies,
                self._texts,
                self._example,
            )
        if not self._gold:
            raise DataError(
                f"task.other.files: of {self._texts} texts, {self._copies} stand in the data with "
                "a label, and none of the others is left to learn from; add texts that are out of "
                "scope"
            )


def deal(rows: list[Row], weights: Mapping[str, float], shares: Mapping[str, float]) -> Splits:
    """Return the rows by role, in proportion to `weights`, whose first roles are those in `shares`.

    Each row gets a position like those of the rows that its role has already: in a carved role's
    interval (see splits.py), or in [0, 1)."""
    total = sum(weights.values())
    dealt: Splits = {role: [] for role in weights}
    for row in rows:
        position = row.position * total
        edge = 0.0
        for role in weights:
            edge += weights[role]
            if position < edge:
                break
        if role not in shares:
            position = 1 + (position - edge) / weights[role]
        dealt[role].append(replace(row, position=position))
    return dealt
