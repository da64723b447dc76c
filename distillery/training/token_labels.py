"""A teacher's probabilities for the tokens of a written answer, as the student's tokens.

In: the student's tokenizer, an answer's token ids, and what the teacher says of each of its own
tokens (data/answer_tokens.py). Out: TokenLabels.

Both tokenizers cut the same bytes. Where a token of one begins and ends where a token of the other
does, both models choose what comes next after the same text, and the teacher's candidates are
choices of the student too, as far as its vocabulary has a token of the same bytes. At the other
tokens there is nothing to compare. So is the hybrid loss of GOLD, in TRL, which compares tokens of
both vocabularies directly (https://huggingface.co/docs/trl/main/en/gold_trainer); it compares the
rest by sorted probabilities, which a list of candidates does not hold.
"""

import math
from collections.abc import Iterable, Sequence
from itertools import accumulate, pairwise
from typing import Any

import numpy as np
from numpy.typing import NDArray
from pydantic import ConfigDict

from distillery.data.answer_tokens import AnswerToken
from distillery.errors import TrainingError
from distillery.models.token_bytes import TokenBytes
from distillery.records import Record


class TokenLabels(Record):
    """The teacher's probabilities for the tokens of a written answer and the end of the turn after
    it. `candidates`: how many candidates there is room for at each of these positions. `ids`:
    their tokens, [positions, candidates], the bytes of int32. `logs`: the natural logarithms of
    their probabilities, the bytes of float32, and -inf where there is no candidate; a position
    where there is none has no soft label. What the candidates leave of 1 is the probability of all
    other tokens together.

    Numbers one by one would take ten times the memory."""

    model_config = ConfigDict(ser_json_bytes="base64", val_json_bytes="base64")

    candidates: int
    ids: bytes
    logs: bytes

    def arrays(self) -> tuple[NDArray[np.int32], NDArray[np.float32]]:
        """Return `ids` and `logs` as arrays, [positions, candidates]."""
        ids = np.frombuffer(self.ids, dtype="<i4").reshape(-1, self.candidates)
        logs = np.frombuffer(self.logs, dtype="<f4").reshape(-1, self.candidates)
        return ids, logs

    @property
    def labelled(self) -> int:
        """How many positions have a soft label."""
        _, logs = self.arrays()
        return int(np.isfinite(logs).any(-1).sum())


class StudentTokens:
    """The tokens of a student's vocabulary by their bytes."""

    def __init__(self, tokenizer: Any, end_id: int) -> None:
        """`tokenizer`: a Hugging Face tokenizer. `end_id`: the token that ends the turn.

        Raises TrainingError where it is not known which bytes its tokens stand for."""
        try:
            known = TokenBytes(tokenizer.backend_tokenizer.to_str(), [end_id])
        except (AttributeError, ValueError) as error:
            raise TrainingError(
                "training.soft_weight: the teacher's tokens can't be compared with those of this "
                "student, whose tokenizer is of an unknown kind; set it to 0"
            ) from error
        self.end_id, self.begin = end_id, known.begin.encode()
        self.texts: dict[int, bytes] = {}
        same: dict[bytes, list[int]] = {}
        for token in sorted(tokenizer.get_vocab().values()):
            if not known.vocabulary.is_special_token(token):
                self.texts[token] = known.of([token])
                same.setdefault(self.texts[token], []).append(token)
        self.ids = {text: produced(tokenizer, text, tokens) for text, tokens in same.items()}

    def labels(self, answer: Sequence[int], tokens: Sequence[AnswerToken]) -> TokenLabels | None:
        """Return the soft labels for the token ids of an `answer` and the end of the turn, from the
        teacher's `tokens`; None where there are none, or the teacher's text is another one."""
        if not tokens:
            return None
        own = [*(self.texts.get(token, b"") for token in answer), b""]
        theirs = [token.text for token in tokens]
        begin = b""
        if b"".join(own) != b"".join(theirs):
            # The student's tokenizer alone may put something before a text.
            begin = self.begin
            theirs[0] = begin + theirs[0]
        if b"".join(own) != b"".join(theirs):
            return None
        given = dict(zip(spans(theirs), tokens, strict=True))
        found = []
        for start, end in spans(own):
            token = given.get((start, end))
            before = b"" if start else begin
            found.append(self.known_candidates(token.candidates, before) if token else {})
        return token_labels_of(found)

    def known_candidates(
        self, candidates: Iterable[tuple[bytes, float]], before: bytes
    ) -> dict[int, float]:
        """Return the candidates that are one token of this vocabulary, each with the logarithm of
        its probability, the likeliest first. `before` is put before their bytes."""
        found: dict[int, float] = {}
        for text, log in candidates:
            token = self.ids.get(before + text) if text else self.end_id
            if token is not None:
                # Two of the teacher's tokens may have the same bytes.
                found[token] = float(np.logaddexp(found.get(token, -math.inf), log))
        return dict(sorted(found.items(), key=lambda item: -item[1]))


def produced(tokenizer: Any, text: bytes, tokens: Sequence[int]) -> int:
    """Return which of the `tokens` that stand for `text` the tokenizer itself makes of it within a
    longer text, or the first one."""
    if len(tokens) > 1:
        # Some tokenizers put a blank before a text: the line break takes it.
        within = tokenizer.encode("\n" + text.decode(errors="replace"), add_special_tokens=False)
        for token in tokens:
            if token in within:
                return token
    return tokens[0]


def spans(texts: Sequence[bytes]) -> list[tuple[int, int]]:
    """Return where each of the texts begins and ends, in bytes, if they follow each other."""
    return list(pairwise(accumulate(map(len, texts), initial=0)))


def token_labels_of(found: Sequence[dict[int, float]]) -> TokenLabels | None:
    """Return the candidates of each position, with the logarithms of their probabilities, as
    TokenLabels; None where no position has any."""
    most = max(map(len, found))
    if not most:
        return None
    ids = np.zeros((len(found), most), dtype="<i4")
    logs = np.full((len(found), most), -np.inf, dtype="<f4")
    for position, candidates in enumerate(found):
        ids[position, : len(candidates)] = list(candidates)
        logs[position, : len(candidates)] = list(candidates.values())
    return TokenLabels(candidates=most, ids=ids.tobytes(), logs=logs.tobytes())
