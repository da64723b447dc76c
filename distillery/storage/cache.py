"""storage/cache"""

import fcntl
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import ClassVar, TextIO


class Cache:
    """Copies of a remote store's artifacts: at most `limit` bytes, the least recently used going first, but none that a
    living process has been given. DIGEST.reading-*/ are being written; locks/DIGEST is held by each process that uses
    or writes DIGEST, for as long as it lives."""

    _held: ClassVar[dict[Path, TextIO]] = {}

    def __init__(self, folder: Path, limit: float) -> None:
        self.folder, self._limit = folder, limit

    def hold(self, digest: str) -> Path:
        """Where the artifact is or will be; nobody evicts it until this process ends, however it ends."""
        entry = self.folder / digest
        if entry not in self._held:
            lock = self._lock(digest)
            fcntl.flock(lock, fcntl.LOCK_SH)
            self._held[entry] = lock
        with suppress(FileNotFoundError):
            os.utime(entry)
        return entry

    @contextmanager
    def writing(self, digest: str) -> Iterator[None]:
        """Keeps other processes from looking at the artifact, or writing it, meanwhile."""
        with self._lock(f"{digest}.writing") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            yield

    def make_room(self, needed: int) -> None:
        """Evicts until `needed` bytes more are within the limit, or until all that is left is in use."""
        entries = [entry for entry in self.folder.iterdir() if entry.name != "locks"]
        by_use = sorted((_used(entry), _bytes_below(entry), entry) for entry in entries)
        total = needed + sum(size for _, size, _ in by_use)
        for _, size, entry in by_use:
            if total <= self._limit:
                return
            if self._evict(entry):
                total -= size

    def _evict(self, entry: Path) -> bool:
        with self._lock(entry.name.partition(".")[0]) as lock:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                return False
            shutil.rmtree(entry, ignore_errors=True)
        return True

    def _lock(self, digest: str) -> TextIO:
        locks = self.folder / "locks"
        locks.mkdir(parents=True, exist_ok=True)
        return (locks / digest).open("w")


def _used(entry: Path) -> float:
    try:
        return entry.stat().st_mtime
    except FileNotFoundError:
        return 0.0


def _bytes_below(folder: Path) -> int:
    try:
        return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
    except FileNotFoundError:
        return 0
