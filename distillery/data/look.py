"""Look at the rows that somebody wants to train a student on, and say what is in them.

In: CSV, JSONL or Parquet files with a text and a label or answer, which may be empty (rows.py).
Out: a Look.
Nothing is written, and a bad row is told, not raised.
"""

import re
import statistics
import unicodedata
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from distillery.data.answer_format import named_format
from distillery.data.guess import (
    JOIN_OPTIONS_PAGE,
    REPEATS,
    ChosenColumns,
    Column,
    choose_columns,
    column_contents,
    columns_of_options,
    guess_schema,
    listed,
)
from distillery.data.near_duplicates import SimilarRows
from distillery.data.readers import open_table, refuse_equal_columns
from distillery.data.row_store import temporary_database
from distillery.data.rows import RowReader, content_of_row, to_example, to_letter, to_options
from distillery.errors import DataError
from distillery.recipe import Columns, DatasetRecipe, TaskKind, TaskRecipe
from distillery.records import LETTERS, Example

MOST_COMPARED = 20_000
"""Rows up to which near duplicates are counted, which takes seconds."""

MOST_CLASSES = 1_000
"""Classes up to which each is compared with each."""

TYPING_ERROR_LENGTH = 4
"""Characters that a label has at least, for another one to be a typing error of it."""

TYPING_ERROR_RATIO = 5
"""How many times as often as its typing error a label occurs at least."""


class ReadRow(NamedTuple):
    """A row of a file as read (readers.py): the line that it starts on, its values and its
    fault."""

    path: Path
    line: int
    values: dict[str, Any]
    fault: str

    @property
    def where(self) -> str:
        """FILE:LINE."""
        return f"{self.path}:{self.line}"


class BadRow(NamedTuple):
    """A row that is not valid. `reason`: what is wrong and what to do."""

    path: Path
    line: int
    reason: str

    def __str__(self) -> str:
        return f"{self.path}:{self.line}: {self.reason}"


class FoundRow(NamedTuple):
    """A valid row. `where` is FILE:LINE."""

    where: str
    example: Example
    content: str


class Lengths(NamedTuple):
    """Lengths of the texts, in characters, and where the longest stands."""

    median: int
    longest: int
    where: str


@dataclass(frozen=True)
class Look:
    """What was found in the files.

    `rows` are the valid ones and `bad` the others, those in `test_files` included. `test` are the
    valid rows of `test_files`, which are for the test alone. `with_ids`: there is a column id,
    whose values are unique. `schema`: of answers that are objects.
    """

    files: tuple[str, ...]
    columns: tuple[str, ...]
    chosen: ChosenColumns
    with_ids: bool
    rows: tuple[FoundRow, ...]
    bad: tuple[BadRow, ...]
    test_files: tuple[str, ...] = ()
    test: tuple[FoundRow, ...] = ()
    schema: dict[str, Any] | None = None

    @property
    def kind(self) -> TaskKind:
        """The kind of task that the rows are for."""
        return self.chosen.kind

    @property
    def answered(self) -> list[FoundRow]:
        """The rows with a label."""
        return [row for row in self.rows if row.example.answer_key is not None]

    @property
    def unanswered(self) -> int:
        """The number of valid rows without a label."""
        return len(self.rows) - len(self.answered)

    @property
    def writes(self) -> bool:
        """Whether answers are written, and not chosen."""
        return self.kind in ("extract", "generate")

    @property
    def classes(self) -> dict[str, int]:
        """Rows by label, the most frequent label first."""
        labels = [row.example.answer_key for row in self.rows]
        counts = Counter(label for label in labels if label is not None)
        return dict(sorted(counts.items(), key=lambda item: (-item[1], item[0])))


def look(
    paths: Sequence[Path],
    texts: Sequence[str] = (),
    label: str | None = None,
    kind: TaskKind | None = None,
    test: Sequence[Path] = (),
) -> Look:
    """Return what is in the files, and in those of `test` rows. `texts` and `label` are the columns
    that the user has named, and `kind` the kind of task.

    Raises DataError for a file that can't be read, columns that are not clear (guess.py), no valid
    row and fewer than two labels.
    """
    found_rows = [row for path in paths for row in rows_of(path)]
    test_rows = [row for path in test for row in rows_of(path)]
    whole = [row.values for row in found_rows if not row.fault]
    if not whole:
        first = found_rows[0]
        raise DataError(f"{first.where}: {first.fault}")
    columns = column_contents(whole)
    chosen = choose_columns(columns, texts, label, kind)
    if kind is None and chosen.kind == "classify":
        refuse_options_apart(columns, chosen, whole)
    schema = None
    if chosen.kind == "extract":
        answers = [values.get(chosen.label) for values in whole]
        answers += [row.values.get(chosen.label) for row in test_rows if not row.fault]
        schema = guess_schema(answers)
    reader = reader_of(chosen, schema)
    rows, bad = valid_rows(found_rows, reader)
    if not rows:
        raise DataError(str(bad[0]))
    refuse_other_columns(test, test_rows, chosen)
    judging, bad_test = valid_rows(test_rows, reader, needs_answer=True)
    if test and not judging:
        raise DataError(str(bad_test[0]))
    found = Look(
        files=tuple(map(str, paths)),
        columns=tuple(columns),
        chosen=chosen,
        with_ids=ids_are_unique([*whole, *(row.values for row in test_rows)]),
        rows=tuple(rows),
        bad=(*bad, *bad_test),
        test_files=tuple(map(str, test)),
        test=tuple(judging),
        schema=schema,
    )
    if found.kind == "classify" and len(found.classes) < 2:
        raise DataError(
            f"the column {chosen.label!r} has {len(found.classes)} labels, and a classifier needs "
            "two or more; label some rows, or name another column by --label"
        )
    if not found.answered:
        if bad:
            raise DataError(f"no answer of the column {chosen.label!r} can be read: {bad[0]}")
        raise DataError(
            f"the column {chosen.label!r} is empty in every row; fill it in for some rows, or name "
            "another column by --label"
        )
    return found


def refuse_options_apart(
    columns: Mapping[str, Column], chosen: ChosenColumns, rows: Sequence[Mapping[str, Any]]
) -> None:
    """Raise DataError where what looks like labels is rather the right one of each row's options:
    it stands in a list beside it, or names a column."""
    labelled = [row for row in rows if str(row.get(chosen.label) or "").strip()]
    for name in columns:
        if name not in chosen.texts and columns[name].may_be_options:
            right = sum(is_option(row.get(chosen.label), row.get(name)) for row in labelled)
            if 2 * right > len(labelled):
                raise DataError(
                    f"{chosen.label!r} says which one of {name!r} is right: where the rows have "
                    f"options of their own, say --task choice --text {chosen.texts[0]} --label "
                    f"{chosen.label}, and else --task classify"
                )
    apart = columns_of_options(columns)
    # A letter alone may be the name of any column, such as one of labels that somebody else gave;
    # but those repeat, and options differ from row to row.
    values = sum(len(columns[name].counts) for name in apart)
    differ = values * REPEATS > sum(columns[name].filled for name in apart)
    named = [row for row in labelled if names_one_of(apart, row, chosen.label, differ)]
    if apart and (len(apart[0]) > 1 or 2 * len(named) > len(labelled)):
        raise DataError(
            f"the columns {listed(apart)} look like options of each row; put them into one column, "
            f'choices, such as ["bank", "library"], by a script as in {JOIN_OPTIONS_PAGE}, or say '
            "--task classify if the labels are the same for all rows"
        )


def names_one_of(
    columns: Sequence[str], row: Mapping[str, Any], label: str, by_value: bool
) -> bool:
    """Return whether a row's label is the name of one of the columns or, with `by_value`, what
    stands in it."""
    said = str(row[label]).strip().casefold()
    known = [name.casefold() for name in columns]
    if by_value:
        known += [str(row.get(name)).strip().casefold() for name in columns]
    return said in known


def is_option(label: Any, options: Any) -> bool:
    """Return whether a label names one of a row's options."""
    try:
        labels, texts = to_options(options, "")
        return to_letter(label, labels, texts, "") is not None
    except DataError:
        return False


def refuse_other_columns(
    paths: Sequence[Path], rows: Sequence[ReadRow], chosen: ChosenColumns
) -> None:
    """Raise DataError where the test rows in `paths` lack a column that was chosen."""
    present = list(dict.fromkeys(name for row in rows for name in row.values))
    for column in (*chosen.texts, chosen.label, chosen.options):
        if rows and column and column not in present:
            raise DataError(
                f"{', '.join(map(str, paths))}: no column {column!r}, only {listed(present)}; name "
                "the columns of test rows as those of the others"
            )


def valid_rows(
    rows: Sequence[ReadRow], reader: RowReader, needs_answer: bool = False
) -> tuple[list[FoundRow], list[BadRow]]:
    """Return the valid rows and the others."""
    found, bad = [], []
    for row in rows:
        reason, example = row.fault, None
        if not reason:
            try:
                example = to_example(row.values, reader, row.where)
            except DataError as error:
                reason = str(error).removeprefix(f"{row.where}: ")
        if example and needs_answer and example.answer_key is None:
            reason = (
                f"{reader.columns.answer}: empty, but rows of test need an answer; fill it in, or "
                "remove the row"
            )
        if example and not reason:
            found.append(FoundRow(row.where, example, content_of_row(example)))
        else:
            bad.append(BadRow(row.path, row.line, reason))
    return found, bad


def rows_of(path: Path) -> list[ReadRow]:
    """Return the rows of a file.

    Raises DataError for a folder and for a file that can't be read, has no rows or is not separated
    by commas."""
    if path.expanduser().is_dir():
        raise DataError(f"{path}: a folder; name the files in it")
    with open_table("DATA", path.expanduser(), whole=True) as table:
        refuse_equal_columns(path, table.columns)
        for sign, name in ((";", "semicolons"), ("\t", "tabs")):
            if table.columns and len(table.columns) == 1 and sign in table.columns[0]:
                raise DataError(
                    f"{path}: separated by {name}; save it with commas between its columns"
                )
        rows = [ReadRow(path, *row) for row in table.rows]
    if not rows:
        raise DataError(f"{path}: empty, without a single row; give another file")
    return rows


def reader_of(chosen: ChosenColumns, schema: dict[str, Any] | None) -> RowReader:
    """Return what turns the values of a row into an Example, whatever its id."""
    question = chosen.texts[0] if len(chosen.texts) == 1 else None
    columns = Columns(
        id=None, question=question, concept=None, choices=chosen.options, answer=chosen.label
    )
    fields = () if question else chosen.texts
    if chosen.kind == "choice":
        return RowReader(columns, fields=fields)
    if chosen.kind == "classify":
        return RowReader(columns, fields=fields, classify=True)
    task = TaskRecipe(kind=chosen.kind, schema=schema)
    return RowReader(columns, fields=fields, format=named_format(task))


def ids_are_unique(rows: Sequence[Mapping[str, Any]]) -> bool:
    """Return whether all rows have a column id, filled and different."""
    ids = set()
    for values in rows:
        value = values.get("id")
        if isinstance(value, str | int) and str(value).strip():
            ids.add(str(value).strip())
    return len(ids) == len(rows)


def lengths(rows: Sequence[FoundRow]) -> Lengths:
    """Return how long the texts are."""
    longest = max(rows, key=lambda row: len(row.example.question))
    median = statistics.median(len(row.example.question) for row in rows)
    return Lengths(round(median), len(longest.example.question), longest.where)


def count_copies(rows: Sequence[FoundRow]) -> int:
    """Return how many rows have the text of an earlier one."""
    return len(rows) - len({row.content for row in rows})


def contradictions(rows: Sequence[FoundRow]) -> list[str]:
    """Return a line for each text that has several labels, or question that has several right
    options, with where they stand."""
    labels: dict[str, dict[str, str]] = {}
    for row in rows:
        label = row.example.answer_key
        if label is not None and row.example.choices:
            # By its text: rows of equal content may have the options in another order.
            label = row.example.choices[LETTERS.index(label)]
        if label is not None:
            labels.setdefault(row.content, {}).setdefault(label, row.where)
    lines = []
    for places in labels.values():
        if len(places) > 1:
            found = ", ".join(f"{label!r} in {where}" for label, where in places.items())
            what = "one text, several labels"
            if rows[0].example.choices:
                what = "one question, several right options"
            lines.append(f"{what}: {found}; correct one")
    return lines


def count_near_duplicates(rows: Sequence[FoundRow]) -> int | None:
    """Return how many rows nearly repeat an earlier one, copies included, as dataset.near_duplicate
    sees it; None for too many rows."""
    if len(rows) > MOST_COMPARED:
        return None
    with temporary_database() as database:
        index = SimilarRows(database, DatasetRecipe().near_duplicate)
        index.read((number, row.example) for number, row in enumerate(rows))
        index.find_candidates()
        count = 0
        for number in index.each_candidate():
            if index.has_similar(number):
                count += 1
            else:
                index.add(number)
    return count


def doubtful_labels(found: Look) -> list[str]:
    """Return a line for each label that another one, which is more frequent, may be meant by."""
    classes = found.classes
    first: dict[str, str] = {}
    for row in found.answered:
        first.setdefault(str(row.example.answer_key), row.where)
    names = list(classes)
    lines: list[str] = []
    if len(names) > MOST_CLASSES:
        return lines
    for position, rare in enumerate(names):
        for common in names[:position]:
            if same_spelling(rare, common):
                why = "differs by case, spaces or punctuation"
            elif (
                classes[common] >= TYPING_ERROR_RATIO * classes[rare]
                and len(common) >= TYPING_ERROR_LENGTH
                and one_typing_error(rare, common)
            ):
                why = "differs by one letter"
            else:
                continue
            lines.append(
                f"{first[rare]}: label {rare!r} ({count_rows(classes[rare])}) {why} from "
                f"{common!r} ({count_rows(classes[common])}); if they are one class, write it alike"
            )
            break
    return lines


def count_rows(count: int) -> str:
    """Return the number of rows in words."""
    return "1 row" if count == 1 else f"{count:,} rows"


def same_spelling(first: str, second: str) -> bool:
    """Return whether two labels have the same letters and digits, without regard to case."""
    folded = [
        re.sub(r"[\W_]", "", unicodedata.normalize("NFKC", label).casefold())
        for label in (first, second)
    ]
    return folded[0] == folded[1] != ""


def new_labels(found: Look) -> list[str]:
    """Return a line for each label that test rows alone have."""
    first: dict[str, str] = {}
    for row in found.test:
        first.setdefault(str(row.example.answer_key), row.where)
    known = found.classes
    return [
        f"{where}: label {label!r}: no row of {', '.join(found.files)} has it, so that nothing "
        "learns it; correct it, or label some rows so"
        for label, where in first.items()
        if label not in known
    ]


def one_typing_error(first: str, second: str) -> bool:
    """Return whether a letter more, less or other, or two that have changed places, makes one label
    of the other. Digits don't count: 'card 1' and 'card 2' are both meant."""
    start = common_start(first, second)
    first, second = first[start:], second[start:]
    end = common_start(first[::-1], second[::-1])
    first, second = first[: len(first) - end], second[: len(second) - end]
    if re.search(r"\d", first + second):
        return False
    swapped = len(first) == 2 and first == second[::-1]
    return swapped or max(len(first), len(second)) <= 1


def common_start(first: str, second: str) -> int:
    """Return how many characters two texts have in common at their start."""
    count = 0
    while first[count : count + 1] == second[count : count + 1] != "":
        count += 1
    return count
