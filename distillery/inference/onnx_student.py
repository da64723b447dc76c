"""Ask an ONNX model: exact probabilities of a row's options, and generated text."""

import threading
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path

import numpy as np

from distillery.inference.decoder import LONGEST_PASS, Decoder
from distillery.inference.generation import Answering, Steps, generated
from distillery.inference.guide import Guide
from distillery.inference.logits import Logits, log_softmax, softmax, token_sampler
from distillery.inference.student import Writer
from distillery.models.class_tokens import require_classes
from distillery.prompts import GenAITokenizer
from distillery.training.rows import TrainingRow


class OnnxStudent(Writer):
    """A model in ONNX Runtime GenAI, which also generates text."""

    def __init__(self, folder: Path, threads: int | None = None, adapter: bool = True) -> None:
        """Load the model; see `Decoder` for the arguments and the errors."""
        self.decoder = Decoder(folder, threads, adapter)
        tokenizer = GenAITokenizer(self.decoder.tokenizer, folder)
        super().__init__(folder, tokenizer, self.decoder.context_length)

    def probabilities(self, rows: Sequence[TrainingRow]) -> list[list[float]]:
        """Return the probabilities over the options of each row, which are asked one by one."""
        found = []
        for row in rows:
            if row.texts:
                found.append(self.text_probabilities(row.prompt, row.texts))
            elif row.closed:
                found.append(self.class_probabilities(row.prompt, row.letters))
            else:
                found.append(self.option_probabilities(row.prompt, row.letters))
        return found

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

    def next_logits(self, prompt_ids: Sequence[int]) -> Logits:
        """Return the logits of the token after a prompt, [vocabulary]."""
        return self.decoder.prefill(prompt_ids)

    def heed(self, stop: threading.Event) -> None:
        """See `Student`."""
        self.decoder.stop = stop
        self.decoder.longest_pass = LONGEST_PASS

    def forget(self) -> None:
        """See `Student`."""
        self.decoder.forget()

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
        guide: Guide | None = None,
        held: bool = False,
    ) -> Steps:
        """Yield up to `max_tokens` pairs of a token and the logits that it was taken from; see
        `generated`, also for `held`.

        Stops after an end token, which is yielded too, and at the end of the context. The model
        computes only as far as the caller asks.
        """
        draw = token_sampler(temperature, top_p, seed, top_k)
        most = max(1, min(max_tokens, self.context_length - len(prompt_ids)))
        first = self.decoder.prefill(prompt_ids, room=most)
        answering = Answering(most, self.end_ids, draw, guide)
        yield from generated(first, lambda token: self.decoder.append([token]), answering, held)
