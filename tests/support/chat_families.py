"""Tiny tokenizers of families of models: each has the family's control tokens, its chat template
and its way to split texts."""

import json
from pathlib import Path
from typing import Any, NamedTuple

from tiny_model import CHATML, TEXT

PHI4_TEMPLATE = Path(__file__).parent / "phi4_mini_chat_template.jinja"
LLAMA_TEMPLATE = (
    "{{ '<|begin_of_text|>' }}{% for message in messages %}"
    "{{ '<|start_header_id|>' + message['role'] + '<|end_header_id|>\n\n' }}"
    "{{ message['content'] | trim }}{{ '<|eot_id|>' }}{% endfor %}"
    "{% if add_generation_prompt %}"
    "{{ '<|start_header_id|>assistant<|end_header_id|>\n\n' }}{% endif %}"
)
GEMMA_TEMPLATE = (
    "{{ '<bos>' }}{% for message in messages %}"
    "{{ '<start_of_turn>' + message['role'] + '\n' + message['content'] | trim }}"
    "{{ '<end_of_turn>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<start_of_turn>model\n' }}{% endif %}"
)
MISTRAL_TEMPLATE = (
    "{{ '<s>' }}{% for message in messages %}"
    "{% if message['role'] == 'assistant' %}{{ message['content'] + '</s>' }}"
    "{% else %}{{ '[INST] ' + message['content'] + '[/INST]' }}{% endif %}{% endfor %}"
)
QWEN_TEMPLATE = CHATML + "{% if enable_thinking %}{{ '<think>\n' }}{% endif %}"


class Family(NamedTuple):
    """`special`: control tokens that the tokenizer calls special, the last of them the end of a
    turn. `named`: added tokens that are not special, but that the chat template writes. `ordinary`:
    added tokens that are texts as any other. `bytes_first`: whether texts are split into bytes, as
    GPT-2's, or into characters, as SentencePiece's."""

    template: str
    special: tuple[str, ...]
    named: tuple[str, ...] = ()
    ordinary: tuple[str, ...] = ()
    bytes_first: bool = True

    @property
    def control(self) -> tuple[str, ...]:
        return self.special + self.named


FAMILIES = {
    "smollm2": Family(CHATML, ("<|endoftext|>", "<|im_start|>", "<|im_end|>")),
    "qwen": Family(
        QWEN_TEMPLATE,
        ("<|endoftext|>", "<|im_start|>", "<|im_end|>"),
        named=("<think>",),
        ordinary=("<tool_call>",),
    ),
    "llama-3": Family(
        LLAMA_TEMPLATE,
        (
            "<|begin_of_text|>",
            "<|end_of_text|>",
            "<|reserved_special_token_0|>",
            "<|start_header_id|>",
            "<|end_header_id|>",
            "<|eot_id|>",
        ),
    ),
    "phi-4-mini": Family(
        PHI4_TEMPLATE.read_text(encoding="utf-8"),
        ("<|endoftext|>", "<|system|>", "<|user|>", "<|assistant|>", "<|end|>"),
        named=("<|tool|>", "<|/tool|>"),
    ),
    "gemma": Family(
        GEMMA_TEMPLATE,
        ("<pad>", "<eos>", "<bos>", "<unk>", "<start_of_turn>", "<end_of_turn>"),
        ordinary=("<table>", "\n\n\n"),
        bytes_first=False,
    ),
    "mistral": Family(
        MISTRAL_TEMPLATE, ("<unk>", "<s>", "[INST]", "[/INST]", "</s>"), bytes_first=False
    ),
}


def family_tokenizer(name: str) -> Any:
    """Return the tokenizer of a family, of 768 tokens at most."""
    from tokenizers import (
        AddedToken,
        Tokenizer,
        decoders,
        models,
        normalizers,
        pre_tokenizers,
        trainers,
    )
    from transformers import PreTrainedTokenizerFast

    family = FAMILIES[name]
    added = [AddedToken(token, normalized=False) for token in family.named + family.ordinary]
    if family.bytes_first:
        tokenizer = Tokenizer(models.BPE())
        tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        tokenizer.decoder = decoders.ByteLevel()
        letters, first = pre_tokenizers.ByteLevel.alphabet(), list(family.special)
    else:
        tokenizer = Tokenizer(models.BPE(byte_fallback=True, unk_token="<unk>", fuse_unk=True))
        tokenizer.normalizer = normalizers.Replace(" ", "\u2581")
        # As SentencePiece has them, words begin with their blank, and signs are apart.
        tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
            [
                pre_tokenizers.Split("\u2581", "merged_with_next"),
                pre_tokenizers.Split("\n", "isolated"),
                pre_tokenizers.Punctuation(),
            ]
        )
        tokenizer.decoder = decoders.Sequence(
            [decoders.Replace("\u2581", " "), decoders.ByteFallback(), decoders.Fuse()]
        )
        letters = [chr(code) for code in range(33, 127)] + ["\n", "\u2581"]
        units = [f"<0x{byte:02X}>" for byte in range(256)]
        first = [*family.special, *units]
    trainer = trainers.BpeTrainer(
        vocab_size=700, special_tokens=first, initial_alphabet=letters, show_progress=False
    )
    tokenizer.train_from_iterator(TEXT, trainer)
    if not family.bytes_first:
        tokenizer.pre_tokenizer = pre_tokenizers.Split(" ", "merged_with_previous")
        # The trainer calls the bytes' tokens special, too.
        parts = json.loads(tokenizer.to_str())
        tokens = [each for each in parts["added_tokens"] if each["content"] in family.special]
        tokenizer = Tokenizer.from_str(json.dumps({**parts, "added_tokens": tokens}))
    tokenizer.add_tokens(added)
    fast = PreTrainedTokenizerFast(  # type: ignore[no-untyped-call]
        tokenizer_object=tokenizer, eos_token=family.special[-1], pad_token=family.special[0]
    )
    fast.chat_template = family.template
    return fast
