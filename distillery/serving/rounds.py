"""The order in which requests are answered, in the student's one thread.

The thread works in rounds. In each, waiting choices are made, one waiting text is begun if the
batch has room, and every text that is under way gets its next token, and those after it that are
computed already: the first of the texts computes for all, see TextBatch. So a choice waits for a
token and not for a text, and texts that come and go share the passes of the model. Choices share
passes too where no text is there; else one is made a round, so that texts do not wait long for
them.
"""

import asyncio
import logging
import time
from collections import deque
from collections.abc import Callable, Sequence
from contextlib import suppress
from threading import Lock
from typing import Any

from distillery.errors import AnswerStopped
from distillery.serving.completion import Completion, Job, Piece, complete, is_choice
from distillery.serving.student import ServedStudent
from distillery.training.rows import TrainingRow

ANSWERS_MEASURED = 33
"""Of how many answers' ends the time of one is told."""

CHOICES_AT_ONCE = 16
"""Choices that are made together, at most: more would share no more passes, and each waits for
all."""

_log = logging.getLogger(__name__)

Told = Callable[[Piece], None]


class Turn:
    """A job on its way through the rounds. `told` gets its pieces, in the student's thread.
    `asked`: what a choice is about, once that is known. `ended`: the event loop's future that ends
    with the answer."""

    def __init__(self, job: Job, told: Told, pieces: Completion) -> None:
        self.job, self.told, self.pieces = job, told, pieces
        self.asked: TrainingRow | None = None
        self.ended: asyncio.Future[None] = asyncio.get_running_loop().create_future()

    def tell(self, piece: Piece) -> None:
        """Pass a piece on, unless there is nothing in it."""
        if piece.text or piece.logprobs or piece.finish_reason:
            self.told(piece)

    def end(self, error: BaseException | None = None) -> None:
        """End the future, from the student's thread."""

        def set_result() -> None:
            if self.ended.done():
                return
            if error is None:
                self.ended.set_result(None)
            else:
                self.ended.set_exception(error)

        # A loop that is closed has nobody who waits.
        with suppress(RuntimeError):
            self.ended.get_loop().call_soon_threadsafe(set_result)


class Rounds:
    """Answers jobs. `choices` and `texts` wait, in the order in which they came; `active` are the
    texts under way. `answer_s`: seconds from the end of one answer to that of the next one, by the
    last ANSWERS_MEASURED. With `shared_prefix`, a prompt is computed from where it departs from
    others."""

    def __init__(self, student: ServedStudent, shared_prefix: bool) -> None:
        self.student = student
        self.shared_prefix = shared_prefix
        self.choices: dict[Job, Turn] = {}
        self.texts: dict[Job, Turn] = {}
        self.active: list[Turn] = []
        self.answering: set[Job] = set()
        """The jobs that the thread is at; those that are given up are not among them."""
        self.lock = Lock()
        """Guards what both threads use: the jobs that wait, `answering`, `running`, `closed`."""
        self.running = self.closed = False
        self.answer_s = 0.0
        self.ends: deque[float] = deque(maxlen=ANSWERS_MEASURED)
        """When the last answers ended; before the first one, when the thread began."""

    def add(self, job: Job, told: Told) -> asyncio.Future[None]:
        """Let a job wait for its turn. The future ends with its answer."""
        turn = Turn(job, told, complete(self.student, job))
        waiting = self.choices if is_choice(self.student, job.request) else self.texts
        with self.lock:
            waiting[job] = turn
            if not self.running:
                self.running = True
                self.student.worker.submit(self.run)
        return turn.ended

    def give_up(self, job: Job) -> None:
        """Spend no further pass on a job."""
        with self.lock:
            job.cancelled.set()
            self.choices.pop(job, None)
            self.texts.pop(job, None)
            if job in self.answering:
                self.answering.remove(job)
                if not self.answering:
                    self.student.stop.set()

    def close(self) -> None:
        """Answer nothing more."""
        with self.lock:
            self.closed = True
            self.student.stop.set()
        self.student.worker.shutdown(wait=False, cancel_futures=True)

    def run(self) -> None:
        """Work in rounds until there is nothing to do."""
        self.ends.clear()
        self.ends.append(time.monotonic())
        while True:
            with self.lock:
                choices, text = self.next_turns()
                if self.closed or not (choices or text or self.active):
                    self.running = False
                    return
            self.choose(choices)
            if text:
                self.active.append(text)
            self.active = [turn for turn in self.active if self.go_on_ahead(turn)]

    def next_turns(self) -> tuple[list[Turn], Turn | None]:
        """Take the choices and the text whose turn it is."""
        choices, text = [], None
        if self.student.chooses_apart or not (self.active or self.text_is_first()):
            alone = self.active or self.texts or not self.shared_prefix
            for job in list(self.choices)[: 1 if alone else CHOICES_AT_ONCE]:
                choices.append(self.choices.pop(job))
        if self.texts and len(self.active) < self.student.at_once:
            text = self.texts.pop(next(iter(self.texts)))
        return choices, text

    def text_is_first(self) -> bool:
        """Return whether the text that waits longest came before all choices that wait."""
        if not (self.texts and self.choices):
            return bool(self.texts)
        return next(iter(self.texts)).came < next(iter(self.choices)).came

    def choose(self, turns: Sequence[Turn]) -> None:
        """Make choices, all in the same passes."""
        asking = [turn for turn in turns if self.go_on(turn)]
        for turn, found in zip(asking, self.found(asking), strict=True):
            if isinstance(found, Exception):
                self.end(turn, found)
                continue
            while self.go_on(turn, found):
                found = None

    def found(self, turns: Sequence[Turn]) -> list[Any]:
        """Return what the student finds of each choice, or the error that it raises: what fails
        for several together is tried for each."""
        if not self.begin(turns):
            return [None] * len(turns)
        try:
            return list(self.student.choices([turn.asked for turn in turns if turn.asked]))
        except AnswerStopped:
            _log.info("%d choices were given up", len(turns))
            return [None] * len(turns)
        except Exception as error:
            if len(turns) == 1:
                return [error]
        finally:
            self.pause()
        return [found for turn in turns for found in self.found([turn])]

    def go_on(self, turn: Turn, found: Any = None) -> bool:
        """Make the next piece of an answer, of a choice from what was `found` of it. Return whether
        another one follows."""
        if not self.begin([turn]):
            return self.end(turn)
        piece, error = None, None
        try:
            piece = turn.pieces.send(found)
            if isinstance(piece, TrainingRow):
                turn.asked = piece
            elif not turn.job.cancelled.is_set():
                turn.tell(piece)
        except StopIteration:
            pass
        except AnswerStopped:
            _log.info("an answer was given up")
        except Exception as raised:
            piece, error = None, raised
        self.pause()
        if piece is None or (isinstance(piece, Piece) and piece.finish_reason):
            return self.end(turn, error)
        if not self.shared_prefix and self.student.chooses_apart:
            # The prompt that was just computed must not serve the next answer that begins.
            self.student.forget()
        return True

    def go_on_ahead(self, turn: Turn) -> bool:
        """Make the next piece of a text, and those after it that take no further pass. Return
        whether another one follows."""
        while self.go_on(turn):
            if not self.student.is_ahead:
                return True
        return False

    def begin(self, turns: Sequence[Turn]) -> bool:
        """Return whether any of these answers is still waited for, and let the student work."""
        with self.lock:
            if self.closed:
                return False
            self.answering = {turn.job for turn in turns if not turn.job.cancelled.is_set()}
            if self.answering:
                self.student.stop.clear()
            return bool(self.answering)

    def pause(self) -> None:
        """Let the student be, between two pieces."""
        with self.lock:
            self.answering = set()
            if not self.closed:
                self.student.stop.clear()

    def end(self, turn: Turn, error: Exception | None = None) -> bool:
        """End an answer, and return False."""
        try:
            turn.pieces.close()
            if not self.shared_prefix:
                self.student.forget()
        except Exception as raised:
            error = error or raised
        self.ends.append(time.monotonic())
        # Choices that are made together end together: one end alone tells nothing.
        self.answer_s = (self.ends[-1] - self.ends[0]) / max(1, len(self.ends) - 1)
        turn.end(error)
        return False
