"""How far a stage is, as a progress artifact in the UI."""

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import copy_context

from prefect import get_run_logger
from prefect.artifacts import create_progress_artifact, update_progress_artifact

_SECONDS = 2.0


@contextmanager
def progress_artifact(key: str, description: str) -> Iterator[Callable[..., None]]:
    """Yields `show(done, of, text="")`, which returns at once: a thread of its own tells the server, every other
    second at most. A server that does not answer costs the display, never the work."""
    latest: list[tuple[float, str]] = [(0.0, description)]
    ended = threading.Event()

    def show(done: float, of: float, text: str = "") -> None:
        latest[0] = (100.0 * done / of if of else 100.0, text or description)

    def publish() -> None:
        artifact, shown = None, None
        while True:
            last = ended.wait(_SECONDS)
            try:
                if artifact is None:
                    artifact = create_progress_artifact(
                        latest[0][0], key=key, description=latest[0][1]
                    )
                elif latest[0] != shown:
                    update_progress_artifact(artifact, *latest[0])
                shown = latest[0]
            except Exception as error:
                get_run_logger().debug("progress is not shown: %s", error)
            if last:
                return

    thread = threading.Thread(
        target=copy_context().run, args=(publish,), name="progress", daemon=True
    )
    thread.start()
    try:
        yield show
    finally:
        ended.set()
        thread.join(_SECONDS)
