"""A token for each class: how a model with a head over a vocabulary answers with a class.

A class's token is read only where the answer stands, and its row of the head is learnt for the
class, so that its text does not matter. Tokens are taken from the end of the vocabulary, where the
rarest are: where head and embeddings are tied, the input embedding of the same token changes too.

The head reads a mean of the states of the text's tokens, of which the last one counts for a third:
what a small model knows of a topic stands in all of them, and what it makes of the whole text in
the last one. Which tokens these are is told by the beginning that all prompts share, which is left
out.

The file class_tokens.json of a model's folder holds a ClassTokens. Where the head of an exported
model was cut to the classes (export/head.py), the tokens are the rows of that head, from 0.
"""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Self

from pydantic import ValidationError, model_validator

from distillery.errors import ModelError, RecipeError
from distillery.records import Record

FILE = "class_tokens.json"

LAST_SHARE = 1 / 3
"""How much of what the head reads is the last token's state, beside the mean of all. Linear probes
of three tasks were as good with it as with both states side by side."""


class ClassTokens(Record):
    """The classes that a model answers with, and the id of each one's token. `pooled`: the head
    reads the mean of the states after `beginning`, the token ids that prompts begin with, where the
    last state counts for `last` more, and otherwise the state of the last token."""

    classes: tuple[str, ...]
    tokens: tuple[int, ...]
    pooled: bool = False
    last: float = 0.0
    beginning: tuple[int, ...] = ()

    @model_validator(mode="after")
    def check_pairs(self) -> Self:
        count = len(self.classes)
        if not len(set(self.classes)) == len(set(self.tokens)) == len(self.tokens) == count:
            raise ValueError("each class needs a token of its own")
        if count < 2 or min(self.tokens) < 0:
            raise ValueError("two classes or more need tokens, which are counted from 0")
        return self

    def span(self, prompt: Sequence[int]) -> int:
        """Return how many of a prompt's last tokens the head reads the mean of."""
        if not self.pooled:
            return 1
        shared = 0
        for ours, theirs in zip(self.beginning, prompt, strict=False):
            if ours != theirs:
                break
            shared += 1
        return max(1, len(prompt) - shared)

    def write(self, folder: Path) -> None:
        """Write the file into `folder`."""
        text = json.dumps(self.model_dump(), ensure_ascii=False, indent=1) + "\n"
        (folder / FILE).write_text(text, encoding="utf-8", newline="\n")

    def for_classes(self, classes: Sequence[str]) -> tuple[int, ...]:
        """Return the tokens in the order of `classes`.

        Raises ModelError where they are not the classes of this model."""
        token_of = dict(zip(self.classes, self.tokens, strict=True))
        unknown = [name for name in classes if name not in token_of]
        if unknown or len(classes) != len(token_of):
            what = f"it does not know {unknown[0]!r}" if unknown else "it has other classes"
            raise ModelError(f"the model was trained for {len(token_of)} classes; {what}")
        return tuple(token_of[name] for name in classes)


def read_class_tokens(folder: Path) -> ClassTokens | None:
    """Return the class tokens of a model's folder; None for a model that answers otherwise.

    Raises ModelError for a file that can't be read as such."""
    path = folder / FILE
    if not path.exists():
        return None
    try:
        return ClassTokens.model_validate_json(path.read_bytes())
    except (OSError, ValidationError) as error:
        raise ModelError(f"{path}: no class tokens; train the model again") from error


def require_classes(found: ClassTokens | None, folder: Path) -> ClassTokens:
    """Return `found`, the class tokens of a model's folder.

    Raises ModelError where there are none."""
    if found is None:
        raise ModelError(f"{folder.name}: answers no classes: it has no {FILE}")
    return found


def choose_class_tokens(tokenizer: Any, classes: Sequence[str]) -> ClassTokens:
    """Choose tokens of a Transformers tokenizer for `classes`: the last ones of its vocabulary that
    are whole texts and not special.

    Raises RecipeError where it has too few of them."""
    added = set(tokenizer.get_added_vocab().values()) | set(tokenizer.all_special_ids)
    chosen: list[int] = []
    for token in range(len(tokenizer) - 1, -1, -1):
        if len(chosen) == len(classes):
            break
        if token not in added and is_whole(tokenizer, token):
            chosen.append(token)
    if len(chosen) < len(classes):
        raise RecipeError(
            f"base model: its vocabulary has tokens for {len(chosen)} classes of "
            f"{len(classes)}; choose another base model"
        )
    return ClassTokens(classes=tuple(classes), tokens=tuple(chosen))


def is_whole(tokenizer: Any, token: int) -> bool:
    """Return whether a token's text is that token again: parts of characters are not."""
    text = tokenizer.decode([token])
    return bool(tokenizer.encode(text, add_special_tokens=False) == [token])
