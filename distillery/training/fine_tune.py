"""Fine-tuning as an Olive workflow: cuts of layers and trainings, one pass each, in order.

In: a model's folder and rendered rows. Out: a checkpoint's folder, as `fine_tune` says.
"""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from distillery.data.examples import write_format
from distillery.models.class_tokens import ClassTokens
from distillery.models.device import choose_device
from distillery.models.drafts import learn_drafts
from distillery.models.load import load_model, pad_id
from distillery.olive_workflow import run_workflow
from distillery.recipe import HealingRecipe, LayerChoice, Layers, TrainingRecipe
from distillery.records import AnswerFormat
from distillery.training.checkpoint import CheckpointsOfSteps
from distillery.training.decisions import kept_decisions
from distillery.training.hidden_states import write_hidden_states
from distillery.training.loop import Progress, TrainingResult
from distillery.training.rows import TrainingRow, require_rows, write_rows

LAYERS_FILE = "layers.json"
FIGURES_FILE = "training.json"
OWN_PASSES = {
    "KeepLayers": "distillery.training.olive_passes.KeepLayers",
    "Distillation": "distillery.training.olive_passes.Distillation",
}


def fine_tune(
    base: Path,
    adapter: Path | None,
    rows: Sequence[TrainingRow],
    validation: Sequence[TrainingRow],
    recipe: TrainingRecipe,
    out: Path,
    *,
    layers: Layers | None = None,
    healing: Sequence[HealingRecipe] = (),
    whole: bool = False,
    remote_code: bool = False,
    progress: Progress | None = None,
    checkpoints: CheckpointsOfSteps | None = None,
    classes: ClassTokens | None = None,
    answer_format: AnswerFormat | None = None,
) -> TrainingResult:
    """Start from `base` with `adapter` merged in; go through the steps of `healing`, each a cut and
    a training; then keep `layers` and train by `recipe`. Return the figures of the last training.

    Writes out/model (for LoRA, the model that the adapter is for) and, for LoRA, out/adapter;
    out/training.json, and out/healing-1.json and so on for the steps of healing; out/layers.json
    where layers were chosen: a list of those kept for each cut. An adapter for `base` as it is goes
    without out/model unless `whole`, for readers of the checkpoint that have no such `base`.
    `classes`: the class tokens of the rows, and `answer_format` that of their written answers,
    which are written beside the weights that learnt them, with drafts of such answers."""
    from distillery.training.olive_passes import reporting

    require_rows(rows)
    out.mkdir(parents=True, exist_ok=True)
    steps = [*((step.layers, step.training) for step in healing), (layers, recipe)]
    inputs = {"rows": out / "rows.jsonl", "validation": out / "validation.jsonl"}
    write_rows(rows, inputs["rows"])
    write_rows(validation, inputs["validation"])
    if any(training.hidden_weight for _, training in steps):
        inputs["hidden"] = out / "hidden.npy"
        device = choose_device(recipe.precision)
        teacher, tokenizer = load_model(base, adapter, remote_code, device.frozen_precision)
        padding = pad_id(tokenizer)
        write_hidden_states(teacher, rows, inputs["hidden"], pad_id=padding, device=device)
        # Beside the model in training it would take as much memory again.
        del teacher
    passes = workflow_passes(steps, inputs, out, merge_first=adapter is not None)
    input_model = {
        "model_path": str(base),
        "adapter_path": str(adapter) if adapter else None,
        "load_kwargs": {"trust_remote_code": remote_code},
    }
    alone = recipe.adapts and len(passes) == 1 and not whole
    try:
        with reporting(progress, checkpoints), kept_decisions() as decisions:
            run_workflow(input_model, passes, out, own_passes=OWN_PASSES, adapter_only=alone)
    finally:
        for file in inputs.values():
            file.unlink()
    weights = out / ("adapter" if recipe.adapts else "model")
    if classes:
        classes.write(weights)
    if answer_format:
        write_format(weights, answer_format)
        learn_drafts((row.prompt, row.target) for row in rows).write(weights)
    return read_result_and_tidy(out).model_copy(update={"decisions": tuple(decisions)})


def workflow_passes(
    steps: Sequence[tuple[Layers | None, TrainingRecipe]],
    inputs: dict[str, Path],
    out: Path,
    *,
    merge_first: bool,
) -> dict[str, dict[str, Any]]:
    """Return the Olive passes, by name, for `steps`: pairs of the layers to keep (None for all) and
    the training after it. With `merge_first` the first cut merges an adapter even where it keeps
    all layers. `inputs`: the files that each training reads, by the pass's parameter."""
    files = {name: str(file) for name, file in inputs.items()}
    passes: dict[str, dict[str, Any]] = {}
    for number, (layers, training) in enumerate(steps, 1):
        healing = number if number < len(steps) else None
        if layers is not None or (merge_first and number == 1):
            kept: Any = layers
            if isinstance(layers, LayerChoice):
                kept = layers.model_dump()
            elif layers is not None:
                kept = list(layers)
            passes[f"keep_layers_{number}"] = {
                "type": "KeepLayers",
                "layers": kept,
                "rows": files["rows"],
                "kept": str(out / LAYERS_FILE),
            }
        passes[f"distillation_{number}"] = {
            "type": "Distillation",
            **files,
            "recipe": training.model_dump(mode="json"),
            "result": str(out / (f"healing-{healing}.json" if healing else FIGURES_FILE)),
            "step": f"step-{number}" if len(steps) > 1 else None,
            "healing": healing,
        }
    return passes


def read_result_and_tidy(out: Path) -> TrainingResult:
    """Return the figures of the last training. Remove from the files what differs between equal
    trainings: speed, resumption, the base's path and the order of a set."""
    result = TrainingResult.model_validate_json((out / FIGURES_FILE).read_text())
    for file in [*out.glob("healing-*.json"), out / FIGURES_FILE]:
        figures = TrainingResult.model_validate_json(file.read_text())
        file.write_text(
            figures.model_dump_json(exclude={"rows_per_second", "resumed_at", "decisions"})
        )
    config = out / "adapter" / "adapter_config.json"
    if config.exists():
        values = json.loads(config.read_text())
        values["base_model_name_or_path"] = None
        values["target_modules"] = sorted(values["target_modules"])
        config.write_text(json.dumps(values, indent=2))
    return result
