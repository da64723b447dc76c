"""The text of an answer in parts is the text of the whole answer, whatever its tokens are."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from distillery.inference.text_stream import TextStream

TEXT = 'Å bread 🥖, "面包" or 👩‍🍳\n\nقريب e\u0301 \ufffd end.'


def byte_level(folder: Path) -> Any:
    from tokenizers import Tokenizer

    return Tokenizer.from_file(str(folder / "tokenizer.json"))


def byte_fallback() -> Any:
    """Return a tokenizer as Llama 2's: pieces begin with their blank, and bytes are tokens."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers

    tokens = [
        "<s>",
        "</s>",
        *(f"<0x{byte:02X}>" for byte in range(256)),
        "▁",
        "▁bread",
        "or",
        "▁or",
    ]
    tokens += [chr(code) for code in range(32, 127)] + ["�"]
    vocabulary = {token: number for number, token in enumerate(dict.fromkeys(tokens))}
    tokenizer: Any = Tokenizer(models.BPE(vocabulary, [], byte_fallback=True))
    tokenizer.add_special_tokens(["<s>", "</s>"])
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first", split=False)
    steps = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
    tokenizer.decoder = decoders.Sequence([*steps, decoders.Strip(" ", 1, 0)])
    return tokenizer


@pytest.fixture(params=["byte level", "byte fallback"])
def tokenizer(request: pytest.FixtureRequest, tiny_model: Callable[[str], Path]) -> Any:
    return byte_level(tiny_model("llama")) if request.param == "byte level" else byte_fallback()


def parts_of(tokenizer: Any, tokens: list[int]) -> list[str]:
    stream = TextStream(tokenizer)
    return [*map(stream.take, tokens), stream.rest()]


def test_characters_of_several_tokens_are_whole(tokenizer: Any) -> None:
    tokens = tokenizer.encode(TEXT, add_special_tokens=False).ids
    assert len(tokens) > len(TEXT), "characters take several tokens"
    parts = parts_of(tokenizer, tokens)
    assert "".join(parts) == TEXT
    assert sum(map(bool, parts)) > 10, "not all at the end"
    assert sum("\ufffd" in part for part in parts) == 1, "the text's own"


def test_any_tokens_give_the_text_of_all_of_them(tokenizer: Any) -> None:
    random = np.random.default_rng(0)
    size = tokenizer.get_vocab_size()
    for _ in range(300):
        # Many bytes that are no character, and special tokens among them.
        tokens = random.integers(0, size, 1 + random.integers(24)).tolist()
        whole = tokenizer.decode(tokens, skip_special_tokens=True)
        assert "".join(parts_of(tokenizer, tokens)) == whole, tokens
