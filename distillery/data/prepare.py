"""Prepare a data set: rows validated, split, and free of copies and leaks.

Rows in: those of a hub data set, local files or the shipped sample (source.py, readers.py), in the
columns that rows.py lists.
Files out: `<role>.jsonl` for the roles gold, train, validation and test, one records.Example a
line, sorted by position (splits.py); for task.kind: classify classes.json, the names of the
classes; and for extract and generate format.json, a records.AnswerFormat.

The steps, in this order: validate (rows.py), correct (corrections.py), carve (splits.py), add the
texts of task.other (other.py), stop at leaks, join references and drop copies (splits.py), drop
near duplicates (near_duplicates.py), sample. Equal rows and settings give equal bytes.

The rows are on disk (row_store.py), and the steps up to dropping copies are taken bucket by bucket,
so that memory does not grow with their number. In memory are only the answers in
dataset.corrections, the names of the classes, and rows of equal content while they are compared.
"""

import json
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

from distillery.data.answer_format import named_format
from distillery.data.classes import named_classes
from distillery.data.corrections import Corrections
from distillery.data.examples import write_classes, write_examples, write_format, write_lines
from distillery.data.near_duplicates import SimilarRows, drop_near_duplicates
from distillery.data.other import OtherTexts, other_rows
from distillery.data.row_store import RowStore, temporary_database
from distillery.data.rows import RowReader, validated_rows
from distillery.data.source import open_source
from distillery.data.splits import (
    ROLES,
    Leaks,
    Splits,
    carve,
    drop_copies,
    file_and_line,
    in_order,
    join_references,
    refuse_empty,
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
    """The rows that `prepare` writes, in a store, with how many each role has; their classes or the
    format of their answers; and the counts of dropped rows."""

    store: RowStore
    counts: dict[str, int]
    classes: tuple[str, ...]
    format: AnswerFormat | None
    duplicates_dropped: int
    near_duplicates_dropped: int

    def lines(self, role: str) -> Iterator[str]:
        """Yield the rows of a role in order, each an Example in JSON."""
        return self.store.lines(role, self.counts[role])


def prepare(
    recipe: DatasetRecipe, out: Path, task: TaskRecipe | None = None, commit: str | None = None
) -> PreparedCounts:
    """Write `<role>.jsonl` into `out` for each role in the recipe's splits and carve, with the
    classes or the format of the answers that task.kind asks for. With task.other, there are gold
    rows in any case. `commit` is that of a hub data set, if it is known.

    Raises DataError for a file, row or column, and RecipeError if splits, carve and sample
    contradict each other; nothing is written then.
    """
    with select_rows(recipe, task, commit) as selected:
        out.mkdir(parents=True, exist_ok=True)
        written = {}
        for role, count in selected.counts.items():
            path = out / f"{role}.jsonl"
            write_lines(selected.lines(role), path)
            written[role] = split_of(path, count, selected.classes, selected.format)
        if selected.classes:
            write_classes(out, selected.classes)
        if selected.format:
            write_format(out, selected.format)
        return PreparedCounts(
            splits=written,
            classes=selected.classes,
            duplicates_dropped=selected.duplicates_dropped,
            near_duplicates_dropped=selected.near_duplicates_dropped,
        )


def check_rows(
    recipe: DatasetRecipe,
    task: TaskRecipe | None = None,
    check_train: Callable[[Iterator[Example]], None] | None = None,
) -> dict[str, int]:
    """Return how many rows `prepare` would write for each role. Writes nothing. `check_train` is
    given the train rows.

    Raises what `prepare` and `check_train` raise. A hub data set is downloaded unless it is on this
    machine.
    """
    with select_rows(recipe, task) as selected:
        if check_train:
            check_train(map(Example.model_validate_json, selected.lines("train")))
        return selected.counts


@contextmanager
def select_rows(
    recipe: DatasetRecipe, task: TaskRecipe | None = None, commit: str | None = None
) -> Iterator[SelectedRows]:
    """Read, validate, split and filter the rows; raises as `prepare` does."""
    classify = task is not None and task.kind == "classify"
    other = task.other if task else None
    classes = named_classes(task) if task else None
    answer_format = named_format(task) if task else None
    check_roles(recipe)
    reader = RowReader(recipe.columns, recipe.fields, classify, classes, answer_format)
    with temporary_database() as database:
        store, similar = RowStore(database), SimilarRows(database, recipe.near_duplicate)
        load_splits(store, recipe, reader, commit)
        texts = None
        if other:
            store.load(OTHER, other_rows(other, reader, recipe.seed))
            texts = OtherTexts(shares_of(recipe))
        labels, leaks, duplicates = split_rows(store, similar, recipe, reader, texts)
        if classify and classes is None:
            classes = found_classes(labels, recipe.columns.answer)
        leaks.refuse()
        refuse_shared_ids(store)
        # Test rows of other rounds count as test rows until all that resembles them is dropped.
        near_duplicates = drop_near_duplicates(store, similar)
        if recipe.rotation:
            low, high = test_interval(dict(recipe.carve.items()), recipe.rotation.round)
            store.drop_outside("test", low, high)
        counts = {role: store.count(role) for role in store.roles}
        refuse_empty(counts)
        for role, limit in recipe.sample.items():
            counts[role] = min(counts[role], limit)
        ordered = {role: counts[role] for role in ROLES if role in counts}
        yield SelectedRows(
            store, ordered, classes or (), answer_format, duplicates, near_duplicates
        )


class FoundRows(NamedTuple):
    """What is known once all rows are split: their labels, the leaks among them, and how many were
    dropped as copies."""

    labels: set[str]
    leaks: Leaks
    duplicates: int


def split_rows(
    store: RowStore,
    similar: SimilarRows,
    recipe: DatasetRecipe,
    reader: RowReader,
    texts: OtherTexts | None,
) -> FoundRows:
    """Take the steps from correcting to dropping copies for the loaded rows, and keep in `store`,
    and have `similar` read, those that are left. Raises DataError for a step before the search for
    leaks: of several faults that of the earliest step, wherever its row stands."""
    corrections = Corrections(recipe, reader)
    shares = shares_of(recipe)
    labels: set[str] = set()
    leaks = Leaks()
    duplicates = 0
    for loaded in store.buckets([*recipe.splits, *([OTHER] if texts else [])], reader.format):
        ordered = {role: rows if role == OTHER else in_order(rows) for role, rows in loaded.items()}
        corrected = corrections.applied(ordered)
        splits = carve(corrected, shares)
        if texts:
            splits = texts.added(splits, splits.pop(OTHER))
        if reader.classify and reader.classes is None:
            labels |= labels_of(splits)
        leaks.find(splits)
        if reader.format:
            splits = join_references(splits)
        splits["train"] = drop_copies(splits["train"])
        # A row's further answers are in its references.
        duplicates += row_count(loaded) - row_count(splits) - reference_count(splits)
        similar.read(store.keep(splits))
    corrections.refuse_unused()
    if texts:
        texts.conclude()
    store.end_keeping()
    return FoundRows(labels, leaks, duplicates)


def row_count(splits: Splits) -> int:
    """Return how many rows the splits have in all."""
    return sum(map(len, splits.values()))


def reference_count(splits: Splits) -> int:
    """Return how many further answers the rows have in all."""
    return sum(len(row.example.references) for rows in splits.values() for row in rows)


def labels_of(splits: Splits) -> set[str]:
    """Return the labels of the rows."""
    labels = {row.example.answer_key for rows in splits.values() for row in rows}
    return {label for label in labels if label is not None}


def found_classes(labels: set[str], column: str) -> tuple[str, ...]:
    """Return the labels in alphabetical order. Raises DataError for fewer than two."""
    if len(labels) < 2:
        raise DataError(
            f"dataset: the column {column!r} has {len(labels)} labels, and a classifier needs two "
            "or more; correct dataset.columns.answer, or label some rows"
        )
    return tuple(sorted(labels))


def refuse_shared_ids(store: RowStore) -> None:
    """Raise DataError if an id names two rows of a split, or rows of different content."""
    if found := store.shared_id():
        role, example_id, *places = found
        earlier, later = sorted(places, key=file_and_line)
        raise DataError(
            f"{later}: id: {example_id!r} of {role} is that of {earlier} too; make ids unique, "
            "or set dataset.columns.id to null to name rows by their content"
        )


def check_roles(recipe: DatasetRecipe) -> None:
    """Raise RecipeError if splits, carve and sample contradict each other. Rows without an answer
    are left for train whatever is carved."""
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
    if total > 1:
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


def load_splits(
    store: RowStore, recipe: DatasetRecipe, reader: RowReader, commit: str | None
) -> None:
    """Load the validated rows of the roles in dataset.splits."""
    source = open_source(recipe, commit)
    for role, name in recipe.splits.items():
        if name not in source:
            raise DataError(
                f"dataset.splits.{role}: the source has no split {name!r}, only "
                f"{', '.join(source)}; correct dataset.splits or take a share of train by "
                "dataset.carve"
            )
        for table in source[name]():
            store.load(role, validated_rows(table, reader, role, recipe.seed))


def write_chosen(examples: Sequence[Example], path: Path) -> Split:
    """Write some rows of a prepared data set (at least one), as `prepare` writes all of them."""
    write_examples(examples, path)
    return split_of(path, len(examples), examples[0].classes, examples[0].format)


def split_of(
    path: Path, rows: int, classes: tuple[str, ...], answer_format: AnswerFormat | None
) -> Split:
    """Return the record of the split in a file. The digest covers the classes or the format,
    too."""
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
