"""training/adapters"""

from typing import TYPE_CHECKING, Any

from distillery.errors import TrainingError
from distillery.recipe import LoraRecipe

if TYPE_CHECKING:
    pass


def linear_modules(model: Any) -> list[str]:
    """The names of all linear layers but the head: qkv_proj and others in Phi-4-mini, q_proj and others in Llama.

    After the recommendation to adapt every linear layer (Dettmers et al., QLoRA, 2023)."""
    import torch

    head = model.get_output_embeddings()
    names = {
        name.rsplit(".", 1)[-1]
        for name, module in model.named_modules()
        if isinstance(module, torch.nn.Linear) and module is not head
    }
    if not names:
        raise TrainingError(
            "base model: found no linear layers to adapt; use training.method: full"
        )
    return sorted(names)


def add_lora(model: Any, recipe: LoraRecipe, dora: bool = False) -> Any:
    """`model` with a fresh LoRA or DoRA adapter.

    Raises TrainingError where lora.target_modules names what is no linear layer of the decoder."""
    import peft

    known = linear_modules(model)
    targets = recipe.target_modules or known
    # Nor embeddings and head: where they are tied, an adapter of the one, merged, would change the other.
    layers = [f".{name}" for name, _ in model.named_modules() if name.rsplit(".", 1)[-1] in known]
    missing = [name for name in targets if not any(layer.endswith(f".{name}") for layer in layers)]
    if missing:
        raise TrainingError(
            f"training.lora.target_modules: {', '.join(missing)}: no linear layer of the decoder's; it has "
            f"{', '.join(known)}"
        )
    config = peft.LoraConfig(
        r=recipe.rank,
        lora_alpha=recipe.alpha,
        lora_dropout=recipe.dropout,
        target_modules=list(targets),
        use_dora=dora,
        task_type="CAUSAL_LM",
    )
    return peft.get_peft_model(model, config)
