"""Ask an ONNX model: exact probabilities of a row's options, and generated text."""

from collections.abc import Iterator, Sequence
from functools import cached_property
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from distillery.errors import DataError
from distillery.inference.abstention import read_abstention
from distillery.inference.decoder import Decoder
from distillery.inference.logits import Logits, log_softmax, softmax, token_sampler
from distillery.models.class_tokens import read_class_tokens, require_classes
from distillery.prompts import (
    GenAITokenizer,
    letter_ids,
    longest_prompt,
    read_added_tokens,
    render_ids,
    text_ids,
)
from distillery.recipe import PromptRecipe
from distillery.records import Example, Record


class Answer(Record):
    """The most probable letter, and the probability of each of the row's letters; they sum to 1.
    `abstained`: whether the letter's probability is below the student's threshold; None for a
    student without a threshold."""

    letter: str
    probabilities: dict[str, float]
    abstained: bool | None = None


class OnnxStudent:
    """A model folder that export made. Not thread-safe: it answers one question at a time."""

    def __init__(self, folder: Path, threads: int | None = None, adapter: bool = True) -> None:
        """Load the model; see `Decoder` for the arguments and the errors."""
        self.folder = folder
        self.decoder = Decoder(folder, threads, adapter)
        self.context_length = self.decoder.context_length
        self.tokenizer = GenAITokenizer(self.decoder.tokenizer, folder)
        self.end_ids = frozenset(int(token) for token in self.decoder.tokenizer.eos_token_ids)
        self.classes = read_class_tokens(folder)
        self.abstention = read_abstention(folder)
        self._letter_ids: dict[int, list[int]] = {}
        self._token_texts: dict[int, str] = {}

    def answer(self, example: Example, prompt: PromptRecipe) -> Answer:
        """Return the answer to a row.

        Raises DataError if the prompt is longer than prompt.max_tokens or than the model's
        context, to which the longest option's text counts if options are scored by their texts.
        """
        texts = []
        if prompt.answer == "text":
            texts = text_ids(example, self.tokenizer)
        ids = render_ids(example, prompt, self.tokenizer)
        limit = longest_prompt(prompt, self.context_length, texts)
        if ids is None or len(ids) > limit:
            whose = "prompt.max_tokens" if limit == prompt.max_tokens else "the model's context"
            raise DataError(
                f"{example.example_id}: the prompt is longer than {limit} tokens ({whose})"
            )
        if texts:
            probabilities = self.text_probabilities(ids, texts)
        elif prompt.answer == "class":
            classes = require_classes(self.classes, self.folder)
            probabilities = self.class_probabilities(ids, classes.for_classes(example.classes))
        else:
            probabilities = self.option_probabilities(ids, self.letter_ids(len(example.options)))
        best = max(range(len(probabilities)), key=probabilities.__getitem__)
        by_letter = dict(zip(example.keys, probabilities, strict=True))
        abstained = None
        if self.abstention:
            abstained = self.abstention.abstains(probabilities[best])
        return Answer(letter=example.keys[best], probabilities=by_letter, abstained=abstained)

    def option_probabilities(
        self, prompt_ids: Sequence[int], letter_ids: Sequence[int]
    ) -> list[float]:
        """Return the softmax, in float64, over the letters' logits at the assistant's first token.

        It takes one pass over the prompt and no decoding.
        """
        return softmax(self.decoder.prefill(prompt_ids)[list(letter_ids)])

    def class_probabilities(self, prompt_ids: Sequence[int], tokens: Sequence[int]) -> list[float]:
        """Return the softmax, in float64, over the logits of the classes' `tokens`.

        It takes one pass over the prompt. Where the head reads the mean of the states, the logits
        are the mean of those at each of them, because a head is linear."""
        classes = require_classes(self.classes, self.folder)
        span = classes.span(prompt_ids)
        if classes.pooled:
            logits = self.decoder.prefill_mean(prompt_ids, span, classes.last)
        else:
            logits = self.decoder.prefill(prompt_ids)
        return softmax(logits[list(tokens)])

    def text_probabilities(
        self, prompt_ids: Sequence[int], texts: Sequence[Sequence[int]]
    ) -> list[float]:
        """Return the softmax, in float64, over the texts' scores.

        A score is the mean log-probability of a text's tokens after the prompt, as in
        training/likelihood.py; the prompt is computed once.
        """
        first = log_softmax(self.decoder.prefill(prompt_ids, room=max(map(len, texts))))
        scores = []
        for text in texts:
            logprobs = [first[text[0]]]
            for token, following in pairwise(text):
                logprobs.append(log_softmax(self.decoder.append([token]))[following])
            scores.append(float(np.mean(logprobs)))
            if len(text) > 1:
                self.decoder.rewind(len(prompt_ids))
        return softmax(np.array(scores))

    def next_token_logprobs(self, prompt_ids: Sequence[int]) -> NDArray[np.float64]:
        """Return the natural log-probabilities of the next token, [vocabulary]."""
        return log_softmax(self.decoder.prefill(prompt_ids))

    def generate(
        self,
        prompt_ids: Sequence[int],
        max_tokens: int,
        temperature: float = 0.0,
        top_p: float = 1.0,
        seed: int | None = None,
    ) -> tuple[list[int], list[float]]:
        """Return the answer's tokens without the end token, and the log-probability of each.

        Log-probabilities are the model's own, at temperature 1. Temperature 0 takes the most
        probable tokens; equal seeds give equal answers.
        """
        tokens, logprobs = [], []
        for token, logits in self.steps(
            prompt_ids, max_tokens, temperature=temperature, top_p=top_p, seed=seed
        ):
            if token not in self.end_ids:
                tokens.append(token)
                logprobs.append(float(log_softmax(logits)[token]))
        return tokens, logprobs

    def steps(
        self,
        prompt_ids: Sequence[int],
        max_tokens: int,
        *,
        temperature: float = 0.0,
        top_p: float = 1.0,
        seed: int | None = None,
        top_k: int | None = None,
    ) -> Iterator[tuple[int, Logits]]:
        """Yield up to `max_tokens` pairs of a token and the logits that it was taken from.

        Stops after an end token, which is yielded too, and at the end of the context. The model
        computes only as far as the caller asks.
        """
        draw = token_sampler(temperature, top_p, seed, top_k)
        most = max(1, min(max_tokens, self.context_length - len(prompt_ids)))
        logits = self.decoder.prefill(prompt_ids, room=most)
        for count in range(1, most + 1):
            token = draw(logits)
            yield token, logits
            if token in self.end_ids or count == most:
                return
            logits = self.decoder.append([token])

    def letter_ids(self, count: int) -> list[int]:
        """Return `prompts.letter_ids` by this model's tokenizer."""
        if count not in self._letter_ids:
            self._letter_ids[count] = letter_ids(self.tokenizer, count)
        return self._letter_ids[count]

    def decode(self, tokens: Sequence[int]) -> str:
        """Return the tokens as text, without special tokens."""
        return str(self.decoder.tokenizer.decode(np.array(tokens, dtype=np.int32)))

    def text_stream(self) -> Any:
        """Return an object whose `decode(token)` gives the text that this token completes."""
        return self.decoder.tokenizer.create_stream()

    def token_text(self, token: int) -> str:
        """Return one token as text: a special one's name, U+FFFD for parts of a character."""
        if token not in self._token_texts:
            self._token_texts[token] = self.added_tokens.get(token) or self.decode([token])
        return self._token_texts[token]

    @cached_property
    def added_tokens(self) -> dict[int, str]:
        """The special tokens by id, as tokenizer.json names them."""
        added, _ = read_added_tokens(self.folder)
        return {token.id: token.content for token in added}
