"""Estimates of the memory that a training takes on a GPU, from a model's shape. No figure here was
measured on a GPU.

What a pass keeps for the backward pass was counted on a CPU, by PyTorch's hooks for saved tensors,
in models of one and two layers (Llama and Phi-3, grouped queries, autocast to bfloat16). For each
token and layer it is so many bytes as the factors below say, times the hidden size and times the
MLP's. Phi-4-mini's own layer keeps 145 kB a token; its factors give 142. test_footprint.py counts
again.
"""

from dataclasses import dataclass

KEPT = {
    "lora": (25.0, 8.0),
    "qlora": (25.0, 8.0),
    "dora": (40.0, 16.0),
    "full": (31.0, 8.0),
}
"""Bytes for each token and layer, by method: times the hidden size, and times the MLP's."""

KEPT_AT_CHECKPOINTS = {"lora": 2.0, "qlora": 2.0, "dora": 2.0, "full": 4.0}
"""Bytes for each token and layer times the hidden size, with gradient checkpointing: a layer's
input, which is in float32 where the embeddings are."""

TRAINED_BYTES = 16
"""For each parameter that is trained: weight, gradient and AdamW's two moments in float32."""

CAST_BYTES = 2
"""For each parameter of a layer that is trained: autocast's copy in bfloat16."""

NORM_BYTES = 3
"""For each parameter below DoRA's adapter, whose norms are computed in each pass."""

FOUR_BITS_BYTES = 0.516
"""For each parameter in 4 bits, with the scale of its block."""

ADAPTER_BYTES = 0.1
"""For each parameter below QLoRA's adapter: those of the adapter, of rank 16 in all layers, with
gradients and moments. It is 0.12 in Phi-4-mini, and 0.05 in a Llama of 70 billion."""

GATHERED_LAYERS = 3
"""How many layers' weights a device holds beside its share of the model: those of the layer that
computes and of the next one, and the buffers that they come in."""


@dataclass(frozen=True)
class Shape:
    """A model's size: parameters, decoder layers, the hidden size and the MLP's. `embedded`: how
    many of the parameters are those of embeddings and head, which are never in 4 bits."""

    parameters: int
    layers: int
    hidden: int
    intermediate: int
    embedded: int = 0


def fixed_bytes(shape: Shape, method: str, precision: str) -> float:
    """Return the bytes of weights, gradients and moments. An adapter's own are left out, save
    QLoRA's: rank 16 in all layers is a hundredth of the model."""
    if method == "full":
        cast = CAST_BYTES if precision == "bfloat16" else 0
        return float(shape.parameters * (TRAINED_BYTES + cast))
    of_base = 2 if precision == "bfloat16" else 4
    if method == "qlora":
        packed = shape.parameters - shape.embedded
        return packed * (FOUR_BITS_BYTES + ADAPTER_BYTES) + shape.embedded * of_base
    if method == "dora":
        of_base += NORM_BYTES
    return float(shape.parameters * of_base)


def split_bytes(shape: Shape, method: str, precision: str, devices: int) -> float:
    """Return what `fixed_bytes` does, for each of several devices that share out the model: its
    share, and the weights that are gathered at a time, in full training with their gradients."""
    of_weight = 2 if precision == "bfloat16" else 4
    layers = GATHERED_LAYERS * (shape.parameters - shape.embedded) / shape.layers
    if method == "full":
        # Embeddings are gathered in float32, and autocast keeps a copy of the head.
        gathered = 2 * of_weight * layers + (8 + CAST_BYTES) * shape.embedded
        return shape.parameters * TRAINED_BYTES / devices + gathered
    gathered = of_weight * (layers + shape.embedded)
    if method == "dora":
        # What norms are computed from stays until the backward pass.
        gathered += shape.parameters * NORM_BYTES
    return shape.parameters * of_weight / devices + gathered


def bytes_a_token(shape: Shape, method: str, precision: str, checkpointing: bool) -> float:
    """Return the bytes that each token of a batch takes until the backward pass is through it."""
    of_hidden, of_mlp = KEPT[method]
    layer = of_hidden * shape.hidden + of_mlp * shape.intermediate
    total = shape.layers * layer
    if checkpointing:
        # One layer at a time is computed again.
        total = shape.layers * KEPT_AT_CHECKPOINTS[method] * shape.hidden + layer
    return total if precision == "bfloat16" else 2 * total
