"""Run the recipe of a registered version again, at the inputs that its manifest pins, and say what
differs: rows, labels, answers, files.

`python -m flows.reproduce my-task` does it here. Nothing is taken from the cache, registered or
kept. A paid teacher is not asked: its stored answers are used.
"""

import sys
from argparse import ArgumentParser
from pathlib import Path
from typing import get_args

from prefect import flow, tags

from distillery.errors import DistilleryError, TeacherError
from distillery.labels.quote import quote_recipe
from distillery.recipe import Recipe, RegistryKind, RegistryRecipe
from distillery.records import RegisteredModel, Selection
from distillery.registry.open import open_registry
from distillery.registry.reproduction import (
    Remade,
    Reproduction,
    apart,
    compare,
    pinned_recipe,
    render_reproduction,
)
from distillery.registry.trace import record_in
from distillery.storage.artifacts import ArtifactStore
from distillery.storage.working import working_folder
from flows.distill import made_student, planned_student, prepared
from tasks.hub import source_of
from tasks.results import results_in_store
from tasks.stage import RESULT, begin
from tasks.terminal import shown_in_terminal


@flow(name="reproduce", description=__doc__, **RESULT)
def reproduce(
    model_name: str, version: str | None = None, registry: RegistryKind = "local"
) -> Reproduction:
    """Make a registered version again and compare it with the original.

    Args:
        model_name: The registered model.
        version: The model's version; by default the champion.
        registry: Where the model is registered.
    """
    begin()
    source = open_registry(RegistryRecipe(kind=registry, model_name=model_name))
    model = source.get(model_name, version)
    made = source.provenance(model)["provenance"]
    recipe = pinned_recipe(model, made)
    store = ArtifactStore()
    selection = record_in(made, "selection", Selection)
    chosen = store.fetch(selection.artifact) if selection else None
    file = chosen / selection.chosen.file if selection and chosen else None
    refuse_missing_answers(model, recipe, file)
    with working_folder("reproduce") as folder:
        original = source.download(model, folder / "original")
        with apart(folder, recipe):
            data = prepared(recipe, source_of(recipe), ())
            if selection and chosen:
                # Chosen anew, they would be others: there is another champion now.
                copied = ArtifactStore().put(chosen)
                selection = selection.model_copy(update={"artifact": copied})
            again = made_student(recipe, data, None, (), selection)
            remade = Remade(again.taught.data, again.taught.labels, again.model, again.report)
            return compare(model, original, made, remade, store, ArtifactStore())


def refuse_missing_answers(model: RegisteredModel, recipe: Recipe, chosen: Path | None) -> None:
    """Raise TeacherError if a paid teacher would have to be asked. `chosen`: the file of the train
    rows that are labelled; None for all."""
    if recipe.teacher.kind != "endpoint":
        return
    calls = sum(quoted.calls for quoted in quote_recipe(recipe, chosen).values())
    if calls:
        raise TeacherError(
            f"{model.name} version {model.version}: the label database lacks {calls} answers of "
            f"{recipe.teacher.identity}, which is not asked again; set DISTILLERY_LABELS to the "
            "database of the run"
        )


def main(arguments: list[str]) -> int:
    """Reproduce a version here; return 0 if rows, labels and answers are the same, 1 if they are
    not, or after one line on what the user can mend."""
    parser = ArgumentParser(
        "python -m flows.reproduce",
        description="Makes a registered version again and says what differs.",
    )
    parser.add_argument("model", help="the registered model's name")
    parser.add_argument("version", nargs="?", help="by default the champion, else the newest")
    parser.add_argument("--registry", choices=get_args(RegistryKind), default="local")
    parser.add_argument("--json", action="store_true", help="print JSON, for programs")
    given = parser.parse_args(arguments)
    try:
        source = open_registry(RegistryRecipe(kind=given.registry, model_name=given.model))
        model = source.get(given.model, given.version)
        recipe = pinned_recipe(model, source.provenance(model)["provenance"])
        with (
            shown_in_terminal(planned_student(recipe)),
            results_in_store(),
            tags(recipe.name, "reproduce"),
        ):
            found = reproduce(given.model, model.version, given.registry)
    except DistilleryError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    print(found.model_dump_json(indent=1) if given.json else render_reproduction(found))
    return 0 if found.same else 1


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
