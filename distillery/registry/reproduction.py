"""Compare a student that was made again from its manifest's recipe with the registered version."""

import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

from pydantic import ValidationError

from distillery.data.examples import each_example
from distillery.errors import ArtifactDamaged, RegistryError
from distillery.evaluation.report import ANSWERS_FILE, candidate_of, read_answers
from distillery.labels.files import read_labels
from distillery.recipe import CascadeRecipe, Recipe, TeacherRecipe
from distillery.records import (
    EvaluationReport,
    OnnxModel,
    PreparedDataset,
    Record,
    RegisteredModel,
    Rows,
    TeacherLabels,
)
from distillery.registry.card import CARD
from distillery.registry.manifest import MANIFEST
from distillery.registry.signing import SIGNATURE
from distillery.storage.artifacts import ArtifactStore
from distillery.storage.digests import list_files

SHOWN = 5
"""How many of the differing rows or files are named."""

EVALUATION = "evaluation/"
"""The folder of a registered model that has the answers to the test rows."""

UNREACHABLE = {
    f"{variables}_{name}": value
    for variables in (TeacherRecipe.variables, CascadeRecipe.variables)
    for name, value in (
        ("NAME", "not-asked"),
        ("ENDPOINT", "http://127.0.0.1:9/v1"),
        ("KEY", "not-sent"),
    )
}
"""Teachers that nobody can ask: their stored answers are all that is used."""


class Compared(Record):
    """How many of `of` rows or files differ, and the names of the first. `different` is None where
    the original is gone, so that it can't be compared."""

    what: str
    of: int
    different: int | None
    first: tuple[str, ...] = ()


class Reproduction(Record):
    """What differs between a registered version and the same recipe run again."""

    name: str
    version: str
    compared: tuple[Compared, ...]

    @property
    def same(self) -> bool:
        """Whether rows, labels and answers are the same. Files may differ nevertheless: float
        arithmetic depends on processor and libraries."""
        return all(each.different == 0 for each in self.compared if each.what != "files")


class Remade(NamedTuple):
    """What the second run made."""

    data: PreparedDataset
    labels: TeacherLabels
    model: OnnxModel
    report: EvaluationReport


def pinned_recipe(model: RegisteredModel, made: Mapping[str, Any]) -> Recipe:
    """Return the recipe of a manifest's provenance with its inputs as the run resolved them: the
    revisions of data set and base models, and the teacher's identity. Canary rows are not
    asked, and stored answers count whatever their age.

    Raises RegistryError if the manifest holds no recipe.
    """
    try:
        recipe = Recipe.model_validate(made.get("recipe"))
        values = recipe.model_dump(mode="json")
        local = made.get("local_teacher")
        if local:
            base = values["teacher"]["preparation"]["base"]
            base["revision"] = local["checkpoint"]["base_revision"] or base["revision"]
        base = values["student"]["base"]
        if recipe.student.start == "teacher":
            base = values["teacher"]["preparation"]["base"]
        base["revision"] = made["student"]["base_revision"] or base["revision"]
        if recipe.dataset.source == "hub" and "source" in made:
            values["dataset"]["revision"] = made["source"].rpartition("@")[2]
        if recipe.teacher.kind == "endpoint":
            values["teacher"]["identity"] = made["teacher"]
        if recipe.teacher.cascade:
            values["teacher"]["cascade"]["identity"] = made["labels"]["cascade"]["cheap"]
        if "choose" not in made["recipe"].get("export", {}):
            # Versions that did not know this key took the smallest form.
            values["export"]["choose"] = "smallest"
        values["teacher"]["canaries"]["rows"] = 0
        values["teacher"]["max_age"] = None
        values["teacher"]["budget"] = {}
        return Recipe.model_validate(values)
    except (ValidationError, KeyError, TypeError) as error:
        raise RegistryError(
            f"{model.name} version {model.version}: its manifest holds no whole recipe; only what "
            "`python -m flows.distill` registered can be reproduced"
        ) from error


@contextmanager
def apart(folder: Path, recipe: Recipe) -> Iterator[None]:
    """Set this process's environment so that a run finds nothing cached and changes nothing.

    Artifacts and cached records go to a store in `folder`. A paid teacher can't be reached, while
    its stored answers are read; a local one is asked again, with a label database in `folder`.
    """
    values = {"DISTILLERY_STORE": str(folder / "store"), "DISTILLERY_TRACKING": ""}
    if recipe.teacher.kind == "endpoint":
        values |= UNREACHABLE
    if recipe.teacher.kind == "local":
        values["DISTILLERY_LABELS"] = f"sqlite:///{folder / 'labels.db'}"
    before = {name: os.environ.get(name) for name in values}
    os.environ.update(values)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value


def compare(
    model: RegisteredModel,
    folder: Path,
    made: Mapping[str, Any],
    remade: Remade,
    store: ArtifactStore,
    new_store: ArtifactStore,
) -> Reproduction:
    """Compare the registered `model`, whose downloaded `folder` and provenance `made` are given,
    with `remade`. `store` holds the first run's artifacts, `new_store` the second's.

    Rows and labels that are no longer in `store` are equal by their digests, or not compared.
    """
    data = PreparedDataset.model_validate(made["data"])
    labels = TeacherLabels.model_validate(made["labels"])
    compared = []
    for role in data.splits | remade.data.splits:
        before, after = data.rows_if_any(role), remade.data.rows_if_any(role)
        if before and after and before.sha256 == after.sha256:
            compared.append(Compared(what=f"{role} rows", of=after.rows, different=0))
        else:
            lines = lines_of(before, store)
            compared.append(difference(f"{role} rows", lines, lines_of(after, new_store) or {}))
    new_labels = read_labels(new_store.fetch(remade.labels.artifact))
    answers = {row: label.answers for row, label in new_labels.items()}
    shares = {row: label.distribution for row, label in new_labels.items()}
    old_answers: dict[str, Any] | None = None
    old_shares: dict[str, Any] | None = None
    try:
        old_labels = read_labels(store.fetch(labels.artifact))
        old_answers = {row: label.answers for row, label in old_labels.items()}
        old_shares = {row: label.distribution for row, label in old_labels.items()}
    except ArtifactDamaged:
        if labels.artifact.sha256 == remade.labels.artifact.sha256:
            old_answers, old_shares = answers, shares
    compared.append(difference("labels", old_answers, answers))
    # Written labels have their probabilities by token, apart from the labels.
    if any(share is not None for share in (*shares.values(), *(old_shares or {}).values())):
        compared.append(difference("probabilities", old_shares, shares))
    old_file = folder / EVALUATION / ANSWERS_FILE
    new_file = new_store.fetch(remade.report.artifact) / ANSWERS_FILE
    compared.append(difference("answers", student_answers(old_file), student_answers(new_file)))
    exported = new_store.files(remade.model.artifact.sha256)
    new_files = {entry.path: entry.sha256 for entry in exported}
    compared.append(difference("files", model_files(folder), new_files))
    return Reproduction(name=model.name, version=model.version, compared=tuple(compared))


def model_files(folder: Path) -> dict[str, str]:
    """Return the digests of a registered folder's files by path, without those that registering
    added to the exported model."""
    files = {}
    for entry in list_files(folder):
        added = entry.path in (MANIFEST, SIGNATURE, CARD) or entry.path.startswith(EVALUATION)
        if not added:
            files[entry.path] = entry.sha256
    return files


def lines_of(rows: Rows | None, store: ArtifactStore) -> dict[str, str] | None:
    """Return the rows of a split by their ids; None where they are no longer in the store."""
    if rows is None:
        return {}
    try:
        file = store.fetch(rows.artifact) / rows.file
    except ArtifactDamaged:
        return None
    return {row.example_id: row.model_dump_json() for row in each_example(file)}


def student_answers(file: Path) -> dict[str, str | None]:
    """Return the student's letter by row, from an answers.jsonl."""
    name = candidate_of(file) or ""
    return {row: letters[name] for row, letters in read_answers(file).items()}


def difference(what: str, before: Mapping[str, Any] | None, after: Mapping[str, Any]) -> Compared:
    """Compare two mappings by name; `before` is None where it can't be read any more."""
    if before is None:
        return Compared(what=what, of=len(after), different=None)
    names = sorted(before.keys() | after.keys())
    missing = object()
    differing = []
    for name in names:
        if before.get(name, missing) != after.get(name, missing):
            differing.append(name)
    return Compared(
        what=what, of=len(names), different=len(differing), first=tuple(differing[:SHOWN])
    )


def render_reproduction(found: Reproduction) -> str:
    """Return the comparison for the terminal."""
    lines = []
    for each in found.compared:
        told = "the same"
        if each.different is None:
            told = "not compared: the original is no longer in the artifact store"
        elif each.different:
            more = ", ..." if each.different > len(each.first) else ""
            told = f"{each.different:,} differ: {', '.join(each.first)}{more}"
        lines.append(f"{each.what:16} {each.of:>9,}  {told}")
    verdict = "rows, labels and answers are the same"
    if not found.same:
        verdict = "not reproduced"
    lines.append(f"{found.name} version {found.version}: {verdict}")
    return "\n".join(lines)
