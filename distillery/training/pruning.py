"""Layer-pruned starts: which decoder layers of a model a smaller student keeps."""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from distillery.errors import TrainingError
from distillery.models.device import choose_device
from distillery.recipe import LayerChoice
from distillery.training.batching import by_length, padded_inputs, turning_point
from distillery.training.depth import probed_depth
from distillery.training.rows import TrainingRow

if TYPE_CHECKING:
    import torch

MOST_ROWS = 64
"""How many of the training prompts, at most, block influence is measured on."""


def resolved_layers(
    model: Any, layers: Sequence[int] | LayerChoice | None, rows: Sequence[TrainingRow], pad_id: int
) -> list[int]:
    """Return the decoder layers that `layers` names or chooses, in order; None means all of them.
    Block influence is measured on some of `rows`, and so is what a probe finds at each depth.

    Raises TrainingError for more layers than there are."""
    count = len(model.get_decoder().layers)
    if layers is None:
        return list(range(count))
    if not isinstance(layers, LayerChoice):
        return list(layers)
    if layers.by == "probe":
        most = min(wanted_number(layers, count), count)
        return list(range(probed_depth(model, rows, pad_id, most, layers.largest_loss)))
    if layers.by != "block_influence":
        return chosen_layers(layers, count)
    if len(rows) > MOST_ROWS:
        rows = [rows[index * len(rows) // MOST_ROWS] for index in range(MOST_ROWS)]
    device = choose_device("float32")
    model.to(device.name).eval()
    inputs = []
    for picked in by_length(rows, 8, turning_point(model)):
        prompts = [rows[index].prompt for index in picked]
        inputs.append(padded_inputs(prompts, pad_id, model.device))
    return chosen_layers(layers, count, block_influence(model, inputs))


def chosen_layers(
    choice: LayerChoice, count: int, influence: Sequence[float] | None = None
) -> list[int]:
    """Return the layers that `choice` keeps of `count`, in order. `influence`: one number for each
    layer, needed for choice.by block_influence.

    Raises TrainingError for more layers than there are."""
    keep = wanted_number(choice, count)
    if keep > count:
        raise TrainingError(
            f"student.layers.keep: {choice.keep}, but this model has {count} layers; keep fewer"
        )
    if choice.by == "first":
        return list(range(keep))
    if choice.by == "early_and_last":
        return [*range(keep - 1), count - 1]
    if choice.by == "even":
        if keep == 1:
            return [count - 1]
        return [round(index * (count - 1) / (keep - 1)) for index in range(keep)]
    if influence is None:
        raise ValueError("block_influence needs the influence of each layer")
    ranked = sorted(range(count), key=lambda layer: -influence[layer])
    return sorted(ranked[:keep])


def wanted_number(choice: LayerChoice, count: int) -> int:
    """Return the number of layers that `choice.keep` names, of a model of `count` layers."""
    if choice.keep is None:
        return count
    if isinstance(choice.keep, float):
        return max(1, round(choice.keep * count))
    return choice.keep


def block_influence(model: Any, batches: Sequence[dict[str, "torch.Tensor"]]) -> list[float]:
    """Return how much each decoder layer changes its input: 1 - the mean cosine of a layer's input
    and output over all tokens that are not padding (Men et al., ShortGPT, 2024).

    `batches`: inputs of the model, as `padded_inputs` returns them."""
    import torch

    layers = model.get_decoder().layers
    sums, tokens, mask = [0.0] * len(layers), 0, torch.empty(0)

    def watch(index: int) -> Any:
        def add_cosines(_layer: Any, inputs: Any, output: Any) -> None:
            before = inputs[0]
            after = output[0] if isinstance(output, tuple) else output
            cosine = torch.nn.functional.cosine_similarity(before.float(), after.float(), dim=-1)
            sums[index] += float((cosine * mask).sum())

        return add_cosines

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


def keep_layers(model: Any, layers: Sequence[int]) -> None:
    """Keep the decoder layers `layers` of a causal language model, in that order, and drop the
    others; changes the model itself.

    Raises TrainingError where the model has no such layer."""
    import torch

    decoder = model.get_decoder()
    count = len(decoder.layers)
    for layer in layers:
        if layer >= count:
            raise TrainingError(
                f"student.layers: {layer} is no layer of this model, which has layers 0 to "
                f"{count - 1}"
            )
    kept = [decoder.layers[layer] for layer in layers]
    for index, module in enumerate(kept):
        module.self_attn.layer_idx = index
    decoder.layers = torch.nn.ModuleList(kept)
    model.config.num_hidden_layers = len(kept)
    if getattr(model.config, "layer_types", None):
        model.config.layer_types = [model.config.layer_types[layer] for layer in layers]
