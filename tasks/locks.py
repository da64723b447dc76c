"""Prefect's lock on a cache key, as a lease in the shared SQL database: Prefect's own locks do not leave a machine."""

import asyncio
import time
from functools import cache

from prefect import get_run_logger
from prefect.runtime import flow_run, task_run

from distillery.leases import Leases
from distillery.settings import LocalSettings


class StageLocks:
    """A Prefect LockManager (prefect.locking.protocol). Two runs that come to the same work at once: one does it, the
    other waits, finds the record and is Cached."""

    def acquire_lock(
        self, key: str, holder: str, acquire_timeout: float | None = None, hold_timeout: float | None = None
    ) -> bool:
        run = str(flow_run.name or "a run without a name")
        return _leases().acquire(key, holder, run=run, timeout=acquire_timeout, waiting=_say_who)

    def release_lock(self, key: str, holder: str) -> None:
        _leases().release(key, holder)

    def is_locked(self, key: str) -> bool:
        return _leases().is_held(key)

    def is_lock_holder(self, key: str, holder: str) -> bool:
        return _leases().is_held(key, holder)

    def wait_for_lock(self, key: str, timeout: float | None = None) -> bool:
        deadline = None if timeout is None else time.monotonic() + timeout
        while _leases().is_held(key):
            if deadline is not None and time.monotonic() >= deadline:
                return False
            time.sleep(1)
        return True

    async def aacquire_lock(
        self, key: str, holder: str, acquire_timeout: float | None = None, hold_timeout: float | None = None
    ) -> bool:
        return await asyncio.to_thread(self.acquire_lock, key, holder, acquire_timeout, hold_timeout)

    async def await_for_lock(self, key: str, timeout: float | None = None) -> bool:
        return await asyncio.to_thread(self.wait_for_lock, key, timeout)


def _leases() -> Leases:
    return _open(LocalSettings().labels_url)


@cache
def _open(url: str) -> Leases:
    return Leases(url)


def _say_who(run: str) -> None:
    get_run_logger().info("%s: %s is at it; waiting for its result", task_run.name, run)
