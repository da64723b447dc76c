import time
from collections.abc import Callable
from typing import Any

from prefect import get_run_logger

from distillery.export import build
from distillery.export.ladder import climb
from distillery.export.ladder_table import describe_rung
from distillery.models.base import base_folder, remote_code_allowed
from distillery.models.inspect import model_and_adapter
from distillery.recipe import BaseModelRecipe, ExportForm, ExportRecipe, PromptRecipe, Recipe
from distillery.records import OnnxModel, PreparedDataset, Rows, StudentCheckpoint, TeacherLabels
from distillery.storage.artifacts import ArtifactStore
from distillery.storage.working import working_folder
from tasks.progress import conclude, show_bytes, show_parts
from tasks.scored_models import float_student
from tasks.stage import Stage, origin, stage


@stage("export", version=2)
def export(checkpoint: StudentCheckpoint, base: BaseModelRecipe, recipe: ExportForm) -> OnnxModel:
    """Merge, quantise and build a checkpoint for ONNX Runtime GenAI."""
    started = time.perf_counter()
    store = ArtifactStore()
    model, adapter = model_and_adapter(
        store.fetch(checkpoint.artifact), base_folder(base, show_bytes)
    )
    with working_folder("onnx") as folder:
        build.export(model, adapter, recipe, folder, remote_code_allowed(base), progress=show_parts)
        artifact = store.put(folder)
    conclude(f"{recipe.precision} model of {artifact.bytes / 1e6:.1f} MB")
    return OnnxModel(
        artifact=artifact,
        precision=recipe.precision,
        algorithm=recipe.algorithm if recipe.quantised else "none",
        parameters=checkpoint.parameters,
        adapter_apart=recipe.adapter_apart,
        **origin(started),
    )


def is_final(model: OnnxModel) -> bool:
    """Return whether a later run may take this result of a ladder from the cache.

    It may not if a rung was left out because memory or time ran out: on another machine, or
    here tomorrow, it may fit."""
    return model.ladder is None or model.ladder.is_final


@stage("export ladder", version=6, reusable=is_final, added_later={"labels"})
def export_ladder(
    checkpoint: StudentCheckpoint,
    base: BaseModelRecipe,
    recipe: ExportRecipe,
    prompt: PromptRecipe,
    validation: Rows,
    train: Rows | None,
    labels: TeacherLabels | None = None,
) -> OnnxModel:
    """Build a checkpoint in the forms of the ladder, ask each the validation rows and keep the
    best.

    gptq is calibrated on the prompts of `train`, and export.training_rows of these are asked too,
    if their `labels` are given."""
    started = time.perf_counter()
    store = ArtifactStore()
    with working_folder("onnx") as folder:
        ladder = climb(
            float_student(checkpoint, base, store),
            recipe,
            prompt,
            store.fetch(validation.artifact) / validation.file,
            store.fetch(train.artifact) / train.file if train else None,
            folder,
            labels=store.fetch(labels.artifact) if labels else None,
            progress=show_parts,
        )
        artifact = store.put(folder)
    for rung in ladder.rungs:
        if rung.out_of_resources:
            get_run_logger().warning(
                "%s; the next run builds the ladder again, on this or another machine; if the rung "
                "never fits, remove it from export.ladder",
                describe_rung(rung),
            )
    picked = next(rung for rung in ladder.rungs if rung.picked)
    form = picked.form
    conclude(f"{describe_rung(picked)}: {ladder.reason}")
    return OnnxModel(
        artifact=artifact,
        precision=form.precision,
        algorithm=form.algorithm if form.quantised else "none",
        parameters=checkpoint.parameters,
        adapter_apart=form.adapter_apart,
        ladder=ladder,
        **origin(started),
    )


def exported(
    checkpoint: StudentCheckpoint,
    base: BaseModelRecipe,
    recipe: Recipe,
    data: PreparedDataset,
    labels: TeacherLabels,
    again: Callable[[Stage, Any], Any],
) -> OnnxModel:
    """Export the student in the recipe's form, or in the form that its ladder picks."""
    model: OnnxModel
    if not recipe.export.ladder:
        model = again("export student", export)(checkpoint, base, recipe.export.form)
        return model
    asks_train = recipe.export.training_rows > 0
    model = again("export student", export_ladder)(
        checkpoint,
        base,
        recipe.export,
        recipe.student_prompt,
        data.rows("validation"),
        data.rows("train") if recipe.export.calibrated or asks_train else None,
        labels if asks_train else None,
    )
    return model
