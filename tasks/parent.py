"""End a run when the run that waits for it has ended: nothing trains or answers for nobody."""

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar, copy_context
from typing import Any

from prefect import get_client
from prefect.exceptions import ObjectNotFound
from prefect.runtime import flow_run

from distillery.errors import DistilleryError

_SECONDS = 3.0
_ended: ContextVar[list[str] | None] = ContextVar("ended", default=None)
"""How the runs that wait for this one have ended; empty while they run."""


class ParentEnded(DistilleryError):
    """The run that asked for this work has ended, or is being cancelled."""


@contextmanager
def parent_watched() -> Iterator[None]:
    """Let `check_parent` know whether the runs that wait for this one still run.

    They are its parent and the run at the root, whose process the parent may share. A thread asks
    the server; while the server does not answer, they count as alive."""
    waiting: set[Any] = set()
    if flow_run.parent_flow_run_id:
        waiting = {flow_run.parent_flow_run_id, flow_run.root_flow_run_id}
    found: list[str] = []
    done = threading.Event()

    def watch() -> None:
        with get_client(sync_client=True) as client:
            while not found and not done.wait(_SECONDS):
                try:
                    runs = [client.read_flow_run(identity) for identity in waiting]
                except ObjectNotFound:
                    found.append("a run that was deleted")
                except Exception:  # noqa: S112 - whatever the server's trouble is, it is not the parent's end
                    continue
                for run in runs:
                    state = run.state
                    if state and (state.is_final() or state.is_cancelling()):
                        found.append(f"{run.name}: {state.name}")

    token = _ended.set(found)
    if waiting:
        threading.Thread(
            target=copy_context().run, args=(watch,), name="parent", daemon=True
        ).start()
    try:
        yield
    finally:
        done.set()
        _ended.reset(token)


def check_parent() -> None:
    """Raise ParentEnded once a watched run has ended."""
    found = _ended.get()
    if found:
        raise ParentEnded(
            f"{found[0]}: it asked for this work and is gone; a new run goes on from what is kept"
        )
