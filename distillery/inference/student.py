"""What every way of asking an ONNX model has in common: a row's answer from the probabilities of
its options, and the texts of tokens."""

import threading
from abc import ABC, abstractmethod
from collections.abc import Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from distillery.errors import DataError
from distillery.inference.abstention import read_abstention
from distillery.inference.generation import Steps, Written, most_tokens, written
from distillery.inference.guide import Guide, Guides
from distillery.inference.logits import Logits, log_softmax
from distillery.inference.rows import RowRenderer
from distillery.inference.text_stream import TextStream
from distillery.prompts import GenAITokenizer, read_added_tokens
from distillery.recipe import PromptRecipe
from distillery.records import AnswerFormat, Example, Record
from distillery.training.rows import TrainingRow


class Answer(Record):
    """The most probable letter, and the probability of each of the row's letters; they sum to 1.
    `abstained`: whether the letter's probability is below the student's threshold; None for a
    student without a threshold."""

    letter: str
    probabilities: dict[str, float]
    abstained: bool | None = None


class Student(RowRenderer, ABC):
    """An exported model that answers rows. Not thread-safe: it answers one question at a time."""

    tokenizer: GenAITokenizer

    def __init__(self, folder: Path, tokenizer: GenAITokenizer, context_length: int) -> None:
        """Read the model's classes and threshold. Raises ModelError where they can't be read."""
        super().__init__(folder, tokenizer, context_length)
        self.abstention = read_abstention(folder)
        self.end_ids = frozenset(int(token) for token in tokenizer.runtime.eos_token_ids)
        self._token_texts: dict[int, str] = {}

    @abstractmethod
    def probabilities(self, rows: Sequence[TrainingRow]) -> list[list[float]]:
        """Return the probabilities over the options of each rendered row; each row's sum to 1."""

    @abstractmethod
    def next_logits(self, prompt_ids: Sequence[int]) -> Logits:
        """Return the logits of the token after a prompt, [vocabulary]."""

    def all_next_logits(self, prompts: Sequence[Sequence[int]]) -> list[Logits]:
        """Return the logits of the token after each prompt, [vocabulary] each."""
        return [self.next_logits(prompt) for prompt in prompts]

    @abstractmethod
    def heed(self, stop: threading.Event) -> None:
        """Look at `stop` before each pass, of which a long prompt then takes several. Another
        thread may set it: until it is cleared, each pass raises AnswerStopped."""

    @abstractmethod
    def forget(self) -> None:
        """Give up what is cached, so that the time of the next prompt tells nothing of the last."""

    def answer(self, example: Example, prompt: PromptRecipe) -> Answer:
        """Return the answer to a row. Raises DataError as `render` does."""
        (found,) = self.probabilities([self.render(example, prompt)])
        return self.chosen(example, found)

    def answers(
        self, examples: Sequence[Example], prompt: PromptRecipe
    ) -> list[Answer | Written | DataError]:
        """Return the answer to each row, or why it can't be asked."""
        rendered = self.render_all(examples, prompt)
        rows = [row for row in rendered if isinstance(row, TrainingRow)]
        found = iter(self.probabilities(rows))
        answers: list[Answer | Written | DataError] = []
        for example, row in zip(examples, rendered, strict=True):
            if isinstance(row, DataError):
                answers.append(row)
            else:
                answers.append(self.chosen(example, next(found)))
        return answers

    def render_all(
        self, examples: Sequence[Example], prompt: PromptRecipe
    ) -> list[TrainingRow | DataError]:
        """Return each row as `render` does, or why it can't be asked."""
        rendered: list[TrainingRow | DataError] = []
        for example in examples:
            try:
                rendered.append(self.render(example, prompt))
            except DataError as error:
                rendered.append(error)
        return rendered

    def chosen(self, example: Example, probabilities: Sequence[float]) -> Answer:
        """Return the answer with the highest of the options' probabilities, the first of equals."""
        best = max(range(len(probabilities)), key=probabilities.__getitem__)
        abstained = None
        if self.abstention:
            abstained = self.abstention.abstains(probabilities[best])
        return Answer(
            letter=example.keys[best],
            probabilities=dict(zip(example.keys, probabilities, strict=True)),
            abstained=abstained,
        )

    def next_token_logprobs(self, prompt_ids: Sequence[int]) -> NDArray[np.float64]:
        """Return the natural log-probabilities of the next token, [vocabulary]."""
        return log_softmax(self.next_logits(prompt_ids))

    def decode(self, tokens: Sequence[int]) -> str:
        """Return the tokens as text, without special tokens."""
        return str(self.tokenizer.runtime.decode(np.array(tokens, dtype=np.int32)))

    def text_of(self, tokens: Sequence[int]) -> str:
        """Return the tokens as text, without special tokens, as Transformers does. Behind bytes
        that are no character, ONNX Runtime GenAI 0.14 loses text."""
        return str(self._text_tokenizer.decode(tokens, skip_special_tokens=True))

    def text_stream(self) -> TextStream:
        """Return what gives an answer's text token by token, in all that of `text_of`."""
        return TextStream(self._text_tokenizer)

    @cached_property
    def _text_tokenizer(self) -> Any:
        from tokenizers import Tokenizer

        return Tokenizer.from_file(str(self.folder / "tokenizer.json"))

    def token_text(self, token: int) -> str:
        """Return one token as text: a special one's name, U+FFFD for parts of a character."""
        if token not in self._token_texts:
            self._token_texts[token] = self.added_tokens.get(token) or self.decode([token])
        return self._token_texts[token]

    def token_bytes(self, token: int) -> bytes | None:
        """Return the bytes that a token adds to an answer, as `Guides.token_bytes` does; b"" for
        one that ends it. Raises SchemaNotHeld for a tokenizer of an unknown kind."""
        return b"" if token in self.end_ids else self.guides.token_bytes(token)

    @cached_property
    def guides(self) -> Guides:
        """What holds this model's answers to a JSON schema."""
        return Guides((self.folder / "tokenizer.json").read_text(encoding="utf-8"), self.end_ids)

    @cached_property
    def added_tokens(self) -> dict[int, str]:
        """The special tokens by id, as tokenizer.json names them."""
        added, _ = read_added_tokens(self.folder)
        return {token.id: token.content for token in added}


class Writer(Student):
    """A student that also writes its answers. `is_ahead`: whether the answer whose step was asked
    last gives another one without a further pass."""

    is_ahead = False

    @abstractmethod
    def steps(
        self, prompt_ids: Sequence[int], max_tokens: int, *, guide: Guide | None = None
    ) -> Steps:
        """Yield up to `max_tokens` of the likeliest tokens, each with the logits that it was taken
        from; see `generated`. Stops after an end token, which is yielded too, and at the end of the
        context. The model computes only as far as the caller asks."""

    def answer_steps(self, prompt_ids: Sequence[int], answer_format: AnswerFormat) -> Steps:
        """Yield the steps of the likeliest answer, held to the format's schema if it has one.

        Raises SchemaNotHeld."""
        guide = None
        if answer_format.json_schema is not None:
            guide = self.guides.start(answer_format.json_schema)
        return self.steps(prompt_ids, most_tokens(answer_format), guide=guide)

    def write(self, prompt_ids: Sequence[int], answer_format: AnswerFormat) -> Written:
        """Return the likeliest answer to a prompt. Raises SchemaNotHeld."""
        tokens = [token for token, _ in self.answer_steps(prompt_ids, answer_format)]
        return written(tokens, self.end_ids, answer_format, self.text_of)

    def write_all(
        self, prompts: Sequence[Sequence[int]], answer_format: AnswerFormat
    ) -> list[Written]:
        """Return the likeliest answer to each prompt. Raises SchemaNotHeld."""
        return [self.write(prompt, answer_format) for prompt in prompts]

    def answers(
        self, examples: Sequence[Example], prompt: PromptRecipe
    ) -> list[Answer | Written | DataError]:
        """See `Student`; also of rows whose answers are written."""
        if not examples:
            return []
        answer_format = examples[0].format
        if answer_format is None:
            return super().answers(examples, prompt)
        found: list[Answer | Written | DataError] = []
        rendered = self.render_all(examples, prompt)
        prompts = [row.prompt for row in rendered if isinstance(row, TrainingRow)]
        texts = iter(self.write_all(prompts, answer_format))
        for row in rendered:
            found.append(row if isinstance(row, DataError) else next(texts))
        return found
