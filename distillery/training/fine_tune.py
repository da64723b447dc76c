"""training/fine_tune"""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from distillery.models.load import load_model, pad_id
from distillery.models.placement import placement
from distillery.recipe import HealingRecipe, LayerChoice, Layers, TrainingRecipe
from distillery.training.checkpoint import Checkpoints
from distillery.training.loop import Progress, TrainingResult
from distillery.training.losses import TrainingRow
from distillery.training.objective import HIDDEN, hidden_states
from distillery.training.rows import require_rows, write_rows

LAYERS_FILE = "layers.json"


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
    checkpoints: Checkpoints | None = None,
) -> TrainingResult:
    """The fine-tuning stage: an Olive workflow over `base` (with `adapter` merged in) that goes through `healing`, each
    a cut and a training, keeps `layers` and trains.

    Writes out/model (LoRA: the model that the adapter is for) and, for LoRA, out/adapter; out/training.json, and
    out/healing-1.json and so on; and where layers were chosen, out/layers.json: those kept, cut by cut. An adapter for
    `base` as it is goes without it, unless `whole`: a reader of the checkpoint has no such `base` then."""
    from distillery.olive_workflow import run_workflow
    from distillery.training import olive_passes

    require_rows(rows)
    out.mkdir(parents=True, exist_ok=True)
    inputs = {"rows": out / "rows.jsonl", "validation": out / "validation.jsonl"}
    write_rows(rows, inputs["rows"])
    write_rows(validation, inputs["validation"])
    steps = [*((step.layers, step.training) for step in healing), (layers, recipe)]
    if any(training.hidden_weight for _, training in steps):
        inputs["hidden"] = _teachers_states(base, adapter, rows, recipe, out, remote_code)
    files = {name: str(file) for name, file in inputs.items()}
    passes: dict[str, dict[str, Any]] = {}
    for number, (cut, training) in enumerate(steps, 1):
        last = number == len(steps)
        if cut is not None or (number == 1 and adapter is not None):
            passes[f"keep_layers_{number}"] = {
                "type": "KeepLayers",
                "layers": cut.model_dump() if isinstance(cut, LayerChoice) else cut and list(cut),
                "rows": files["rows"],
                "kept": str(out / LAYERS_FILE),
            }
        passes[f"distillation_{number}"] = {
            "type": "Distillation",
            **files,
            "recipe": training.model_dump(mode="json"),
            "result": str(out / ("training.json" if last else f"healing-{number}.json")),
            "step": f"step-{number}" if healing else None,
            "healing": None if last else number,
        }
    input_model = {
        "model_path": str(base),
        "adapter_path": str(adapter) if adapter else None,
        "load_kwargs": {"trust_remote_code": remote_code},
    }
    set_progress, set_checkpoints = (
        olive_passes.progress.set(progress),
        olive_passes.checkpoints.set(checkpoints),
    )
    try:
        run_workflow(
            input_model, passes, out, adapter_only=recipe.adapts and len(passes) == 1 and not whole
        )
    finally:
        olive_passes.progress.reset(set_progress)
        olive_passes.checkpoints.reset(set_checkpoints)
        for file in inputs.values():
            file.unlink()
    return _tidied(out)


def _teachers_states(
    base: Path,
    adapter: Path | None,
    rows: Sequence[TrainingRow],
    recipe: TrainingRecipe,
    out: Path,
    remote_code: bool,
) -> Path:
    """A file with the hidden states of the whole start model, which is the teacher, in the rows' order."""
    from safetensors.torch import save_file

    teacher, tokenizer = load_model(base, adapter, remote_code)
    states = hidden_states(
        teacher, rows, pad_id=pad_id(tokenizer), place=placement(recipe.precision)
    )
    save_file({HIDDEN: states}, out / "hidden.safetensors")
    return out / "hidden.safetensors"


def _tidied(out: Path) -> TrainingResult:
    """Takes from the files what differs between equal runs: speed, resumption, the base's path, the order of a set."""
    config = out / "adapter" / "adapter_config.json"
    for figures in [*out.glob("healing-*.json"), out / "training.json"]:
        result = TrainingResult.model_validate_json(figures.read_text())
        figures.write_text(result.model_dump_json(exclude={"rows_per_second", "resumed_at"}))
    if config.exists():
        values = json.loads(config.read_text())
        changed = {
            "base_model_name_or_path": None,
            "target_modules": sorted(values["target_modules"]),
        }
        config.write_text(json.dumps(values | changed, indent=2))
    return result
