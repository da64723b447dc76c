"""Ask a model some rows again with their options in another order: does it give the same option?

Models prefer some letters to others (Zheng et al., Large Language Models Are Not Robust Multiple
Choice Selectors, ICLR 2024), so that an answer may depend on where the option stands.
"""

from collections.abc import Sequence

from distillery.data.rows import content_of
from distillery.records import Example, Record

ORDER_ROWS = 100
"""The most rows that are asked again."""


class Reordered(Record):
    """What came of asking again: `rows` were answered, `alike` of them with the same option, in
    `seconds`."""

    rows: int
    alike: int
    seconds: float


def reordered_rows(
    examples: Sequence[Example], answers: Sequence[str | None]
) -> list[tuple[int, Example]]:
    """Return up to ORDER_ROWS of the answered rows, each with its index, in another order of
    options. Classes have no order: such rows are returned as they are.

    Which rows, and in which order, depends on the rows' content alone. The options are rotated, so
    that each stands at another letter than before."""
    by_content = []
    for index, example in enumerate(examples):
        if answers[index] is not None:
            by_content.append((content_of(example.question, example.options), index))
    rows = []
    for content, index in sorted(by_content)[:ORDER_ROWS]:
        choices = examples[index].choices
        if not choices:
            rows.append((index, examples[index]))
            continue
        shift = 1 + int(content[:8], 16) % (len(choices) - 1)
        rotated = {"choices": choices[shift:] + choices[:shift], "answer_key": None}
        rows.append((index, examples[index].model_copy(update=rotated)))
    return rows


def count_alike(
    examples: Sequence[Example],
    answers: Sequence[str | None],
    reordered: Sequence[tuple[int, Example]],
    reordered_answers: Sequence[str | None],
    seconds: float,
) -> Reordered:
    """Count how often `reordered_answers` are the options of `answers`.

    A row that could not be asked in the other order is left out."""
    rows = alike = 0
    for (index, other), letter in zip(reordered, reordered_answers, strict=True):
        if letter is not None:
            rows += 1
            alike += option_text(examples[index], answers[index]) == option_text(other, letter)
    return Reordered(rows=rows, alike=alike, seconds=seconds)


def option_text(example: Example, letter: str | None) -> str | None:
    """Return the text of a row's option; None for a letter that the row does not have."""
    if letter not in example.keys:
        return None
    return example.options[example.keys.index(letter)]
