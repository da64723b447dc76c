"""The Olive passes that turn a checkpoint into a form: merge the adapter, quantise, build."""

import re
from pathlib import Path
from typing import Any

from distillery.errors import ExportError
from distillery.models.inspect import layer_count, tensor_names
from distillery.recipe import ExportForm

Passes = dict[str, dict[str, Any]]
"""Settings of Olive's passes by name, in the order in which they run."""

ATTENTION_LAYERS = ("q_proj", "k_proj", "v_proj", "o_proj")
MLP_LAYERS = ("gate_proj", "up_proj", "down_proj")


def export_passes(
    form: ExportForm, model: Path, has_adapter: bool, remote_code: bool, calibration: Path | None
) -> Passes:
    """Return the passes for `form`. `model` is the folder of weights that they start from,
    `calibration` the file of prompts for gptq."""
    if form.adapter_apart:
        return passes_with_adapter_apart(form, model, remote_code)
    passes: Passes = {}
    if has_adapter:
        passes["merge"] = {"type": "MergeAdapterWeights"}
    if form.quantised:
        passes |= quantising_passes(form, model, calibration)
        # ModelBuilder takes over the weights as they are quantised, int8 ones too.
        passes["build"] = build_pass("int4", form, remote_code)
        if form.share_embeddings:
            surgeries = [{"surgeon": "TieWordEmbeddings"}]
            passes["tie"] = {"type": "GraphSurgeries", "surgeries": surgeries}
        return passes
    return passes | float_passes(form, remote_code)


def passes_with_adapter_apart(form: ExportForm, model: Path, remote_code: bool) -> Passes:
    """Return the passes that leave the adapter in a file of its own.

    ModelBuilder quantises the base model: Olive's quantisers would include the adapter.
    ModelBuilder leaves the embeddings in float, which is most of a small model's folder, so that a
    pass of their own quantises them."""
    passes = float_passes(form, remote_code)
    if form.quantised:
        layers = layer_count(model)
        algorithm: str = form.algorithm
        kept = adapter_nodes(layers)
        if form.dynamic:
            # This is rtn with the head in 8 bits; the layers are quantised by eight_bits.py.
            algorithm = "rtn_last"
            kept += layer_nodes(layers)
        passes["build"] = build_pass("int4", form, remote_code) | {
            "int4_algo_config": algorithm,
            "int4_block_size": form.block_size,
            "int4_nodes_to_exclude": kept,
        }
        passes["embeddings"] = {
            "type": "OnnxBlockWiseRtnQuantization",
            "bits": 8,
            "block_size": form.block_size,
            "nodes_to_include": ["/model/embed_tokens/Gather"],
        }
    passes["adapter"] = {"type": "ExtractAdapters"}
    return passes


def float_passes(form: ExportForm, remote_code: bool) -> Passes:
    """Return the passes that build a model in the form's own precision."""
    if form.precision != "fp16":
        return {"build": build_pass(form.precision, form, remote_code)}
    # ModelBuilder has no float16 for a CPU, but Olive converts its float32.
    half = {"type": "OnnxFloatToFloat16"}
    return {"build": build_pass("fp32", form, remote_code), "half": half}


def build_pass(precision: str, form: ExportForm, remote_code: bool) -> dict[str, Any]:
    """Return the pass that builds the ONNX model in ModelBuilder's `precision`, which need not be
    the form's."""
    # ModelBuilder's hf_remote is on by default: it would run code that comes with a model.
    options = {"hf_remote": remote_code, "prune_lm_head": not form.all_logits}
    return {"type": "ModelBuilder", "precision": precision, "extra_options": options}


def quantising_passes(form: ExportForm, model: Path, calibration: Path | None) -> Passes:
    """Return the passes that quantise the weights in blocks with a scale and an offset each,
    embeddings and head included."""
    blocks: dict[str, Any] = {"bits": 4, "group_size": form.block_size}
    if form.precision == "int8":
        blocks["bits"] = 8
    all_weights = {**blocks, "lm_head": True, "embeds": True}
    if form.algorithm == "gptq":
        # Gptq quantises the decoder's layers alone; KQuant takes what it leaves.
        gptq = {"type": "Gptq", **blocks, "data_config": prompts_config(calibration)}
        return {"quantise": gptq, "quantise_rest": {"type": "KQuant", **all_weights}}
    if form.algorithm in ("rtn", "dynamic"):
        # For dynamic, eight_bits.py goes on from there.
        return {"quantise": {"type": "Rtn", **all_weights}}
    quantise: dict[str, Any] = {"type": "KQuant", **all_weights}
    if form.precision == "int4" and form.algorithm in ("k_quant_mixed", "k_quant_high"):
        quantise["overrides"] = {}
        for name in sensitive_weights(model, all_layers=form.algorithm == "k_quant_high"):
            quantise["overrides"][name] = {"bits": 8}
    return {"quantise": quantise}


def prompts_config(calibration: Path | None) -> dict[str, Any]:
    """Return Olive's settings for the file of prompts that gptq is calibrated on."""
    from distillery.training.olive_passes import PROMPTS

    if calibration is None:
        raise ExportError(
            "export.algorithm: gptq needs the task's prompts; use it in export.ladder"
        )
    load = {"type": PROMPTS, "params": {"path": str(calibration)}}
    return {"name": PROMPTS, "load_dataset_config": load}


def sensitive_weights(model: Path, all_layers: bool) -> list[str]:
    """Return the names of the attention inputs and down projections of all layers, or of the first
    and the last eighth and every third layer in between.

    The latter is the choice of ONNX Runtime GenAI's ModelBuilder for k_quant_mixed, which is close
    to that of llama.cpp's Q4_K_M."""
    count = layer_count(model)
    found = []
    for name in tensor_names(model):
        match = re.fullmatch(r"(.*\.layers\.(\d+)\..*(?:q|k|v|qkv|down)_proj)\.weight", name)
        if match is None:
            continue
        layer = int(match[2])
        at_an_end = layer < count / 8 or layer >= 7 * count / 8
        every_third = (layer - round(count / 8)) % 3 == 2
        if all_layers or at_an_end or every_third:
            found.append(match[1])
    return found


def layer_nodes(layers: int) -> list[str]:
    """Return ModelBuilder's names of the products of all layers, fused ones and others, whichever
    of them the model has."""
    inner = [f"attn/{name}" for name in (*ATTENTION_LAYERS, "qkv_proj")]
    inner += [f"mlp/{name}" for name in (*MLP_LAYERS, "gate_up_proj")]
    return [f"/model/layers.{layer}/{name}/MatMul" for layer in range(layers) for name in inner]


def adapter_nodes(layers: int) -> list[str]:
    """Return ModelBuilder's names of a LoRA adapter's MatMuls, whichever of them the adapter has.

    They stay in float: an adapter is small, and k_quant can't quantise one whose rank is within a
    block (see `fit.blocks_fit`)."""
    inner = [f"attn/{name}" for name in ATTENTION_LAYERS]
    inner += [f"mlp/{name}" for name in MLP_LAYERS]
    nodes = []
    for layer in range(layers):
        for name in inner:
            nodes.append(f"/model/layers.{layer}/{name}/lora_A/MatMul")
            nodes.append(f"/model/layers.{layer}/{name}/lora_B/MatMul")
    return nodes
