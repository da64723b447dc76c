"""The last student of a task, the champion in the registry, as far as the choice of the next rows
depends on it: what it learnt from, and how sure it is of the others."""

import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from itertools import islice
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from distillery.errors import ModelGone
from distillery.inference.batch import ROWS
from distillery.inference.student import Answer
from distillery.inference.text_student import load_for_rows
from distillery.recipe import FilterRecipe, PromptRecipe, Recipe
from distillery.records import (
    Example,
    PreparedDataset,
    Record,
    RegisteredModel,
    Rows,
    Selection,
)
from distillery.registry.base import Registry, champion_of
from distillery.storage.artifacts import ArtifactStore

_log = logging.getLogger(__name__)


class LastStudent(Record):
    """The champion; None if there is none. `learnt`: the train rows that were labelled for it, if
    the teacher is asked today as it was then, so that its answers are stored. `selection`: what was
    chosen for it, if that is what the recipe asks for today."""

    model: RegisteredModel | None = None
    learnt: Rows | None = None
    selection: Selection | None = None


def find_last_student(
    registry: Registry,
    recipe: Recipe,
    data: PreparedDataset,
    identity: str,
    store: ArtifactStore,
    cheap: str | None = None,
) -> LastStudent:
    """Return the last student of a recipe whose teacher is `identity`, after the cheap one `cheap`
    if there is one, and whose rows are `data`.

    Rows that are no longer in `store` count as not learnt."""
    champion = champion_of(registry.list(recipe.registry.model_name))
    if champion is None:
        return LastStudent()
    try:
        made = registry.provenance(champion)["provenance"]
    except ModelGone:
        return LastStudent()
    found = LastStudent(model=champion)
    if not asks_alike(made, recipe, identity, cheap):
        return found
    selection, learnt = labelled_rows(made)
    if learnt is None or not store.holds(learnt.artifact):
        _log.info(
            "%s version %s: the rows that it learnt from are not in the store, so that none of "
            "them is kept for teacher.select",
            champion.name,
            champion.version,
        )
        return found
    select = recipe.teacher.select
    if selection and select:
        then = (selection.by, selection.added, selection.train_sha256)
        if then != (select.by, select.rows, data.splits["train"].sha256):
            selection = None
    return LastStudent(model=champion, learnt=learnt, selection=selection)


def asks_alike(
    made: Mapping[str, Any], recipe: Recipe, identity: str, cheap: str | None = None
) -> bool:
    """Return whether the provenance `made` is of a student whose teacher was asked as `recipe` asks
    the teacher `identity`, and the one before it `cheap`."""
    try:
        earlier = Recipe.model_validate(made.get("recipe"))
    except ValidationError:
        return False
    if made.get("teacher") != identity or earlier.prompt != recipe.prompt:
        return False
    cascade = (made.get("labels") or {}).get("cascade") or {}
    return cascade.get("cheap") == cheap and asked_as(earlier) == asked_as(recipe)


def asked_as(recipe: Recipe) -> str:
    """Return what a teacher's answers depend on besides prompt and identity: filters reject labels
    of answers that are there."""
    return recipe.teacher.model_copy(update={"filters": FilterRecipe()}).content_id


def labelled_rows(made: Mapping[str, Any]) -> tuple[Selection | None, Rows | None]:
    """Return the selection in a provenance, if there is one, and the train rows that were labelled:
    the chosen ones, or all."""
    try:
        if made.get("selection"):
            selection = Selection.model_validate(made["selection"])
            return selection, selection.rows
        return None, PreparedDataset.model_validate(made.get("data")).rows("train")
    except ValidationError:
        return None, None


def shares_by_student(
    folder: Path,
    rows: Sequence[Example],
    prompt: PromptRecipe,
    progress: Callable[[int, int], None] | None = None,
) -> list[tuple[float, ...] | None] | None:
    """Return the probabilities of each row's options by the student in `folder`, None for a row
    that it can't be asked; None instead of all where it has other classes, or writes its
    answers."""
    student = load_for_rows(folder)
    classes = student.classes.classes if student.classes else ()
    if student.format is not None or set(classes) != set(rows[0].classes):
        return None
    shares: list[tuple[float, ...] | None] = []
    for some in in_parts(rows):
        for row, found in zip(some, student.answers(some, prompt), strict=True):
            known = found.probabilities if isinstance(found, Answer) else None
            shares.append(tuple(known[key] for key in row.keys) if known else None)
        if progress:
            progress(len(shares), len(rows))
    return shares


def in_parts(rows: Sequence[Example]) -> Iterator[list[Example]]:
    """Yield the rows by as many as batch inference answers together."""
    remaining = iter(rows)
    while part := list(islice(remaining, ROWS)):
        yield part
