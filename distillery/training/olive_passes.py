"""Our two Olive passes, a cut and a training, and the data set of prompts for Olive's Gptq pass.

Olive imports this module by its name and reads each pass's settings as JSON.
"""

import json
from collections.abc import Iterator
from contextlib import closing, contextmanager
from contextvars import ContextVar
from pathlib import Path
from typing import Any

import torch
from olive.data.registry import Registry
from olive.hardware.accelerator import AcceleratorSpec
from olive.model import HfModelHandler
from olive.passes import Pass
from olive.passes.pass_config import BasePassConfig, PassConfigParam
from olive.passes.pytorch.common import inherit_hf_from_hf

from distillery.models.device import are_several
from distillery.models.load import load_model, pad_id
from distillery.recipe import LayerChoice
from distillery.settings import LocalSettings
from distillery.training.checkpoint import Checkpoints, CheckpointsOfSteps
from distillery.training.devices import distil_on_devices
from distillery.training.job import TrainingJob, distil
from distillery.training.loop import Progress, TrainingProgress
from distillery.training.pruning import keep_layers, resolved_layers
from distillery.training.rows import RowFile

PROMPTS = "distillery_prompts"
"""The name of the data set in Olive's registry."""

_progress: ContextVar[Progress | None] = ContextVar("progress", default=None)
_checkpoints: ContextVar[CheckpointsOfSteps | None] = ContextVar("checkpoints", default=None)


@contextmanager
def reporting(progress: Progress | None, checkpoints: CheckpointsOfSteps | None) -> Iterator[None]:
    """Tell `progress` how far the trainings within are, and keep their checkpoints in
    `checkpoints`: a pass's settings are JSON and can't carry them."""
    progress_token, checkpoints_token = _progress.set(progress), _checkpoints.set(checkpoints)
    try:
        yield
    finally:
        _progress.reset(progress_token)
        _checkpoints.reset(checkpoints_token)


@Registry.register_dataset(PROMPTS)  # type: ignore[untyped-decorator]
def prompts(path: str, **_others: Any) -> list[tuple[dict[str, torch.Tensor], int]]:
    """Return the prompts of a file, one a line as a JSON list of token ids: pairs of the model's
    inputs and a label that is not used."""
    pairs = []
    for line in Path(path).read_text(encoding="utf-8").splitlines():
        ids = torch.tensor(json.loads(line))
        pairs.append(({"input_ids": ids, "attention_mask": torch.ones_like(ids)}, 0))
    return pairs


class KeepLayers(Pass):
    """Keeps some decoder layers of a model, after its adapter is merged in."""

    @classmethod
    def _default_config(cls, accelerator_spec: AcceleratorSpec) -> dict[str, PassConfigParam]:
        return {
            "layers": PassConfigParam(
                type_=list[int] | dict, default_value=None, description="Layers, or LayerChoice"
            ),
            "rows": PassConfigParam(type_=str, required=True, description="JSONL of TrainingRow"),
            "kept": PassConfigParam(
                type_=str, required=True, description="Where chosen layers are listed, as JSON"
            ),
        }

    def _run_for_config(
        self, model: HfModelHandler, config: type[BasePassConfig], output_model_path: str
    ) -> HfModelHandler:
        network, tokenizer = load_handled(model)
        layers, kept = config.layers, Path(config.kept)
        if isinstance(layers, dict):
            choice = LayerChoice.model_validate(layers)
            with closing(RowFile(Path(config.rows))) as rows:
                layers = resolved_layers(network, choice, rows, pad_id(tokenizer))
            before = json.loads(kept.read_text()) if kept.exists() else []
            kept.write_text(json.dumps([*before, layers]))
        if layers is not None:
            keep_layers(network, layers)
        network.save_pretrained(output_model_path)
        tokenizer.save_pretrained(output_model_path)
        return inherit_hf_from_hf(model, output_model_path, adapter_path=None)


class Distillation(Pass):
    """Trains a model on the rows of a file with `loop.train`, on as many devices as this machine's
    settings say."""

    @classmethod
    def _default_config(cls, accelerator_spec: AcceleratorSpec) -> dict[str, PassConfigParam]:
        return {
            "rows": PassConfigParam(type_=str, required=True, description="JSONL of TrainingRow"),
            "validation": PassConfigParam(
                type_=str, required=True, description="JSONL of TrainingRow, may be empty"
            ),
            "hidden": PassConfigParam(
                type_=str, default_value=None, description="The teacher's hidden states"
            ),
            "recipe": PassConfigParam(type_=dict, required=True, description="TrainingRecipe"),
            "result": PassConfigParam(
                type_=str, required=True, description="Where the figures go, as JSON"
            ),
            "step": PassConfigParam(
                type_=str,
                default_value=None,
                description="The name of its checkpoints, if there are several trainings",
            ),
            "healing": PassConfigParam(
                type_=int,
                default_value=None,
                description="Which step of healing this is; None for the last training",
            ),
        }

    def _run_for_config(
        self, model: HfModelHandler, config: type[BasePassConfig], output_model_path: str
    ) -> HfModelHandler:
        job = TrainingJob(
            model=model.model_path,
            adapter=model.adapter_path,
            remote_code=has_remote_code(model),
            rows=config.rows,
            validation=config.validation,
            hidden=config.hidden,
            recipe=config.recipe,
            result=config.result,
            out=output_model_path,
            # The steps that follow go on from the end of this one.
            keep_end=config.healing is not None,
            split=LocalSettings().fsdp,
        )
        of_workflow = _checkpoints.get()
        checkpoints: Checkpoints | None = of_workflow
        if of_workflow and config.step:
            checkpoints = of_workflow.of(config.step)
        progress = progress_of(config.healing)
        if are_several():
            distil_on_devices(job, progress, checkpoints)
        else:
            distil(job, progress, checkpoints)
        if job.recipe.adapts:
            return inherit_hf_from_hf(model, model.model_path, adapter_path=output_model_path)
        return inherit_hf_from_hf(model, output_model_path, adapter_path=None)


def progress_of(healing: int | None) -> Progress | None:
    """Return what to call with the progress of this step of healing; None where nobody is told."""
    report = _progress.get()
    if report is None:
        return None

    def with_healing(progress: TrainingProgress) -> None:
        report(progress._replace(healing=healing))

    return with_healing


def load_handled(model: HfModelHandler) -> tuple[Any, Any]:
    """Return (model, tokenizer) of a model that Olive handles, its adapter merged in, all weights
    in float32."""
    adapter = Path(model.adapter_path) if model.adapter_path else None
    return load_model(Path(model.model_path), adapter, has_remote_code(model))


def has_remote_code(model: HfModelHandler) -> bool:
    """Return whether code of the model's own may run."""
    load_kwargs: Any = model.get_load_kwargs()
    return bool(load_kwargs.get("trust_remote_code"))
