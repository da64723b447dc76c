"""Score a model on rows: what is asked of the process that does it, and what it answers."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Literal

from pydantic import Field

from distillery.data.examples import read_examples
from distillery.errors import DataError, ModelError
from distillery.evaluation.option_order import Reordered
from distillery.machine import usable_cores
from distillery.processes import run_in_process
from distillery.progress import ShowProgress, show_nothing
from distillery.recipe import PromptRecipe
from distillery.records import Departure, Example, Record

Answers = Sequence[str | None]
"""One letter, class or text a row, in the rows' order; None where there is no answer, which counts
as wrong."""

Probabilities = tuple[float, ...] | None
"""Over a row's options; None where the row's prompt is too long to be asked."""

Precision = Literal["auto", "float32", "bfloat16"]

TIMED_ROWS = 30
"""Rows that a model is asked one by one, to time it, where the others are asked in batches."""


class ModelToScore(Record):
    """A model for the scoreboard: a Transformers folder, with a LoRA adapter or without, or an ONNX
    folder. `parameters` and `bytes` (of the folder) are shown as they are given. `prompt` is the
    model's own, where it is not asked as the others are."""

    name: str
    kind: Literal["transformers", "onnx"]
    folder: str
    adapter: str | None = None
    remote_code: bool = False
    parameters: int | None = None
    bytes: int | None = None
    prompt: PromptRecipe | None = None


class ScoringJob(Record):
    """What the process that scores a model is given. `reorder`: some rows are asked again with
    their options in another order. `timed_rows`: see TIMED_ROWS. `known`: by their numbers, the
    files of slices that were asked before (slices.py)."""

    model: ModelToScore
    examples: str
    prompt: PromptRecipe
    threads: int
    timed_rows: int = TIMED_ROWS
    precision: Precision = "auto"
    reorder: bool = False
    known: dict[int, str] = Field({})


class Scored(Record):
    """What the process returns. `answers`, and `probabilities` over the row's options, are in the
    rows' order; None for a row whose prompt is too long to be asked. Written answers have no
    probabilities; `no_answer` tells for each row why it has none, and None where it has one.
    `tokens_per_second`: of written answers, in the time of `latencies_ms`, prompts included.

    `latencies_ms` and `rows_per_second` are of single rows, asked one after another: of the first
    ScoringJob.timed_rows, because the others are asked in batches, which give the same answers
    sooner. Of all rows, where the model takes no batches: a Transformers model in bfloat16 that
    chooses, whose batches would give other answers, and an ONNX model that writes and whose graph
    takes one text at a time. The latency of a written answer is that of its last token. `peak_mib`
    is the process's memory with single rows, the longest included, and with loading.

    What a prompt shares with the one before it is not computed again, neither by Transformers nor
    by ONNX Runtime, and the latencies show that, as they do for users. Where an option's text is
    the answer, this holds for ONNX Runtime alone. `reordered` and `first_token_ms` (see
    records.Figures) are of the job that asks for another order; they are measured last. `waited`:
    the share of the time of `latencies_ms` (0 to 1) in which the process waited for a processor;
    None on a GPU, and in records of earlier versions."""

    answers: tuple[str | None, ...]
    probabilities: tuple[Probabilities, ...]
    latencies_ms: tuple[float, ...]
    rows_per_second: float
    peak_mib: float
    load_s: float
    ran_on: str
    no_answer: tuple[str | None, ...] = ()
    tokens_per_second: float | None = None
    reordered: Reordered | None = None
    first_token_ms: float | None = None
    waited: float | None = None


def score_model(
    model: ModelToScore,
    examples_file: Path,
    prompt: PromptRecipe,
    threads: int | None = None,
    precision: Precision = "auto",
    progress: ShowProgress = show_nothing,
    reorder: bool = False,
    timed_rows: int = TIMED_ROWS,
    known: Mapping[int, Path] | None = None,
) -> Scored:
    """Score `model` on the rows of `examples_file`, in a process that ends with this one.
    `progress` is shown the rows that are done. With `reorder`, some are asked again at the end with
    their options in another order. `timed_rows`: see TIMED_ROWS. `known`: files of slices that were
    asked before and are not asked again, by their numbers (slices.py).

    `threads` defaults to the usable cores. `precision` is a Transformers model's: "auto" is
    bfloat16 on a GPU that multiplies in it, else float32. Raises ModelError with the reason that
    the process gives."""
    job = ScoringJob(
        model=model,
        examples=str(Path(examples_file).absolute()),
        prompt=model.prompt or prompt,
        threads=threads or usable_cores(),
        timed_rows=timed_rows,
        precision=precision,
        reorder=reorder,
        known={number: str(file.absolute()) for number, file in (known or {}).items()},
    )
    try:
        result = run_in_process("distillery.evaluation.scoring_process", job, progress=progress)
    except ModelError as error:
        raise type(error)(f"{model.name}: {error}") from error
    return Scored.model_validate_json(result)


def answered_rows(path: Path, role: str = "test") -> tuple[list[Example], list[str]]:
    """Return the rows of a split that judges models, and their gold letters.

    Raises DataError where there is no row, or one without a gold answer."""
    examples = read_examples(path)
    if not examples:
        raise DataError(f"{path}: no {role} row; prepare the data set again")
    gold = []
    for example in examples:
        if not example.answer_key or (
            example.format is None and example.answer_key not in example.keys
        ):
            raise DataError(
                f"{path}: row {example.example_id} has no gold answer; {role} rows need one"
            )
        gold.append(str(example.answer_key))
    return examples, gold


def departure(exported: Scored, exact: Scored, written: bool = False) -> Departure:
    """Return how far `exported` departs from `exact` on the same rows.

    A row that one of them was not asked is left out; where no row is left, the departure is 0. Of
    `written` answers, which have no probabilities, all that differ are counted."""
    import numpy as np

    if written:
        pairs = zip(exported.answers, exact.answers, strict=True)
        return Departure(changed=sum(own != theirs for own, theirs in pairs))
    differences = [np.zeros(0)]
    changed = 0
    for number, (own, theirs) in enumerate(
        zip(exported.probabilities, exact.probabilities, strict=True)
    ):
        if own is not None and theirs is not None:
            differences.append(abs(np.subtract(own, theirs)))
            changed += exported.answers[number] != exact.answers[number]
    each = np.concatenate(differences)
    if not len(each):
        each = np.zeros(1)
    return Departure(mean=float(each.mean()), largest=float(each.max()), changed=changed)


def right_answers(answers: Answers, gold: Answers) -> list[bool]:
    """Return row by row whether the answer is the gold one."""
    return [answer == right for answer, right in zip(answers, gold, strict=True)]
