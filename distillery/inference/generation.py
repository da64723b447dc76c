"""Write an answer token by token: the one loop, with the one rule of where an answer ends, for ONNX
and Transformers models, evaluation, batch inference and the server."""

from collections.abc import Callable, Collection, Generator, Sequence

import numpy as np

from distillery.answers import NotAnAnswer, canonical
from distillery.inference.guide import Guide
from distillery.inference.logits import Draw, Logits, likeliest
from distillery.records import AnswerFormat, Record

Steps = Generator[tuple[int, Logits], None, None]
"""The tokens of an answer, each with the logits that it was taken from, [vocabulary]."""

SHOWN = 80
"""Characters of a text that is no answer, where its reason is told."""


class Written(Record):
    """What a model has written: the text without blanks at its ends, and how many tokens it took,
    the end not counted. `finished`: whether the model ended it, and no limit did."""

    text: str
    tokens: int
    finished: bool

    def answer(self, answer_format: AnswerFormat | None) -> str:
        """Return the answer as it is compared and given; see `canonical`. Without a format, it is
        any text.

        Raises NotAnAnswer with the reason and the text's beginning."""
        try:
            if not self.finished:
                raise NotAnAnswer(f"cut off after {self.tokens} tokens")
            return canonical(self.text, answer_format.json_schema if answer_format else None)
        except NotAnAnswer as error:
            shown = self.text[:SHOWN] + ("..." if len(self.text) > SHOWN else "")
            raise NotAnAnswer(f"{error}: {shown!r}") from error


class Answering:
    """An answer that is being written: at most `most` tokens, which `draw` takes, until one of
    `end_ids`. `over`: no further token follows. `held`: the logits of the last token that `draw`
    took, with -inf for those that the guide leaves out."""

    def __init__(
        self,
        most: int,
        end_ids: Collection[int],
        draw: Draw = likeliest,
        guide: Guide | None = None,
    ) -> None:
        self.most, self.end_ids, self.draw, self.guide = most, end_ids, draw, guide
        self.tokens: list[int] = []
        self.over = False
        self.held: Logits = np.empty(0, np.float32)

    def take(self, logits: Logits) -> list[int]:
        """Take a token from the logits after those so far, [vocabulary], and return it; where the
        guide is complete with it, an end token too, which needs no logits."""
        self.held = self.guide.masked(logits) if self.guide else logits
        taken = [self.draw(self.held)]
        if self.guide and taken[0] not in self.end_ids:
            self.guide.take(taken[0])
            if self.guide.complete:
                taken.append(min(self.end_ids))
        self.tokens += taken
        self.over = taken[-1] in self.end_ids or len(self.tokens) >= self.most
        return taken


def generated(
    logits: Logits,
    append: Callable[[int], Logits],
    answering: Answering,
    held: bool = False,
) -> Steps:
    """Yield the answer's tokens, each with the model's own logits, [vocabulary], that it was taken
    from; or, with `held`, with -inf for the tokens that the answer's guide leaves out.

    `logits`: those after the prompt. `append` computes a token and returns the logits after it."""
    while True:
        taken, *end = answering.take(logits)
        yield taken, answering.held if held else logits
        for token in end:
            yield token, alone(token, logits) if held else logits
        if answering.over:
            return
        logits = append(taken)


def alone(token: int, logits: Logits) -> Logits:
    """Return logits of the same size by which nothing but `token` may follow."""
    found = np.full_like(logits, -np.inf)
    found[token] = 0.0
    return found


def most_tokens(answer_format: AnswerFormat) -> int:
    """Return how many tokens are generated for an answer, at most: its own and its end."""
    return answer_format.max_tokens + 1


def written(
    tokens: Sequence[int],
    end_ids: Collection[int],
    answer_format: AnswerFormat,
    decode: Callable[[Sequence[int]], str],
) -> Written:
    """Return what the tokens of an `Answering` say. `decode` leaves special tokens out."""
    ended = tokens[-1] in end_ids
    own = tokens[:-1] if ended else tokens
    within = own[: answer_format.max_tokens]
    finished = ended and len(within) == len(own)
    return Written(text=decode(within).strip(), tokens=len(within), finished=finished)
