"""The order in which requests are answered, in the student's one thread.

The thread works in rounds. In each, one waiting choice is made, one waiting text is begun if the
batch has room, and every text that is under way gets its next token: the first of them computes it
for all, see TextBatch. So a choice waits for a token and not for a text, and texts that come and go
share the passes of the model.
"""

import asyncio
import logging
import time
from collections.abc import Callable, Generator
from threading import Lock

from distillery.errors import AnswerStopped
from distillery.serving.completion import Job, Piece, complete, is_choice
from distillery.serving.student import ServedStudent

_log = logging.getLogger(__name__)

Told = Callable[[Piece], None]


class Turn:
    """A job on its way through the rounds. `told` gets its pieces, in the student's thread.
    `ended`: the event loop's future that ends with the answer."""

    def __init__(self, job: Job, told: Told, pieces: Generator[Piece, None, None]) -> None:
        self.job, self.told, self.pieces = job, told, pieces
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

        self.ended.get_loop().call_soon_threadsafe(set_result)


class Rounds:
    """Answers jobs. `choices` and `texts` wait, in the order in which they came; `active` are the
    texts under way. `answer_s`: seconds from the end of one answer to that of the next one, by the
    last ones. With `shared_prefix`, a prompt is computed from where it departs from others."""

    def __init__(self, student: ServedStudent, shared_prefix: bool) -> None:
        self.student = student
        self.shared_prefix = shared_prefix
        self.choices: dict[Job, Turn] = {}
        self.texts: dict[Job, Turn] = {}
        self.active: list[Turn] = []
        self.answering: Job | None = None
        """The job that the thread is at."""
        self.lock = Lock()
        """Guards what both threads use: the jobs that wait, `answering`, `running`, `closed`."""
        self.running = self.closed = False
        self.answer_s = self.last_end = 0.0

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
            if self.answering is job:
                self.student.stop.set()

    def close(self) -> None:
        """Answer nothing more."""
        with self.lock:
            self.closed = True
            self.student.stop.set()
        self.student.worker.shutdown(wait=False, cancel_futures=True)

    def run(self) -> None:
        """Work in rounds until there is nothing to do."""
        self.last_end = time.monotonic()
        while True:
            with self.lock:
                choice, text = self.next_turns()
                if self.closed or not (choice or text or self.active):
                    self.running = False
                    return
            while choice and self.go_on(choice):
                pass
            if text:
                self.active.append(text)
            self.active = [turn for turn in self.active if self.go_on(turn)]

    def next_turns(self) -> tuple[Turn | None, Turn | None]:
        """Take the choice and the text whose turn it is."""
        choice = text = None
        if self.choices and (self.student.chooses_apart or not self.active):
            choice = self.choices.pop(next(iter(self.choices)))
        if self.texts and len(self.active) < self.student.at_once:
            text = self.texts.pop(next(iter(self.texts)))
        return choice, text

    def go_on(self, turn: Turn) -> bool:
        """Make the next piece of an answer. Return whether another one follows."""
        piece, error = None, None
        with self.lock:
            given_up = self.closed or turn.job.cancelled.is_set()
            if not given_up:
                self.answering = turn.job
                self.student.stop.clear()
        if given_up:
            return self.end(turn)
        try:
            piece = next(turn.pieces, None)
            if piece and not turn.job.cancelled.is_set():
                turn.tell(piece)
        except AnswerStopped:
            _log.info("an answer was given up")
        except Exception as raised:
            piece, error = None, raised
        with self.lock:
            self.answering = None
            if not self.closed:
                self.student.stop.clear()
        if piece is None or piece.finish_reason:
            return self.end(turn, error)
        if not self.shared_prefix and self.student.chooses_apart:
            # The prompt that was just computed must not serve the next answer that begins.
            self.student.forget()
        return True

    def end(self, turn: Turn, error: Exception | None = None) -> bool:
        """End an answer, and return False."""
        try:
            turn.pieces.close()
            if not self.shared_prefix:
                self.student.forget()
        except Exception as raised:
            error = error or raised
        now = time.monotonic()
        taken, self.last_end = now - self.last_end, now
        self.answer_s = 0.8 * self.answer_s + 0.2 * taken if self.answer_s else taken
        turn.end(error)
        return False
