"""Slices of the rows that a model is asked in batches. No slice depends on what was asked before
it, so that another process may ask it and find the same numbers."""

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

from pydantic import ConfigDict

from distillery.errors import ModelError
from distillery.evaluation.predictors import AskBatches, Found, Predictor
from distillery.evaluation.scoring import Probabilities
from distillery.inference.generation import Written
from distillery.records import Example, Record
from distillery.training.rows import TrainingRow

SLICE_ROWS = 1024
"""Rows of a slice. A batch is of one slice, since its longest row and what all its rows begin with
can change the last bits of a float model's numbers. Batches of rows of like length are found among
them, at 6 to 7 % more padding than among 5,000 rows; among 512 it would be 15 %."""

ROWS_OF_A_PART = 1000
"""Rows of all models, which one process asks in about the time in which another one starts and
loads the models."""

SLICE_FILE = "slice.json"

Asked = Probabilities | Written
"""What came of a row; None where its prompt is too long to be asked."""


class SliceAnswers(Record):
    """What came of the rows of a slice, in their order."""

    # What is no finite number is told when the model's rows are together, by the row's name.
    model_config = ConfigDict(ser_json_inf_nan="constants")

    asked: tuple[Asked, ...]


def slice_numbers(rows: int) -> range:
    """Return the numbers of the slices that hold no row that is timed, as a rule: all but the
    first."""
    return range(1, -(-rows // SLICE_ROWS))


def slice_of(number: int, rows: int) -> range:
    """Return the indices of a slice's rows, of `rows` in all."""
    return range(rows)[number * SLICE_ROWS : (number + 1) * SLICE_ROWS]


def slices_from(first: int, rows: int) -> Iterator[tuple[int | None, range]]:
    """Yield the rows from `first` on, slice by slice: the slice's number, None where `first` is
    within it, and the rows' indices."""
    while first < rows:
        number, within = divmod(first, SLICE_ROWS)
        each = slice_of(number, rows)[within:]
        yield None if within else number, each
        first = each.stop


def count_of_parts(rows: int, processes: int) -> int:
    """Return by how many of the processes so many rows of all models are asked: each has enough to
    do."""
    return max(1, min(processes, rows // ROWS_OF_A_PART))


def ask_slice(
    predictor: Predictor, examples: Sequence[Example], number: int, rows_done: Callable[[int], None]
) -> SliceAnswers:
    """Ask a model the rows of a slice of the test rows `examples`. Raises ModelError for a model
    that takes no batches."""
    if predictor.ask_batches is None:
        raise ModelError("its rows are asked and timed one by one, by a single process")
    rendered = [predictor.render(examples[index]) for index in slice_of(number, len(examples))]
    predictor.forget()
    return SliceAnswers(asked=tuple(ask_in_batches(predictor.ask_batches, rendered, rows_done)))


def read_slice(file: Path) -> list[Asked]:
    """Return what came of the rows of a slice that was asked before."""
    return list(SliceAnswers.model_validate_json(file.read_text(encoding="utf-8")).asked)


def ask_in_batches(
    ask_batches: AskBatches,
    rendered: Sequence[TrainingRow | None],
    rows_done: Callable[[int], None],
) -> list[Asked]:
    """Return what comes of each rendered row."""
    rows_done(rendered.count(None))
    answered = iter(ask_batches([row for row in rendered if row is not None], rows_done))
    return [None if row is None else as_asked(next(answered)) for row in rendered]


def as_asked(found: Found) -> Asked:
    return found if isinstance(found, Written) else tuple(found)
