"""Prepare a local teacher, for those without an endpoint: fine-tune it on gold rows and export
it."""

from prefect import flow

from distillery.recipe import PromptRecipe, TeacherPreparation
from distillery.records import PreparedDataset, PreparedTeacher
from flows.train_student import trained
from tasks.labels import gold_labels
from tasks.onnx import export
from tasks.stage import RESULT, Stage, begin, refreshing


@flow(
    name="prepare-teacher",
    description="Fine-tunes a local teacher on gold labels and exports it.",
    **RESULT,
)
def prepare_teacher(
    preparation: TeacherPreparation,
    prompt: PromptRecipe,
    data: PreparedDataset,
    training_deployment: str | None = None,
    refresh: tuple[Stage, ...] = (),
) -> PreparedTeacher:
    """Fine-tune a local teacher on the gold rows and export it.

    Args:
        preparation: The base model, and how it is trained and exported.
        prompt: The chat prompt.
        data: The prepared rows.
        training_deployment: The deployment that trains; by default this process.
        refresh: Stages to do again although nothing has changed.
    """
    begin()
    gold = data.rows("gold")
    checkpoint = trained(
        training_deployment,
        "teacher",
        refresh="train teacher" in refresh,
        base=preparation.base,
        training=preparation.training,
        layers=preparation.layers,
        prompt=prompt,
        rows=gold,
        labels=gold_labels(gold, prompt),
        validation=data.rows_if_any("validation"),
    )
    again = refreshing(refresh)
    model = again("export teacher", export)(checkpoint, preparation.base, preparation.export)
    return PreparedTeacher(checkpoint=checkpoint, model=model)
