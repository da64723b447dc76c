"""The only prompt renderer: from a row to chat messages, and to the student's token ids.

Training, evaluation, the ONNX runtime and the server all call these functions, so a student is
asked exactly what it was trained on. The student's own chat template makes one text of messages.

A control token that stands in a message, such as <|im_end|>, is a text like any other: it gets a
blank after its first character, so that the tokenizer finds no token there and the model sees the
letters. Other texts stay as they are.
"""

import json
import re
from collections.abc import Iterable, Sequence
from functools import lru_cache
from os.path import commonprefix
from pathlib import Path
from typing import Any, Protocol

from pydantic import BaseModel

from distillery.errors import DataError, ModelError, RecipeError, one_line
from distillery.recipe import PromptRecipe
from distillery.records import LETTERS, Example

Message = dict[str, str]
NUL, REPLACEMENT = "\0", "\ufffd"
NUMBERS = {2: "two", 3: "three", 4: "four", 5: "five", 6: "six", 7: "seven", 8: "eight", 9: "nine"}

TEMPLATES = 100
"""Templates that are kept in parts: a recipe has few, and each is filled for every row."""


def render_messages(example: Example, prompt: PromptRecipe) -> list[Message]:
    """Return the system and user messages that ask a row's question.

    An empty system text leaves that message out.
    """
    count = len(example.options)
    for_system = {"count": NUMBERS.get(count, str(count))}
    for_user = {"question": example.question, **example.fields}
    if example.classes:
        labels = "\n".join(example.classes)
        for_system["labels"] = for_user["labels"] = labels
        for_user["text"] = example.question
    elif example.format:
        for_user["text"] = example.question
        if example.format.json_schema is not None:
            for_user["schema"] = json.dumps(example.format.json_schema, ensure_ascii=False)
        for_system = for_user
    else:
        lines = []
        for letter, text in zip(example.keys, example.options, strict=True):
            lines.append(fill_template(prompt.choice, letter=letter, text=text))
        for_system["letters"] = list_letters(example.keys)
        for_user["choices"] = "\n".join(lines)
    system = fill_template(prompt.system, **for_system)
    user = fill_template(prompt.user, **for_user)
    messages = []
    if system:
        messages.append({"role": "system", "content": system})
    messages.append({"role": "user", "content": user})
    return messages


def fill_template(template: str, **values: str) -> str:
    """Replace each {name} by its value; all other braces stay, those in a value too."""
    first, parts = template_parts(template)
    filled = first
    for name, brace, rest in parts:
        if brace and name in values:
            filled += values[name] + rest
        else:
            filled += "{" + name + brace + rest
    return filled


@lru_cache(TEMPLATES)
def template_parts(template: str) -> tuple[str, tuple[tuple[str, str, str], ...]]:
    """Return the text before a template's first opening brace, and for each of them what follows:
    the name, the closing brace and the text behind it, or the text and twice nothing."""
    first, *parts = template.split("{")
    return first, tuple(part.partition("}") for part in parts)


@lru_cache
def list_letters(letters: tuple[str, ...]) -> str:
    """Return the letters in quotes, as an enumeration with "or"."""
    quoted = [f"'{letter}'" for letter in letters]
    start = ", ".join(quoted[:-1])
    if len(quoted) > 2:
        start += ","
    return f"{start} or {quoted[-1]}"


class ControlTokens:
    """The tokens of a tokenizer that a text must not contain: those that it calls special, and
    those that the chat template writes, such as <|tool|> of Phi-4-mini, with their other ends."""

    def __init__(self, added: Iterable[tuple[str, bool]], template: str) -> None:
        """`added`: each token that was added to the vocabulary, and whether it is special."""
        self.tokens: set[str] = set()
        for token, special in added:
            # A single character or a blank one can't be told from a text.
            written = token in template or other_end(token) in template
            if len(token.strip()) > 1 and (special or written):
                self.tokens.add(token)
        # What is between a token's outer blanks is enough to find it.
        texts = sorted({token.strip() for token in self.tokens})
        rests: dict[str, list[str]] = {}
        for text in texts:
            rests.setdefault(text[0], []).append(text[1:])
        # The rest is looked at and not taken, since another token may begin in it.
        starts = [f"{re.escape(first)}(?={any_of(rest)})" for first, rest in rests.items()]
        self._pattern = re.compile("|".join(starts))
        # One more than any token has, so that the parted text can't be one again.
        longest = max(
            (len(blanks) for text in texts for blanks in re.findall(" +", text)), default=0
        )
        self._blanks = " " * (longest + 1)

    def as_text(self, text: str) -> str:
        """Return the text with a blank after the first character of each control token, and with
        U+FFFD for NUL, at which ONNX Runtime GenAI would cut off a text.

        Blanks at a token's ends do not count, and a token with blanks in it gets more than those.
        So no token is left after one pass."""
        text = text.replace(NUL, REPLACEMENT)
        if not self.tokens:
            return text
        return self._pattern.sub(lambda found: found[0] + self._blanks, text)

    def as_texts(self, messages: list[Message]) -> list[Message]:
        """Return the messages with their contents as `as_text` gives them, save those that the
        student itself wrote: a template may look for its own tokens there, such as </think>."""
        texts = []
        for message in messages:
            content = message["content"]
            if message["role"] == "assistant":
                content = content.replace(NUL, REPLACEMENT)
            else:
                content = self.as_text(content)
            texts.append({**message, "content": content})
        return texts


def other_end(token: str) -> str:
    """Return </x> for <x>, and the other way round."""
    if token.startswith("</"):
        return token.replace("</", "<", 1)
    return token.replace("<", "</", 1)


def any_of(texts: Sequence[str]) -> str:
    """Return a regular expression that finds any of the texts, of several the longest. Common
    beginnings stand in it once, so that a search among thousands takes no longer than among a
    few."""
    groups: dict[str, list[str]] = {}
    for text in texts:
        groups.setdefault(text[:1], []).append(text)
    parts = []
    for first, group in groups.items():
        if first:
            shared = commonprefix(group)  # noqa: RUF071 - characters are meant
            rest = [text[len(shared) :] for text in group]
            parts.append(re.escape(shared) + (any_of(rest) if len(group) > 1 else ""))
    return f"(?:{'|'.join(parts)})" + ("?" if "" in groups else "")


class Tokenizer(Protocol):
    """What this project needs of a tokenizer: that of Transformers or ONNX Runtime GenAI."""

    def encode_chat(self, messages: list[Message]) -> list[int]:
        """Return the ids of the messages in the model's chat template, up to the assistant's first
        token. Raises ModelError if the template refuses them."""
        ...

    def encode_text(self, text: str) -> list[int]:
        """Return the ids of the text alone, with no special tokens."""
        ...


class TransformersTokenizer:
    """A Hugging Face tokenizer as a `Tokenizer`."""

    def __init__(self, tokenizer: Any) -> None:
        self._tokenizer = tokenizer
        added = tokenizer.added_tokens_decoder.values()
        self.control = ControlTokens(
            ((token.content, token.special) for token in added), str(tokenizer.chat_template)
        )

    def chat_text(self, messages: list[Message]) -> str:
        """Return the text whose ids `encode_chat` returns, and raise the same error."""
        from jinja2 import TemplateError

        try:
            text = self._tokenizer.apply_chat_template(
                self.control.as_texts(messages), add_generation_prompt=True, tokenize=False
            )
        except TemplateError as error:
            raise template_error(error) from error
        return str(text)

    def encode_chat(self, messages: list[Message]) -> list[int]:
        return self.encode_rendered(self.chat_text(messages))

    def encode_text(self, text: str) -> list[int]:
        return self.encode_rendered(self.control.as_text(text))

    def encode_rendered(self, text: str) -> list[int]:
        """Return the ids of a text of `chat_text`, in which control tokens are tokens."""
        return list(self._tokenizer.encode(text, add_special_tokens=False))


class GenAITokenizer:
    """An ONNX Runtime GenAI tokenizer as a `Tokenizer`. `runtime`: that tokenizer itself."""

    def __init__(self, tokenizer: Any, folder: Path) -> None:
        """`folder` has the files that the tokenizer was loaded from.

        Raises ModelError where they can't be read."""
        self.runtime = tokenizer
        added, template = read_added_tokens(folder)
        self.control = ControlTokens(((token.content, token.special) for token in added), template)
        special = [token.content for token in added if token.special and not token.lstrip]
        self._end = special[-1] if special else ""

    def encode_chat(self, messages: list[Message]) -> list[int]:
        try:
            text = self.runtime.apply_chat_template(
                json.dumps(self.control.as_texts(messages)), add_generation_prompt=True
            )
        except RuntimeError as error:
            raise template_error(error) from error
        return self._encode(text)

    def encode_text(self, text: str) -> list[int]:
        return self._encode(self.control.as_text(text))

    def _encode(self, text: str) -> list[int]:
        """Return the ids of a text in which control tokens are tokens.

        ONNX Runtime GenAI 0.14 loses the end of a text that could be the beginning of an added
        token: of "x<y" it loses the y. With a special token behind it, nothing is lost."""
        ids = list(map(int, self.runtime.encode(text + self._end)))
        return ids[:-1] if self._end else ids


class AddedToken(BaseModel):
    """A token that was added to the vocabulary. `lstrip`: it takes the blanks before it along."""

    id: int
    content: str
    special: bool = False
    lstrip: bool = False


def read_added_tokens(folder: Path) -> tuple[list[AddedToken], str]:
    """Return the tokens that were added to the vocabulary, from tokenizer.json, and the chat
    template of a model's folder.

    Raises ModelError where they can't be read."""
    template = folder / "chat_template.jinja"
    try:
        settings = json.loads((folder / "tokenizer.json").read_text(encoding="utf-8"))
        added = [AddedToken.model_validate(token) for token in settings["added_tokens"]]
        if template.exists():
            return added, template.read_text(encoding="utf-8")
        settings = json.loads((folder / "tokenizer_config.json").read_text(encoding="utf-8"))
        return added, str(settings.get("chat_template"))
    except (OSError, ValueError, LookupError, TypeError, AttributeError, RecursionError) as error:
        raise ModelError(
            f"{folder}: its tokenizer's files can't be read ({type(error).__name__}); fetch or "
            "export the model again"
        ) from error


def template_error(error: Exception) -> ModelError:
    """Return the error for messages that a chat template refuses, such as a system message or an
    order of roles."""
    return ModelError(
        f"the model's chat template refuses the messages ({one_line(error)}); send other "
        'roles, or no system message (in a recipe, prompt.system: "")'
    )


def render_ids(
    example: Example, prompt: PromptRecipe, tokenizer: Tokenizer, instruction: str | None = None
) -> list[int] | None:
    """Return the prompt's token ids, or None if they are more than prompt.max_tokens.

    The caller sets such a row aside. `instruction` is added below the question.
    """
    messages = render_messages(example, prompt)
    if instruction:
        messages[-1]["content"] += f"\n\n{instruction}"
    ids = tokenizer.encode_chat(messages)
    if len(ids) > prompt.max_tokens:
        return None
    return ids


def shared_beginning(
    example: Example, prompt: PromptRecipe, tokenizer: Tokenizer
) -> tuple[int, ...]:
    """Return the token ids that the prompts of all texts begin with: what those of two texts that
    have nothing in common share. `example` is any row of the task."""
    rendered = []
    for text in ("a", "1"):
        fields = dict.fromkeys(example.fields, text)
        other = example.model_copy(update={"question": text, "fields": fields})
        rendered.append(tokenizer.encode_chat(render_messages(other, prompt)))
    shared = []
    for first, second in zip(*rendered, strict=False):
        if first != second:
            break
        shared.append(first)
    return tuple(shared)


def letter_ids(tokenizer: Tokenizer, count: int) -> list[int]:
    """Return the token id of each of the first `count` letters as the assistant's first token.

    Raises RecipeError if a letter is not one token of this tokenizer.
    """
    ids = []
    for letter in LETTERS[:count]:
        tokens = tokenizer.encode_text(letter)
        if len(tokens) != 1:
            raise RecipeError(
                f"base model: its tokenizer splits the option letter {letter} into "
                f"{len(tokens)} tokens; choose another base model, or set "
                "student.prompt.answer: text"
            )
        ids += tokens
    return ids


def text_ids(example: Example, tokenizer: Tokenizer) -> list[list[int]]:
    """Return the token ids of each option's text as the assistant would say it.

    Raises DataError if an option has no token.
    """
    ids = []
    for letter, text in zip(example.keys, example.options, strict=True):
        tokens = tokenizer.encode_text(text)
        if not tokens:
            raise DataError(
                f"{example.example_id}: option {letter} has no token of the student's; "
                "give it a text"
            )
        ids.append(tokens)
    return ids


def longest_prompt(prompt: PromptRecipe, context: int, texts: Sequence[Sequence[int]] = ()) -> int:
    """Return how many tokens a prompt may have.

    That is prompt.max_tokens, or what the model's `context` (tokens) leaves beside the longest of
    the `texts` that are scored after the prompt.
    """
    return min(prompt.max_tokens, context - max(map(len, texts), default=0))
