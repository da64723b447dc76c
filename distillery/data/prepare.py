"""Rows of a hub data set, of local files or of the shipped sample: validated, split, free of copies and leaks.

Columns in, named in dataset.columns, by default those of tau/commonsense_qa:
  id             text or whole number; the content's hash where the column is not there
  question       text
  question_concept   text, optional
  choices        {"label": [...], "text": [...]} or a list of texts, 2 to 26; also either as a JSON string (CSV);
                 texts may repeat, as in one row of 75 of CommonsenseQA: it is the letter that is asked for
  answerKey      one of the labels, which become letters by position; empty or missing where unknown
Files out: `<role>.jsonl` for the roles gold, train, validation, test, one records.Example a line.

A row's *content* is its question and its options, whatever their order, without regard to case, width of characters and
white space. Its *place* in [0, 1) is a hash of the recipe's seed and that content, so copies share a place, and neither
other rows nor a corrected answer move one. Carving gives consecutive intervals of places to gold, validation and test,
in this order, and the rest to train; sampling keeps the lowest places. Files out are sorted by place: the order of the
source's rows changes nothing.

Copies. Two rows are *alike* where the sets of word triples of their questions, and the sets of their options, both have
a Jaccard similarity of dataset.near_duplicate or more; a question of fewer than three words, or in a script without
spaces, is like its equals only. Within train, of rows with equal content, then of rows alike, the one of the lowest
place stays. Rows of train or gold with the content of a validation or test row stop the run; carved from one source
they can't be apart, as they share a place. Rows of train or gold that are merely alike to a validation or test row, of
the same source or another, are dropped and counted among the near duplicates. Duplicates within gold, validation and
test stay, so that adding rows takes none away. All of this comes before sampling: a test row that is not sampled today
trains no student either.
"""

import logging
from collections.abc import Callable, Iterator
from functools import partial
from importlib.resources import files
from pathlib import Path

from distillery.data.hub import hub_commit, hub_table, load_from_hub
from distillery.data.near_duplicates import drop_near_duplicates
from distillery.data.readers import Table, read_files
from distillery.data.rows import ROLES, Row, Splits, by_position, validated_rows, with_ids
from distillery.data.splits import carve, drop_copies, refuse_empty, refuse_leaks, refuse_shared_ids
from distillery.errors import DataError, NoSuchRevision, RecipeError
from distillery.recipe import DatasetRecipe
from distillery.records import Record, Split, digest_of
from distillery.storage.digests import sha256_of

_log = logging.getLogger(__name__)


class PreparedCounts(Record):
    """`splits` by role; rows that were dropped because their content, or nearly so, stands in the data already."""

    splits: dict[str, Split]
    duplicates_dropped: int = 0
    near_duplicates_dropped: int = 0


def prepare(recipe: DatasetRecipe, out: Path) -> PreparedCounts:
    """Writes `<role>.jsonl` into `out` for each role that the recipe's splits and carve name; see the module's text.

    Raises DataError (a file, row or column), RecipeError (splits, carve and sample at odds). Writes all or nothing.
    """
    _check_roles(recipe)
    splits = carve(recipe, _load(recipe))
    refuse_leaks(splits)
    splits, copies = drop_copies(splits)
    refuse_shared_ids(splits)
    splits, near = drop_near_duplicates(splits, recipe.near_duplicate)
    limits: dict[str, int] = dict(recipe.sample.items())
    splits = {role: rows[: limits.get(role)] for role, rows in splits.items()}
    refuse_empty(splits)
    out.mkdir(parents=True, exist_ok=True)
    written = {
        role: _write(out / f"{role}.jsonl", splits[role]) for role in ROLES if role in splits
    }
    return PreparedCounts(splits=written, duplicates_dropped=copies, near_duplicates_dropped=near)


def source_identity(recipe: DatasetRecipe) -> str:
    """What stands for the source's content in a cache key: a digest of the files, or the hub's commit.

    Where the hub doesn't answer, a revision stands for itself. Raises DataError where a file can't be read, or where
    there is no revision either."""
    if recipe.source == "hub":
        try:
            commit = hub_commit(recipe)
        except DataError as error:
            if not recipe.revision or isinstance(error, NoSuchRevision):
                raise
            _log.warning("%s; going on with what is here of revision %s", error, recipe.revision)
            commit = recipe.revision
        return f"{recipe.name}@{commit}"
    if recipe.source == "files":
        paths = [
            Path(file).expanduser()
            for split in sorted(recipe.files)
            for file in recipe.files[split]
        ]
    else:
        paths = sorted(
            path
            for path in Path(str(files("distillery.data") / "sample")).iterdir()
            if path.suffix == ".jsonl"
        )
    missing = [str(path) for path in paths if not path.is_file()]
    if missing:
        raise DataError(f"{missing[0]}: no such file; correct dataset.files")
    splits = {split: len(recipe.files[split]) for split in sorted(recipe.files)}
    return digest_of([splits, *(sha256_of(path) for path in paths)])


def _check_roles(recipe: DatasetRecipe) -> None:
    for role in recipe.carve:
        if role in recipe.splits:
            raise RecipeError(
                f"dataset.carve.{role}: dataset.splits.{role} names a split already; remove one of them"
            )
    for sampled in sorted(set(recipe.sample) - {*recipe.splits, *recipe.carve}):
        raise RecipeError(
            f"dataset.sample.{sampled}: no such split; name it in dataset.splits or dataset.carve"
        )
    if sum(recipe.carve.values()) >= 1:
        raise RecipeError(
            f"dataset.carve: the shares add up to {sum(recipe.carve.values()):g}; leave some for train"
        )


# Reading


def _load(recipe: DatasetRecipe) -> Splits:
    """The validated rows of the roles in dataset.splits, in order of place."""
    source = _open(recipe)
    splits: Splits = {}
    for role, name in recipe.splits.items():
        if name not in source:
            raise DataError(
                f"dataset.splits.{role}: the source has no split {name!r}, only {', '.join(source)}; "
                f"correct dataset.splits or take a share of train by dataset.carve"
            )
        rows = [row for table in source[name]() for row in validated_rows(table, recipe, role)]
        splits[role] = with_ids(sorted(rows, key=by_position))
    return splits


def _open(recipe: DatasetRecipe) -> dict[str, Callable[[], Iterator[Table]]]:
    """A reader for each split of the source, by the split's name."""
    if recipe.source == "hub":
        return {
            name: partial(hub_table, recipe.name, name, rows)
            for name, rows in load_from_hub(recipe).items()
        }
    if recipe.source == "files":
        return {
            name: partial(read_files, f"dataset.files.{name}", paths)
            for name, paths in recipe.files.items()
        }
    folder = Path(str(files("distillery.data") / "sample"))
    names = ("gold", "pool", "validation", "test")
    return {
        name: partial(read_files, f"dataset.files.{name}", (str(folder / f"{name}.jsonl"),))
        for name in names
    }


def _write(path: Path, rows: list[Row]) -> Split:
    path.write_text(
        "".join(f"{row.example.model_dump_json()}\n" for row in rows),
        encoding="utf-8",
        newline="\n",
    )
    return Split(file=path.name, rows=len(rows), sha256=sha256_of(path))
