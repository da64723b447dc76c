"""The live display of a run in a terminal: the stages that are done, running and to come.

Without a terminal nothing of this runs, and progress goes to the log (progress.py).
"""

import logging
import os
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

from prefect.logging.handlers import PrefectConsoleHandler
from rich.console import Console
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.spinner import Spinner
from rich.table import Table
from rich.text import Text

from tasks.progress import StageProgress, clock, displayed_by

State = Literal["to come", "running", "done", "cached", "failed"]
MARKS = {"to come": "·", "done": "✓", "cached": "✓", "failed": "✗"}
STYLES = {"to come": "dim", "done": "green", "cached": "green", "failed": "red"}


class PlannedStage(NamedTuple):
    """A stage that a run will come to: its title for people, and its Prefect task's name."""

    title: str
    task: str


@dataclass
class ShownStage:
    """A line of the display."""

    title: str
    task: str
    state: State = "to come"
    progress: StageProgress | None = None
    seconds: float = 0.0


class LiveDisplay:
    """The stages of a run in order: Prefect's hooks tell it in the run's thread, rich draws it in
    another."""

    def __init__(self, planned: Sequence[PlannedStage]) -> None:
        self.stages = [ShownStage(stage.title, stage.task) for stage in planned]
        self._spinner = Spinner("dots")

    def stage_begins(self, task: str) -> None:
        """Mark the first stage to come of this task as running; an unplanned one is added.

        A stage that is tried again begins again, and is the same line."""
        running = self._running_stage()
        if running is not None and running.task == task:
            return
        for stage in self.stages:
            if stage.task == task and stage.state == "to come":
                stage.state = "running"
                return
        self.stages.append(ShownStage(task, task, "running"))

    def work_begins(self, progress: StageProgress) -> None:
        """Take over the progress of the running stage: it was not found in the cache."""
        stage = self._running_stage()
        if stage is not None:
            stage.progress = progress

    def stage_ends(self, state_name: str, completed: bool) -> None:
        """Mark the running stage as done, cached or failed."""
        stage = self._running_stage()
        if stage is None:
            return
        if stage.progress is not None:
            stage.seconds = stage.progress.seconds
        if not completed:
            stage.state = "failed"
        elif state_name == "Cached":
            stage.state = "cached"
        else:
            stage.state = "done"

    def _running_stage(self) -> ShownStage | None:
        # Where a stage calls another, the innermost one is the last to have begun.
        for stage in reversed(self.stages):
            if stage.state == "running":
                return stage
        return None

    def __rich__(self) -> Table:
        table = Table.grid(padding=(0, 1))
        table.add_column(width=2)
        table.add_column(no_wrap=True)
        table.add_column(no_wrap=True, overflow="ellipsis")
        table.add_column(justify="right", no_wrap=True)
        for stage in self.stages:
            self._add_row(table, stage)
        if all(stage.state == "to come" for stage in self.stages):
            table.add_row(self._spinner, "starting", Text("a Prefect server", style="dim"), "")
        return table

    def _add_row(self, table: Table, stage: ShownStage) -> None:
        if stage.state != "running":
            style = STYLES[stage.state]
            mark = Text(MARKS[stage.state], style=style)
            table.add_row(
                mark, Text(stage.title, style=_quiet(stage)), _figures(stage), _time(stage)
            )
            return
        table.add_row(self._spinner, Text(stage.title, style="bold"), _figures(stage), _time(stage))
        share = stage.progress.share if stage.progress else None
        if share is not None:
            table.add_row("", "", ProgressBar(total=1.0, completed=share, width=40), "")


def _quiet(stage: ShownStage) -> str:
    return "dim" if stage.state == "to come" else ""


def _figures(stage: ShownStage) -> Text:
    if stage.state == "cached":
        return Text("cached", style="dim")
    if stage.progress is None:
        return Text("")
    if stage.state == "running":
        return Text(stage.progress.line())
    return Text(stage.progress.conclusion)


def _time(stage: ShownStage) -> Text:
    if stage.state == "running" and stage.progress is not None:
        return Text(clock(stage.progress.seconds))
    if stage.state in ("done", "failed"):
        return Text(clock(stage.seconds))
    return Text("")


@contextmanager
def shown_in_terminal(planned: Sequence[PlannedStage]) -> Iterator[None]:
    """Show the run within as a live display where standard error is a terminal.

    Prefect's log lines go above it, those below WARNING nowhere: the display says the same."""
    console = Console(file=sys.stderr)
    if not console.is_terminal or os.environ.get("TERM") == "dumb":
        yield
        return
    display = LiveDisplay(planned)
    live = Live(display, console=console, refresh_per_second=4)
    handlers = _console_handlers()
    before = [(handler, handler.console, handler.level) for handler in handlers]
    try:
        with live, displayed_by(display):
            for handler in handlers:
                handler.console = live.console
                handler.setLevel(logging.WARNING)
            yield
    finally:
        for handler, own_console, level in before:
            handler.console = own_console
            handler.setLevel(level)


def _console_handlers() -> list[PrefectConsoleHandler]:
    loggers: list[Any] = [logging.getLogger(), *logging.root.manager.loggerDict.values()]
    found: list[PrefectConsoleHandler] = []
    for logger in loggers:
        for handler in getattr(logger, "handlers", []):
            if isinstance(handler, PrefectConsoleHandler) and handler not in found:
                found.append(handler)
    return found
