"""The one prompt renderer: from row to chat messages, and to the student's token ids by its own chat template.

Training, evaluation, the ONNX runtime and the server all call these functions, so that what a student was trained on is
what it is asked.
"""

import json
from collections.abc import Sequence
from typing import Any, Protocol

from distillery.errors import DataError, ModelError, RecipeError
from distillery.recipe import PromptRecipe
from distillery.records import LETTERS, Example

Message = dict[str, str]
NUMBERS = {2: "two", 3: "three", 4: "four", 5: "five", 6: "six", 7: "seven", 8: "eight", 9: "nine"}


def render_messages(example: Example, prompt: PromptRecipe) -> list[Message]:
    """The system and user message that ask `example`'s question; an empty system text leaves that message out."""
    choices = "\n".join(
        _fill(prompt.choice, letter=letter, text=text)
        for letter, text in zip(example.letters, example.choices, strict=True)
    )
    user = _fill(prompt.user, question=example.question, choices=choices)
    count = len(example.choices)
    system = _fill(
        prompt.system, count=NUMBERS.get(count, str(count)), letters=_listed(example.letters)
    )
    messages = [{"role": "system", "content": system}] if system else []
    return [*messages, {"role": "user", "content": user}]


def _fill(template: str, **places: str) -> str:
    """Fills {places} and leaves all other braces alone; what is filled in is not looked at again."""
    parts = template.split("{")
    filled = [parts[0]]
    for part in parts[1:]:
        name, brace, rest = part.partition("}")
        filled.append(places[name] + rest if brace and name in places else "{" + part)
    return "".join(filled)


def _listed(letters: Sequence[str]) -> str:
    quoted = [f"'{letter}'" for letter in letters]
    comma = "," if len(quoted) > 2 else ""
    return ", ".join(quoted[:-1]) + f"{comma} or {quoted[-1]}"


class Tokenizer(Protocol):
    """The part of a tokenizer that this project uses: Transformers' own, or `GenAITokenizer`."""

    def encode_chat(self, messages: list[Message]) -> list[int]:
        """The ids of the messages in the model's chat template, ready for the assistant's first token."""
        ...

    def encode_text(self, text: str) -> list[int]:
        """The ids of `text` alone, with no special tokens."""
        ...


def _whole(messages: list[Message]) -> list[Message]:
    return [{name: _whole_text(text) for name, text in message.items()} for message in messages]


def _whole_text(text: str) -> str:
    """The text with U+FFFD for NUL, at which ONNX Runtime GenAI would cut it off."""
    return text.replace("\0", "\ufffd")


class TransformersTokenizer:
    """A Hugging Face tokenizer as a `Tokenizer`."""

    def __init__(self, tokenizer: Any) -> None:
        self._tokenizer = tokenizer

    def encode_chat(self, messages: list[Message]) -> list[int]:
        """Raises ModelError as `GenAITokenizer` does."""
        from jinja2 import TemplateError

        try:
            text = self._tokenizer.apply_chat_template(
                _whole(messages), add_generation_prompt=True, tokenize=False
            )
        except TemplateError as error:
            raise _refused(error) from error
        return self.encode_text(text)

    def encode_text(self, text: str) -> list[int]:
        return list(self._tokenizer.encode(_whole_text(text), add_special_tokens=False))


class GenAITokenizer:
    """An ONNX Runtime GenAI tokenizer as a `Tokenizer`."""

    def __init__(self, tokenizer: Any) -> None:
        self._tokenizer = tokenizer

    def encode_chat(self, messages: list[Message]) -> list[int]:
        """Raises ModelError where the template refuses the messages, such as a system message or an order of roles."""
        try:
            text = self._tokenizer.apply_chat_template(
                json.dumps(_whole(messages)), add_generation_prompt=True
            )
        except RuntimeError as error:
            raise _refused(error) from error
        return self.encode_text(text)

    def encode_text(self, text: str) -> list[int]:
        return [int(token) for token in self._tokenizer.encode(_whole_text(text))]


def _refused(error: Exception) -> ModelError:
    cause = " ".join(str(error).split())[:200]
    return ModelError(
        f"the model's chat template refuses the messages ({cause}); send other roles, or no system message "
        '(in a recipe, prompt.system: "")'
    )


def letter_ids(tokenizer: Tokenizer, count: int) -> list[int]:
    """The token id of each of the first `count` option letters, as the assistant's first token.

    Raises RecipeError where a letter is not one token of this tokenizer."""
    ids = [tokenizer.encode_text(letter) for letter in LETTERS[:count]]
    for letter, tokens in zip(LETTERS, ids, strict=False):
        if len(tokens) != 1:
            raise RecipeError(
                f"base model: its tokenizer splits the option letter {letter} into {len(tokens)} tokens"
            )
    return [tokens[0] for tokens in ids]


def text_ids(example: Example, tokenizer: Tokenizer) -> list[list[int]]:
    """The token ids of each option's text, as the assistant would say it.

    Raises DataError where one has none."""
    texts = [tokenizer.encode_text(text) for text in example.choices]
    for letter, tokens in zip(example.letters, texts, strict=True):
        if not tokens:
            raise DataError(
                f"{example.example_id}: option {letter} has no token of the student's; give it a text"
            )
    return texts


def longest_prompt(prompt: PromptRecipe, context: int, texts: Sequence[Sequence[int]] = ()) -> int:
    """How many tokens a prompt may have: prompt.max_tokens, or what the model's `context` leaves for it beside the
    longest of the `texts` that are scored after it."""
    return min(prompt.max_tokens, context - max(map(len, texts), default=0))


def render_ids(
    example: Example, prompt: PromptRecipe, tokenizer: Tokenizer, instruction: str | None = None
) -> list[int] | None:
    """The prompt's token ids, or None where they are more than prompt.max_tokens: the caller sets the row aside.

    `instruction` is asked for below it."""
    messages = render_messages(example, prompt)
    if instruction:
        messages[-1]["content"] += f"\n\n{instruction}"
    ids = tokenizer.encode_chat(messages)
    return ids if len(ids) <= prompt.max_tokens else None
