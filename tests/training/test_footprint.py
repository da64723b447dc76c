"""The estimate of a training's memory is that of what its passes keep."""

import random
from typing import Any, get_args

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM, Phi3Config, Phi3ForCausalLM

from distillery.models.device import Device, linear_layers_cast
from distillery.recipe import TrainingRecipe
from distillery.training.batching import forward
from distillery.training.footprint import Shape, bytes_a_token, fixed_bytes, split_bytes
from distillery.training.loop import trainable_model

HIDDEN, MLP, BATCH = 384, 1024, 4
CLASSES: dict[str, tuple[Any, Any]] = {
    "llama": (LlamaConfig, LlamaForCausalLM),
    "phi3": (Phi3Config, Phi3ForCausalLM),
}


def kept(arch: str, layers: int, length: int, recipe: TrainingRecipe) -> int:
    """Return the bytes that a pass of rows of `length` tokens keeps for the backward pass."""
    config_class, model_class = CLASSES[arch]
    config = config_class(
        vocab_size=512,
        hidden_size=HIDDEN,
        intermediate_size=MLP,
        num_hidden_layers=layers,
        num_attention_heads=6,
        num_key_value_heads=2,
        pad_token_id=0,
    )
    config._attn_implementation = "sdpa"
    device = Device("cpu", "bfloat16")
    dtype = torch.bfloat16 if recipe.adapts else torch.float32
    model = trainable_model(model_class._from_config(config, dtype=dtype), recipe, device)
    weights = {weight.untyped_storage().data_ptr() for weight in model.parameters()}
    tensors: dict[int, torch.Tensor] = {}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage().data_ptr()
        if storage not in weights:
            tensors[storage] = tensor
        return tensor

    numbers = random.Random(0)
    ids = [numbers.choices(range(1, 512), k=length) for _ in range(BATCH)]
    with (
        torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor),
        device.autocast(),
        linear_layers_cast(model, device, frozen_only=True),
    ):
        forward(model, ids, 2, 0)
    return sum(tensor.untyped_storage().nbytes() for tensor in tensors.values())


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("method", get_args(TrainingRecipe.model_fields["method"].annotation))
@pytest.mark.parametrize("arch", CLASSES)
def test_passes_keep_what_is_estimated_for_each_token_and_layer(
    arch: str, method: str, checkpointing: bool
) -> None:
    settings = {"method": method, "gradient_checkpointing": checkpointing}
    recipe = TrainingRecipe.model_validate(settings)
    # The second layer's share of what more tokens take: without weights that are cast.
    long, short = ([kept(arch, layers, length, recipe) for layers in (1, 2)] for length in (64, 32))
    found = ((long[1] - long[0]) - (short[1] - short[0])) / (BATCH * 32)

    def estimated(layers: int) -> float:
        return bytes_a_token(Shape(0, layers, HIDDEN, MLP), method, "bfloat16", checkpointing)

    assert found == pytest.approx(estimated(2) - estimated(1), rel=0.1)


@pytest.mark.parametrize("precision", ["bfloat16", "float32"])
@pytest.mark.parametrize("method", ["lora", "dora", "full"])
def test_devices_that_share_out_a_model_hold_less_each(method: str, precision: str) -> None:
    shape = Shape(8 * 10**9, 32, HIDDEN, MLP, 10**9)
    whole = fixed_bytes(shape, method, precision)
    two, eight = (split_bytes(shape, method, precision, devices) for devices in (2, 8))
    assert eight < two < whole
    # What is gathered at a time does not depend on the number of devices.
    share = 16 if method == "full" else 2 if precision == "bfloat16" else 4
    assert two - eight == pytest.approx(shape.parameters * share * (1 / 2 - 1 / 8))


def test_full_training_takes_more_than_an_adapter_and_float32_more_than_bfloat16() -> None:
    shape = Shape(10**9, 32, HIDDEN, MLP)
    full, dora, lora = (fixed_bytes(shape, name, "bfloat16") for name in ("full", "dora", "lora"))
    assert (full, dora, lora) == (18e9, 5e9, 2e9)
    assert fixed_bytes(shape, "lora", "float32") == 4e9
    # Of 1e9 parameters, the embeddings' stay as they are.
    embedded = Shape(10**9, 32, HIDDEN, MLP, embedded=2 * 10**8)
    assert fixed_bytes(embedded, "qlora", "bfloat16") == pytest.approx(0.8e9 * 0.616 + 0.4e9)
    assert fixed_bytes(embedded, "lora", "bfloat16") == lora
    half = bytes_a_token(shape, "lora", "bfloat16", False)
    assert bytes_a_token(shape, "lora", "float32", False) == 2 * half
