"""Load a causal language model and its tokenizer from a folder of safetensors."""

from pathlib import Path
from typing import TYPE_CHECKING, Any

from distillery.errors import TrainingError
from distillery.hub_kernels import import_bitsandbytes

if TYPE_CHECKING:
    import torch


def load_model(
    folder: Path,
    adapter: Path | None = None,
    remote_code: bool = False,
    precision: str = "float32",
) -> tuple[Any, Any]:
    """Return (model, tokenizer) of a folder of safetensors, an adapter merged in, all weights in
    `precision`. Each weight is cast as it is read, so that no copy in another precision is kept;
    with an adapter, after it is merged in float32, as the export merges it."""
    import torch
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(
        folder,
        dtype=precision if adapter is None else "float32",
        # On a CPU, PyTorch's fused attention is slower than plain products for prompts of some
        # hundred tokens.
        attn_implementation="sdpa" if torch.cuda.is_available() else "eager",
        use_safetensors=True,
        trust_remote_code=remote_code,
    )
    if adapter is not None:
        import_bitsandbytes()
        import peft

        model = peft.PeftModel.from_pretrained(model, adapter).merge_and_unload()
        # peft has frozen the base; once merged, the model is trained like any other.
        model = model.requires_grad_(True)
        # The parameters alone: rotary frequencies stay in float32.
        for weight in model.parameters():
            weight.data = weight.data.to(getattr(torch, precision))
    return model, load_tokenizer(folder, remote_code)


def load_tokenizer(folder: Path, remote_code: bool = False) -> Any:
    """Return the tokenizer of a folder.

    Raises TrainingError where it can't be loaded or has no chat template."""
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


def end_of_turn_id(tokenizer: Any) -> int:
    """Return the token that ends the assistant's turn: what the chat template writes after an
    answer, or the end-of-text token."""
    messages = [{"role": "user", "content": "?"}, {"role": "assistant", "content": "A"}]
    asked = tokenizer.apply_chat_template(messages[:1], add_generation_prompt=True, tokenize=False)
    answered = tokenizer.apply_chat_template(messages, tokenize=False)
    if answered.startswith(asked + "A"):
        ids = tokenizer.encode(answered[len(asked) + 1 :], add_special_tokens=False)
        if ids:
            return int(ids[0])
    return int(tokenizer.eos_token_id)


def end_ids(model: Any, tokenizer: Any) -> frozenset[int]:
    """Return the tokens that end an answer: what ends the assistant's turn, and what the model's
    own settings name."""
    found = model.generation_config.eos_token_id
    own = found if isinstance(found, list) else [found]
    return frozenset({end_of_turn_id(tokenizer), *(int(each) for each in own if each is not None)})


def pad_id(tokenizer: Any) -> int:
    """Return the padding token, or the end-of-text token where there is none: padding is masked, so
    that any token serves."""
    if tokenizer.pad_token_id is None:
        return int(tokenizer.eos_token_id)
    return int(tokenizer.pad_token_id)


def contiguous_head(model: Any) -> None:
    """Make the head read contiguous hidden states: for the strided slice of `logits_to_keep`,
    PyTorch's CPU kernels would copy the whole head once for each row of the batch."""
    head = model.get_output_embeddings()
    if make_contiguous not in head._forward_pre_hooks.values():
        head.register_forward_pre_hook(make_contiguous)


def make_contiguous(_head: Any, inputs: "tuple[torch.Tensor, ...]") -> "tuple[torch.Tensor]":
    """Return a layer's first input as contiguous memory (a forward pre-hook)."""
    return (inputs[0].contiguous(),)
