"""The artifact store: content-addressed folders under an fsspec URL, all that workers on different machines share.

DIGEST/files/ holds an artifact, DIGEST/artifact.json lists path, size and sha256 of each of its files; the digest is
that of the list, so it covers all of them. artifact.json is written last: without it the folder is not there. A local
store writes beside and renames; object storage is written straight to the digest's prefix, and artifact.json only if it
is absent. Whatever is read is verified against the list, and the list against the digest. What a remote store hands out
is kept in a local cache.

Beside the artifacts: records/ and results/, small objects by name, and work/KEY/, the state of a stage under way. The
time of artifact.json says when an artifact was last used: see housekeeping.py.
"""

import fcntl
import hashlib
import json
import os
import re
import shutil
import tempfile
import uuid
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any, ClassVar, TextIO

from pydantic import ValidationError

from distillery.errors import ArtifactDamaged, StoreError
from distillery.records import Artifact, Record, digest_of
from distillery.settings import LocalSettings
from distillery.storage import ASIDE, NO_ROOM, Storage

MANIFEST = "artifact.json"
FILES = "files"
WORK = "work"
RECORDS = "records"
RESULTS = "results"
RUNS = "runs"
_CHUNK = 1 << 20
_STILL_NEW = timedelta(hours=1)
_NO_ROOM = re.compile("|".join(map(os.strerror, NO_ROOM)))


class FileEntry(Record):
    path: str
    sha256: str
    bytes: int


def sha256_of(path: Path) -> str:
    """SHA-256 (hex) of a file's content, read in pieces."""
    hasher = hashlib.sha256()
    with path.open("rb") as file:
        while piece := file.read(_CHUNK):
            hasher.update(piece)
    return hasher.hexdigest()


def list_files(folder: Path) -> tuple[FileEntry, ...]:
    """Every file below `folder`, in the order of its path; paths with forward slashes."""
    entries = []
    for path in sorted(p for p in folder.rglob("*") if p.is_file()):
        entries.append(
            FileEntry(path=path.relative_to(folder).as_posix(), sha256=sha256_of(path), bytes=path.stat().st_size)
        )
    return tuple(entries)


def digest_of_files(files: tuple[FileEntry, ...]) -> str:
    return digest_of([entry.model_dump() for entry in files])


class ArtifactStore:
    """Folders by digest under `url`. Raises StoreUnavailable where the storage does not answer for `wait_s` seconds (by
    default the settings'), ArtifactDamaged where a folder is missing, half-written or altered, CredentialsError where
    access is refused, StoreError for what else keeps it from being read or written."""

    def __init__(self, url: str | None = None, cache: Path | None = None, wait_s: float | None = None) -> None:
        settings = LocalSettings()
        self.storage = Storage(url or settings.store_url, settings.store_wait if wait_s is None else wait_s)
        self.url = self.storage.url
        self._cache = _Cache(cache or settings.folder / "cache", settings.cache_gb * 1e9)

    def put(self, folder: Path) -> Artifact:
        """Stores the content of `folder`; storing the same content twice writes once."""
        files = list_files(folder)
        if not files:
            raise StoreError(f"{folder}: an empty folder is no artifact")
        digest = digest_of_files(files)
        if not self._is_whole(digest):
            (self._put_local if self.storage.is_local else self._put_remote)(folder, digest, files)
        return Artifact(uri=f"{self.url}/{digest}", sha256=digest, bytes=sum(f.bytes for f in files))

    def fetch(self, artifact: Artifact) -> Path:
        """A local folder with the artifact's verified content. Treat it as read-only."""
        digest = artifact.sha256
        if not self.storage.is_local:
            return self._fetch_remote(digest) / FILES
        with suppress(FileNotFoundError):
            self._use(digest)
        folder = Path(self.storage.root) / digest
        _verify(folder, digest)
        return folder / FILES

    def holds(self, artifact: Artifact) -> bool:
        """Whether the store has the artifact whole: every byte of a local one, every file's size of a remote one."""
        return self._is_whole(artifact.sha256)

    def files(self, digest: str) -> tuple[FileEntry, ...]:
        """What an artifact's list says is in it. Raises ArtifactDamaged where it can't be read."""
        return _read_manifest(self.read_object(f"{digest}/{MANIFEST}"), f"{self.url}/{digest}")

    def write_object(self, name: str, content: bytes) -> None:
        """Keeps a small object under `name`, whole or not at all, in place of what was there."""
        self.storage.write(name, content)

    def read_object(self, name: str) -> bytes:
        """Raises ArtifactDamaged where nothing is kept under `name`."""
        try:
            return self.storage.read(name)
        except FileNotFoundError as error:
            raise ArtifactDamaged(f"{self.url}/{name}: not in the store; do both sides use one?") from error

    def write_record(self, name: str, text: str) -> None:
        """Keeps a record that one worker hands to another, or that outlives its run, under `name`."""
        self.write_object(f"{RECORDS}/{name}", text.encode())

    def read_record(self, name: str) -> str:
        """Raises ArtifactDamaged where nothing is kept under `name`."""
        return self.read_object(f"{RECORDS}/{name}").decode()

    def save_checkpoint(self, key: str, folder: Path) -> None:
        """Keeps the content of `folder` as the state of the work `key`; once it is whole, the state before goes."""
        before = self._snapshots(key)
        number = int(before[-1].rpartition("/")[2].partition("-")[0]) + 1 if before else 1
        # Two that take each other for dead would write the same number.
        snapshot = f"{WORK}/{key}/{number:06d}-{uuid.uuid4().hex[:8]}"
        self._write_folder(folder, snapshot, list_files(folder))
        for old in before:
            self.storage.remove_folder(old, self.storage.find(old))

    def load_checkpoint(self, key: str, into: Path) -> bool:
        """Writes the newest whole state of the work `key` into the empty folder `into`; False where there is none."""
        for snapshot in reversed(self._snapshots(key)):
            beside = Path(tempfile.mkdtemp(prefix=ASIDE, dir=into.parent))
            try:
                self._read_folder(snapshot, beside)
                os.rename(beside / FILES, into)
                return True
            except (ArtifactDamaged, FileNotFoundError):
                continue
            finally:
                shutil.rmtree(beside, ignore_errors=True)
        return False

    def drop_checkpoint(self, key: str) -> None:
        """Removes all states of the work `key`."""
        self.storage.remove_folder(f"{WORK}/{key}", self.storage.find(f"{WORK}/{key}"))

    def _snapshots(self, key: str) -> list[str]:
        """The oldest first, half-written ones among them."""
        depth = f"{WORK}/{key}/".count("/")
        names = {"/".join(file.name.split("/")[: depth + 1]) for file in self.storage.find(f"{WORK}/{key}")}
        return sorted(names)

    def _is_whole(self, digest: str) -> bool:
        try:
            self._use(digest)
            if self.storage.is_local:
                _verify(Path(self.storage.root) / digest, digest)
                return True
            files = _read_manifest(self.storage.read(f"{digest}/{MANIFEST}"), f"{self.url}/{digest}")
            sizes = {file.name: file.bytes for file in self.storage.find(digest)}
            listed = all(sizes.get(f"{digest}/{FILES}/{entry.path}") == entry.bytes for entry in files)
            return listed and digest_of_files(files) == digest
        except (ArtifactDamaged, FileNotFoundError):
            return False

    def _use(self, digest: str) -> None:
        """Makes the artifact new again, before it is looked at, so that none is collected while a run counts on it.
        Raises FileNotFoundError where it is not there."""
        manifest = f"{digest}/{MANIFEST}"
        if datetime.now(UTC) - self.storage.modified(manifest) > _STILL_NEW:
            self.storage.touch(manifest)

    def _put_local(self, folder: Path, digest: str, files: tuple[FileEntry, ...]) -> None:
        beside = f"{ASIDE}{uuid.uuid4().hex[:8]}"
        path, final = Path(self.storage.root) / beside, Path(self.storage.root) / digest
        try:
            self._write_folder(folder, beside, files)
            if final.exists() and not self._is_whole(digest):
                # What was damaged after it was written moves aside, so that the good copy can take its place.
                os.replace(final, final.with_name(f"{digest}.damaged-{uuid.uuid4().hex[:8]}"))
            _take_name(path, final)
        finally:
            shutil.rmtree(path, ignore_errors=True)

    def _put_remote(self, folder: Path, digest: str, files: tuple[FileEntry, ...]) -> None:
        for entry in files:
            self.storage.upload(folder / entry.path, f"{digest}/{FILES}/{entry.path}")
        manifest, text = f"{digest}/{MANIFEST}", _manifest_text(files)
        if not self.storage.create(manifest, text) and not self._is_whole(digest):
            # It is not another writer's but damaged.
            self.storage.write(manifest, text)

    def _write_folder(self, folder: Path, name: str, files: tuple[FileEntry, ...]) -> None:
        for entry in files:
            self.storage.upload(folder / entry.path, f"{name}/{FILES}/{entry.path}")
        self.storage.write(f"{name}/{MANIFEST}", _manifest_text(files))

    def _read_folder(self, name: str, target: Path) -> None:
        """Raises FileNotFoundError for a missing file, ArtifactDamaged for one that does not match the list."""
        manifest = self.storage.read(f"{name}/{MANIFEST}")
        files = _read_manifest(manifest, f"{self.url}/{name}")
        for entry in files:
            self.storage.download(f"{name}/{FILES}/{entry.path}", target / FILES / entry.path)
        _verify_files(target, files)
        (target / MANIFEST).write_bytes(manifest)

    def _fetch_remote(self, digest: str) -> Path:
        try:
            entry = self._cache.hold(digest)
            # One at a time: what another process has just put there in place of a damaged copy stays.
            with self._cache.writing(digest):
                with suppress(ArtifactDamaged):
                    _verify(entry, digest)
                    with suppress(FileNotFoundError):
                        self._use(digest)
                    return entry
                self._download(digest, entry)
        except FileNotFoundError as error:
            raise ArtifactDamaged(
                f"{self.url}/{digest}: not in the store, or not completely written; run its stage again"
            ) from error
        except OSError as error:
            raise StoreError(
                f"{self._cache.folder}: {error.strerror}; free some space or move DISTILLERY_HOME"
            ) from error
        return entry

    def _download(self, digest: str, entry: Path) -> None:
        shutil.rmtree(entry, ignore_errors=True)
        self._use(digest)
        listed = {file.name: file for file in self.storage.find(digest)}
        self._cache.make_room(sum(file.bytes for file in listed.values()))
        beside = Path(tempfile.mkdtemp(prefix=f"{digest}.reading-", dir=self._cache.folder))
        try:
            self._read_folder(digest, beside)
            _verify(beside, digest)
            _take_name(beside, entry)
        except ArtifactDamaged:
            # Where sizes are right only reading shows the damage. Without its manifest the artifact counts as missing.
            self.storage.remove(listed[f"{digest}/{MANIFEST}"])
            raise
        finally:
            shutil.rmtree(beside, ignore_errors=True)


class _Cache:
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


def _verify(folder: Path, digest: str) -> None:
    manifest = folder / MANIFEST
    if not manifest.exists():
        raise ArtifactDamaged(f"{folder}: not in the store, or not completely written; run its stage again")
    files = _read_manifest(manifest.read_bytes(), str(folder))
    if digest_of_files(files) != digest:
        raise ArtifactDamaged(f"{manifest}: does not match the digest {digest[:12]}; run its stage again")
    _verify_files(folder, files)


def _verify_files(folder: Path, files: tuple[FileEntry, ...]) -> None:
    for entry in files:
        path = folder / FILES / entry.path
        if not path.is_file() or path.stat().st_size != entry.bytes or sha256_of(path) != entry.sha256:
            raise ArtifactDamaged(f"{path}: missing or altered since it was written; run its stage again")


def _manifest_text(files: tuple[FileEntry, ...]) -> bytes:
    return json.dumps({"files": [entry.model_dump() for entry in files]}, indent=1).encode()


def _read_manifest(text: bytes, place: str) -> tuple[FileEntry, ...]:
    try:
        payload: dict[str, Any] = json.loads(text)
        files = tuple(FileEntry(**entry) for entry in payload["files"])
    except (ValueError, KeyError, TypeError, ValidationError) as error:
        raise ArtifactDamaged(
            f"{place}/{MANIFEST}: can't be read ({type(error).__name__}); run its stage again"
        ) from error
    if any(Path(entry.path).is_absolute() or ".." in Path(entry.path).parts for entry in files):
        raise ArtifactDamaged(f"{place}/{MANIFEST}: names a file outside the folder")
    return files


def _take_name(beside: Path, final: Path) -> None:
    """Renames; where another run has written the same content in the meantime, its folder stands."""
    try:
        os.rename(beside, final)
    except OSError:
        if not (final / MANIFEST).exists():
            raise


@contextmanager
def working_folder(purpose: str) -> Iterator[Path]:
    """A scratch folder on the disk that holds DISTILLERY_HOME, removed afterwards whatever happens.

    Raises StoreError where the disk is full, whichever library found it so."""
    parent = LocalSettings().folder / "work"
    try:
        parent.mkdir(parents=True, exist_ok=True)
        folder = Path(tempfile.mkdtemp(prefix=f"{purpose}-", dir=parent))
    except OSError as error:
        raise StoreError(
            f"DISTILLERY_HOME {parent.parent}: can't be written ({error.strerror}); set another"
        ) from error
    try:
        yield folder
    except StoreError:
        raise
    except Exception as error:
        if not (reason := _no_room(error)):
            raise
        raise StoreError(
            f"{parent}: the disk is full ({reason}); free some space or move DISTILLERY_HOME, then run again"
        ) from error
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _no_room(error: BaseException | None) -> str:
    """What the system said of a disk without room, of which safetensors and shutil keep no errno; or nothing."""
    while error:
        if found := _NO_ROOM.search(str(error)):
            return found[0]
        error = error.__cause__ or error.__context__
    return ""
