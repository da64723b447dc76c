"""Our two Olive passes, each thin over a function of student.py, and the prompts that Olive's Gptq pass looks at. Olive
imports this module by name."""

import json
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
from safetensors.torch import load_file

from distillery.models.load import end_of_turn_id, load_model, pad_id
from distillery.recipe import LayerChoice, TrainingRecipe
from distillery.settings import LocalSettings
from distillery.training.checkpoint import Checkpoints
from distillery.training.loop import Progress, train
from distillery.training.objective import HIDDEN
from distillery.training.pruning import keep_layers, resolved_layers
from distillery.training.rows import read_rows

progress: ContextVar[Progress | None] = ContextVar("progress", default=None)
"""Who is told how far training is: a pass's own config is JSON and can't carry a function."""

checkpoints: ContextVar[Checkpoints | None] = ContextVar("checkpoints", default=None)
"""Where training keeps its checkpoints."""

PROMPTS = "distillery_prompts"


@Registry.register_dataset(PROMPTS)  # type: ignore[untyped-decorator]
def prompts(path: str, **_others: Any) -> list[tuple[dict[str, torch.Tensor], int]]:
    """The prompts of a file, one a line as a JSON list of token ids: (inputs, a label that nobody reads)."""
    rows = [
        torch.tensor(json.loads(line))
        for line in Path(path).read_text(encoding="utf-8").splitlines()
    ]
    return [({"input_ids": row, "attention_mask": torch.ones_like(row)}, 0) for row in rows]


class KeepLayers(Pass):
    """Keeps some decoder layers of a model, an adapter merged in before."""

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
        network, tokenizer = load_model(
            Path(model.model_path), _adapter(model), _remote_code(model)
        )
        layers, kept = config.layers, Path(config.kept)
        if isinstance(layers, dict):
            choice, rows = LayerChoice.model_validate(layers), read_rows(Path(config.rows))
            layers = resolved_layers(network, choice, rows, pad_id(tokenizer))
            before = json.loads(kept.read_text()) if kept.exists() else []
            kept.write_text(json.dumps([*before, layers]))
        if layers is not None:
            keep_layers(network, layers)
        network.save_pretrained(output_model_path)
        tokenizer.save_pretrained(output_model_path)
        return inherit_hf_from_hf(model, output_model_path, adapter_path=None)


class Distillation(Pass):
    """Trains on the rows of a file with student.train: hard and soft labels, LoRA or full."""

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
                type_=str, default_value=None, description="Its checkpoints' name, of several"
            ),
            "healing": PassConfigParam(
                type_=int, default_value=None, description="Which step before the last it is"
            ),
        }

    def _run_for_config(
        self, model: HfModelHandler, config: type[BasePassConfig], output_model_path: str
    ) -> HfModelHandler:
        network, tokenizer = load_model(
            Path(model.model_path), _adapter(model), _remote_code(model)
        )
        recipe = TrainingRecipe.model_validate(config.recipe)
        hidden = load_file(config.hidden)[HIDDEN] if config.hidden else None
        kept, report = checkpoints.get(), progress.get()
        trained, result = train(
            network,
            read_rows(Path(config.rows)),
            read_rows(Path(config.validation)),
            recipe,
            pad_id=pad_id(tokenizer),
            end_id=end_of_turn_id(tokenizer),
            progress=report and (lambda at: report(at._replace(healing=config.healing))),
            hidden=hidden,
            checkpoints=kept.of(config.step) if kept and config.step else kept,
            checkpoint_every_s=LocalSettings().checkpoint_seconds,
            # Of the end too: the steps that follow go on from there.
            keep_end=config.healing is not None,
        )
        Path(config.result).write_text(result.model_dump_json())
        trained.save_pretrained(output_model_path)
        if recipe.adapts:
            return inherit_hf_from_hf(model, model.model_path, adapter_path=output_model_path)
        tokenizer.save_pretrained(output_model_path)
        return inherit_hf_from_hf(model, output_model_path, adapter_path=None)


def _adapter(model: HfModelHandler) -> Path | None:
    return Path(model.adapter_path) if model.adapter_path else None


def _remote_code(model: HfModelHandler) -> bool:
    load_kwargs: Any = model.get_load_kwargs()
    return bool(load_kwargs.get("trust_remote_code"))
