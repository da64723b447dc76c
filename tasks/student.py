import json
import time
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from prefect import get_run_logger

from distillery.data.examples import read_examples
from distillery.errors import DistilleryError, TrainingError
from distillery.labels.files import read_labels
from distillery.labels.known import gold_labels
from distillery.models.base import base_folder, remote_code_allowed
from distillery.models.inspect import parts
from distillery.models.load import load_tokenizer
from distillery.recipe import BaseModelRecipe, HealingRecipe, Layers, PromptRecipe, TrainingRecipe
from distillery.records import Rows, StudentCheckpoint, TeacherLabels
from distillery.storage.artifacts import ArtifactStore
from distillery.storage.working import working_folder
from distillery.training.fine_tune import fine_tune
from distillery.training.loop import TrainingProgress
from distillery.training.losses import TrainingRow
from distillery.training.rows import training_rows
from distillery.training.tracking import tracked
from tasks.parent import check_parent
from tasks.progress import progress_artifact
from tasks.stage import is_recorded, origin, own_key, produced_by, stage


@stage("train", version=5)
def train(
    base: BaseModelRecipe,
    training: TrainingRecipe,
    prompt: PromptRecipe,
    rows: Rows,
    labels: TeacherLabels,
    validation: Rows | None = None,
    start: StudentCheckpoint | None = None,
    layers: Layers | None = None,
    healing: tuple[HealingRecipe, ...] = (),
    gold: Rows | None = None,
) -> StudentCheckpoint:
    """Fine-tunes `layers` of `base`, or of the checkpoint `start`, on the labelled rows, after the steps of `healing`;
    validates on gold answers."""
    started = time.perf_counter()
    store, logger = ArtifactStore(), get_run_logger()
    base_model = base_folder(base)
    model, adapter = parts(store.fetch(start.artifact), base_model) if start else (base_model, None)
    tokenizer = load_tokenizer(model, remote_code_allowed(base))
    examples = read_examples(store.fetch(rows.artifact) / rows.file)
    with_reasons = [
        one for one in (training, *(step.training for step in healing)) if one.rationale_weight
    ]
    explain = with_reasons[0].rationale_instruction if with_reasons else None
    found = read_labels(store.fetch(labels.artifact))
    ready, too_long = training_rows(examples, found, prompt, tokenizer, explain)
    if explain and ready and not any(row.rationale for row in ready):
        raise TrainingError(
            "training.rationale_weight is above 0, but no label has a reason: it takes an endpoint that is asked with "
            "teacher.answers.form: rationale, or a column rationale in teacher.files"
        )
    answered, too_long_gold = _with_own_answers(gold, prompt, tokenizer)
    checks, too_long_checks = _with_own_answers(validation, prompt, tokenizer)
    ready += answered
    too_long += too_long_gold
    work = _Work(store, own_key())
    check_parent()
    with (
        working_folder("train") as folder,
        progress_artifact("training", "training steps") as show,
        tracked(produced_by(), training.model_dump(mode="json")) as track,
    ):

        def progress(at: TrainingProgress) -> None:
            check_parent()
            speed = f"{at.rows_per_second:.1f} rows/s, {at.seconds_left / 60:.0f} minutes left"
            part = f"healing {at.healing} of {len(healing)}, " if at.healing else ""
            show(
                at.step,
                at.steps,
                f"{part}step {at.step} of {at.steps}, loss {at.point.loss:.3f}, {speed}",
            )
            figures = {"rows_per_second": at.rows_per_second} | at.point.model_dump(
                exclude={"step"}, exclude_none=True
            )
            # Each training counts its steps from 1: figures of its own, so that none lies over another's.
            within = f"healing-{at.healing}/" if at.healing else ""
            track(at.step, {within + name: value for name, value in figures.items()})
            logger.debug("%sstep %d of %d, loss %.3f", part, at.step, at.steps, at.point.loss)

        set_aside = {"train": too_long, "validation": too_long_checks}
        (folder / "set_aside.json").write_text(json.dumps(set_aside, indent=1))
        if too_long or too_long_checks:
            count = len(too_long) + len(too_long_checks)
            logger.warning(
                "%d rows over prompt.max_tokens are set aside and listed in set_aside.json", count
            )
        result = fine_tune(
            model,
            adapter,
            ready,
            checks,
            training,
            folder,
            layers=layers,
            healing=healing,
            # Whoever reads an adapter alone puts it on the base model, and this one is for the start's weights.
            whole=start is not None,
            remote_code=remote_code_allowed(base),
            progress=progress,
            checkpoints=work,
        )
        artifact = store.put(folder)
    since = f" (from step {result.resumed_at} on)" if result.resumed_at else ""
    accuracy = "none" if result.validation_accuracy is None else f"{result.validation_accuracy:.3f}"
    logger.info(
        "%d rows, %d steps%s, %.1f rows/s on %s, loss %.3f, validation accuracy %s",
        len(ready),
        result.steps,
        since,
        result.rows_per_second,
        result.device,
        result.curve[-1].loss,
        accuracy,
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
        **origin(started),
    )


@train.on_completion
def _drop_checkpoint(_task: Any, _run: Any, state: Any) -> None:
    """Only once the record is kept: until then a checkpoint is all that a killed run would leave."""
    key = Path(state.data.metadata.storage_key).name
    # What can't be dropped now is collected later: see housekeeping.py.
    with suppress(DistilleryError):
        if is_recorded(train, key):
            ArtifactStore().drop_checkpoint(key)


def _with_own_answers(
    rows: Rows | None, prompt: PromptRecipe, tokenizer: Any
) -> tuple[list[TrainingRow], list[str]]:
    examples = read_examples(ArtifactStore().fetch(rows.artifact) / rows.file) if rows else []
    return training_rows(examples, gold_labels(examples), prompt, tokenizer)


@dataclass(frozen=True)
class _Work:
    """Where this training's checkpoints lie: in the store, so that any machine's next run goes on from there. The lease
    on `key`, which the stage holds, keeps another run from writing there."""

    store: ArtifactStore
    key: str

    def save(self, folder: Path) -> None:
        self.store.save_checkpoint(self.key, folder)

    def load(self, into: Path) -> bool:
        return self.store.load_checkpoint(self.key, into)

    def of(self, step: str) -> "_Work":
        return _Work(self.store, f"{self.key}/{step}")
