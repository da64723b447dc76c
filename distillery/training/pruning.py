"""Layer-pruned starts: which decoder layers of a model a smaller student keeps."""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from distillery.errors import TrainingError
from distillery.models.placement import placement
from distillery.recipe import LayerChoice
from distillery.training.batching import by_length, padded_inputs, turning_point
from distillery.training.losses import TrainingRow

if TYPE_CHECKING:
    import torch

MOST_ROWS = 64
"""Of the training prompts, so many tell a layer's influence."""


def keep_layers(model: Any, layers: Sequence[int]) -> None:
    """Keeps the decoder layers `layers` of a causal language model, in that order, and drops the others in place.

    Raises TrainingError where the model has no such layer."""
    import torch

    decoder = model.get_decoder()
    count = len(decoder.layers)
    wrong = [layer for layer in layers if layer >= count]
    if wrong:
        raise TrainingError(
            f"student.layers: {wrong[0]} is no layer of this model, which has layers 0 to {count - 1}"
        )
    kept = [decoder.layers[layer] for layer in layers]
    for index, layer in enumerate(kept):
        layer.self_attn.layer_idx = index
    decoder.layers = torch.nn.ModuleList(kept)
    model.config.num_hidden_layers = len(kept)
    if getattr(model.config, "layer_types", None):
        model.config.layer_types = [model.config.layer_types[layer] for layer in layers]


def chosen_layers(
    choice: LayerChoice, count: int, influence: Sequence[float] | None = None
) -> list[int]:
    """The layers that `choice` keeps of `count`, in order. `influence`: each layer's, for choice.by block_influence.

    Raises TrainingError for more layers than there are."""
    if choice.keep > count:
        raise TrainingError(
            f"student.layers.keep: {choice.keep}, but this model has {count} layers; keep fewer"
        )
    if choice.by == "early_and_last":
        return [*range(choice.keep - 1), count - 1]
    if choice.by == "even":
        if choice.keep == 1:
            return [count - 1]
        return [round(index * (count - 1) / (choice.keep - 1)) for index in range(choice.keep)]
    if influence is None:
        raise ValueError("block_influence needs each layer's influence")
    return sorted(sorted(range(count), key=lambda layer: -influence[layer])[: choice.keep])


def block_influence(model: Any, batches: Sequence[dict[str, "torch.Tensor"]]) -> list[float]:
    """How much each decoder layer changes what passes through it: 1 - the mean cosine, over all tokens that are no
    padding, of a layer's input and its output (Men et al., ShortGPT, 2024). `batches`: the model's inputs."""
    import torch

    layers = model.get_decoder().layers
    sums, tokens, mask = [0.0] * len(layers), 0, torch.empty(0)

    def watch(index: int) -> Any:
        def hook(_layer: Any, inputs: Any, output: Any) -> None:
            before, after = inputs[0], output[0] if isinstance(output, tuple) else output
            cosine = torch.nn.functional.cosine_similarity(before.float(), after.float(), dim=-1)
            sums[index] += float((cosine * mask).sum())

        return hook

    hooks = [layer.register_forward_hook(watch(index)) for index, layer in enumerate(layers)]
    try:
        with torch.inference_mode():
            for batch in batches:
                mask = batch["attention_mask"]
                tokens += int(mask.sum())
                model(**batch, use_cache=False, logits_to_keep=1)
    finally:
        for hook in hooks:
            hook.remove()
    return [1 - total / tokens for total in sums]


def resolved_layers(
    model: Any, layers: Sequence[int] | LayerChoice | None, rows: Sequence[TrainingRow], pad_id: int
) -> list[int]:
    """The decoder layers that `layers` names or chooses, in order; block influence is measured on some of `rows`."""
    count = len(model.get_decoder().layers)
    if not isinstance(layers, LayerChoice):
        return list(range(count) if layers is None else layers)
    if layers.by != "block_influence":
        return chosen_layers(layers, count)
    place = placement("float32")
    model.to(place.device).eval()
    picked = (
        [rows[i * len(rows) // MOST_ROWS] for i in range(MOST_ROWS)]
        if len(rows) > MOST_ROWS
        else rows
    )
    prompts = [
        [picked[i].prompt for i in part] for part in by_length(picked, 8, turning_point(model))
    ]
    inputs = [padded_inputs(part, pad_id, place.device) for part in prompts]
    return chosen_layers(layers, count, block_influence(model, inputs))
