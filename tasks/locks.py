"""Prefect's lock on a cache key, as a lease in the shared SQL database: Prefect's own locks do not leave a machine."""

import asyncio
import time
from collections.abc import Callable
from functools import cache

from prefect import get_run_logger
from prefect.runtime import flow_run, task_run

from distillery.settings import LocalSettings
from distillery.storage.leases import Leases
from tasks.parent import check_parent

_held: dict[tuple[str, str], str] = {}
"""Who holds a key, by the key and the task run that took it."""


class StageLocks:
    """A Prefect LockManager (prefect.locking.protocol). Two runs that come to the same work at once: one does it, the
    other waits, finds the record and is Cached. Leases expire by themselves, so nothing has a `hold_timeout`."""

    def acquire_lock(
        self,
        key: str,
        holder: str,
        acquire_timeout: float | None = None,
        hold_timeout: float | None = None,
    ) -> bool:
        mine = key, str(task_run.id)
        if before := _held.pop(mine, None):
            # Prefect does not release it where a hit can't be read: the next try would wait for itself.
            _leases().release(key, before)
        run = str(flow_run.name or "a run without a name")
        taken = _leases().acquire(key, holder, run=run, timeout=acquire_timeout, waiting=_waiting())
        if taken:
            _held[mine] = holder
        return taken

    def release_lock(self, key: str, holder: str) -> None:
        _held.pop((key, str(task_run.id)), None)
        _leases().release(key, holder)

    def is_locked(self, key: str) -> bool:
        return _leases().is_held(key)

    def is_lock_holder(self, key: str, holder: str) -> bool:
        return _leases().holds(key, holder)

    def wait_for_lock(self, key: str, timeout: float | None = None) -> bool:
        deadline = None if timeout is None else time.monotonic() + timeout
        while _leases().is_held(key):
            if deadline is not None and time.monotonic() >= deadline:
                return False
            time.sleep(1)
        return True

    async def aacquire_lock(
        self,
        key: str,
        holder: str,
        acquire_timeout: float | None = None,
        hold_timeout: float | None = None,
    ) -> bool:
        return await asyncio.to_thread(
            self.acquire_lock, key, holder, acquire_timeout, hold_timeout
        )

    async def await_for_lock(self, key: str, timeout: float | None = None) -> bool:
        return await asyncio.to_thread(self.wait_for_lock, key, timeout)


def _leases() -> Leases:
    return _open(LocalSettings().labels_url)


@cache
def _open(url: str) -> Leases:
    return Leases(url)


def _waiting() -> Callable[[str], None]:
    """Says once for whom this run waits, and waits no longer when nobody waits for it."""
    said: list[str] = []

    def look(run: str) -> None:
        check_parent()
        if not said:
            get_run_logger().info("%s: %s is at it; waiting for its result", task_run.name, run)
            said.append(run)

    return look
