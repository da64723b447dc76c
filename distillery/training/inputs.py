"""What a training learns from, rendered to token ids: labelled rows, gold rows and validation rows.

In: files of Examples, a folder of labels, a prompt and the student's tokenizer. Out: TrainingRows,
and the ids of the rows that are set aside as too long.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from distillery.data.examples import read_examples
from distillery.errors import TrainingError
from distillery.labels.files import read_labels
from distillery.labels.known import gold_labels
from distillery.models.class_tokens import LAST_SHARE, ClassTokens, choose_class_tokens
from distillery.prompts import TransformersTokenizer, shared_beginning
from distillery.recipe import PromptRecipe, TrainingRecipe
from distillery.records import AnswerFormat, Example
from distillery.training.rows import TrainingRow, training_rows
from distillery.training.second_opinion import with_second_opinion


@dataclass(frozen=True)
class TrainingInputs:
    """The rows to train on and to validate on. `set_aside`: by split, the ids of rows that are too
    long; see `training_rows`. `classes`: the tokens of the classes, with prompt.answer class.
    `format`: how the answers look, where they are written."""

    rows: list[TrainingRow]
    validation: list[TrainingRow]
    set_aside: dict[str, list[str]]
    classes: ClassTokens | None = None
    format: AnswerFormat | None = None

    @property
    def set_aside_count(self) -> int:
        """How many rows are set aside in all."""
        return sum(len(ids) for ids in self.set_aside.values())


def read_training_inputs(
    tokenizer: Any,
    prompt: PromptRecipe,
    labelled: Path,
    labels: Path,
    gold: Path | None = None,
    validation: Path | None = None,
    explain: str | None = None,
    second_opinion: bool = False,
) -> TrainingInputs:
    """Render the rows of `labelled` that have a label in the folder `labels`, and after them the
    `gold` rows with their own answers; `validation` rows too carry their own answers.

    With `second_opinion`, the labels are those of `with_second_opinion`. `explain` asks for the
    reasons that labels have. Raises TrainingError where it is given and no
    label has a reason."""
    found = read_labels(labels)
    examples = read_examples(labelled)
    classes = None
    if prompt.answer == "class":
        classes = tokens_of_classes(examples[0], prompt, tokenizer)
    if second_opinion:
        found = with_second_opinion(examples, found)
    rows, too_long = training_rows(examples, found, prompt, tokenizer, explain, classes)
    if explain and rows and not any(row.rationale for row in rows):
        raise TrainingError(
            "training.rationale_weight is above 0, but no label has a reason: use an endpoint with "
            "teacher.answers.form: rationale, or files with a column rationale in teacher.files"
        )
    gold_rows, gold_too_long = _with_own_answers(gold, prompt, tokenizer, classes)
    checks, checks_too_long = _with_own_answers(validation, prompt, tokenizer, classes)
    set_aside = {"train": too_long + gold_too_long, "validation": checks_too_long}
    answer_format = examples[0].format if examples else None
    return TrainingInputs(rows + gold_rows, checks, set_aside, classes, answer_format)


def tokens_of_classes(example: Example, prompt: PromptRecipe, tokenizer: Any) -> ClassTokens:
    """Return the tokens of the classes of `example`, any row of the task, and what a student reads
    them from."""
    reading = {
        "pooled": prompt.pooling != "last",
        "last": LAST_SHARE if prompt.pooling == "mean_and_last" else 0.0,
        "beginning": shared_beginning(example, prompt, TransformersTokenizer(tokenizer)),
    }
    return choose_class_tokens(tokenizer, example.classes).model_copy(update=reading)


def rationale_instruction(trainings: Sequence[TrainingRecipe]) -> str | None:
    """Return what asks for reasons in the trainings of one student; None where none learns them.

    A recipe whose trainings ask in several ways is refused when it is read."""
    for training in trainings:
        if training.rationale_weight:
            return training.rationale_instruction
    return None


def _with_own_answers(
    file: Path | None, prompt: PromptRecipe, tokenizer: Any, classes: ClassTokens | None
) -> tuple[list[TrainingRow], list[str]]:
    if file is None:
        return [], []
    examples = read_examples(file)
    return training_rows(examples, gold_labels(examples), prompt, tokenizer, classes=classes)
