"""The artifact store: content-addressed folders on any fsspec URL, all that workers on different machines share.

DIGEST/files/ holds an artifact, DIGEST/artifact.json lists path, size and sha256 of each of its files; the digest is
that of the list, so it covers all of them. artifact.json is written last: without it the folder is not there. A local
store writes beside and renames; object storage is written straight to the digest's prefix. Whatever is read is verified
against the list, and the list against the digest.
"""

import errno
import hashlib
import json
import os
import re
import shutil
import tempfile
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import fsspec
from fsspec.implementations.local import LocalFileSystem
from pydantic import ValidationError

from distillery.errors import ArtifactDamaged, StoreError, StoreUnavailable
from distillery.records import Artifact, Record, digest_of
from distillery.settings import LocalSettings

MANIFEST = "artifact.json"
FILES = "files"
_CHUNK = 1 << 20
_NO_ROOM = re.compile("|".join(map(os.strerror, (errno.ENOSPC, errno.EDQUOT, errno.EFBIG))))


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
    """Folders by digest under `url`. Raises StoreUnavailable where the storage does not answer, ArtifactDamaged where a
    folder is missing, half-written or altered."""

    def __init__(self, url: str | None = None, cache: Path | None = None) -> None:
        settings = LocalSettings()
        self.url = (url or settings.store_url).rstrip("/")
        try:
            self._fs, self._root = fsspec.url_to_fs(self.url)
        except (ValueError, ImportError) as error:
            raise StoreError(f"DISTILLERY_STORE {self.url.split('://')[0]}://…: {error}") from error
        self._local = isinstance(self._fs, LocalFileSystem)
        self._cache = cache or settings.folder / "cache"

    def put(self, folder: Path) -> Artifact:
        """Stores the content of `folder`; storing the same content twice writes once."""
        files = list_files(folder)
        if not files:
            raise StoreError(f"{folder}: an empty folder is no artifact")
        digest = digest_of_files(files)
        artifact = Artifact(uri=f"{self.url}/{digest}", sha256=digest, bytes=sum(f.bytes for f in files))
        with _storage_errors(self.url):
            if not self._is_whole(digest):
                (self._put_local if self._local else self._put_remote)(folder, digest, files)
        return artifact

    def fetch(self, artifact: Artifact) -> Path:
        """A local folder with the artifact's verified content. Treat it as read-only."""
        with _storage_errors(self.url):
            folder = Path(self._root) / artifact.sha256 if self._local else self._download(artifact.sha256)
        self._verify(folder, artifact.sha256)
        return folder / FILES

    def holds(self, artifact: Artifact) -> bool:
        """Whether the store has the artifact whole: every byte of a local one, every file's size of a remote one."""
        with _storage_errors(self.url):
            return self._is_whole(artifact.sha256)

    def write_record(self, name: str, text: str) -> None:
        """Keeps a small text, such as a record that one worker hands to another, under `name`."""
        with _storage_errors(self.url):
            self._fs.makedirs(f"{self._root}/records", exist_ok=True)
            self._fs.pipe_file(f"{self._root}/records/{name}", text.encode())

    def read_record(self, name: str) -> str:
        """Raises ArtifactDamaged where nothing is kept under `name`."""
        with _storage_errors(self.url):
            try:
                text: bytes = self._fs.cat_file(f"{self._root}/records/{name}")
            except FileNotFoundError as error:
                raise ArtifactDamaged(f"{self.url}/records/{name}: not in the store; do both sides use one?") from error
        return text.decode()

    def _is_whole(self, digest: str) -> bool:
        path = f"{self._root}/{digest}"
        try:
            if self._local:
                self._verify(Path(path), digest)
                return True
            files = _read_manifest(self._fs.cat_file(f"{path}/{MANIFEST}").decode(), path)
            sizes = all(self._fs.size(f"{path}/{FILES}/{entry.path}") == entry.bytes for entry in files)
            return sizes and digest_of_files(files) == digest
        except (ArtifactDamaged, FileNotFoundError):
            return False

    def _put_local(self, folder: Path, digest: str, files: tuple[FileEntry, ...]) -> None:
        root = Path(self._root)
        root.mkdir(parents=True, exist_ok=True)
        beside = Path(tempfile.mkdtemp(prefix=".writing-", dir=root))
        try:
            for entry in files:
                target = beside / FILES / entry.path
                target.parent.mkdir(parents=True, exist_ok=True)
                shutil.copyfile(folder / entry.path, target)
            (beside / MANIFEST).write_text(_manifest_text(files))
            final = root / digest
            if final.exists() and not self._is_whole(digest):
                # What was damaged after it was written moves aside, so that the good copy can take its place.
                os.replace(final, root / f"{digest}.damaged-{uuid.uuid4().hex[:8]}")
            _take_name(beside, final)
        finally:
            shutil.rmtree(beside, ignore_errors=True)

    def _put_remote(self, folder: Path, digest: str, files: tuple[FileEntry, ...]) -> None:
        for entry in files:
            self._fs.put_file(str(folder / entry.path), f"{self._root}/{digest}/{FILES}/{entry.path}")
        self._fs.pipe_file(f"{self._root}/{digest}/{MANIFEST}", _manifest_text(files).encode())

    def _download(self, digest: str) -> Path:
        final = self._cache / digest
        if final.exists():
            try:
                self._verify(final, digest)
                return final
            except ArtifactDamaged:
                shutil.rmtree(final, ignore_errors=True)
        remote = f"{self._root}/{digest}"
        if not self._fs.exists(f"{remote}/{MANIFEST}"):
            raise ArtifactDamaged(f"{remote}: not in the store, or not completely written; run its stage again")
        self._cache.mkdir(parents=True, exist_ok=True)
        beside = Path(tempfile.mkdtemp(prefix=".reading-", dir=self._cache))
        try:
            manifest = self._fs.cat_file(f"{remote}/{MANIFEST}").decode()
            for entry in _read_manifest(manifest, remote):
                target = beside / FILES / entry.path
                target.parent.mkdir(parents=True, exist_ok=True)
                self._fs.get_file(f"{remote}/{FILES}/{entry.path}", str(target))
            (beside / MANIFEST).write_text(manifest)
            self._verify(beside, digest)
            _take_name(beside, final)
        except FileNotFoundError as error:
            raise ArtifactDamaged(f"{self.url}/{digest}: a file is missing ({error}); run its stage again") from error
        finally:
            shutil.rmtree(beside, ignore_errors=True)
        return final

    def _verify(self, folder: Path, digest: str) -> None:
        manifest = folder / MANIFEST
        if not manifest.exists():
            raise ArtifactDamaged(f"{folder}: not in the store, or not completely written; run its stage again")
        files = _read_manifest(manifest.read_text(), str(folder))
        if digest_of_files(files) != digest:
            raise ArtifactDamaged(f"{manifest}: does not match the digest {digest[:12]}; run its stage again")
        for entry in files:
            path = folder / FILES / entry.path
            if not path.is_file() or path.stat().st_size != entry.bytes or sha256_of(path) != entry.sha256:
                raise ArtifactDamaged(f"{path}: missing or altered since it was written; run its stage again")


def _manifest_text(files: tuple[FileEntry, ...]) -> str:
    return json.dumps({"files": [entry.model_dump() for entry in files]}, indent=1)


def _read_manifest(text: str, place: str) -> tuple[FileEntry, ...]:
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


@contextmanager
def _storage_errors(url: str) -> Iterator[None]:
    """Turns what file systems and Azure raise into one line that says what to do."""
    try:
        yield
    except (StoreError, FileNotFoundError):
        raise
    except OSError as error:
        if error.errno in (28, 122):
            raise StoreError(
                f"{url}: the disk is full; free some space or set DISTILLERY_STORE, then run again"
            ) from error
        if error.errno in (13, 30):
            raise StoreError(
                f"{url}: not writable ({error.strerror}); set DISTILLERY_STORE to a place that is"
            ) from error
        raise StoreUnavailable(f"{url}: the store does not answer ({error})") from error
    except Exception as error:
        if type(error).__module__.startswith(("azure.", "aiohttp")):
            raise StoreUnavailable(f"{url}: the store does not answer ({type(error).__name__})") from error
        raise
