"""Hold generated text to a JSON Schema: at each step, the tokens that would break it are left out.

llguidance, the library that ONNX Runtime GenAI's own guidance uses too, says which tokens may
follow. It is asked here for each token that is sampled, so that ONNX and Transformers models are
held alike, and a model's vocabulary is prepared once: ONNX Runtime GenAI 0.14 does that for every
answer, which takes longer than most answers do.
"""

from collections.abc import Collection, Mapping
from functools import lru_cache
from typing import Any

import numpy as np

from distillery.answers import grammar_of
from distillery.errors import SchemaNotHeld, one_line
from distillery.inference.logits import Logits
from distillery.models.token_bytes import TokenBytes

KEPT_SCHEMAS = 16
"""Schemas whose grammars are kept, those that were used last: a server's requests bring any number
of them."""


class Guides:
    """Makes the guides of one model. `tokenizer`: the text of its tokenizer.json. `end_ids`: the
    tokens that end an answer."""

    def __init__(self, tokenizer: str, end_ids: Collection[int]) -> None:
        """Prepare the vocabulary. Raises SchemaNotHeld for a tokenizer of an unknown kind."""
        try:
            tokens = TokenBytes(tokenizer, end_ids)
        except ValueError as error:
            raise SchemaNotHeld(
                f"no answer can be held to a schema with this tokenizer: {one_line(error)}"
            ) from error
        self._tokens = tokens
        # What is compiled once: half a second for a schema of 70 KB.
        self.matcher_at_start = lru_cache(KEPT_SCHEMAS)(self.compiled)

    def token_bytes(self, token: int) -> bytes | None:
        """Return the bytes that a token stands for: UTF-8 that may begin or end within a
        character. None where the head has a row for no token."""
        if token >= self._tokens.vocabulary.vocab_size:
            return None
        return self._tokens.of([token])

    def start(self, schema: Mapping[str, Any], strict: bool = False) -> "Guide":
        """Return a guide at the beginning of an answer. With `strict`, all of the schema must be
        held; else keywords that llguidance does not know, such as uniqueItems, are passed over.

        Raises SchemaNotHeld with the reason."""
        try:
            grammar = grammar_of(schema, strict, self._tokens.begin)
        except ValueError as error:
            raise SchemaNotHeld(str(error)) from error
        return Guide(self.matcher_at_start(grammar).deep_copy())

    def compiled(self, grammar: str) -> Any:
        """Return llguidance's matcher of a grammar, at the beginning of an answer. Raises
        SchemaNotHeld as `start` does."""
        from llguidance import LLMatcher

        matcher = LLMatcher(self._tokens.vocabulary, grammar, log_level=0)
        require_no_error(matcher)
        return matcher


class Guide:
    """Follows one answer. `complete`: nothing but the end may follow."""

    def __init__(self, matcher: Any) -> None:
        self._matcher = matcher
        self.complete = False

    def masked(self, logits: Logits) -> Logits:
        """Return the logits, [vocabulary], with -inf for the tokens that may not follow.

        Raises SchemaNotHeld where what may follow is too much to be found out."""
        bits = np.frombuffer(self._matcher.compute_bitmask(), dtype=np.uint8)
        # It would let the answer end here.
        require_no_error(self._matcher)
        may_follow = np.unpackbits(bits, bitorder="little")[: len(logits)]
        # A head may have more rows than the tokenizer has tokens.
        found = np.full_like(logits, -np.inf)
        allowed = np.flatnonzero(may_follow)
        found[allowed] = logits[allowed]
        return found

    def take(self, token: int) -> None:
        """Go on behind `token`, one of those that may follow. Raises SchemaNotHeld as `masked`
        does."""
        self._matcher.consume_token(token)
        require_no_error(self._matcher)
        self.complete = self._matcher.is_stopped()


def require_no_error(matcher: Any) -> None:
    """Raise SchemaNotHeld with the first line of a matcher's error."""
    if matcher.is_error():
        reason = matcher.get_error().partition("<")[0]
        raise SchemaNotHeld(one_line(reason))
