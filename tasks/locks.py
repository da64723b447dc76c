"""Prefect's lock on a cache key, as a lease in the shared SQL database.

Prefect's own locks hold on one machine only.
"""

import asyncio
import time
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache

from prefect import get_run_logger
from prefect.runtime import flow_run, task_run
from pydantic import BaseModel

from distillery.settings import LocalSettings
from distillery.storage.leases import Leases
from tasks.parent import ParentEnded, check_parent

_held: dict[tuple[str, str], str] = {}
"""The holder of a key, by the key and the task run that took it."""


class StageLocks:
    """A Prefect LockManager (prefect.locking.protocol).

    Invariant: of two runs that come to the same work at once, one does it; the other waits, finds
    the record and is Cached. Leases expire by themselves, so `hold_timeout` is not used."""

    def acquire_lock(
        self,
        key: str,
        holder: str,
        acquire_timeout: float | None = None,
        hold_timeout: float | None = None,
    ) -> bool:
        mine = key, str(task_run.id)
        before = _held.pop(mine, None)
        if before is not None:
            # Prefect does not release a lock when a hit can't be read: the retry would wait for
            # itself.
            shared_leases().release(key, before)
        run = str(flow_run.name or "a run without a name")
        taken = shared_leases().acquire(
            key, holder, run=run, timeout=acquire_timeout, waiting=_waiting()
        )
        if taken:
            _held[mine] = holder
        return taken

    def release_lock(self, key: str, holder: str) -> None:
        _held.pop((key, str(task_run.id)), None)
        shared_leases().release(key, holder)

    def is_locked(self, key: str) -> bool:
        return shared_leases().is_held(key)

    def is_lock_holder(self, key: str, holder: str) -> bool:
        return shared_leases().holds(key, holder)

    def wait_for_lock(self, key: str, timeout: float | None = None) -> bool:
        deadline = None if timeout is None else time.monotonic() + timeout
        while shared_leases().is_held(key):
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


class Lease(BaseModel):
    """A lease that a run has taken on `key`, as `holder`."""

    key: str
    holder: str


@contextmanager
def leased(key: str, children_of: str | None = None) -> Iterator[Lease]:
    """Hold the lease on `key`, once no other run has it: for work that is no stage.

    `children_of`: the run whose children share the lease (`parents_lease`). Where this fails, the
    lease stays with those that are still at work, and a retry of the same run holds it with them.
    """
    holder = f"children of {children_of}" if children_of else uuid.uuid4().hex
    run = str(flow_run.name or "a run without a name")
    shared_leases().acquire(key, holder, run=run, waiting=_waiting())
    try:
        yield Lease(key=key, holder=holder)
    except BaseException:
        if children_of:
            shared_leases().abandon(key, holder)
        raise
    finally:
        shared_leases().release(key, holder)


@contextmanager
def parents_lease(lease: Lease) -> Iterator[Callable[[], None]]:
    """Renew the parent's lease while this run works: if the parent is killed, another run that
    comes to the same work waits for what this one still does. Yield a function that raises
    ParentEnded once the lease is lost."""
    with shared_leases().shared(lease.key, lease.holder) as is_lost:

        def check() -> None:
            if is_lost():
                raise ParentEnded(
                    "the run that asked for this work has ended; a new run goes on from what is "
                    "kept"
                )

        check()
        yield check


def shared_leases() -> Leases:
    """Return the leases in the shared database, which this process opens once."""
    return _open(LocalSettings().labels_url)


@cache
def _open(url: str) -> Leases:
    return Leases(url)


def _waiting() -> Callable[[str], None]:
    """Return what is called at each look: it logs once which run is waited for, and raises
    ParentEnded once nobody waits for this run."""
    said: list[str] = []

    def look(run: str) -> None:
        check_parent()
        if not said:
            get_run_logger().info(
                "%s: %s does this work already; waiting for its result", task_run.name, run
            )
            said.append(run)

    return look
