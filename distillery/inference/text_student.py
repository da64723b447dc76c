"""Write the answers to many rows, several at once."""

import threading
from collections import deque
from collections.abc import Callable, Sequence
from contextlib import ExitStack, closing
from functools import cached_property, partial
from pathlib import Path
from typing import Any

from distillery.inference.batch_student import load_scorer, load_together
from distillery.inference.generation import Steps, Written, written
from distillery.inference.logits import Logits
from distillery.inference.onnx_student import OnnxStudent
from distillery.inference.student import Student, Writer
from distillery.inference.text_batch import TextBatch
from distillery.models.drafts import read_drafts
from distillery.records import FORMAT_FILE, AnswerFormat
from distillery.training.rows import TrainingRow

WRITTEN_TOGETHER = 8
"""Answers that are written at once, unless another number is asked for."""


def load_for_rows(folder: Path, threads: int | None = None) -> Student:
    """Load a model that is to answer many rows, whether it chooses or writes its answers.

    `threads` counts the cores for one operation; None leaves it to the runtime. Raises ModelError
    for a folder that can't be loaded."""
    if (folder / FORMAT_FILE).is_file():
        return load_writer(folder, threads)
    return load_scorer(folder, threads)


def load_writer(
    folder: Path, threads: int | None = None, count: int = WRITTEN_TOGETHER
) -> "TextStudent | OnnxStudent":
    """Load a model that is to write up to `count` answers at once, as a TextStudent or, where
    TextBatch does not take its graph, as an OnnxStudent, which writes one at a time; see
    `load_for_rows`."""
    # A file of guesses that can't be read is no reason to go on without them, and slowly.
    read_drafts(folder)
    return load_together(partial(TextStudent, folder, threads, count), folder, threads)


class TextStudent(Writer):
    """A model that writes by a TextBatch. Each answer has the tokens that it has alone.

    Rows with options are answered by another student, which holds the weights once more. It is
    loaded when the first of them is asked."""

    def __init__(
        self, folder: Path, threads: int | None = None, count: int = WRITTEN_TOGETHER
    ) -> None:
        """Load the model; see `TextBatch` for the arguments and the errors."""
        self.batch = TextBatch(folder, threads, count)
        self.threads = threads
        super().__init__(folder, self.batch.tokenizer, self.batch.context_length)

    @property
    def is_ahead(self) -> bool:  # type: ignore[override]
        """See `Writer`."""
        return self.batch.is_ahead

    @cached_property
    def scorer(self) -> Student:
        """What answers rows with options."""
        return load_scorer(self.folder, self.threads)

    def probabilities(self, rows: Sequence[TrainingRow]) -> list[list[float]]:
        """See `Student`."""
        return self.scorer.probabilities(rows)

    def next_logits(self, prompt_ids: Sequence[int]) -> Logits:
        """See `Student`."""
        return self.batch.prefill(prompt_ids, room=0)

    def heed(self, stop: threading.Event) -> None:
        """See `Student`."""
        self.batch.heed(stop)

    def forget(self) -> None:
        """See `Student`."""
        self.batch.forget()

    def steps(self, prompt_ids: Sequence[int], max_tokens: int, **settings: Any) -> Steps:
        """See `Writer`; `settings` as for `TextBatch.steps`."""
        return self.batch.steps(prompt_ids, max_tokens, **settings)

    def write_all(
        self,
        prompts: Sequence[Sequence[int]],
        answer_format: AnswerFormat,
        rows_done: Callable[[int], None] = lambda _: None,
    ) -> list[Written]:
        """See `Writer`; as many answers are under way as the batch has room for. `rows_done` is
        told of each answer that is written."""
        tokens: list[list[int]] = [[] for _ in prompts]
        waiting = deque(enumerate(prompts))
        with ExitStack() as under_way:
            active: dict[int, Steps] = {}
            while waiting or active:
                if waiting and len(active) < self.batch.count:
                    number, prompt = waiting.popleft()
                    steps = self.answer_steps(prompt, answer_format)
                    active[number] = under_way.enter_context(closing(steps))
                for number, steps in list(active.items()):
                    if not self.go_on(steps, tokens[number]):
                        del active[number]
                        rows_done(1)
        return [written(each, self.end_ids, answer_format, self.text_of) for each in tokens]

    def go_on(self, steps: Steps, tokens: list[int]) -> bool:
        """Add to an answer's tokens those that its steps give without a further pass. Return
        whether others may follow."""
        for token, _ in steps:
            tokens.append(token)
            if not self.is_ahead:
                return True
        return False
