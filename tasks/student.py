"""Training as a stage: one domain call, its checkpoints in the store, its progress shown."""

import json
import time
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from prefect import get_run_logger

from distillery.errors import DistilleryError
from distillery.models.base import base_folder, license_of, remote_code_allowed
from distillery.models.device import check_gpu
from distillery.models.four_bits import check_four_bits
from distillery.models.inspect import model_and_adapter
from distillery.models.load import load_tokenizer
from distillery.progress import shown_by
from distillery.recipe import BaseModelRecipe, HealingRecipe, Layers, PromptRecipe, TrainingRecipe
from distillery.records import Rows, StudentCheckpoint, TeacherLabels
from distillery.storage.artifacts import ArtifactStore
from distillery.storage.working import working_folder
from distillery.training.decisions import kept_decisions
from distillery.training.fine_tune import fine_tune
from distillery.training.inputs import rationale_instruction, read_training_inputs
from distillery.training.loop import TrainingProgress, TrainingResult
from distillery.training.tracking import Log, tracked
from tasks.parent import check_parent
from tasks.progress import conclude, show, show_bytes, show_parts, show_rows
from tasks.stage import is_recorded, origin, own_key, produced_by, stage


@stage("train", version=6)
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
    """Fine-tune `layers` of `base`, or of the checkpoint `start`, on the labelled rows.

    The steps of `healing` come before; validation is on gold answers."""
    started = time.perf_counter()
    check_gpu(training.allow_cpu)
    if training.method == "qlora":
        check_four_bits()
    trainings = (training, *(step.training for step in healing))
    store = ArtifactStore()
    remote_code = remote_code_allowed(base)
    model, adapter = base_folder(base, show_bytes), None
    base_license = license_of(base, model)
    if start is not None:
        model, adapter = model_and_adapter(store.fetch(start.artifact), model)
    with kept_decisions() as decisions:
        inputs = read_training_inputs(
            load_tokenizer(model, remote_code),
            prompt,
            store.fetch(rows.artifact) / rows.file,
            store.fetch(labels.artifact),
            gold=_file_of(gold, store),
            validation=_file_of(validation, store),
            explain=rationale_instruction(trainings),
            second_opinion=training.second_opinion == "words",
            soft=any(each.soft_share > 0 for each in trainings),
        )
    check_parent()
    with (
        working_folder("train") as folder,
        tracked(produced_by(), training.model_dump(mode="json")) as track,
    ):
        (folder / "set_aside.json").write_text(json.dumps(inputs.set_aside, indent=1))
        if inputs.set_aside_count:
            get_run_logger().warning(
                "%d rows are over prompt.max_tokens, or a written answer of theirs is over "
                "task.max_tokens: set aside, and listed in set_aside.json",
                inputs.set_aside_count,
            )
        if inputs.classes:
            show_parts(0, 1, "loading the model for linear probes, before the first step")
        with shown_by(show_rows):
            result = fine_tune(
                model,
                adapter,
                inputs.rows,
                inputs.validation,
                training,
                folder,
                layers=layers,
                healing=healing,
                # An adapter alone would be put on the base model, and this one is for the start's
                # weights.
                whole=start is not None,
                remote_code=remote_code,
                progress=partial(_report, track, len(healing)),
                checkpoints=StageCheckpoints(store, own_key()),
                classes=inputs.classes,
                answer_format=inputs.format,
            )
        artifact = store.put(folder)
    conclude(_summary(len(inputs.rows), result))
    return StudentCheckpoint(
        artifact=artifact,
        method=training.method,
        base=base.model,
        base_revision=base.revision,
        base_license=base_license,
        parameters=result.parameters,
        steps=result.steps,
        curve=result.curve,
        validation_accuracy=result.validation_accuracy,
        validation_tokens=result.validation_tokens,
        device=result.device,
        decisions=(*decisions, *result.decisions),
        remote_code=remote_code,
        **origin(started),
    )


def _file_of(rows: Rows | None, store: ArtifactStore) -> Path | None:
    if rows is None:
        return None
    return store.fetch(rows.artifact) / rows.file


def _report(track: Log, healing_steps: int, at: TrainingProgress) -> None:
    """Tell the display and MLflow how far training is; end it with its parent run."""
    check_parent()
    part = f"healing {at.healing} of {healing_steps}, " if at.healing else ""
    show(
        at.step,
        at.steps,
        "steps",
        f"{part}loss {at.point.loss:.3f}, {at.rows_per_second:.1f} rows/s",
        seconds_left=at.seconds_left,
    )
    figures = {"rows_per_second": at.rows_per_second}
    figures |= at.point.model_dump(exclude={"step"}, exclude_none=True)
    # Each training counts its steps from 1: a prefix keeps the curves apart.
    prefix = f"healing-{at.healing}/" if at.healing else ""
    track(at.step, {prefix + name: value for name, value in figures.items()})


def _summary(rows: int, result: TrainingResult) -> str:
    since = f" (from step {result.resumed_at} on)" if result.resumed_at else ""
    accuracy = "none"
    if result.validation_accuracy is not None:
        accuracy = f"{result.validation_accuracy:.3f}"
    if result.validation_tokens is not None:
        accuracy += f" (answers that are all right; of their tokens {result.validation_tokens:.3f})"
    return (
        f"{rows} rows, {result.steps} steps{since}, {result.rows_per_second:.1f} rows/s on "
        f"{result.device}, loss {result.curve[-1].loss:.3f}, validation accuracy {accuracy}"
    )


@train.on_completion
def _drop_checkpoint(_task: Any, _run: Any, state: Any) -> None:
    """Only once the record is kept: until then a checkpoint is all that a killed run would
    leave."""
    key = Path(state.data.metadata.storage_key).name
    # What can't be dropped now is collected later: see housekeeping.py.
    with suppress(DistilleryError):
        if is_recorded(train, key):
            ArtifactStore().drop_checkpoint(key)


@dataclass(frozen=True)
class StageCheckpoints:
    """A training's checkpoints in the artifact store, so that the next run on any machine goes on
    from there.

    The stage holds the lease on `key`, so that no other run writes under it."""

    store: ArtifactStore
    key: str

    def save(self, folder: Path) -> None:
        self.store.save_checkpoint(self.key, folder)

    def load(self, into: Path) -> bool:
        return self.store.load_checkpoint(self.key, into)

    def of(self, step: str) -> "StageCheckpoints":
        return StageCheckpoints(self.store, f"{self.key}/{step}")
