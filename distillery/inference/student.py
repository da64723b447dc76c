"""What every way of asking an ONNX model has in common: a row's prompt and options, and its answer
from the options' probabilities."""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from pathlib import Path

from distillery.errors import DataError
from distillery.inference.abstention import read_abstention
from distillery.models.class_tokens import read_class_tokens, require_classes
from distillery.prompts import Tokenizer, letter_ids, longest_prompt, render_ids, text_ids
from distillery.recipe import PromptRecipe
from distillery.records import Example, Record
from distillery.training.rows import TrainingRow


class Answer(Record):
    """The most probable letter, and the probability of each of the row's letters; they sum to 1.
    `abstained`: whether the letter's probability is below the student's threshold; None for a
    student without a threshold."""

    letter: str
    probabilities: dict[str, float]
    abstained: bool | None = None


class Student(ABC):
    """An exported model that answers rows. `context_length` counts tokens."""

    def __init__(self, folder: Path, tokenizer: Tokenizer, context_length: int) -> None:
        """Read the model's classes and threshold. Raises ModelError where they can't be read."""
        self.folder = folder
        self.tokenizer = tokenizer
        self.context_length = context_length
        self.classes = read_class_tokens(folder)
        self.abstention = read_abstention(folder)
        self._letter_ids: dict[int, list[int]] = {}

    @abstractmethod
    def probabilities(self, rows: Sequence[TrainingRow]) -> list[list[float]]:
        """Return the probabilities over the options of each rendered row; each row's sum to 1."""

    def answer(self, example: Example, prompt: PromptRecipe) -> Answer:
        """Return the answer to a row. Raises DataError as `render` does."""
        (found,) = self.probabilities([self.render(example, prompt)])
        return self.chosen(example, found)

    def answers(
        self, examples: Sequence[Example], prompt: PromptRecipe
    ) -> list[Answer | DataError]:
        """Return the answer to each row, or why it can't be asked."""
        rendered: list[TrainingRow | DataError] = []
        for example in examples:
            try:
                rendered.append(self.render(example, prompt))
            except DataError as error:
                rendered.append(error)
        rows = [row for row in rendered if isinstance(row, TrainingRow)]
        found = iter(self.probabilities(rows))
        answers: list[Answer | DataError] = []
        for example, row in zip(examples, rendered, strict=True):
            if isinstance(row, DataError):
                answers.append(row)
            else:
                answers.append(self.chosen(example, next(found)))
        return answers

    def render(self, example: Example, prompt: PromptRecipe) -> TrainingRow:
        """Return a row's prompt and options as token ids.

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
        # `answer`, the label in training, plays no part here.
        if texts:
            return TrainingRow(prompt=tuple(ids), texts=tuple(map(tuple, texts)), answer=0)
        if prompt.answer == "class":
            classes = require_classes(self.classes, self.folder)
            return TrainingRow(
                prompt=tuple(ids),
                letters=classes.for_classes(example.classes),
                closed=True,
                span=classes.span(ids),
                last=classes.last,
                answer=0,
            )
        letters = self.letter_ids(len(example.options))
        return TrainingRow(prompt=tuple(ids), letters=tuple(letters), answer=0)

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

    def letter_ids(self, count: int) -> list[int]:
        """Return `prompts.letter_ids` by this model's tokenizer."""
        if count not in self._letter_ids:
            self._letter_ids[count] = letter_ids(self.tokenizer, count)
        return self._letter_ids[count]
