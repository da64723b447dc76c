"""Replace answers of the source by those of dataset.corrections."""

from dataclasses import replace

from distillery.data.readers import read_files
from distillery.data.rows import RowReader, validated_rows
from distillery.data.splits import Splits
from distillery.errors import DataError
from distillery.recipe import DatasetRecipe


class Corrections:
    """The answers of the recipe's corrections, and which of them no row has met yet.

    A row is known by its content and the order of its options, in which the letters are."""

    def __init__(self, recipe: DatasetRecipe, reader: RowReader) -> None:
        """Read all files. Raises DataError for a correction without an answer and for two of one
        row that differ."""
        self._answers: dict[tuple[str, tuple[str, ...]], str | None] = {}
        self._unused: dict[tuple[str, tuple[str, ...]], str] = {}
        for table in read_files("dataset.corrections", recipe.corrections):
            # A table's other faults come before that of two answers.
            for row in list(validated_rows(table, reader, "validation", recipe.seed)):
                key, answer = (row.content, row.example.choices), row.example.answer_key
                if self._answers.setdefault(key, answer) != answer:
                    raise DataError(
                        f"{row.where}: another answer than {self._unused[key]} gives this row; "
                        "remove one"
                    )
                self._unused[key] = row.where

    def applied(self, splits: Splits) -> Splits:
        """Return the splits with these answers."""
        if not self._answers:
            return splits
        changed: Splits = {}
        for role, rows in splits.items():
            changed[role] = []
            for row in rows:
                key = (row.content, row.example.choices)
                if key in self._answers:
                    self._unused.pop(key, None)
                    example = row.example.model_copy(update={"answer_key": self._answers[key]})
                    row = replace(row, example=example)
                changed[role].append(row)
        return changed

    def refuse_unused(self) -> None:
        """Raise DataError for a correction that no row of the source has met."""
        for where in self._unused.values():
            raise DataError(
                f"{where}: no row of the source has this text and these options; remove it from "
                "dataset.corrections, or correct the text"
            )
