"""Which train rows are labelled, where teacher.select chooses some of them."""

import time
from collections.abc import Callable, Sequence
from typing import Any

from prefect import get_run_logger

from distillery.data.examples import each_example, read_examples
from distillery.data.prepare import write_chosen
from distillery.data.rows import content_of_row
from distillery.data.selection import SELECTION_FILE, choose_rows
from distillery.errors import DataError
from distillery.evaluation.baselines import TFIDF_ON_GOLD, answered, hindrance, shares_of_words
from distillery.labels.quote import free_rows
from distillery.labels.store import LabelStore
from distillery.recipe import (
    FilterRecipe,
    PromptRecipe,
    Recipe,
    RegistryRecipe,
    SelectRecipe,
    TeacherRecipe,
)
from distillery.records import Example, PreparedDataset, RegisteredModel, Rows, Selection
from distillery.registry.last_student import LastStudent, find_last_student, shares_by_student
from distillery.registry.manifest import prompt_in
from distillery.registry.open import open_registry
from distillery.storage.artifacts import ArtifactStore
from distillery.storage.working import working_folder
from distillery.teacher.identity import identity_of_cheap
from tasks.progress import conclude, show_rows
from tasks.stage import Stage, origin, stage, uncached

Shares = list[tuple[float, ...] | None]
"""The probabilities of each row's options; None for a row that could not be asked."""


@uncached("last student")
def last_student(data: PreparedDataset, recipe: Recipe, identity: str) -> LastStudent:
    """Return the champion, with what it learnt from if the teacher is asked as it was then."""
    registry = open_registry(recipe.registry)
    cheap = identity_of_cheap(recipe.teacher)
    return find_last_student(registry, recipe, data, identity, ArtifactStore(), cheap)


@stage("select rows", version=2)
def select_rows(
    train: Rows,
    select: SelectRecipe,
    last: RegisteredModel | None,
    learnt: Rows | None,
    gold: Rows | None,
    prompt: PromptRecipe,
    teacher: TeacherRecipe,
    identity: str,
    cheap: str | None,
) -> Selection:
    """Choose the train rows that teach most.

    `last`: the student whose uncertainty counts; without one, a classifier of words that learns
    from the `gold` rows is asked. `learnt`: rows that stay where they are among the train rows. So
    do those to which the `teacher`, `identity`, after the cheap one `cheap`, has answered before:
    they cost nothing, whether or not a student that learnt from them was promoted."""
    started = time.perf_counter()
    store = ArtifactStore()
    rows = read_examples(store.fetch(train.artifact) / train.file)
    known = set[str]()
    if learnt:
        known = {
            content_of_row(row) for row in each_example(store.fetch(learnt.artifact) / learnt.file)
        }
    with LabelStore(max_age=teacher.max_age) as answers:
        free = free_rows(rows, prompt, teacher, identity, cheap, answers)
        known.update(content_of_row(row) for row in free)
    kept = frozenset(position for position, row in enumerate(rows) if content_of_row(row) in known)
    by, scorer, note = select.by, "", ""
    shares: Shares | None = None
    if by != "diversity":
        shares, scorer, note = shares_of(rows, last, gold)
        if shares is None and by == "uncertainty":
            raise DataError(
                f"teacher.select.by: uncertainty: nobody knows it: {note}; register a student "
                "first, add gold rows, or set by: diversity"
            )
        if shares is None:
            by = "diversity"
    chosen = choose_rows(rows, select.rows, by, shares, kept, progress=show_rows)
    with working_folder("selection") as folder:
        # In the order of the train rows, on which training and labels depend.
        split = write_chosen([rows[position] for position in sorted(chosen)], folder / train.file)
        lines = [f"{row.model_dump_json(exclude_none=True)}\n" for row in chosen.values()]
        (folder / SELECTION_FILE).write_text("".join(lines), encoding="utf-8", newline="\n")
        artifact = store.put(folder)
    selection = Selection(
        artifact=artifact,
        chosen=split,
        of=len(rows),
        kept=len(kept),
        by=select.by,
        added=select.rows,
        scorer=scorer,
        train_sha256=train.sha256,
        note=note,
        **origin(started),
    )
    conclude(selection.line())
    return selection


def shares_of(
    rows: Sequence[Example], last: RegisteredModel | None, gold: Rows | None
) -> tuple[Shares | None, str, str]:
    """Return the probabilities of the rows' options, whose they are, and what is to be told of it;
    no probabilities where neither a student nor words tell any."""
    notes = []
    if last:
        name = f"{last.name} version {last.version}"
        registry = open_registry(RegistryRecipe(kind=last.registry, model_name=last.name))
        prompt = prompt_in(
            registry.provenance(last)["provenance"], name, classify=bool(rows[0].classes)
        )
        with working_folder("last-student") as folder:
            model = registry.download(last, folder / "model")
            shares = shares_by_student(model, rows, prompt, show_rows)
        if shares is not None:
            return shares, name, ""
        notes.append(f"{name} has other classes")
    learnt: list[Example] = []
    if gold:
        store = ArtifactStore()
        learnt = answered(read_examples(store.fetch(gold.artifact) / gold.file))
    reason = hindrance(learnt, rows)
    if reason is None:
        return shares_of_words(learnt, rows), TFIDF_ON_GOLD, "; ".join(notes)
    notes.append(f"there is no student yet, and of words {reason}" if not last else reason)
    return None, "", "; ".join(notes)


def selected(
    recipe: Recipe, data: PreparedDataset, identity: str, again: Callable[[Stage, Any], Any]
) -> Selection | None:
    """Return the train rows that are labelled, chosen as teacher.select says; None where all are.

    The rows that were chosen for the champion are taken where the recipe asks for the same choice
    of the same rows: it has learnt from them since, and would choose others."""
    select = recipe.teacher.select
    if select is None:
        return None
    last = last_student(data, recipe, identity)
    if last.selection:
        get_run_logger().info("%s, as for the champion", last.selection.line())
        return last.selection
    selection: Selection = again("select rows", select_rows)(
        data.rows("train"),
        select,
        last.model,
        last.learnt,
        data.rows_if_any("gold"),
        recipe.prompt,
        # Another filter is no reason to choose anew: the answers are those of before.
        recipe.teacher.model_copy(update={"filters": FilterRecipe()}),
        identity,
        identity_of_cheap(recipe.teacher),
    )
    return selection
