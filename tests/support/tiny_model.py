"""Random models of two layers that pass the whole chain in seconds."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

CHATML = (
    "{% for message in messages %}"
    "{{'<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>' + '\n'}}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
PHI = (
    "{% for message in messages %}"
    "{{ '<|' + message['role'] + '|>' + message['content'] + '<|end|>' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>' }}{% else %}{{ eos_token }}{% endif %}"
)
PHI_TOKENS = ("<|endoftext|>", "<|system|>", "<|user|>", "<|assistant|>", "<|end|>")
CHATML_TOKENS = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")
ARCHITECTURES = ("llama", "phi3", "phi4mini", "qwen2", "qwen3")
"""phi4mini is phi3 with what sets Phi-4-mini apart: rotary embeddings of a part of each head,
scaled by LongRoPE; qwen2 has biases in its attention, qwen3 norms."""
TEXT = (
    "You are a helpful assistant. Your output should only be one of the five choices.",
    "Answer the following multiple-choice question by selecting the correct option.",
    "Question: Where does the baker keep the bread warm?\nAnswer Choices:\n"
    "(A) oven\n(B) river\n(C) cloud",
    "A person who is tired after work would like to rest in a quiet room, wouldn't they?",
)


def build_tiny_model(arch: str, folder: Path, tied: bool = True, **config: float) -> Path:
    """Writes a model of 2 layers with a tokenizer of 512 tokens into `folder`; arch is of
    ARCHITECTURES. `tied`: whether head and embeddings share their weights. `config`: what of the
    model's configuration is not tiny."""
    tiny_tokenizer(arch).save_pretrained(folder)
    tiny_weights(arch, tied, **config).save_pretrained(folder)
    return folder


def tiny_tokenizer(arch: str, texts: Sequence[str] = TEXT, tokens: int = 512) -> Any:
    """Return a tokenizer of `tokens` tokens, those of `texts`."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    special = _special_tokens(arch)
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=tokens, special_tokens=list(special), initial_alphabet=alphabet
    )
    tokenizer.train_from_iterator(texts, trainer)
    end = special[-1]
    fast = PreTrainedTokenizerFast(  # type: ignore[no-untyped-call]
        tokenizer_object=tokenizer, eos_token=end, pad_token="<|endoftext|>"
    )
    fast.chat_template = PHI if arch.startswith("phi") else CHATML
    return fast


def _special_tokens(arch: str) -> tuple[str, ...]:
    return PHI_TOKENS if arch.startswith("phi") else CHATML_TOKENS


def tiny_weights(arch: str, tied: bool = True, **config: float) -> Any:
    """Return a random model of 2 layers. `config`: values of its configuration other than these."""
    import torch
    from transformers import (
        LlamaConfig,
        LlamaForCausalLM,
        Phi3Config,
        Phi3ForCausalLM,
        Qwen2Config,
        Qwen2ForCausalLM,
        Qwen3Config,
        Qwen3ForCausalLM,
    )

    shape: dict[str, Any] = {
        "vocab_size": 512,
        "hidden_size": 64,
        "intermediate_size": 128,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 1024,
        "bos_token_id": 0,
        "pad_token_id": 0,
        "eos_token_id": len(_special_tokens(arch)) - 1,
        "initializer_range": 0.2,
        "tie_word_embeddings": tied,
        **config,
    }
    torch.manual_seed(0)
    if arch == "llama":
        return LlamaForCausalLM(LlamaConfig(**shape))
    if arch == "qwen2":
        model = Qwen2ForCausalLM(Qwen2Config(**shape))
        for layer in model.model.layers:
            # They start at zero, where nobody would miss them.
            for projection in (
                layer.self_attn.q_proj,
                layer.self_attn.k_proj,
                layer.self_attn.v_proj,
            ):
                torch.nn.init.normal_(projection.bias, std=0.5)
        return model
    if arch == "phi4mini":
        # The runtime asks for a multiple of 16 that is rotated: 48 of a head's 64.
        shape |= {"hidden_size": 128, "num_attention_heads": 2, "num_key_value_heads": 1}
        # As its own config.json says it.
        shape |= {"original_max_position_embeddings": 512, "partial_rotary_factor": 0.75}
        short, long = [1 + i / 16 for i in range(24)], [2 + i / 8 for i in range(24)]
        rope = {"type": "longrope", "short_factor": short, "long_factor": long}
        shape |= {"rope_scaling": rope}
        return Phi3ForCausalLM(Phi3Config(**shape))
    if arch == "qwen3":
        return Qwen3ForCausalLM(Qwen3Config(head_dim=16, **shape))
    return Phi3ForCausalLM(Phi3Config(original_max_position_embeddings=1024, **shape))
