"""The artifact store: content-addressed folders under an fsspec URL, all that workers on different machines share.

DIGEST/files/ holds an artifact, DIGEST/artifact.json lists path, size and sha256 of each of its files; the digest is
that of the list, so it covers all of them. artifact.json is written last: without it the folder is not there. A local
store writes beside and renames; object storage is written straight to the digest's prefix, and artifact.json only if it
is absent. Whatever is read is verified against the list, and the list against the digest. What a remote store hands out
is kept in a local cache.

Beside the artifacts: records/ and results/, small objects by name, and work/KEY/, the state of a stage under way. The
time of artifact.json says when an artifact was last used: see housekeeping.py.
"""

import os
import shutil
import tempfile
import uuid
from contextlib import suppress
from datetime import UTC, datetime, timedelta
from pathlib import Path

from distillery.errors import ArtifactDamaged, StoreError
from distillery.records import Artifact
from distillery.settings import LocalSettings
from distillery.storage.cache import Cache
from distillery.storage.digests import FileEntry, digest_of_files, list_files
from distillery.storage.files import UNFINISHED, Storage
from distillery.storage.manifest import (
    FILES,
    MANIFEST,
    manifest_text,
    read_manifest,
    rename_into_place,
    verify_files,
    verify_folder,
)

WORK = "work"

RECORDS = "records"

RESULTS = "results"

RUNS = "runs"

_STILL_NEW = timedelta(hours=1)


class ArtifactStore:
    """Folders by digest under `url`. Raises StoreUnavailable where the storage does not answer for `wait_s` seconds (by
    default the settings'), ArtifactDamaged where a folder is missing, half-written or altered, CredentialsError where
    access is refused, StoreError for what else keeps it from being read or written."""

    def __init__(
        self, url: str | None = None, cache: Path | None = None, wait_s: float | None = None
    ) -> None:
        settings = LocalSettings()
        self.storage = Storage(
            url or settings.store_url, settings.store_wait if wait_s is None else wait_s
        )
        self.url = self.storage.url
        self._cache = Cache(cache or settings.folder / "cache", settings.cache_gb * 1e9)

    def put(self, folder: Path) -> Artifact:
        """Stores the content of `folder`; storing the same content twice writes once."""
        files = list_files(folder)
        if not files:
            raise StoreError(f"{folder}: an empty folder is no artifact")
        digest = digest_of_files(files)
        if not self._is_whole(digest):
            (self._put_local if self.storage.is_local else self._put_remote)(folder, digest, files)
        return Artifact(
            uri=f"{self.url}/{digest}", sha256=digest, bytes=sum(f.bytes for f in files)
        )

    def fetch(self, artifact: Artifact) -> Path:
        """A local folder with the artifact's verified content. Treat it as read-only."""
        digest = artifact.sha256
        if not self.storage.is_local:
            return self._fetch_remote(digest) / FILES
        with suppress(FileNotFoundError):
            self._use(digest)
        folder = Path(self.storage.root) / digest
        verify_folder(folder, digest)
        return folder / FILES

    def holds(self, artifact: Artifact) -> bool:
        """Whether the store has the artifact whole: every byte of a local one, every file's size of a remote one."""
        return self._is_whole(artifact.sha256)

    def files(self, digest: str) -> tuple[FileEntry, ...]:
        """What an artifact's list says is in it. Raises ArtifactDamaged where it can't be read."""
        return read_manifest(self.read_object(f"{digest}/{MANIFEST}"), f"{self.url}/{digest}")

    def write_object(self, name: str, content: bytes) -> None:
        """Keeps a small object under `name`, whole or not at all, in place of what was there."""
        self.storage.write(name, content)

    def read_object(self, name: str) -> bytes:
        """Raises ArtifactDamaged where nothing is kept under `name`."""
        try:
            return self.storage.read(name)
        except FileNotFoundError as error:
            raise ArtifactDamaged(
                f"{self.url}/{name}: not in the store; do both sides use one?"
            ) from error

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
            beside = Path(tempfile.mkdtemp(prefix=UNFINISHED, dir=into.parent))
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
        names = {
            "/".join(file.name.split("/")[: depth + 1])
            for file in self.storage.find(f"{WORK}/{key}")
        }
        return sorted(names)

    def _is_whole(self, digest: str) -> bool:
        try:
            self._use(digest)
            if self.storage.is_local:
                verify_folder(Path(self.storage.root) / digest, digest)
                return True
            files = read_manifest(self.storage.read(f"{digest}/{MANIFEST}"), f"{self.url}/{digest}")
            sizes = {file.name: file.bytes for file in self.storage.find(digest)}
            listed = all(
                sizes.get(f"{digest}/{FILES}/{entry.path}") == entry.bytes for entry in files
            )
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
        beside = f"{UNFINISHED}{uuid.uuid4().hex[:8]}"
        path, final = Path(self.storage.root) / beside, Path(self.storage.root) / digest
        try:
            self._write_folder(folder, beside, files)
            if final.exists() and not self._is_whole(digest):
                # What was damaged after it was written moves aside, so that the good copy can take its place.
                os.replace(final, final.with_name(f"{digest}.damaged-{uuid.uuid4().hex[:8]}"))
            rename_into_place(path, final)
        finally:
            shutil.rmtree(path, ignore_errors=True)

    def _put_remote(self, folder: Path, digest: str, files: tuple[FileEntry, ...]) -> None:
        for entry in files:
            self.storage.upload(folder / entry.path, f"{digest}/{FILES}/{entry.path}")
        manifest, text = f"{digest}/{MANIFEST}", manifest_text(files)
        if not self.storage.create(manifest, text) and not self._is_whole(digest):
            # It is not another writer's but damaged.
            self.storage.write(manifest, text)

    def _write_folder(self, folder: Path, name: str, files: tuple[FileEntry, ...]) -> None:
        for entry in files:
            self.storage.upload(folder / entry.path, f"{name}/{FILES}/{entry.path}")
        self.storage.write(f"{name}/{MANIFEST}", manifest_text(files))

    def _read_folder(self, name: str, target: Path) -> None:
        """Raises FileNotFoundError for a missing file, ArtifactDamaged for one that does not match the list."""
        manifest = self.storage.read(f"{name}/{MANIFEST}")
        files = read_manifest(manifest, f"{self.url}/{name}")
        for entry in files:
            self.storage.download(f"{name}/{FILES}/{entry.path}", target / FILES / entry.path)
        verify_files(target, files)
        (target / MANIFEST).write_bytes(manifest)

    def _fetch_remote(self, digest: str) -> Path:
        try:
            entry = self._cache.hold(digest)
            # One at a time: what another process has just put there in place of a damaged copy stays.
            with self._cache.writing(digest):
                with suppress(ArtifactDamaged):
                    verify_folder(entry, digest)
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
            verify_folder(beside, digest)
            rename_into_place(beside, entry)
        except ArtifactDamaged:
            # Where sizes are right only reading shows the damage. Without its manifest the artifact counts as missing.
            self.storage.remove(listed[f"{digest}/{MANIFEST}"])
            raise
        finally:
            shutil.rmtree(beside, ignore_errors=True)
