"""The threshold below which an exported student abstains."""

import shutil
from collections.abc import Callable
from typing import Any

from distillery.errors import DataError, ModelError
from distillery.evaluation.scoring import answered_rows, score_model
from distillery.evaluation.selective import asked_rows, choose_threshold, rows_needed
from distillery.inference.abstention import write_abstention
from distillery.recipe import AbstainRecipe, PromptRecipe
from distillery.records import Abstention, OnnxModel, PreparedDataset, Rows
from distillery.storage.artifacts import ArtifactStore
from distillery.storage.working import working_folder
from tasks.progress import conclude, show_rows
from tasks.scored_models import onnx_model
from tasks.stage import Stage, stage


@stage("set threshold", version=3)
def set_threshold(
    model: OnnxModel, recipe: AbstainRecipe, prompt: PromptRecipe, validation: Rows | None
) -> OnnxModel:
    """Write into a student's folder when it abstains. The threshold is chosen on the validation
    rows if the recipe names an accuracy. The record still tells which run exported the student.

    Raises ModelError where no threshold is proven to reach the accuracy."""
    store = ArtifactStore()
    threshold, proof = recipe.threshold or 0.0, None
    if recipe.accuracy is not None and validation is not None:
        file = store.fetch(validation.artifact) / validation.file
        examples, _ = answered_rows(file, "validation")
        scored = score_model(onnx_model("student", model, store), file, prompt, progress=show_rows)
        rows = asked_rows(examples, scored.answers, scored.probabilities)
        chosen = choose_threshold(rows, recipe.accuracy, recipe.confidence, threshold)
        threshold, proof = chosen.threshold, chosen.proof
        if not chosen.proven:
            raise ModelError(
                f"task.abstain.accuracy: no threshold reaches {recipe.accuracy:g} on "
                f"{proof.rows} validation rows: the best, {threshold:.3f}, has {proof.correct} of "
                f"{proof.given} answers right, which proves {proof.bound:.3f}; more validation "
                "rows or a better student would help most, or set a lower accuracy"
            )
    abstention = Abstention(threshold=threshold, answer=recipe.answer, proof=proof)
    with working_folder("abstain") as folder:
        shutil.copytree(store.fetch(model.artifact), folder, dirs_exist_ok=True)
        write_abstention(abstention, folder)
        artifact = store.put(folder)
    conclude(describe(abstention))
    return model.model_copy(update={"artifact": artifact, "abstention": abstention})


def describe(abstention: Abstention) -> str:
    """Return in words when a student abstains."""
    text = f"abstains below {abstention.threshold:.3f}"
    proof = abstention.proof
    if proof:
        text += (
            f": gives {proof.given} of {proof.rows} answers, {proof.correct} of them right; "
            f"{proof.bound:.3f} or more are right with {proof.confidence:.0%} confidence"
        )
    return text


def with_threshold(
    model: OnnxModel,
    recipe: AbstainRecipe,
    prompt: PromptRecipe,
    data: PreparedDataset,
    again: Callable[[Stage, Any], Any],
) -> OnnxModel:
    """Return the exported student with the threshold of the recipe."""
    validation = data.rows("validation") if recipe.accuracy is not None else None
    found: OnnxModel = again("set threshold", set_threshold)(model, recipe, prompt, validation)
    return found


def check_provable(recipe: AbstainRecipe, data: PreparedDataset) -> None:
    """Raise DataError, before anything is trained, where the validation rows are too few to prove
    the accuracy, or a class is named like the answer of a student that abstains."""
    if recipe.answer in data.classes:
        raise DataError(
            f"task.abstain.answer: {recipe.answer!r} is one of the classes; choose another text"
        )
    if recipe.accuracy is None:
        return
    rows = data.rows("validation").rows
    needed = rows_needed(recipe.accuracy, recipe.confidence)
    if rows < needed:
        raise DataError(
            f"task.abstain.accuracy: {rows} validation rows can't prove {recipe.accuracy:g}, "
            f"even if all answers are right; {needed} can: add validation rows or set a lower "
            "accuracy"
        )
