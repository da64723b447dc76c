"""The local copies of a remote store's artifacts: folders by digest, up to a limit in bytes.

DIGEST/ is a copy, DIGEST.reading-*/ is being downloaded, locks/ holds the lock files.
"""

import os
import shutil
import uuid
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import ClassVar

from filelock import FileLock, Timeout


class Cache:
    """Copies of artifacts in `folder`, at most `limit` bytes; the least recently used goes first.

    Invariant: a copy that a living process was given is never evicted; the kernel drops the locks
    of a process that ends, even if it is killed. All locks are exclusive: each process that uses
    DIGEST keeps a file of its own locked, locks/DIGEST.use-*, until it ends. Adding such a file,
    and looking for users and evicting, happen under locks/DIGEST, so that no user comes between
    the look and the eviction. (filelock has a shared lock too, but as an SQLite database that
    works neither on network file systems nor, in a folder open to a group, without hard links.)"""

    _held: ClassVar[dict[Path, FileLock]] = {}

    def __init__(self, folder: Path, limit: float) -> None:
        self.folder = folder
        self._limit = limit

    def hold(self, digest: str) -> Path:
        """Return where the copy is or will be; it is not evicted until this process ends."""
        entry = self.folder / digest
        if entry not in self._held:
            with self._lock(digest):
                # Removes what ended processes left, of which each run would leave more.
                self._is_in_use(digest)
                lock = self._lock(f"{digest}.use-{uuid.uuid4().hex[:8]}")
                lock.acquire()
            self._held[entry] = lock
        with suppress(FileNotFoundError):
            os.utime(entry)
        return entry

    @contextmanager
    def writing(self, digest: str) -> Iterator[None]:
        """Keep other processes from checking or writing the copy meanwhile."""
        with self._lock(f"{digest}.writing"):
            yield

    def make_room(self, needed: int) -> None:
        """Evict until `needed` more bytes are within the limit or all that is left is in use."""
        copies = []
        total = needed
        for entry in self.folder.iterdir():
            if entry.name != "locks":
                size = bytes_below(entry)
                copies.append((used_at(entry), size, entry))
                total += size
        for _, size, entry in sorted(copies):
            if total <= self._limit:
                return
            if self._evict(entry):
                total -= size

    def _evict(self, entry: Path) -> bool:
        digest = entry.name.partition(".")[0]
        try:
            with self._lock(digest).acquire(blocking=False):
                if self._is_in_use(digest):
                    return False
                shutil.rmtree(entry, ignore_errors=True)
        except Timeout:
            return False
        return True

    def _is_in_use(self, digest: str) -> bool:
        """Return whether a living process uses it; remove the lock files of those that ended."""
        in_use = False
        for file in (self.folder / "locks").glob(f"{digest}.use-*"):
            try:
                with FileLock(file, blocking=False):
                    pass
            except Timeout:
                in_use = True
            else:
                file.unlink(missing_ok=True)
        return in_use

    def _lock(self, name: str) -> FileLock:
        locks = self.folder / "locks"
        locks.mkdir(parents=True, exist_ok=True)
        return FileLock(locks / name, thread_local=False)


def used_at(entry: Path) -> float:
    """Return when `entry` was last held, in seconds since the epoch; 0 if it is gone."""
    try:
        return entry.stat().st_mtime
    except FileNotFoundError:
        return 0.0


def bytes_below(folder: Path) -> int:
    """Return the size of all files below `folder`; 0 if it is being removed."""
    try:
        return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
    except FileNotFoundError:
        return 0
