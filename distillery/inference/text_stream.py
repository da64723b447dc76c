"""The text of an answer while its tokens come."""

import re
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from tokenizers import Tokenizer

BYTE_TOKEN = re.compile(r"<0x[0-9A-F]{2}>")
"""A token of tokenizers as Llama 2's that stands for a byte. What such tokens say is known only
behind the last one of several: if their bytes are no characters, each becomes U+FFFD."""


class TextStream:
    """Gives an answer's text in parts that are final. All parts and the `rest` are together what
    the tokenizer makes of all tokens, special tokens left out.

    A token may hold a part of a character, or begin with a blank that counts only behind others.
    So each is decoded together with those of the part before, which are `_start` to `_given`."""

    def __init__(self, tokenizer: "Tokenizer") -> None:
        self._tokenizer = tokenizer
        self._tokens: list[int] = []
        self._start = self._given = self._characters = 0

    def take(self, token: int) -> str:
        """Return the text that is final with the answer's next token."""
        self._tokens.append(token)
        # One that is left out does not end a row of bytes.
        is_left_out = not self._tokenizer.decode([token], skip_special_tokens=True)
        if is_left_out or BYTE_TOKEN.fullmatch(self._tokenizer.id_to_token(token) or ""):
            return ""
        before = self._decoded(self._start, self._given)
        text = self._decoded(self._start, len(self._tokens)).removeprefix(before)
        if not text or text.endswith("\ufffd"):
            return ""
        self._start, self._given = self._given, len(self._tokens)
        self._characters += len(text)
        return text

    def rest(self) -> str:
        """Return the text that is left when no further token comes."""
        return self._decoded(0, len(self._tokens))[self._characters :]

    def _decoded(self, start: int, end: int) -> str:
        return str(self._tokenizer.decode(self._tokens[start:end], skip_special_tokens=True))
