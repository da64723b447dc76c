"""The bytes that the tokens of a vocabulary stand for.

llguidance knows them for the tokenizers of language models: byte-level BPE, and SentencePiece
with its byte tokens.
"""

from collections.abc import Collection


class TokenBytes:
    """The tokens of one tokenizer. `vocabulary`: llguidance's own object for it. `begin`: what the
    tokenizer puts before each text, as Llama 2's does with a blank, those that are learnt
    included."""

    def __init__(self, tokenizer: str, end_ids: Collection[int]) -> None:
        """`tokenizer`: the text of its tokenizer.json. `end_ids`: the tokens that end an answer.

        Raises ValueError for a tokenizer of an unknown kind."""
        from llguidance import LLTokenizer
        from tokenizers import Tokenizer

        self.vocabulary = LLTokenizer(tokenizer, eos_token=sorted(end_ids))
        first = Tokenizer.from_str(tokenizer).encode("{", add_special_tokens=False).ids
        self.begin = " " if self.of(first).startswith(b" ") else ""

    def of(self, tokens: Collection[int]) -> bytes:
        """Return the bytes of tokens, one after the other."""
        found: bytes = self.vocabulary.decode_bytes(list(tokens))
        return found
