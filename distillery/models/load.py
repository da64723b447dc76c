"""models/load"""

from pathlib import Path
from typing import TYPE_CHECKING, Any

from distillery.errors import TrainingError

if TYPE_CHECKING:
    import torch


def contiguous_head(model: Any) -> None:
    """Has the head see contiguous hidden states: for the strided slice that `logits_to_keep` makes, PyTorch's CPU
    kernels would copy the whole head once for each row of the batch."""
    head = model.get_output_embeddings()
    if _contiguous not in head._forward_pre_hooks.values():
        head.register_forward_pre_hook(_contiguous)


def _contiguous(_head: Any, inputs: "tuple[torch.Tensor, ...]") -> "tuple[torch.Tensor]":
    return (inputs[0].contiguous(),)


def end_of_turn_id(tokenizer: Any) -> int:
    """The id of the token that ends the assistant's turn: what the chat template writes after an answer."""
    messages = [{"role": "user", "content": "?"}, {"role": "assistant", "content": "A"}]
    asked = tokenizer.apply_chat_template(messages[:1], add_generation_prompt=True, tokenize=False)
    answered = tokenizer.apply_chat_template(messages, tokenize=False)
    if answered.startswith(asked + "A"):
        ids = tokenizer.encode(answered[len(asked) + 1 :], add_special_tokens=False)
        if ids:
            return int(ids[0])
    return int(tokenizer.eos_token_id)


def pad_id(tokenizer: Any) -> int:
    """The padding token's id; the end token's where there is none (padding is masked, so any id serves)."""
    return int(tokenizer.eos_token_id if tokenizer.pad_token_id is None else tokenizer.pad_token_id)


def load_tokenizer(folder: Path, remote_code: bool = False) -> Any:
    from transformers import AutoTokenizer

    try:
        tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=remote_code)
    except (OSError, ValueError) as error:
        raise TrainingError(
            f"base model: {folder.name} has no tokenizer that Transformers loads"
        ) from error
    if not tokenizer.chat_template:
        raise TrainingError(
            f"base model: {folder.name} has no chat template; choose an instruction-tuned model"
        )
    return tokenizer


def load_model(
    folder: Path, adapter: Path | None = None, remote_code: bool = False
) -> tuple[Any, Any]:
    """(model, tokenizer) of a folder of safetensors, in float32, an adapter merged in."""
    import torch
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(
        folder,
        dtype="float32",
        # On a CPU, PyTorch's fused attention is slower than plain products for prompts of some hundred tokens.
        attn_implementation="sdpa" if torch.cuda.is_available() else "eager",
        use_safetensors=True,
        trust_remote_code=remote_code,
    )
    if adapter is not None:
        import peft

        # peft freezes what an adapter is for; merged, it is a model like any other.
        model = (
            peft.PeftModel.from_pretrained(model, adapter).merge_and_unload().requires_grad_(True)
        )
    return model, load_tokenizer(folder, remote_code)
