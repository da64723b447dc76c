"""LoRA and DoRA adapters: which layers of a model they adapt, and a model with a new one."""

from typing import Any

from distillery.errors import TrainingError
from distillery.hub_kernels import import_bitsandbytes
from distillery.recipe import LoraRecipe


def add_lora(model: Any, recipe: LoraRecipe, dora: bool = False, first_layer: int = 0) -> Any:
    """Return `model` with a new LoRA or DoRA adapter (Hu et al., LoRA, 2021; Liu et al., DoRA,
    2024) in the decoder layers from `first_layer` on.

    Raises TrainingError where lora.target_modules names what is no linear layer of the decoder."""
    import_bitsandbytes()
    import peft

    known = linear_modules(model)
    targets = list(recipe.target_modules or known)
    # Embeddings and head are excluded: if they are tied, merging an adapter into one changes the
    # other.
    layers = [f".{name}" for name, _ in model.named_modules() if name.rsplit(".", 1)[-1] in known]
    missing = []
    for target in targets:
        if not any(layer.endswith(f".{target}") for layer in layers):
            missing.append(target)
    if missing:
        raise TrainingError(
            f"training.lora.target_modules: {', '.join(missing)}: no linear layer of the decoder; "
            f"choose from {', '.join(known)}"
        )
    # None adapts all layers.
    adapted = None
    if first_layer:
        adapted = list(range(first_layer, len(model.get_decoder().layers)))
    config = peft.LoraConfig(
        r=recipe.rank,
        lora_alpha=recipe.alpha,
        lora_dropout=recipe.dropout,
        target_modules=targets,
        layers_to_transform=adapted,
        use_dora=dora,
        task_type="CAUSAL_LM",
    )
    return peft.get_peft_model(model, config)


def linear_modules(model: Any) -> list[str]:
    """Return the names of all linear layers except the head: qkv_proj and others in Phi-4-mini,
    q_proj and others in Llama.

    Adapting every linear layer is the recommendation of Dettmers et al., QLoRA, 2023. Raises
    TrainingError where there is none."""
    import torch

    head = model.get_output_embeddings()
    names: set[str] = set()
    for name, module in model.named_modules():
        if isinstance(module, torch.nn.Linear) and module is not head:
            names.add(name.rsplit(".", 1)[-1])
    if not names:
        raise TrainingError(
            "base model: found no linear layers to adapt; use training.method: full"
        )
    return sorted(names)
