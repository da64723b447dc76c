"""A run that another one waits for ends when that one has: nothing trains on a GPU for nobody."""

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import copy_context

from prefect import get_client
from prefect.runtime import flow_run

from distillery.errors import DistilleryError

_SECONDS = 3.0


class ParentEnded(DistilleryError):
    """The run that asked for this work has ended, or is being cancelled."""


@contextmanager
def parent_watched() -> Iterator[Callable[[], None]]:
    """Yields `check()`, which raises ParentEnded once the parent of this run has ended; a run without one goes on.

    A thread of its own asks the server. While that does not answer, the parent counts as alive."""
    parent = flow_run.parent_flow_run_id
    found: list[str] = []
    done = threading.Event()

    def watch() -> None:
        with get_client(sync_client=True) as client:
            while not done.wait(_SECONDS):
                try:
                    run = client.read_flow_run(parent)
                except Exception:  # noqa: S112 - whatever the server's trouble is, it is not the parent's end
                    continue
                if run.state and (run.state.is_final() or run.state.is_cancelling()):
                    found.append(f"{run.name}: {run.state.name}")
                    return

    def check() -> None:
        if found:
            raise ParentEnded(f"{found[0]}: it asked for this training and is gone; a new run goes on from here")

    if parent:
        threading.Thread(target=copy_context().run, args=(watch,), name="parent", daemon=True).start()
    try:
        yield check
    finally:
        done.set()
