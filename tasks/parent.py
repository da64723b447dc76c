"""A run that another one waits for ends when that one has: nothing trains on a GPU for nobody."""

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar, copy_context

from prefect import get_client
from prefect.exceptions import ObjectNotFound
from prefect.runtime import flow_run

from distillery.errors import DistilleryError

_SECONDS = 3.0
_ended: ContextVar[list[str] | None] = ContextVar("ended", default=None)
"""What is known of the ends of the runs that wait for this one."""


class ParentEnded(DistilleryError):
    """The run that asked for this work has ended, or is being cancelled."""


@contextmanager
def parent_watched() -> Iterator[None]:
    """Has `check_parent` know, meanwhile, whether the runs that wait for this one still run: its parent, and the run at
    the root of them all, whose process the parent may share. A thread of its own asks the server; while that does not
    answer, they count as alive."""
    waiting = (
        {flow_run.parent_flow_run_id, flow_run.root_flow_run_id}
        if flow_run.parent_flow_run_id
        else set()
    )
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
                else:
                    ends = [
                        run
                        for run in runs
                        if run.state and (run.state.is_final() or run.state.is_cancelling())
                    ]
                    found.extend(f"{run.name}: {run.state.name}" for run in ends)

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
    """Raises ParentEnded once a watched run has ended."""
    if found := _ended.get():
        raise ParentEnded(
            f"{found[0]}: it asked for this training and is gone; a new run goes on from the last checkpoint, if any"
        )
