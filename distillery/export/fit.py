"""Whether a base model can be built in a form, told from its config.json before anything is paid
for."""

import math
from collections.abc import Mapping
from typing import Any, get_args

from distillery.recipe import ExportForm

BLOCK_SIZES: tuple[int, ...] = get_args(ExportForm.model_fields["block_size"].annotation)


ARCHITECTURES = (
    *("ChatGLMForConditionalGeneration", "ChatGLMModel", "Ernie4_5ForCausalLM", "GemmaForCausalLM"),
    *("Gemma2ForCausalLM", "Gemma3ForCausalLM", "Gemma3ForConditionalGeneration"),
    *("GptOssForCausalLM", "GraniteForCausalLM", "HunYuanDenseV1ForCausalLM"),
    *("InternLM2ForCausalLM", "Lfm2ForCausalLM", "LlamaForCausalLM", "MistralForCausalLM"),
    *("Mistral3ForConditionalGeneration", "NemotronForCausalLM", "OlmoForCausalLM"),
    *("PhiForCausalLM", "Phi3ForCausalLM", "PhiMoEForCausalLM", "Phi3SmallForCausalLM"),
    *("Phi3VForCausalLM", "Phi4MMForCausalLM", "Qwen2ForCausalLM"),
    *("VideoChatFlashQwenForCausalLM", "Qwen2_5_VLForConditionalGeneration", "Qwen3ForCausalLM"),
    *("Qwen3_5ForConditionalGeneration", "Qwen3_5MoeForConditionalGeneration"),
    *("Qwen3VLForConditionalGeneration", "SmolLM3ForCausalLM", "WhisperForConditionalGeneration"),
)
"""What ModelBuilder (ONNX Runtime GenAI 0.14.1) builds, as config.json names it."""


def misfit(form: ExportForm, config: Mapping[str, Any], key: str = "export") -> str | None:
    """Return why a model with this config.json can't be built in `form`, the recipe's `key`, and
    what to do; None where nothing is known against it.

    The rotary embeddings and layers refused here are those with which ModelBuilder (ONNX Runtime
    GenAI 0.14.1) gave other probabilities than Transformers, by 0.25 and more: yarn with Llama and
    Qwen2, whose code serves all models but gpt_oss; and with Qwen2, layers of which only some have
    a sliding window."""
    architectures = config.get("architectures") or ()
    if architectures and architectures[0] not in ARCHITECTURES:
        return (
            f"base model: ModelBuilder builds no {architectures[0]}; choose a base model that is a "
            "LlamaForCausalLM, Phi3ForCausalLM, Qwen3ForCausalLM or another that it builds"
        )
    rope = config.get("rope_parameters") or config.get("rope_scaling") or {}
    rope_type = rope.get("rope_type", rope.get("type"))
    if rope_type == "yarn" and config.get("model_type") != "gpt_oss":
        return (
            "base model: ModelBuilder builds its rotary embeddings (yarn) wrongly; "
            "choose a base model without them"
        )
    if config.get("model_type") in ("qwen2", "qwen3") and windows_differ(config):
        return (
            "base model: ModelBuilder gives all layers the same window, but only some of them "
            "have one; choose another base model"
        )
    if not form.quantised or blocks_fit(form, form.block_size, config):
        return None
    advice = []
    for size in BLOCK_SIZES:
        if blocks_fit(form, size, config):
            advice.append(f"block_size: {size}")
    if form.adapter_apart:
        advice.append("algorithm: rtn")
    choices = " or ".join(advice) or "precision: fp16"
    return (
        f"{key}: {form.algorithm} in blocks of {form.block_size} does not fit the base model; "
        f"use {choices}"
    )


def windows_differ(config: Mapping[str, Any]) -> bool:
    """Return whether some layers have a sliding window and others do not."""
    types = config.get("layer_types")
    if types:
        return len(set(types)) > 1
    if not config.get("use_sliding_window") or not config.get("sliding_window"):
        return False
    layers_without = config.get("max_window_layers") or 0
    return 0 < layers_without < (config.get("num_hidden_layers") or 0)


def blocks_fit(form: ExportForm, block_size: int, config: Mapping[str, Any]) -> bool:
    """Return whether the inputs of all layers divide into blocks as the algorithm requires.

    Olive's quantisers require whole blocks; ONNX Runtime's k_quant, which quantises where the
    adapter is apart, an even number of blocks. Sizes that config.json does not tell are no
    hindrance."""
    sizes = {}
    for name in ("hidden_size", "intermediate_size", "num_attention_heads"):
        value = config.get(name)
        sizes[name] = value if isinstance(value, int) else 0
    heads = sizes["num_attention_heads"]
    head_size = config.get("head_dim") or sizes["hidden_size"] // max(heads, 1)
    for count in (sizes["hidden_size"], sizes["intermediate_size"], heads * head_size):
        if form.adapter_apart:
            if form.algorithm not in ("rtn", "dynamic") and math.ceil(count / block_size) % 2:
                return False
        elif count % block_size:
            return False
    return True
