"""The artifact store: folders by digest under an fsspec URL, shared by workers on all machines.

DIGEST/files/ holds an artifact, DIGEST/artifact.json the list of its files with their sizes and
sha256; the digest is that of the list and so covers all files. artifact.json is written last:
without it the artifact does not count. A local store writes under another name and renames; on
object storage the files are written to their final names, and artifact.json only if it is absent.
What is read is verified against the list, and the list against the digest. Copies of what a remote
store hands out stay in a local cache.

Besides artifacts the store holds small objects by name in records/ and results/, and in work/KEY/
the state of a stage under way. The time of artifact.json tells when an artifact was last used: see
housekeeping.py.
"""

import hashlib
import os
import re
import shutil
import tempfile
import uuid
from contextlib import suppress
from datetime import UTC, datetime, timedelta
from pathlib import Path

from tenacity import retry, retry_if_exception_type, stop_after_attempt

from distillery.errors import ArtifactDamaged, StoreError
from distillery.records import Artifact, is_relative_name
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

LONGEST_RUN = 200
"""Bytes of a run's name in the name of its record, at most."""

STILL_NEW = timedelta(hours=1)
"""An artifact that was used since is not touched again."""


def run_record(run: str) -> str:
    """Return the name of the record of a run. That of an ordinary run holds its name as it is;
    where that can't be the name of a file, its letters and digits and its own digest stand for it.

    What stands for a name gives the same record as the name."""
    name = run
    is_name = is_relative_name(f"{RUNS}/{run}.json") and UNFINISHED not in run
    if not is_name or len(run.encode()) > LONGEST_RUN:
        digest = hashlib.sha256(run.encode(errors="backslashreplace")).hexdigest()
        name = f"{re.sub('[^A-Za-z0-9 _-]', '_', run)[:150]}-{digest[:12]}"
    return f"{RUNS}/{name}.json"


class ArtifactStore:
    """Folders by digest under `url`, by default DISTILLERY_STORE.

    Raises StoreUnavailable where the storage does not answer for `wait_s` seconds (by default
    DISTILLERY_STORE_WAIT), ArtifactDamaged where a folder is missing, half-written or altered,
    CredentialsError where access is refused, and StoreError for other errors."""

    def __init__(
        self, url: str | None = None, cache: Path | None = None, wait_s: float | None = None
    ) -> None:
        settings = LocalSettings()
        if wait_s is None:
            wait_s = settings.store_wait
        self.storage = Storage(url or settings.store_url, wait_s)
        self.url = self.storage.url
        self._cache = Cache(cache or settings.folder / "cache", settings.cache_gb * 1e9)

    def put(self, folder: Path) -> Artifact:
        """Store the content of `folder`; storing the same content twice writes it once."""
        files = list_files(folder)
        if not files:
            raise StoreError(f"{folder}: an empty folder is no artifact")
        digest = digest_of_files(files)
        if not self._is_whole(digest):
            if self.storage.is_local:
                self._put_local(folder, digest, files)
            else:
                self._put_remote(folder, digest, files)
        size = sum(file.bytes for file in files)
        return Artifact(uri=f"{self.url}/{digest}", sha256=digest, bytes=size)

    def fetch(self, artifact: Artifact) -> Path:
        """Return a local folder with the artifact's verified content. Treat it as read-only."""
        digest = artifact.sha256
        if not self.storage.is_local:
            return self._fetch_remote(digest) / FILES
        with suppress(FileNotFoundError):
            self._mark_used(digest)
        folder = Path(self.storage.root) / digest
        verify_folder(folder, digest)
        return folder / FILES

    def holds(self, artifact: Artifact) -> bool:
        """Return whether the store has the whole artifact: every byte is checked in a local store,
        the files' sizes in a remote one."""
        return self._is_whole(artifact.sha256)

    def files(self, digest: str) -> tuple[FileEntry, ...]:
        """Return the list of an artifact's files. Raises ArtifactDamaged where it can't be read."""
        return read_manifest(self.read_object(f"{digest}/{MANIFEST}"), f"{self.url}/{digest}")

    def write_object(self, name: str, content: bytes) -> None:
        """Keep a small object under `name`, whole or not at all, in place of what was there."""
        self.storage.write(name, content)

    def read_object(self, name: str) -> bytes:
        """Return the object `name`. Raises ArtifactDamaged where there is none."""
        try:
            return self.storage.read(name)
        except FileNotFoundError as error:
            raise ArtifactDamaged(
                f"{self.url}/{name}: not in the store; do both sides use one?"
            ) from error

    def write_record(self, name: str, text: str) -> None:
        """Keep a record that one worker hands to another, or that outlives its run."""
        self.write_object(f"{RECORDS}/{name}", text.encode())

    def read_record(self, name: str) -> str:
        """Return the record `name`. Raises ArtifactDamaged where there is none."""
        return self.read_object(f"{RECORDS}/{name}").decode()

    def save_checkpoint(self, key: str, folder: Path) -> None:
        """Keep the content of `folder` as the state of the work `key`; once it is written
        completely, earlier states are removed."""
        before = self._snapshots(key)
        number = 1
        if before:
            number += int(before[-1].rpartition("/")[2].partition("-")[0])
        # Two processes that each think the other dead may choose the same number.
        snapshot = f"{WORK}/{key}/{number:06d}-{uuid.uuid4().hex[:8]}"
        self._write_folder(folder, snapshot, list_files(folder))
        for old in before:
            self.storage.remove_folder(old, self.storage.find(old))

    def load_checkpoint(self, key: str, into: Path) -> bool:
        """Write the newest whole state of the work `key` into the empty folder `into`; return
        whether there was one."""
        for snapshot in reversed(self._snapshots(key)):
            unfinished = Path(tempfile.mkdtemp(prefix=UNFINISHED, dir=into.parent))
            try:
                self._read_folder(snapshot, unfinished)
                # Windows renames onto no folder, not even an empty one.
                into.rmdir()
                os.rename(unfinished / FILES, into)
                return True
            except (ArtifactDamaged, FileNotFoundError):
                continue
            finally:
                shutil.rmtree(unfinished, ignore_errors=True)
        return False

    def drop_checkpoint(self, key: str) -> None:
        """Remove all states of the work `key`."""
        self.storage.remove_folder(f"{WORK}/{key}", self.storage.find(f"{WORK}/{key}"))

    def _snapshots(self, key: str) -> list[str]:
        """Return the names of the states of the work `key`, half-written ones too, oldest first."""
        depth = f"{WORK}/{key}/".count("/")
        names = set()
        for file in self.storage.find(f"{WORK}/{key}"):
            names.add("/".join(file.name.split("/")[: depth + 1]))
        return sorted(names)

    def _is_whole(self, digest: str) -> bool:
        try:
            self._mark_used(digest)
            if self.storage.is_local:
                verify_folder(Path(self.storage.root) / digest, digest)
                return True
            files = read_manifest(self.storage.read(f"{digest}/{MANIFEST}"), f"{self.url}/{digest}")
        except (ArtifactDamaged, FileNotFoundError):
            return False
        sizes = {file.name: file.bytes for file in self.storage.find(digest)}
        for entry in files:
            if sizes.get(f"{digest}/{FILES}/{entry.path}") != entry.bytes:
                return False
        return digest_of_files(files) == digest

    def _mark_used(self, digest: str) -> None:
        """Make the artifact new again. Called before it is checked, so that it is not collected
        while a run counts on it. Raises FileNotFoundError."""
        manifest = f"{digest}/{MANIFEST}"
        if datetime.now(UTC) - self.storage.modified(manifest) > STILL_NEW:
            self.storage.touch(manifest)

    def _put_local(self, folder: Path, digest: str, files: tuple[FileEntry, ...]) -> None:
        root = Path(self.storage.root)
        unfinished = f"{UNFINISHED}{uuid.uuid4().hex[:8]}"
        try:
            self._write_folder(folder, unfinished, files)
            if (root / digest).exists() and not self._is_whole(digest):
                # It was damaged after it was written: it makes way for the good copy.
                os.replace(root / digest, root / f"{digest}.damaged-{uuid.uuid4().hex[:8]}")
            rename_into_place(root / unfinished, root / digest)
        finally:
            shutil.rmtree(root / unfinished, ignore_errors=True)

    def _put_remote(self, folder: Path, digest: str, files: tuple[FileEntry, ...]) -> None:
        for entry in files:
            self.storage.upload(folder / entry.path, f"{digest}/{FILES}/{entry.path}")
        manifest, text = f"{digest}/{MANIFEST}", manifest_text(files)
        if not self.storage.create(manifest, text) and not self._is_whole(digest):
            # The manifest that is there is damaged, and not another writer's of the same content.
            self.storage.write(manifest, text)

    def _write_folder(self, folder: Path, name: str, files: tuple[FileEntry, ...]) -> None:
        for entry in files:
            self.storage.upload(folder / entry.path, f"{name}/{FILES}/{entry.path}")
        self.storage.write(f"{name}/{MANIFEST}", manifest_text(files))

    def _read_folder(self, name: str, target: Path) -> None:
        """Download a folder with its manifest into `target`. Raises FileNotFoundError for a
        missing file, ArtifactDamaged for one that does not match the list."""
        manifest = self.storage.read(f"{name}/{MANIFEST}")
        files = read_manifest(manifest, f"{self.url}/{name}")
        for entry in files:
            self.storage.download(f"{name}/{FILES}/{entry.path}", target / FILES / entry.path)
        verify_files(target, files)
        (target / MANIFEST).write_bytes(manifest)

    def _fetch_remote(self, digest: str) -> Path:
        try:
            entry = self._cache.hold(digest)
            # One process at a time: another one may just have replaced a damaged copy.
            with self._cache.writing(digest):
                try:
                    verify_folder(entry, digest)
                except ArtifactDamaged:
                    self._download(digest, entry)
                else:
                    with suppress(FileNotFoundError):
                        self._mark_used(digest)
        except FileNotFoundError as error:
            raise ArtifactDamaged(
                f"{self.url}/{digest}: not in the store, or not completely written; "
                "run its stage again"
            ) from error
        except OSError as error:
            raise StoreError(
                f"{self._cache.folder}: {error.strerror}; free some space or move DISTILLERY_HOME"
            ) from error
        return entry

    def _download(self, digest: str, entry: Path) -> None:
        shutil.rmtree(entry, ignore_errors=True)
        self._mark_used(digest)
        listed = {file.name: file for file in self.storage.find(digest)}
        self._cache.make_room(sum(file.bytes for file in listed.values()))
        try:
            self._read_into_cache(digest, entry)
        except ArtifactDamaged:
            # Where the sizes are right, only reading shows the damage. Without its manifest the
            # artifact counts as missing, so that its stage makes it again.
            self.storage.remove(listed[f"{digest}/{MANIFEST}"])
            raise

    # One bad read may be the network's or this machine's fault.
    @retry(retry=retry_if_exception_type(ArtifactDamaged), stop=stop_after_attempt(2), reraise=True)
    def _read_into_cache(self, digest: str, entry: Path) -> None:
        unfinished = Path(tempfile.mkdtemp(prefix=f"{digest}.reading-", dir=self._cache.folder))
        try:
            self._read_folder(digest, unfinished)
            verify_folder(unfinished, digest)
            rename_into_place(unfinished, entry)
        finally:
            shutil.rmtree(unfinished, ignore_errors=True)
