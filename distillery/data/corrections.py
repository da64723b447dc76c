"""Replace answers of the source by those of dataset.corrections."""

from dataclasses import replace

from distillery.data.readers import read_files
from distillery.data.rows import RowReader, validated_rows
from distillery.data.splits import Splits
from distillery.errors import DataError
from distillery.recipe import DatasetRecipe


def corrected(splits: Splits, recipe: DatasetRecipe, reader: RowReader) -> Splits:
    """Return the splits with the answers of the recipe's corrections.

    A row is known by its content and the order of its options, in which the letters are. Raises
    DataError for a correction without an answer, for two of one row that differ, and for one that
    no row of the source has."""
    answers: dict[tuple[str, tuple[str, ...]], str | None] = {}
    unused: dict[tuple[str, tuple[str, ...]], str] = {}
    for table in read_files("dataset.corrections", recipe.corrections):
        for row in validated_rows(table, reader, "validation", recipe.seed):
            key, answer = (row.content, row.example.choices), row.example.answer_key
            if answers.setdefault(key, answer) != answer:
                raise DataError(
                    f"{row.where}: another answer than {unused[key]} gives this row; remove one"
                )
            unused[key] = row.where
    changed: Splits = {}
    for role, rows in splits.items():
        changed[role] = []
        for row in rows:
            key = (row.content, row.example.choices)
            if key in answers:
                unused.pop(key, None)
                example = row.example.model_copy(update={"answer_key": answers[key]})
                row = replace(row, example=example)
            changed[role].append(row)
    for where in unused.values():
        raise DataError(
            f"{where}: no row of the source has this text and these options; remove it from "
            "dataset.corrections, or correct the text"
        )
    return changed
