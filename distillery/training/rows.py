"""Rows rendered to token ids, which training, validation and scoring read.

In: Examples with their labels, a prompt and a tokenizer. Out: TrainingRows; their file is JSONL,
one row a line.
"""

import mmap
from array import array
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, overload

from pydantic import Field

from distillery.errors import TrainingError
from distillery.models.class_tokens import ClassTokens
from distillery.prompts import Tokenizer, TransformersTokenizer, letter_ids, render_ids, text_ids
from distillery.recipe import PromptRecipe
from distillery.records import Example, Record, TeacherLabel
from distillery.training.token_labels import TokenLabels


class TrainingRow(Record):
    """A rendered row. `prompt`: token ids up to the assistant's first token. What may follow is
    given by `letters`, the options' letters as one token each, or by `texts`, the options' token
    ids. `closed`: the letters are the tokens of classes (models/class_tokens.py), the same for all
    rows, and nothing else is ever said; the head reads the mean of the states of the last `span`
    tokens, where the last one counts for `last` more (batching.read_shares). `target`: a written
    answer's token ids, without the end of the turn; such a row has no options. `answer`: index of
    the label among the options, else 0. `soft`: the teacher's probabilities over the options, in
    the same order. `soft_tokens`: its probabilities for the tokens of `target` and the end of the
    turn. `explain` and `rationale`: the prompt that asks for a reason, and the teacher's reason,
    where the label has one."""

    prompt: tuple[int, ...]
    letters: tuple[int, ...] = ()
    texts: tuple[tuple[int, ...], ...] = ()
    closed: bool = False
    span: int = 1
    last: float = 0.0
    target: tuple[int, ...] = Field((), exclude_if=lambda target: not target)
    answer: int
    soft: tuple[float, ...] | None = None
    soft_tokens: TokenLabels | None = Field(None, exclude_if=lambda found: found is None)
    explain: tuple[int, ...] = ()
    rationale: tuple[int, ...] = ()


def training_rows(
    examples: Sequence[Example],
    labels: dict[str, TeacherLabel],
    prompt: PromptRecipe,
    tokenizer: Any,
    explain: str | None = None,
    classes: ClassTokens | None = None,
    soft_tokens: Mapping[str, TokenLabels] | None = None,
) -> tuple[list[TrainingRow], list[str]]:
    """Render the examples that have a label, once for each text of it. Return the rows, and the ids
    of those that are set aside: their prompt is over prompt.max_tokens, or a written answer of
    theirs over task.max_tokens.

    `explain`: the instruction that asks for the labels' reasons; None leaves the reasons out.
    `classes`: the tokens of the classes, with prompt.answer class. `soft_tokens`: the teacher's
    probabilities for the tokens of the labels' answers, by example id.
    Raises DataError for an option whose text has no token, as nothing would be learnt from it."""
    wrapped = TransformersTokenizer(tokenizer)
    rows: list[TrainingRow] = []
    too_long: list[str] = []
    for example, label in each_label(examples, labels):
        ids = render_ids(example, prompt, wrapped)
        target = wrapped.encode_text(label.answer) if example.format else []
        if ids is None or (example.format and len(target) > example.format.max_tokens):
            too_long.append(example.example_id)
            continue
        answer = example.keys.index(label.answer) if example.keys else 0
        fields: dict[str, Any] = {"prompt": ids, "target": target, "answer": answer}
        if classes is not None:
            fields |= {"letters": classes.for_classes(example.classes), "closed": True}
            fields |= {"span": classes.span(ids), "last": classes.last}
        elif prompt.answer == "letter":
            fields["letters"] = letter_ids(wrapped, len(example.options))
        elif prompt.answer == "text":
            fields["texts"] = text_ids(example, wrapped)
        if label.distribution:
            fields["soft"] = [label.distribution[letter] for letter in example.keys]
        # Of the further texts of a label, the teacher told no probabilities.
        if soft_tokens and label is labels[example.example_id]:
            fields["soft_tokens"] = soft_tokens.get(example.example_id)
        if explain and label.rationale:
            fields |= reason_fields(example, label.rationale, prompt, wrapped, explain)
        rows.append(TrainingRow(**fields))
    return rows, list(dict.fromkeys(too_long))


def each_label(
    examples: Sequence[Example], labels: dict[str, TeacherLabel]
) -> Iterator[tuple[Example, TeacherLabel]]:
    """Yield each example that has a label, with the label, and once more with each reference in
    place of the label's answer."""
    for example in examples:
        label = labels.get(example.example_id)
        if label is None:
            continue
        yield example, label
        for text in label.references:
            yield example, label.model_copy(update={"answer": text})


def reason_fields(
    example: Example, reason: str, prompt: PromptRecipe, tokenizer: Tokenizer, explain: str
) -> dict[str, list[int]]:
    """Return the fields `explain` and `rationale` of a row; none where the prompt that asks for the
    reason is too long or the reason has no token."""
    asked = render_ids(example, prompt, tokenizer, explain)
    rationale = tokenizer.encode_text(reason)
    if asked is None or not rationale:
        return {}
    return {"explain": asked, "rationale": rationale}


class RowFile(Sequence[TrainingRow]):
    """The rows of a file of `write_rows`, each of which is decoded when it is asked for.

    The file is mapped into memory, so that the processes of a machine that train on it share its
    pages. Each keeps 8 bytes for a row, and the rows that it computes with."""

    def __init__(self, path: Path) -> None:
        self._starts = array("Q", [0])
        with path.open("rb") as file:
            for line in file:
                self._starts.append(self._starts[-1] + len(line))
            # An empty file can't be mapped.
            self._data = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) if len(self) else b""

    def close(self) -> None:
        """Unmap the file; Windows can't remove one that is mapped."""
        if isinstance(self._data, mmap.mmap):
            self._data.close()

    def __len__(self) -> int:
        return len(self._starts) - 1

    @overload
    def __getitem__(self, index: int) -> TrainingRow: ...

    @overload
    def __getitem__(self, index: slice) -> list[TrainingRow]: ...

    def __getitem__(self, index: int | slice) -> TrainingRow | list[TrainingRow]:
        if isinstance(index, slice):
            return [self[number] for number in range(*index.indices(len(self)))]
        number = range(len(self))[index]
        line = self._data[self._starts[number] : self._starts[number + 1]]
        return TrainingRow.model_validate_json(line)


def write_rows(rows: Sequence[TrainingRow], path: Path) -> None:
    """Write rows as JSONL."""
    with path.open("w", encoding="utf-8") as file:
        for row in rows:
            file.write(row.model_dump_json() + "\n")


def require_rows(rows: Sequence[TrainingRow]) -> None:
    """Raise TrainingError where there is no row."""
    if not rows:
        raise TrainingError(
            "no row to train on: every label was rejected, or every prompt is over "
            "prompt.max_tokens or every written answer over task.max_tokens"
        )
