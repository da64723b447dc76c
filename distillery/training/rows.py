"""training/rows"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from distillery.errors import TrainingError
from distillery.prompts import Tokenizer, TransformersTokenizer, letter_ids, render_ids, text_ids
from distillery.recipe import PromptRecipe
from distillery.records import Example, TeacherLabel
from distillery.training.losses import TrainingRow


def training_rows(
    examples: Sequence[Example],
    labels: dict[str, TeacherLabel],
    prompt: PromptRecipe,
    tokenizer: Any,
    explain: str | None = None,
) -> tuple[list[TrainingRow], list[str]]:
    """Renders the rows that have a label. Returns them, and the ids of those that are over prompt.max_tokens.

    `explain`: what asks for the reasons that labels have, where they are trained on. Raises DataError for an option
    whose text has no token, so that nothing would be learnt from it."""
    wrapped = TransformersTokenizer(tokenizer)
    rows, too_long = [], []
    for example in examples:
        label = labels.get(example.example_id)
        if label is None:
            continue
        ids = render_ids(example, prompt, wrapped)
        if ids is None:
            too_long.append(example.example_id)
            continue
        soft = label.distribution and tuple(
            label.distribution[letter] for letter in example.letters
        )
        rows.append(
            TrainingRow(
                prompt=tuple(ids),
                answer=example.letters.index(label.answer),
                soft=soft or None,
                **_what_may_follow(example, prompt, wrapped),
                **_reason(example, label, prompt, wrapped, explain),
            )
        )
    return rows, too_long


def _what_may_follow(
    example: Example, prompt: PromptRecipe, tokenizer: Tokenizer
) -> dict[str, Any]:
    if prompt.answer == "letter":
        return {"letters": tuple(letter_ids(tokenizer, len(example.choices)))}
    return {"texts": tuple(map(tuple, text_ids(example, tokenizer)))}


def _reason(
    example: Example,
    label: TeacherLabel,
    prompt: PromptRecipe,
    tokenizer: Tokenizer,
    explain: str | None,
) -> dict[str, Any]:
    if not explain or not label.rationale:
        return {}
    asked = render_ids(example, prompt, tokenizer, explain)
    reason = tokenizer.encode_text(label.rationale)
    if asked is None or not reason:
        return {}
    return {"explain": tuple(asked), "rationale": tuple(reason)}


def write_rows(rows: Sequence[TrainingRow], path: Path) -> None:
    path.write_text("".join(row.model_dump_json() + "\n" for row in rows))


def read_rows(path: Path) -> list[TrainingRow]:
    return [TrainingRow.model_validate_json(line) for line in path.read_text().splitlines()]


def require_rows(rows: Sequence[TrainingRow]) -> None:
    if not rows:
        raise TrainingError(
            "no row to train on: every label was rejected or every prompt is over prompt.max_tokens"
        )
