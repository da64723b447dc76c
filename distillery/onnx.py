"""From a checkpoint to a folder that ONNX Runtime GenAI runs: Olive merges the adapter, quantises and builds.

The lab's form, the adapter apart as adapter_weights.onnx_adapter, is `export.adapter_apart` in the recipe.
"""

import json
import shutil
from pathlib import Path
from typing import Any

from distillery.errors import ExportError, ModelError
from distillery.recipe import ExportRecipe
from distillery.store import working_folder

ADAPTER_FILE = "adapter_weights.onnx_adapter"
TRIAL = [{"role": "user", "content": "Which comes first?\n(A) one\n(B) two"}]


def export(model: Path, adapter: Path | None, recipe: ExportRecipe, out: Path, remote_code: bool = False) -> None:
    """Builds `model` (a Transformers folder, with a LoRA `adapter` or without) into `out` and asks it one question.

    Raises ExportError where nothing was built, or where what was built doesn't load or answer."""
    from distillery.olive_workflow import run_workflow

    if recipe.adapter_apart and adapter is None:
        raise ExportError(
            "export.adapter_apart is true, but full training leaves no adapter; use training.method: lora"
        )
    input_model = {
        "model_path": str(model),
        "adapter_path": str(adapter) if adapter else None,
        "load_kwargs": {"trust_remote_code": remote_code, "torch_dtype": "float32"},
    }
    with working_folder("export") as built:
        run_workflow(input_model, _passes(recipe, adapter is not None, remote_code), built)
        if not (built / "model").is_dir():
            raise ExportError("Olive produced no model folder; its log above says why")
        shutil.copytree(built / "model", out, dirs_exist_ok=True)
    _check(out, recipe)


def _passes(recipe: ExportRecipe, has_adapter: bool, remote_code: bool) -> dict[str, dict[str, Any]]:
    build: dict[str, Any] = {
        "type": "ModelBuilder",
        "precision": recipe.precision,
        # hf_remote is on by default in ModelBuilder: it would run code that comes with a model.
        "extra_options": {"hf_remote": remote_code, "prune_lm_head": True},
    }
    if recipe.precision == "int4":
        build |= {"int4_algo_config": recipe.algorithm, "int4_block_size": recipe.block_size}
        build["extra_options"]["shared_embeddings"] = recipe.share_embeddings
    if recipe.adapter_apart:
        return {"build": build, "adapter": {"type": "ExtractAdapters"}}
    return ({"merge": {"type": "MergeAdapterWeights"}} if has_adapter else {}) | {"build": build}


def _check(out: Path, recipe: ExportRecipe) -> None:
    for name in ("genai_config.json", "model.onnx", *([ADAPTER_FILE] if recipe.adapter_apart else [])):
        if not (out / name).is_file():
            raise ExportError(f"Olive produced no {name}; its log above says why")
    json.loads((out / "genai_config.json").read_text())
    try:
        ask_once(out)
    except ModelError as error:
        raise ExportError(f"the exported model does not answer: {error}") from error


def ask_once(folder: Path) -> None:
    """Loads a model folder and asks it one question. Raises ModelError where that fails or gives no finite number."""
    import numpy as np

    from distillery.inference import OnnxStudent

    student = OnnxStudent(folder, threads=1)
    scores = student.next_token_logprobs(student.tokenizer.encode_chat(TRIAL))
    if not np.isfinite(scores).all():
        raise ModelError(f"{folder}: its scores are no finite numbers")
