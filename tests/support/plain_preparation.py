"""Preparation in its plainest form: all rows in memory, each pair of rows compared."""

from distillery.data.answer_format import named_format
from distillery.data.classes import named_classes
from distillery.data.corrections import Corrections
from distillery.data.near_duplicates import option_tokens, question_tokens
from distillery.data.other import OtherTexts, other_rows
from distillery.data.prepare import OTHER, check_roles, found_classes, labels_of, shares_of
from distillery.data.rows import Row, RowReader, validated_rows
from distillery.data.source import open_source
from distillery.data.splits import (
    FITTED,
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
from distillery.errors import DataError
from distillery.recipe import DatasetRecipe, TaskRecipe


def plainly_prepared(recipe: DatasetRecipe, task: TaskRecipe) -> dict[str, str]:
    """Return the text of each role's file. Raises what `prepare` raises, except for splits that the
    source lacks."""
    classes, answer_format = named_classes(task), named_format(task)
    classify = task.kind == "classify"
    check_roles(recipe)
    reader = RowReader(recipe.columns, recipe.fields, classify, classes, answer_format)
    source = open_source(recipe)
    splits: Splits = {}
    for role, name in recipe.splits.items():
        rows: list[Row] = []
        for table in source[name]():
            rows += validated_rows(table, reader, role, recipe.seed)
        splits[role] = in_order(rows)
    if task.other:
        splits[OTHER] = list(other_rows(task.other, reader, recipe.seed))
    corrections = Corrections(recipe, reader)
    splits = corrections.applied(splits)
    corrections.refuse_unused()
    splits = carve(splits, shares_of(recipe))
    if task.other:
        texts = OtherTexts(shares_of(recipe))
        splits = texts.added(splits, splits.pop(OTHER))
        texts.conclude()
    if classify and classes is None:
        found_classes(labels_of(splits), recipe.columns.answer)
    leaks = Leaks()
    leaks.find(splits)
    leaks.refuse()
    if answer_format:
        splits = join_references(splits)
    splits["train"] = drop_copies(splits["train"])
    refuse_shared_ids(splits)
    splits = without_near_duplicates(splits, recipe.near_duplicate)
    if recipe.rotation:
        low, high = test_interval(dict(recipe.carve.items()), recipe.rotation.round)
        splits["test"] = [row for row in splits["test"] if low <= row.position < high]
    refuse_empty({role: len(rows) for role, rows in splits.items()})
    texts_of: dict[str, str] = {}
    limits = {str(role): limit for role, limit in recipe.sample.items()}
    for name in ROLES:
        if name in splits:
            rows = splits[name][: limits.get(name)]
            texts_of[name] = "".join(f"{row.example.model_dump_json()}\n" for row in rows)
    return texts_of


def refuse_shared_ids(splits: Splits) -> None:
    first: dict[str, Row] = {}
    for role, rows in splits.items():
        own: dict[str, Row] = {}
        for row in rows:
            key = row.example.example_id
            other = own.get(key) or first.get(key, row)
            if key in own or other.content != row.content:
                earlier, later = sorted((other.where, row.where), key=file_and_line)
                raise DataError(
                    f"{later}: id: {key!r} of {role} is that of {earlier} too; make ids unique, "
                    "or set dataset.columns.id to null to name rows by their content"
                )
            own[key] = row
        first |= own


def without_near_duplicates(splits: Splits, threshold: float) -> Splits:
    tokens = {
        id(row): (question_tokens(row.example), option_tokens(row.example))
        for rows in splits.values()
        for row in rows
    }

    def repeats(row: Row, others: list[Row]) -> bool:
        return any(
            all(
                len(a & b) >= threshold * len(a | b) - 1e-9
                for a, b in zip(tokens[id(row)], tokens[id(other)], strict=True)
            )
            for other in others
        )

    kept = dict(splits)
    compared = list(splits.get("test", []))
    if "validation" in splits:
        kept["validation"] = [row for row in splits["validation"] if not repeats(row, compared)]
        compared += kept["validation"]
    for role in FITTED:
        if role in splits:
            kept[role] = []
            for row in splits[role]:
                if not repeats(row, compared):
                    kept[role].append(row)
                    if role == "train":
                        compared.append(row)
    return kept
