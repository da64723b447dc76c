"""evaluation/scoring"""

from collections.abc import Sequence
from pathlib import Path
from typing import Literal

from distillery.data.examples import read_examples
from distillery.errors import DataError, ModelError
from distillery.machine import usable_cores
from distillery.processes import run_in_process
from distillery.recipe import PromptRecipe
from distillery.records import Departure, Example, Record

Answers = Sequence[str | None]
"""A letter for each row, in the rows' order; None where there is no answer, which counts as wrong."""

Precision = Literal["auto", "float32", "bfloat16"]


class ModelToScore(Record):
    """A line of the scoreboard to be: a Transformers folder (with a LoRA adapter or without) or an ONNX folder. `bytes`
    is what the folder weighs, `parameters` what it has; `prompt` its own, where it is asked otherwise than the rest."""

    name: str
    kind: Literal["transformers", "onnx"]
    folder: str
    adapter: str | None = None
    remote_code: bool = False
    parameters: int | None = None
    bytes: int | None = None
    prompt: PromptRecipe | None = None


class ScoringJob(Record):
    """What the process that scores a model is told."""

    model: ModelToScore
    examples: str
    prompt: PromptRecipe
    threads: int
    precision: Precision = "auto"


class Scored(Record):
    """What it tells. Answers and probabilities (over the row's options) by row, None for a prompt over the budget;
    latencies in ms of the rows that were asked, one at a time; `peak_mib` is the process's, loading included.

    What a prompt shares with the one before it is computed only once, by Transformers as by ONNX Runtime; the latencies
    show that, as users would see it. Where the answer is an option's text, ONNX Runtime alone has this."""

    answers: tuple[str | None, ...]
    probabilities: tuple[tuple[float, ...] | None, ...]
    latencies_ms: tuple[float, ...]
    rows_per_second: float
    peak_mib: float
    load_s: float
    ran_on: str


def score_model(
    model: ModelToScore,
    examples_file: Path,
    prompt: PromptRecipe,
    threads: int | None = None,
    precision: Precision = "auto",
) -> Scored:
    """Scores `model` on the rows of `examples_file` in a process of its own, which ends with this one; `threads`
    defaults to the cores.

    `precision` is that of a Transformers model; auto is bfloat16 on a GPU that has it, else float32. Raises ModelError
    with the reason that the process gives."""
    job = ScoringJob(
        model=model,
        examples=str(Path(examples_file).absolute()),
        prompt=model.prompt or prompt,
        threads=threads or usable_cores(),
        precision=precision,
    )
    try:
        return Scored.model_validate_json(run_in_process("distillery.evaluation.scoring_process", job))
    except ModelError as error:
        raise ModelError(f"{model.name}: {error}") from error


def answered_rows(path: Path, role: str = "test") -> tuple[list[Example], list[str]]:
    """The rows of a split that judges, and their gold letters. Raises DataError where there are none."""
    examples = read_examples(path)
    if not examples:
        raise DataError(f"{path}: no {role} row; prepare the data set again")
    for example in examples:
        if example.answer_key not in example.letters:
            raise DataError(
                f"{path}: row {example.example_id} has no gold answer; {role} rows need one"
            )
    return examples, [str(example.answer_key) for example in examples]


def departure(exported: Scored, exact: Scored) -> Departure:
    """How far `exported` is from `exact` on the same rows; a row that either was not asked is left out, and where no
    row is left there is no departure: 0."""
    import numpy as np

    pairs = zip(exported.probabilities, exact.probabilities, strict=True)
    apart = [abs(np.subtract(a, b)) for a, b in pairs if a is not None and b is not None]
    each = np.concatenate(apart) if apart else np.zeros(1)
    changed = sum(a != b for a, b in zip(exported.answers, exact.answers, strict=True))
    return Departure(mean=float(each.mean()), largest=float(each.max()), changed=changed)


def right_answers(answers: Answers, gold: Answers) -> list[bool]:
    return [a == b for a, b in zip(answers, gold, strict=True)]
