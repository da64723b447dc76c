"""Prepare a data set: rows validated, split, and free of copies and leaks.

Rows in: those of a hub data set, local files or the shipped sample (source.py, readers.py), in the
columns that rows.py lists.
Files out: `<role>.jsonl` for the roles gold, train, validation and test, one records.Example a
line, sorted by position (splits.py); for task.kind: classify classes.json, the names of the
classes; and for extract and generate format.json, a records.AnswerFormat.

The steps, in this order: validate (rows.py), correct (corrections.py), carve (splits.py), add the
texts of task.other (other.py), stop at leaks, join references and drop copies (splits.py), drop
near duplicates (near_duplicates.py), sample. Equal rows and settings give equal bytes.
"""

import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

from distillery.data.answer_format import named_format
from distillery.data.classes import named_classes
from distillery.data.corrections import corrected
from distillery.data.examples import write_classes, write_examples, write_format
from distillery.data.near_duplicates import drop_near_duplicates
from distillery.data.other import other_rows, with_other
from distillery.data.rows import Row, RowReader, validated_rows
from distillery.data.source import open_source
from distillery.data.splits import (
    ROLES,
    Splits,
    carve,
    drop_copies,
    in_order,
    join_references,
    refuse_empty,
    refuse_leaks,
    refuse_shared_ids,
    test_interval,
)
from distillery.errors import DataError, RecipeError
from distillery.recipe import DatasetRecipe, TaskRecipe
from distillery.records import AnswerFormat, Example, Record, Split, digest_of
from distillery.storage.digests import sha256_of

OTHER = "other"
"""The texts of task.other among the splits, until they are dealt."""


class PreparedCounts(Record):
    """What `prepare` wrote. `splits` are by role; the other counts are of the rows dropped because
    their content, or nearly the same, stands in the data already."""

    splits: dict[str, Split]
    classes: tuple[str, ...] = ()
    duplicates_dropped: int = 0
    near_duplicates_dropped: int = 0


class SelectedRows(NamedTuple):
    """The rows that `prepare` writes, their classes or the format of their answers, and its counts
    of dropped rows."""

    splits: Splits
    classes: tuple[str, ...]
    format: AnswerFormat | None
    duplicates_dropped: int
    near_duplicates_dropped: int


def prepare(
    recipe: DatasetRecipe, out: Path, task: TaskRecipe | None = None, commit: str | None = None
) -> PreparedCounts:
    """Write `<role>.jsonl` into `out` for each role in the recipe's splits and carve, with the
    classes or the format of the answers that task.kind asks for. With task.other, there are gold
    rows in any case. `commit` is that of a hub data set, if it is known.

    Raises DataError for a file, row or column, and RecipeError if splits, carve and sample
    contradict each other; nothing is written then.
    """
    splits, classes, answer_format, duplicates, near_duplicates = select_rows(recipe, task, commit)
    out.mkdir(parents=True, exist_ok=True)
    written = {}
    for role in ROLES:
        if role in splits:
            path = out / f"{role}.jsonl"
            written[role] = write_split(path, splits[role], classes, answer_format)
    if classes:
        write_classes(out, classes)
    if answer_format:
        write_format(out, answer_format)
    return PreparedCounts(
        splits=written,
        classes=classes,
        duplicates_dropped=duplicates,
        near_duplicates_dropped=near_duplicates,
    )


def check_rows(recipe: DatasetRecipe, task: TaskRecipe | None = None) -> dict[str, int]:
    """Return how many rows `prepare` would write for each role. Writes nothing.

    Raises what `prepare` raises. A hub data set is downloaded unless it is on this machine.
    """
    splits = select_rows(recipe, task).splits
    return {role: len(splits[role]) for role in ROLES if role in splits}


def select_rows(
    recipe: DatasetRecipe, task: TaskRecipe | None = None, commit: str | None = None
) -> SelectedRows:
    """Read, validate, split and filter the rows; raises as `prepare` does."""
    classify = task is not None and task.kind == "classify"
    other = task.other if task else None
    classes = named_classes(task) if task else None
    answer_format = named_format(task) if task else None
    unanswered_train = classify or answer_format is not None
    check_roles(recipe, unanswered_train)
    reader = RowReader(recipe.columns, recipe.fields, classify, classes, answer_format)
    loaded = load_splits(recipe, reader, commit)
    if other:
        loaded[OTHER] = other_rows(other, reader, recipe.seed)
    loaded = corrected(loaded, recipe, reader)
    # Test rows of other rounds count as test rows until all that resembles them is dropped.
    splits = carve(loaded, shares_of(recipe), recipe.columns.answer, unanswered_train)
    if other:
        texts = splits.pop(OTHER)
        splits = with_other(splits, texts, shares_of(recipe))
    if classify and classes is None:
        classes = found_classes(splits, recipe.columns.answer)
        splits = with_classes(splits, classes)
    refuse_leaks(splits)
    if answer_format:
        splits = join_references(splits)
    splits["train"] = drop_copies(splits["train"])
    # A row's further answers are in its references.
    duplicates = row_count(loaded) - row_count(splits) - reference_count(splits)
    refuse_shared_ids(splits)
    splits, near_duplicates = drop_near_duplicates(splits, recipe.near_duplicate)
    if recipe.rotation:
        low, high = test_interval(dict(recipe.carve.items()), recipe.rotation.round)
        splits["test"] = [row for row in splits["test"] if low <= row.position < high]
    for role, limit in recipe.sample.items():
        splits[role] = splits[role][:limit]
    refuse_empty(splits)
    return SelectedRows(splits, classes or (), answer_format, duplicates, near_duplicates)


def row_count(splits: Splits) -> int:
    """Return how many rows the splits have in all."""
    return sum(map(len, splits.values()))


def reference_count(splits: Splits) -> int:
    """Return how many further answers the rows have in all."""
    return sum(len(row.example.references) for rows in splits.values() for row in rows)


def found_classes(splits: Splits, column: str) -> tuple[str, ...]:
    """Return the labels of the rows, in alphabetical order. Raises DataError for fewer than two."""
    labels = {row.example.answer_key for rows in splits.values() for row in rows}
    classes = tuple(sorted(label for label in labels if label is not None))
    if len(classes) < 2:
        raise DataError(
            f"dataset: the column {column!r} has {len(classes)} labels, and a classifier needs two "
            "or more; correct dataset.columns.answer, or label some rows"
        )
    return classes


def with_classes(splits: Splits, classes: tuple[str, ...]) -> Splits:
    """Return the splits with the classes in every row."""
    known: Splits = {}
    for role, rows in splits.items():
        known[role] = []
        for row in rows:
            example = row.example.model_copy(update={"classes": classes})
            known[role].append(replace(row, example=example))
    return known


def check_roles(recipe: DatasetRecipe, unanswered_train: bool) -> None:
    """Raise RecipeError if splits, carve and sample contradict each other.

    With `unanswered_train`, rows without an answer are left for train whatever is carved."""
    for role in recipe.carve:
        if role in recipe.splits:
            raise RecipeError(
                f"dataset.carve.{role}: {role} rows come from the split {recipe.splits[role]!r} "
                "already (dataset.files or dataset.splits); remove one of them"
            )
    for sampled in sorted(recipe.sample):
        if sampled not in recipe.splits and sampled not in recipe.carve:
            raise RecipeError(
                f"dataset.sample.{sampled}: no such split; "
                "name it in dataset.splits or dataset.carve"
            )
    total = sum(shares_of(recipe).values())
    if total > 1 or (total == 1 and not unanswered_train):
        counted = ", test once for each of dataset.rotation.rounds," if recipe.rotation else ""
        raise RecipeError(
            f"dataset.carve: the shares{counted} add up to {total:g}; leave some for train"
        )


def shares_of(recipe: DatasetRecipe) -> dict[str, float]:
    """Return the share (0 to 1) of train that each role takes; for test, that of all rounds."""
    shares: dict[str, float] = dict(recipe.carve.items())
    if recipe.rotation:
        shares["test"] *= recipe.rotation.rounds
    return shares


def load_splits(recipe: DatasetRecipe, reader: RowReader, commit: str | None) -> Splits:
    """Return the validated rows of the roles in dataset.splits, by position."""
    source = open_source(recipe, commit)
    splits: Splits = {}
    for role, name in recipe.splits.items():
        if name not in source:
            raise DataError(
                f"dataset.splits.{role}: the source has no split {name!r}, only "
                f"{', '.join(source)}; correct dataset.splits or take a share of train by "
                "dataset.carve"
            )
        rows: list[Row] = []
        for table in source[name]():
            rows += validated_rows(table, reader, role, recipe.seed)
        splits[role] = in_order(rows)
    return splits


def write_split(
    path: Path, rows: list[Row], classes: tuple[str, ...], answer_format: AnswerFormat | None
) -> Split:
    """Write the rows' Examples, one a line. The digest covers the classes or the format, too."""
    write_examples([row.example for row in rows], path)
    return split_of(path, len(rows), classes, answer_format)


def write_chosen(examples: Sequence[Example], path: Path) -> Split:
    """Write some rows of a prepared data set (at least one), as `prepare` writes all of them."""
    write_examples(examples, path)
    return split_of(path, len(examples), examples[0].classes, examples[0].format)


def split_of(
    path: Path, rows: int, classes: tuple[str, ...], answer_format: AnswerFormat | None
) -> Split:
    """Return the record of the split in a file."""
    sha256 = sha256_of(path)
    if classes:
        sha256 = digest_of([sha256, classes])
    if answer_format:
        content = answer_format.model_dump(mode="json")
        if answer_format.json_schema is not None:
            # A digest passes over the order of keys, in which an answer's fields are written.
            content["json_schema"] = json.dumps(answer_format.json_schema)
        sha256 = digest_of([sha256, content])
    return Split(file=path.name, rows=rows, sha256=sha256)
