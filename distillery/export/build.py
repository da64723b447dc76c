"""From a checkpoint to a folder that ONNX Runtime GenAI runs: Olive merges the adapter, quantises and builds.

The lab's form, the adapter apart as adapter_weights.onnx_adapter, is `export.adapter_apart` in the form.
"""

import json
import math
import re
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any, get_args

from distillery.errors import ExportError, ModelError
from distillery.inference.decoder import ADAPTER_FILE
from distillery.inference.onnx_student import OnnxStudent
from distillery.models.inspect import layer_count, tensor_names
from distillery.recipe import ExportForm
from distillery.storage.working import working_folder

BLOCK_SIZES: tuple[int, ...] = get_args(ExportForm.model_fields["block_size"].annotation)

TRIAL = [{"role": "user", "content": "Which comes first?\n(A) one\n(B) two"}]


def export(
    model: Path,
    adapter: Path | None,
    form: ExportForm,
    out: Path,
    remote_code: bool = False,
    calibration: Path | None = None,
) -> None:
    """Builds `model` (a Transformers folder, with a LoRA `adapter` or without) into `out` and asks it one question.

    `calibration` is what gptq looks at: one prompt a line, as a JSON list of token ids. Raises ExportError where
    nothing was built, or where what was built doesn't load or answer."""
    from distillery.olive_workflow import run_workflow

    if form.adapter_apart and form.precision == "int8":
        raise ExportError(
            "export.adapter_apart: an adapter apart goes with int4, fp16 or fp32, not with int8"
        )
    if form.adapter_apart and adapter is None:
        raise ExportError(
            "export.adapter_apart is true, but full training leaves no adapter; use training.method: lora"
        )
    if complaint := misfit(form, json.loads((model / "config.json").read_text())):
        raise ExportError(complaint)
    input_model = {
        "model_path": str(model),
        "adapter_path": str(adapter) if adapter else None,
        # An adapter merged in bfloat16 would be rounded: another student than the one that was scored.
        "load_kwargs": {"trust_remote_code": remote_code, "torch_dtype": "float32"},
    }
    with working_folder("export") as built:
        run_workflow(
            input_model, _passes(form, model, adapter is not None, remote_code, calibration), built
        )
        if not (built / "model").is_dir():
            raise ExportError("Olive produced no model folder")
        # Olive's own record of the build names this machine's folders, and nothing reads it.
        shutil.copytree(
            built / "model",
            out,
            dirs_exist_ok=True,
            ignore=shutil.ignore_patterns("model_config.json"),
        )
    _check(out, form)


def misfit(form: ExportForm, config: Mapping[str, Any], key: str = "export") -> str | None:
    """Why a model of this config.json can't be built in `form`, the recipe's `key`, with what to do; None where nothing
    speaks against it.

    The rotary embeddings and layers refused here are those with which ModelBuilder (ONNX Runtime GenAI 0.14.1) gave
    other probabilities than Transformers, by 0.25 and more: yarn with Llama and Qwen2, whose code is that of all
    models but gpt_oss; layers of which only some have a sliding window with Qwen2."""
    rope = config.get("rope_parameters") or config.get("rope_scaling") or {}
    if rope.get("rope_type", rope.get("type")) == "yarn" and config.get("model_type") != "gpt_oss":
        return "base model: ModelBuilder builds its rotary embeddings (yarn) wrongly; take a base without them"
    if config.get("model_type") in ("qwen2", "qwen3") and _windows_differ(config):
        return "base model: ModelBuilder gives all its layers one window, of which it has two; take another base"
    if not form.quantised or _fits(form, form.block_size, config):
        return None
    fitting = [f"block_size: {size}" for size in BLOCK_SIZES if _fits(form, size, config)]
    advice = (
        " or ".join(fitting + (["algorithm: rtn"] if form.adapter_apart else []))
        or "precision: fp16"
    )
    return f"{key}: {form.algorithm} in blocks of {form.block_size} does not fit the base model; use {advice}"


def _windows_differ(config: Mapping[str, Any]) -> bool:
    if types := config.get("layer_types"):
        return len(set(types)) > 1
    full, layers = config.get("max_window_layers") or 0, config.get("num_hidden_layers") or 0
    return (
        bool(config.get("use_sliding_window") and config.get("sliding_window"))
        and 0 < full < layers
    )


def _fits(form: ExportForm, block: int, config: Mapping[str, Any]) -> bool:
    """Olive's quantisers want whole blocks; ONNX Runtime's k_quant, for the adapter apart, an even number of them. What
    the config does not tell fits."""
    hidden, inner, heads = (
        value if isinstance(value := config.get(name), int) else 0
        for name in ("hidden_size", "intermediate_size", "num_attention_heads")
    )
    inputs = [hidden, inner, heads * (config.get("head_dim") or hidden // max(heads, 1))]
    if not form.adapter_apart:
        return all(count % block == 0 for count in inputs)
    return form.algorithm == "rtn" or all(math.ceil(count / block) % 2 == 0 for count in inputs)


def _passes(
    form: ExportForm, model: Path, has_adapter: bool, remote_code: bool, calibration: Path | None
) -> dict[str, dict[str, Any]]:
    # hf_remote is on by default in ModelBuilder: it would run code that comes with a model.
    options: dict[str, Any] = {"hf_remote": remote_code, "prune_lm_head": True}
    # For a processor, ModelBuilder has no float16, but Olive can make it of its float32.
    half = {"half": {"type": "OnnxFloatToFloat16"}} if form.precision == "fp16" else {}
    precision = "fp32" if half else form.precision
    build: dict[str, Any] = {
        "type": "ModelBuilder",
        "precision": precision,
        "extra_options": options,
    }
    if form.adapter_apart:
        embeddings = {}
        if form.precision == "int4":
            # The base is quantised by ModelBuilder itself: Olive's quantisers would take the adapter in. The embeddings
            # it leaves as they are, which in a small model is most of the folder.
            build |= {"int4_algo_config": form.algorithm, "int4_block_size": form.block_size}
            build["int4_nodes_to_exclude"] = _adapter_nodes(layer_count(model))
            rtn = {"type": "OnnxBlockWiseRtnQuantization", "bits": 8, "block_size": form.block_size}
            embeddings = {"embeddings": {**rtn, "nodes_to_include": ["/model/embed_tokens/Gather"]}}
        return {"build": build} | embeddings | half | {"adapter": {"type": "ExtractAdapters"}}
    merge = {"merge": {"type": "MergeAdapterWeights"}} if has_adapter else {}
    if not form.quantised:
        return merge | {"build": build} | half
    return (
        merge
        | _quantise(form, model, calibration)
        | {"build": build | {"precision": "int4"}}
        | _tie(form)
    )


def _quantise(form: ExportForm, model: Path, calibration: Path | None) -> dict[str, dict[str, Any]]:
    """Weights in groups with a scale and an offset each, embeddings and head included."""
    groups = {"bits": 8 if form.precision == "int8" else 4, "group_size": form.block_size}
    all_weights: dict[str, Any] = {**groups, "lm_head": True, "embeds": True}
    if form.algorithm == "gptq":
        # GPTQ knows the decoder's layers alone; what follows it quantises what it has left.
        gptq = {"type": "Gptq", **groups, "data_config": _prompts(calibration)}
        return {"quantise": gptq, "quantise_rest": {"type": "KQuant", **all_weights}}
    quantise = {"type": "Rtn" if form.algorithm == "rtn" else "KQuant", **all_weights}
    if form.precision == "int4" and form.algorithm in ("k_quant_mixed", "k_quant_high"):
        quantise["overrides"] = {
            name: {"bits": 8} for name in _sensitive(model, form.algorithm == "k_quant_high")
        }
    return {"quantise": quantise}


def _prompts(calibration: Path | None) -> dict[str, Any]:
    """Olive's data configuration for the file of prompts."""
    from distillery.training.olive_passes import PROMPTS

    if calibration is None:
        raise ExportError(
            "export.algorithm: gptq needs the task's prompts; use it in export.ladder"
        )
    return {
        "name": PROMPTS,
        "load_dataset_config": {"type": PROMPTS, "params": {"path": str(calibration)}},
    }


def _sensitive(model: Path, all_layers: bool) -> list[str]:
    """The attention inputs and down projections of all layers, or of the first and last eighth and every third between:
    the choice of ONNX Runtime GenAI's ModelBuilder for k_quant_mixed, which is near that of llama.cpp's Q4_K_M."""
    count = layer_count(model)
    found = []
    for name in tensor_names(model):
        match = re.fullmatch(r"(.*\.layers\.(\d+)\..*(?:q|k|v|qkv|down)_proj)\.weight", name)
        if match is None:
            continue
        layer = int(match[2])
        if (
            all_layers
            or layer < count / 8
            or layer >= 7 * count / 8
            or (layer - round(count / 8)) % 3 == 2
        ):
            found.append(match[1])
    return found


def _adapter_nodes(layers: int) -> list[str]:
    """ModelBuilder's names of a LoRA adapter's MatMuls, for whatever of a layer it adapts: they stay in float, since an
    adapter is small, and where its rank is within one block k_quant can't take it (see `_fits`)."""
    attention, mlp = ("q_proj", "k_proj", "v_proj", "o_proj"), ("gate_proj", "up_proj", "down_proj")
    inner = [f"attn/{name}" for name in attention] + [f"mlp/{name}" for name in mlp]
    return [
        f"/model/layers.{n}/{name}/lora_{part}/MatMul"
        for n in range(layers)
        for name in inner
        for part in "AB"
    ]


def _tie(form: ExportForm) -> dict[str, dict[str, Any]]:
    tie = {"tie": {"type": "GraphSurgeries", "surgeries": [{"surgeon": "TieWordEmbeddings"}]}}
    return tie if form.share_embeddings else {}


def _check(out: Path, form: ExportForm) -> None:
    for name in (
        "genai_config.json",
        "model.onnx",
        *([ADAPTER_FILE] if form.adapter_apart else []),
    ):
        if not (out / name).is_file():
            raise ExportError(f"Olive produced no {name}")
    json.loads((out / "genai_config.json").read_text())
    try:
        ask_once(out)
    except ModelError as error:
        raise ExportError(f"the exported model does not answer: {error}") from error


def ask_once(folder: Path) -> None:
    """Loads a model folder and asks it one question. Raises ModelError where that fails or gives no finite number."""
    import numpy as np

    student = OnnxStudent(folder, threads=1)
    scores = student.next_token_logprobs(student.tokenizer.encode_chat(TRIAL))
    if not np.isfinite(scores).all():
        raise ModelError(f"{folder}: its scores are no finite numbers")
