import json
import time

from prefect import get_run_logger

from distillery import student as domain
from distillery.base_model import base_folder, remote_code_allowed
from distillery.dataset import read_examples
from distillery.labels import read_labels
from distillery.recipe import BaseModelRecipe, PromptRecipe, TrainingRecipe
from distillery.records import Rows, StudentCheckpoint, TeacherLabels
from distillery.store import ArtifactStore, working_folder
from tasks.stage import produced_by, stage


@stage("train", version=1)
def train(
    base: BaseModelRecipe,
    start: StudentCheckpoint | None,
    layers: tuple[int, ...] | None,
    training: TrainingRecipe,
    prompt: PromptRecipe,
    rows: Rows,
    labels: TeacherLabels,
    validation: Rows | None,
) -> StudentCheckpoint:
    """Fine-tunes `layers` of `base`, or of the checkpoint `start`, on the labelled rows; validates on gold answers."""
    started = time.perf_counter()
    store, logger = ArtifactStore(), get_run_logger()
    base_model = base_folder(base)
    model, adapter = domain.parts(store.fetch(start.artifact), base_model) if start else (base_model, None)
    tokenizer = domain.load_tokenizer(model, remote_code_allowed(base))
    examples = read_examples(store.fetch(rows.artifact) / rows.file)
    ready, too_long = domain.training_rows(examples, read_labels(store.fetch(labels.artifact)), prompt, tokenizer)
    held_out = read_examples(store.fetch(validation.artifact) / validation.file) if validation else []
    checks, too_long_checks = domain.training_rows(held_out, domain.gold_labels(held_out), prompt, tokenizer)
    with working_folder("train") as folder:
        set_aside = {"train": too_long, "validation": too_long_checks}
        (folder / "set_aside.json").write_text(json.dumps(set_aside, indent=1))
        if too_long or too_long_checks:
            count = len(too_long) + len(too_long_checks)
            logger.warning("%d rows over prompt.max_tokens are set aside and listed in set_aside.json", count)
        result = domain.fine_tune(
            model,
            adapter,
            ready,
            checks,
            training,
            folder,
            layers=layers,
            remote_code=remote_code_allowed(base),
            progress=lambda step, steps, loss: logger.info("step %d of %d, loss %.3f", step, steps, loss),
        )
        artifact = store.put(folder)
    logger.info(
        "%d steps, %.1f rows/s, validation accuracy %s",
        result.steps,
        result.rows_per_second,
        result.validation_accuracy,
    )
    return StudentCheckpoint(
        artifact=artifact,
        method=training.method,
        base=base.model,
        base_revision=base.revision,
        parameters=result.parameters,
        steps=result.steps,
        curve=result.curve,
        validation_accuracy=result.validation_accuracy,
        device=result.device,
        remote_code=remote_code_allowed(base),
        produced_by=produced_by(),
        seconds=time.perf_counter() - started,
    )
