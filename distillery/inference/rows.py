"""Render the rows that a model is asked."""

from pathlib import Path

from distillery.data.examples import read_format
from distillery.errors import PromptTooLong
from distillery.models.class_tokens import read_class_tokens, require_classes
from distillery.prompts import Tokenizer, letter_ids, longest_prompt, render_ids, text_ids
from distillery.recipe import PromptRecipe
from distillery.records import Example
from distillery.training.rows import TrainingRow


class RowRenderer:
    """Renders rows for the model in `folder`. `context_length` counts tokens."""

    tokenizer: Tokenizer

    def __init__(self, folder: Path, tokenizer: Tokenizer, context_length: int) -> None:
        """Read the model's classes and the format of the answers that it writes. Raises ModelError
        or DataError where they can't be read."""
        self.folder = folder
        self.tokenizer = tokenizer
        self.context_length = context_length
        self.classes = read_class_tokens(folder)
        self.format = read_format(folder)
        self._letter_ids: dict[int, list[int]] = {}

    def render(self, example: Example, prompt: PromptRecipe) -> TrainingRow:
        """Return a row's prompt and options as token ids; a row whose answer is written has none.

        Raises DataError for an option without a token, and PromptTooLong if the prompt is longer
        than prompt.max_tokens or than the model's context, to which the longest option's text
        counts if options are scored by their texts.
        """
        texts = []
        if prompt.answer == "text":
            texts = text_ids(example, self.tokenizer)
        ids = render_ids(example, prompt, self.tokenizer)
        context = self.context_length
        if example.format:
            # For the first token of the answer.
            context -= 1
        limit = longest_prompt(prompt, context, texts)
        if ids is None or len(ids) > limit:
            whose = "prompt.max_tokens" if limit == prompt.max_tokens else "the model's context"
            raise PromptTooLong(
                f"{example.example_id}: the prompt is longer than {limit} tokens ({whose})"
            )
        # `answer`, the label in training, plays no part here.
        if example.format:
            return TrainingRow(prompt=tuple(ids), answer=0)
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

    def letter_ids(self, count: int) -> list[int]:
        """Return `prompts.letter_ids` by this model's tokenizer."""
        if count not in self._letter_ids:
            self._letter_ids[count] = letter_ids(self.tokenizer, count)
        return self._letter_ids[count]
