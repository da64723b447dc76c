"""The models of a scoreboard: from the records of the stages that made them to what is asked."""

from functools import cached_property
from importlib.metadata import version
from pathlib import Path
from typing import Self

from distillery.errors import StageError
from distillery.evaluation.scoreboard import BASE, FLOAT
from distillery.evaluation.scoring import ModelToScore
from distillery.machine import machine_name, processor_name
from distillery.models.base import base_folder, remote_code_allowed
from distillery.models.inspect import model_and_adapter, parameter_count
from distillery.recipe import BaseModelRecipe, PromptRecipe
from distillery.records import OnnxModel, Record, StudentCheckpoint, digest_of
from distillery.storage.artifacts import ArtifactStore
from tasks.progress import show_bytes
from tasks.stage import content_of


class AskedModel(Record):
    """A model and the prompt that it is asked with: an exported model, or a base model as it is or
    as training left it, by a checkpoint. `machine`: see `machine_of`."""

    prompt: PromptRecipe
    base: BaseModelRecipe | None = None
    checkpoint: StudentCheckpoint | None = None
    exported: OnnxModel | None = None
    machine: str = ""

    def here(self) -> Self:
        """Return the same model, whose numbers are to be those of this machine."""
        # Not a copy, which would have the content_id of another machine.
        return type(self)(
            prompt=self.prompt,
            base=self.base,
            checkpoint=self.checkpoint,
            exported=self.exported,
            machine=self.machine_of(),
        )

    def machine_of(self) -> str:
        """Return what of this machine the last bits of the model's numbers depend on: the
        processor and the version of what runs the model; for Transformers, also how many cores
        compute, and the GPU."""
        if self.exported:
            return f"{processor_name()}, onnxruntime {version('onnxruntime')}"
        import torch

        gpu = ", GPU" if torch.cuda.is_available() else ""
        runtimes = f"torch {version('torch')}, transformers {version('transformers')}"
        return f"{machine_name()}{gpu}, {runtimes}"

    @cached_property
    def content_id(self) -> str:
        """What stands for the model in cache keys; a base model's files are read for it once."""
        made_of = (self.prompt, self.base, self.checkpoint, self.exported)
        return digest_of([self.machine, *map(content_of, made_of)])

    def to_score(self, store: ArtifactStore) -> ModelToScore:
        """Return what is asked."""
        if self.exported:
            return onnx_model("student", self.exported, store)
        if self.base is None:
            raise StageError("a model of nothing is to be asked; please report this")
        if self.checkpoint:
            return float_student(self.checkpoint, self.base, store)
        return untrained(self.base)


def untrained(base: BaseModelRecipe) -> ModelToScore:
    """Return a base model as it is before any training, which Transformers runs."""
    folder = base_folder(base, show_bytes)
    return ModelToScore(
        name=BASE,
        kind="transformers",
        folder=str(folder),
        remote_code=remote_code_allowed(base),
        parameters=parameter_count(folder),
        bytes=_bytes(folder),
    )


def float_student(
    checkpoint: StudentCheckpoint, base: BaseModelRecipe, store: ArtifactStore
) -> ModelToScore:
    """Return the student as training left it, which Transformers runs."""
    model, adapter = model_and_adapter(
        store.fetch(checkpoint.artifact), base_folder(base, show_bytes)
    )
    return ModelToScore(
        name=FLOAT,
        kind="transformers",
        folder=str(model),
        adapter=str(adapter) if adapter else None,
        remote_code=remote_code_allowed(base),
        parameters=checkpoint.parameters,
        bytes=_bytes(model) + (_bytes(adapter) if adapter else 0),
    )


def _bytes(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.iterdir() if path.is_file())


def onnx_model(name: str, model: OnnxModel, store: ArtifactStore) -> ModelToScore:
    """Return an exported model, which ONNX Runtime runs."""
    folder = store.fetch(model.artifact)
    return ModelToScore(
        name=name,
        kind="onnx",
        folder=str(folder),
        parameters=model.parameters,
        bytes=model.artifact.bytes,
    )
