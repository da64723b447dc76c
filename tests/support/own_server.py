"""The server in this process, with a student that waits where a test tells it to."""

import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, NamedTuple

from distillery.inference.generation import Steps
from distillery.serving.app import ModelServer, create_app
from distillery.serving.completion import Job, Piece, complete
from distillery.serving.limits import Limits
from distillery.serving.running import Server
from distillery.serving.server import listen
from distillery.serving.student import Choice, ServedStudent
from distillery.training.rows import TrainingRow


class SlowStudent(ServedStudent):
    """A student that waits for a permit after each token of a text, and for each choice, and counts
    how often it was asked."""

    def __init__(self, folder: Path) -> None:
        super().__init__(folder, threads=1)
        self.go_on = threading.Semaphore(0)
        self.asked = 0

    def steps(self, *arguments: Any, **settings: Any) -> Steps:
        for step in super().steps(*arguments, **settings):
            self.asked += 1
            assert self.go_on.acquire(timeout=60)
            yield step

    def choices(self, rows: Sequence[TrainingRow]) -> list[Choice]:
        found = super().choices(rows)
        for _ in rows:
            self.asked += 1
            assert self.go_on.acquire(timeout=60)
        return found


def pieces_of(student: ServedStudent, job: Job) -> list[Piece]:
    """Return the pieces of an answer, without a server."""
    pieces: list[Piece] = []
    completion, found = complete(student, job), None
    with suppress(StopIteration):
        while True:
            piece = completion.send(found)
            found = None
            if isinstance(piece, TrainingRow):
                (found,) = student.choices([piece])
            else:
                pieces.append(piece)
    return pieces


class OwnServer(NamedTuple):
    url: str
    port: int
    server: ModelServer


@contextmanager
def own_server(
    student: ServedStudent, limits: Limits | None = None, **settings: Any
) -> Iterator[OwnServer]:
    """Run the app, without a key, in a thread of this process."""
    limits = limits or Limits(drain_s=0)
    app = create_app(student, "tiny", None, limits=limits, **settings)
    with listen("127.0.0.1", 0) as bound:
        running = Server(app, limits)
        thread = threading.Thread(target=running.run, kwargs={"sockets": [bound]})
        thread.start()
        port = bound.getsockname()[1]
        try:
            yield OwnServer(f"http://127.0.0.1:{port}", port, app.state.server)
        finally:
            running.should_exit = True
            thread.join()


@contextmanager
def in_this_process(student: ServedStudent) -> Iterator[str]:
    """Run the app as `own_server` does, and give its URL."""
    with own_server(student) as running:
        yield running.url


def wait_until(condition: Callable[[], bool], seconds: float = 30.0) -> bool:
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline and not condition():
        time.sleep(0.01)
    return condition()
