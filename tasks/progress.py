"""How far a running stage is: one source for the terminal, the log and Prefect's progress artifact.

A stage calls `show` as often as it likes, and `conclude` once at its end. While it runs, a thread
of its own tells the Prefect server every two seconds at most. Where no live display runs
(terminal.py), the thread also writes a log line: every 10 s in a stage's first five minutes, every
30 s after that. A server that does not answer costs the display, never the work.
"""

import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar, copy_context
from typing import Any, Protocol

from prefect import get_run_logger
from prefect.artifacts import create_progress_artifact, update_progress_artifact

from distillery.markdown import escape

PUBLISH_S = 2.0
LOG_S, LATER_LOG_S, LATER_AFTER_S = 10.0, 30.0, 300.0

_running: ContextVar["StageProgress | None"] = ContextVar("running", default=None)


class StageProgress:
    """How far one stage is. Written by the stage, read by its thread and by the live display."""

    def __init__(self, title: str) -> None:
        self.title = title
        self.started = time.monotonic()
        self.done, self.of, self.unit, self.text = 0.0, 0.0, "", ""
        self._first_done, self._first_at = 0.0, 0.0
        # Where the stage knows its time left, it says its own rate in the text.
        self._seconds_left: float | None = None
        self.conclusion = ""

    def show(
        self, done: float, of: float, unit: str, text: str = "", seconds_left: float | None = None
    ) -> None:
        """Record that `done` of `of` units are done. The rate, and with it the time left where the
        stage does not know it better, is measured from the last call on before any unit is done.
        Fewer units than before, or others, begin a new count.

        Without a unit, the line is the text alone: there is no rate of parts that take unequal
        times."""
        is_new = unit != self.unit or done < self.done
        if is_new or done == self._first_done:
            self._first_done, self._first_at = done, time.monotonic()
        self.done, self.of, self.unit, self.text = done, of, unit, text
        self._seconds_left = seconds_left

    @property
    def seconds(self) -> float:
        """Seconds since the stage began."""
        return time.monotonic() - self.started

    @property
    def share(self) -> float | None:
        """What is done, from 0 to 1; None where the stage has not said anything."""
        if not self.of:
            return None
        return min(self.done / self.of, 1.0)

    @property
    def rate(self) -> float:
        """Units per second since the first call of `show`; 0 while that can't be told."""
        elapsed = time.monotonic() - self._first_at
        if not self.unit or elapsed <= 0:
            return 0.0
        return (self.done - self._first_done) / elapsed

    @property
    def seconds_left(self) -> float | None:
        """Seconds to the end, as the stage says or at the rate so far; None while that can't be
        told."""
        if self._seconds_left is not None:
            return self._seconds_left
        if self.rate <= 0:
            return None
        return (self.of - self.done) / self.rate

    def line(self) -> str:
        """Return what is known in one line: 400 of 1001 rows, 31.2 rows/s, 0:19 left."""
        parts = []
        if self.unit:
            parts.append(f"{self.done:g} of {self.of:g} {self.unit}")
        if self.text:
            parts.append(self.text)
        if self.unit and self.rate > 0 and self._seconds_left is None:
            parts.append(f"{self.rate:.1f} {self.unit}/s")
        if self.seconds_left is not None:
            parts.append(f"{clock(self.seconds_left)} left")
        return ", ".join(parts)

    def log_line(self) -> str:
        """Return the line, and how long the stage has run where the time left can't be told."""
        parts = [self.line()] if self.line() else []
        if self.seconds_left is None:
            parts.append(f"at work for {clock(self.seconds)}")
        return ", ".join(parts)


def clock(seconds: float) -> str:
    """Return a duration as minutes:seconds or hours:minutes:seconds."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"


def show(
    done: float, of: float, unit: str, text: str = "", seconds_left: float | None = None
) -> None:
    """Say how far the running stage is; outside a stage nothing happens."""
    progress = _running.get()
    if progress is not None:
        progress.show(done, of, unit, text, seconds_left)


def show_rows(done: int, of: int, text: str = "") -> None:
    """Say how many rows the running stage has done."""
    show(done, of, "rows", text)


def show_parts(done: int, of: int, text: str) -> None:
    """Say which part of the running stage is under way; parts take unequal times."""
    show(done, of, "", text)


def show_bytes(done: int, of: int, text: str) -> None:
    """Say how many bytes of a download are there, in GB."""
    show(round(done / 1e9, 2), round(of / 1e9, 2), "GB", text)


def conclude(text: str) -> None:
    """Log what came of the running stage, and leave it to the live display as the stage's
    figures."""
    get_run_logger().info("%s", text)
    progress = _running.get()
    if progress is not None:
        progress.conclusion = text


class Display(Protocol):
    """Who shows the stages of this process to somebody who watches."""

    def stage_begins(self, task: str) -> None:
        """A stage begins: it is looked up in the cache first."""

    def work_begins(self, progress: StageProgress) -> None:
        """The stage that began last was not found, and does its work."""

    def stage_ends(self, state_name: str, completed: bool) -> None:
        """The stage that began last has ended, in a state of Prefect's."""


_displays: list[Display] = []


def live_display() -> Display | None:
    """Return the display of this process; None where nobody watches."""
    return _displays[-1] if _displays else None


@contextmanager
def displayed_by(display: Display) -> Iterator[None]:
    """Have `display` told of the stages that run within, in place of the log."""
    _displays.append(display)
    try:
        yield
    finally:
        _displays.remove(display)


class NoDisplay:
    """A display for work that is a part of what is shown already."""

    def stage_begins(self, task: str) -> None:
        """See `Display`."""

    def work_begins(self, progress: StageProgress) -> None:
        """See `Display`."""

    def stage_ends(self, state_name: str, completed: bool) -> None:
        """See `Display`."""


@contextmanager
def shown_as_stage(title: str) -> Iterator[StageProgress]:
    """Show what runs within as one stage, although it is no task of Prefect, or many."""
    display = live_display()
    if display is not None:
        display.stage_begins(title)
    completed = False
    try:
        with progress_of(title) as progress, displayed_by(NoDisplay()):
            yield progress
        completed = True
    finally:
        if display is not None:
            display.stage_ends(title, completed)


@contextmanager
def progress_of(title: str) -> Iterator[StageProgress]:
    """Publish the progress of the stage that runs within, until it ends."""
    progress = StageProgress(title)
    display = live_display()
    if display is not None:
        display.work_begins(progress)
    ended = threading.Event()
    thread = threading.Thread(
        target=copy_context().run,
        args=(_publish, progress, ended, display is None),
        name="progress",
        daemon=True,
    )
    thread.start()
    token = _running.set(progress)
    try:
        yield progress
    finally:
        _running.reset(token)
        ended.set()
        thread.join(PUBLISH_S)


def _publish(progress: StageProgress, ended: threading.Event, log: bool) -> None:
    artifact: Any = None
    logged_at = 0.0
    shown = ""
    last = False
    while not last:
        last = ended.wait(PUBLISH_S)
        line = progress.line()
        seconds = progress.seconds
        due = logged_at + (LOG_S if seconds < LATER_AFTER_S else LATER_LOG_S)
        if log and not last and seconds >= due:
            logged_at = seconds
            get_run_logger().info("%s: %s", progress.title, progress.log_line())
        share = progress.share
        if share is not None and line != shown:
            shown = line
            artifact = _publish_artifact(artifact, progress.title, 100 * share, line)


def _publish_artifact(artifact: Any, title: str, percent: float, line: str) -> Any:
    shown = escape(line)
    try:
        if artifact is None:
            key = title.replace(" ", "-")
            created: Any = create_progress_artifact(percent, key=key, description=shown)
            return created
        update_progress_artifact(artifact, percent, description=shown)
    except Exception as error:
        # Whatever the server's trouble is, it must not end the work.
        get_run_logger().debug("progress is not shown: %s", error)
    return artifact
