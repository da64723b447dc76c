"""What a training learns from, rendered to token ids: labelled rows, gold rows and validation rows.

In: files of Examples, a folder of labels, a prompt and the student's tokenizer. Out: TrainingRows,
and the ids of the rows that are set aside as too long.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from distillery.data.answer_tokens import FILE, each_answer_tokens
from distillery.data.examples import read_examples
from distillery.errors import TrainingError
from distillery.labels.files import read_labels
from distillery.labels.known import gold_labels
from distillery.models.class_tokens import LAST_SHARE, ClassTokens, choose_class_tokens
from distillery.models.load import end_of_turn_id
from distillery.prompts import TransformersTokenizer, shared_beginning
from distillery.recipe import PromptRecipe, TrainingRecipe
from distillery.records import AnswerFormat, Example, TeacherLabel
from distillery.training.decisions import decide
from distillery.training.rows import TrainingRow, training_rows
from distillery.training.second_opinion import with_second_opinion
from distillery.training.token_labels import StudentTokens, TokenLabels


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
    soft: bool = False,
) -> TrainingInputs:
    """Render the rows of `labelled` that have a label in the folder `labels`, and after them the
    `gold` rows with their own answers; `validation` rows too carry their own answers.

    With `second_opinion`, the labels are those of `with_second_opinion`. `explain` asks for the
    reasons that labels have. `soft`: the teacher's probabilities are learnt, also those for the
    tokens of written answers. Raises TrainingError where no label has the reasons or the tokens'
    probabilities that are asked for."""
    found = read_labels(labels)
    examples = read_examples(labelled)
    classes = None
    if prompt.answer == "class":
        classes = tokens_of_classes(examples[0], prompt, tokenizer)
    if second_opinion:
        found = with_second_opinion(examples, found)
    soft_tokens = None
    if soft and prompt.answer == "written":
        soft_tokens = read_soft_tokens(labels, found, tokenizer)
    rows, too_long = training_rows(
        examples, found, prompt, tokenizer, explain, classes, soft_tokens
    )
    if soft_tokens is not None and rows:
        require_soft_tokens(rows)
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


def read_soft_tokens(
    folder: Path, labels: Mapping[str, TeacherLabel], tokenizer: Any
) -> dict[str, TokenLabels]:
    """Return the teacher's probabilities for the tokens of the `labels` in a folder, as the
    student's tokens, by example id; none for labels without any."""
    wrapped = TransformersTokenizer(tokenizer)
    student = StudentTokens(tokenizer, end_of_turn_id(tokenizer))
    found = {}
    # One by one: what the teacher says takes far more memory than what is kept of it.
    for example_id, tokens in each_answer_tokens(folder / FILE):
        if example_id in labels:
            answer = wrapped.encode_text(labels[example_id].answer)
            soft = student.labels(answer, tokens)
            if soft:
                found[example_id] = soft
    return found


def require_soft_tokens(rows: Sequence[TrainingRow]) -> None:
    """Tell how many tokens of the rows' written answers have the teacher's probabilities.

    Raises TrainingError where none has."""
    tokens = sum(len(row.target) + 1 for row in rows)
    soft = sum(row.soft_tokens.labelled for row in rows if row.soft_tokens)
    if not soft:
        raise TrainingError(
            "training.soft_weight is above 0, but no token of a label has the teacher's "
            "probabilities: set it to 0, or teacher.soft_labels: true with a teacher that gives "
            "log-probabilities"
        )
    decide(
        f"{soft:,} of {tokens:,} tokens of the labels' answers have the teacher's probabilities "
        "(training.soft_weight)"
    )


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
