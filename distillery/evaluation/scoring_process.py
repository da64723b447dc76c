"""The process that scores one model, `python -m distillery.evaluation.scoring_process JOB RESULT
PARENT`; `scoring.score_model` starts it.

JOB holds a ScoringJob. Into RESULT goes a Scored, or {"error": "one line"} with exit code 1. PARENT
is the process id that it ends with. The process is the model's own, so that its peak memory is the
model's, and a runtime that crashes takes nothing else with it.
"""

import math
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from statistics import median

from distillery.answers import NotAnAnswer
from distillery.data.examples import read_examples
from distillery.errors import ModelError
from distillery.evaluation.option_order import ORDER_ROWS, Reordered, count_alike, reordered_rows
from distillery.evaluation.predictors import Predictor, load_predictor
from distillery.evaluation.scoring import Probabilities, Scored, ScoringJob
from distillery.evaluation.slices import Asked, as_asked, ask_in_batches, read_slice, slices_from
from distillery.inference.generation import Written
from distillery.processes import process_main
from distillery.progress import ShowProgress, show_nothing
from distillery.records import AnswerFormat, Example
from distillery.training.rows import TrainingRow

WARM_UP_ROWS = 3

FIRST_TOKEN_ROWS = 10
"""Rows on which the time to the first token is measured."""

SHOW_S = 0.5
"""The fewest seconds between two reports of progress: rows are timed meanwhile."""


class RowCounter:
    """Counts the rows that are done, and shows it at most every SHOW_S seconds."""

    def __init__(self, of: int, progress: ShowProgress) -> None:
        self.done, self.of, self.progress = 0, of, progress
        self._shown_at = -math.inf

    def add(self, rows: int) -> None:
        """Count `rows` more as done."""
        self.done += rows
        now = time.monotonic()
        if now >= self._shown_at + SHOW_S:
            self._shown_at = now
            self.progress(self.done, self.of, f"{self.done} of {self.of} rows")


def score(job: ScoringJob, progress: ShowProgress = show_nothing) -> Scored:
    """Ask the model every row, one by one and timed, or in batches; see `Scored`."""
    examples = read_examples(Path(job.examples))
    started = time.perf_counter()
    answer_format = examples[0].format if examples else None
    predictor = load_predictor(job, answer_format)
    load_s = time.perf_counter() - started
    further = min(len(examples), ORDER_ROWS) if job.reorder else 0
    counter = RowCounter(len(examples) + further, progress)
    counter.add(0)
    found, latencies, waited = ask_single_rows(predictor, examples, job.timed_rows, counter.add)
    tokens_per_second = None
    if answer_format and latencies:
        tokens = sum(each.tokens for each in found if isinstance(each, Written))
        tokens_per_second = 1000 * tokens / sum(latencies)
    rest = [predictor.render(example) for example in examples[len(found) :]]
    # The longest row takes the most memory of single rows. It is asked here, untimed, since batches
    # may take more.
    ask(predictor, max(rest, key=token_count, default=None))
    peak = peak_mib()
    found += ask_slices(predictor, rest, len(found), job.known, counter.add)
    rows_per_second = 0.0
    if latencies:
        rows_per_second = 1000 * len(latencies) / sum(latencies)
    probabilities = [None if isinstance(each, Written) else each for each in found]
    no_answer: list[str | None] = []
    if answer_format:
        answers, no_answer = written_answers(found, answer_format)
    else:
        answers = most_probable(examples, probabilities)
    reordered = first_token_ms = None
    if job.reorder:
        reordered, first_token_ms = ask_in_other_order(predictor, examples, answers, counter.add)
    return Scored(
        answers=tuple(answers),
        probabilities=tuple(probabilities),
        latencies_ms=tuple(latencies),
        rows_per_second=rows_per_second,
        peak_mib=peak,
        load_s=load_s,
        ran_on=predictor.ran_on,
        no_answer=tuple(no_answer),
        tokens_per_second=tokens_per_second,
        reordered=reordered,
        first_token_ms=first_token_ms,
        # On a GPU the thread may wait for that, not for a processor.
        waited=None if predictor.ran_on.startswith("cuda") else waited,
    )


def ask_in_other_order(
    predictor: Predictor,
    examples: Sequence[Example],
    answers: Sequence[str | None],
    rows_done: Callable[[int], None],
) -> tuple[Reordered | None, float | None]:
    """Ask some rows again, their options in another order, and compare with `answers`.

    Returns the comparison, None for rows without options, which have no order, and the median ms to
    the first token of the first of these rows."""
    reordered = reordered_rows(examples, answers)
    if not examples[0].choices:
        reordered = reordered[:FIRST_TOKEN_ROWS]
    probabilities: list[Probabilities] = []
    first_tokens: list[float] = []
    started = time.perf_counter()
    for _, example in reordered:
        row = predictor.render(example)
        if row is not None and predictor.first_token and len(first_tokens) < FIRST_TOKEN_ROWS:
            # What this leaves in the cache is of no use to the prompt.
            predictor.first_token(row.prompt[-2:])
            asked_at = time.perf_counter()
            predictor.render(example)
            predictor.first_token(row.prompt)
            first_tokens.append(1000 * (time.perf_counter() - asked_at))
        if example.choices:
            asked = ask(predictor, row)
            probabilities.append(None if isinstance(asked, Written) else asked)
        rows_done(1)
    seconds = time.perf_counter() - started
    if not examples[0].choices:
        return None, median(first_tokens) if first_tokens else None
    letters = most_probable([example for _, example in reordered], probabilities)
    found = count_alike(examples, answers, reordered, letters, seconds)
    return found, median(first_tokens) if first_tokens else None


def ask_single_rows(
    predictor: Predictor,
    examples: Sequence[Example],
    timed_rows: int,
    rows_done: Callable[[int], None],
) -> tuple[list[Asked], list[float], float | None]:
    """Ask row after row: all of them, or, where the model takes batches, the first ones until
    `timed_rows` are timed. A few are asked before, to warm up.

    Returns what came of these rows, the latencies in ms of those that could be asked, and the share
    of that time (0 to 1; None without a row) that this thread did not compute. A latency spans
    rendering, tokenising and one prefill, and where the answer is written all its tokens."""
    for example in examples[:WARM_UP_ROWS]:
        ask(predictor, predictor.render(example))
    found: list[Asked] = []
    latencies: list[float] = []
    computed_ms = 0.0
    for example in examples:
        if predictor.ask_batches and len(latencies) == timed_rows:
            break
        started, computed_before = time.perf_counter(), time.thread_time()
        asked = ask(predictor, predictor.render(example))
        elapsed, computed = time.perf_counter() - started, time.thread_time() - computed_before
        found.append(asked)
        if asked is not None:
            latencies.append(1000 * elapsed)
            computed_ms += 1000 * computed
        rows_done(1)
    # The thread never sleeps: where it waits for the model's other threads, it spins.
    waited = max(0.0, 1 - computed_ms / sum(latencies)) if latencies else None
    return found, latencies, waited


def ask(predictor: Predictor, row: TrainingRow | None) -> Asked:
    """Return what comes of a rendered row."""
    return None if row is None else as_asked(predictor.ask(row))


def token_count(row: TrainingRow | None) -> int:
    """Return the tokens of a row's prompt and of the texts that are scored after it."""
    if row is None:
        return 0
    return len(row.prompt) + sum(map(len, row.texts))


def ask_slices(
    predictor: Predictor,
    rest: Sequence[TrainingRow | None],
    first: int,
    known: Mapping[int, str],
    rows_done: Callable[[int], None],
) -> list[Asked]:
    """Return what comes of the rendered rows behind the `first` ones, which were asked one by one:
    from the files of slices that are known, and of the others in batches."""
    found: list[Asked] = []
    for number, rows in slices_from(first, first + len(rest)):
        if number is not None and number in known:
            found += read_slice(Path(known[number]))
            rows_done(len(rows))
        elif predictor.ask_batches:
            if number is not None:
                predictor.forget()
            some = rest[rows.start - first : rows.stop - first]
            found += ask_in_batches(predictor.ask_batches, some, rows_done)
    return found


def written_answers(
    found: Sequence[Asked], answer_format: AnswerFormat
) -> tuple[list[str | None], list[str | None]]:
    """Return each row's answer, and for those that have none the reason."""
    answers: list[str | None] = []
    no_answer: list[str | None] = []
    for written in found:
        answer = reason = None
        if isinstance(written, Written):
            try:
                answer = written.answer(answer_format)
            except NotAnAnswer as error:
                reason = str(error)
        else:
            reason = "the prompt is too long to be asked"
        answers.append(answer)
        no_answer.append(reason)
    return answers, no_answer


def most_probable(
    examples: Sequence[Example], probabilities: Sequence[Probabilities]
) -> list[str | None]:
    """Return the letter of each row's most probable option, the first of equals.

    Raises ModelError where a probability is not a finite number."""
    letters: list[str | None] = []
    for example, row in zip(examples, probabilities, strict=True):
        if row is None:
            letters.append(None)
        elif all(map(math.isfinite, row)):
            letters.append(example.keys[row.index(max(row))])
        else:
            raise ModelError(
                f"its probabilities for row {example.example_id} are no finite numbers"
            )
    return letters


def peak_mib() -> float:
    """Return the most resident memory that this process has held so far, in MiB (without a GPU's).

    On Linux it is VmHWM: getrusage's ru_maxrss outlives exec there, so that a small child of a
    large parent would report the parent's."""
    status = Path("/proc/self/status")
    if status.exists():
        _, _, after = status.read_text().partition("VmHWM:")
        return int(after.split()[0]) / 1024
    if sys.platform == "win32":
        import psutil

        return psutil.Process().memory_info().peak_wset / 2**20
    import resource

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    if sys.platform == "darwin":
        return peak / 2**20
    return peak / 1024


if __name__ == "__main__":
    sys.exit(process_main(sys.argv[1:], ScoringJob, score))
