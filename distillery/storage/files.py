"""Files by name under an fsspec URL: a local folder, or object storage such as Azure's (abfs://).

Each operation waits out an outage, so that a finished training is not lost to one of a minute.
What waiting does not mend is an error of one line at once.
"""

import logging
import os
import shutil
import uuid
from collections.abc import Callable, Collection
from contextlib import suppress
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import fsspec
from fsspec.implementations.local import LocalFileSystem
from fsspec.utils import get_protocol
from tenacity import RetryCallState, Retrying, retry_if_exception, wait_random_exponential

from distillery.errors import StoreError, StoreUnavailable
from distillery.records import is_relative_name
from distillery.storage.azure_blobs import (
    AZURE_PROTOCOLS,
    azure_options,
    limit_retries,
    remove_blob,
    touch_blob,
)
from distillery.storage.outages import (
    OutageLongerThan,
    azure_error,
    is_azure_error,
    is_outage,
    no_container,
    os_error,
    reason_of,
)

UNFINISHED = ".writing-"
"""In the name of what is being written, and never in a final name."""

WHOLE_UPLOADS = (*AZURE_PROTOCOLS, "s3", "s3a", "gs", "gcs")
"""Object stores, in which a file is not seen before all of it is uploaded."""

_log = logging.getLogger(__name__)

T = TypeVar("T")


class StoredFile(NamedTuple):
    """A file of a storage. `name` is relative to the storage's URL; `version` changes with each
    write and each touch."""

    name: str
    bytes: int
    modified: datetime
    version: str


class Storage:
    """The files under `url`, which `setting` names. Every method raises StoreUnavailable where the
    storage has not answered for `wait_s` seconds, StoreError or CredentialsError where waiting does
    not help, and FileNotFoundError for a name that is not there. `shown`: the URL as errors show
    it."""

    def __init__(
        self, url: str, wait_s: float, setting: str = "DISTILLERY_STORE", shown: str | None = None
    ) -> None:
        self.url = url.rstrip("/")
        self._wait_s, self._setting, self._shown = wait_s, setting, shown or self.url
        protocol = get_protocol(self.url)
        self._is_azure = protocol in AZURE_PROTOCOLS
        options = azure_options(self.url) if self._is_azure else {}
        try:
            self.filesystem, self.root = fsspec.url_to_fs(self.url, **options)
        except (ValueError, ImportError) as error:
            reason = f"{setting} {protocol}://…: {error.__cause__ or error}"
            if self._is_azure and isinstance(error, ValueError):
                reason += (
                    "; name the account in the URL, or correct AZURE_STORAGE_CONNECTION_STRING"
                )
            elif self._is_azure:
                reason += "; install distillery[azure]"
            raise StoreError(reason) from None
        self.is_local = isinstance(self.filesystem, LocalFileSystem)
        self._uploads_whole = protocol in WHOLE_UPLOADS
        if self._is_azure:
            limit_retries(self.filesystem.service_client)

    def read(self, name: str) -> bytes:
        content: bytes = self._patiently(self.filesystem.cat_file, self._path(name))
        return content

    def write(self, name: str, content: bytes) -> None:
        """Write a file, whole or not at all, in place of what may be there."""
        if self.is_local:
            self._patiently(write_local, Path(self._path(name)), content)
        else:
            self._patiently(self.filesystem.pipe_file, self._path(name), content)

    def create(self, name: str, content: bytes) -> bool:
        """Write a file that is not there yet; return whether it was this call that wrote it. Of
        two writers at once, exactly one does."""
        try:
            self._patiently(self.filesystem.pipe_file, self._path(name), content, mode="create")
        except FileExistsError:
            return False
        return True

    def upload(self, source: Path, name: str) -> None:
        """Store a file of any size."""
        if self.is_local:
            self._patiently(Path(self._path(name)).parent.mkdir, parents=True, exist_ok=True)
        self._patiently(self.filesystem.put_file, str(source), self._path(name))

    def upload_whole(self, source: Path, name: str) -> None:
        """Store a file of any size, whole or not at all where the storage can move a file, in place
        of what may be there. A killed writer may leave a file whose name begins with UNFINISHED."""
        path = self._path(name)
        if self._uploads_whole:
            self.upload(source, name)
        else:
            beside = self._path(f"{UNFINISHED}{name}")
            self._patiently(upload_and_move, self.filesystem, source, beside, path)

    def make_folder(self) -> bool:
        """Make the folder under the URL and return whether it was not there; an object store needs
        none, and its containers are made by their owner."""
        if self._uploads_whole or self._patiently(self.filesystem.isdir, self.root):
            return False
        self._patiently(self.filesystem.makedirs, self.root, exist_ok=True)
        return True

    def remove_empty(self) -> None:
        """Remove a local folder under the URL, unless somebody has put something there. Elsewhere
        it stays: the rmdir of some file systems removes what is in it, too."""
        if self.is_local:
            with suppress(OSError):
                os.rmdir(self.root)

    def entries(self) -> list[tuple[str, bool]]:
        """Return the names of what is directly under the URL, each with whether it is a folder;
        none where nothing is there."""
        self.filesystem.invalidate_cache()
        try:
            found = self._patiently(self.filesystem.ls, self.root, detail=True)
        except FileNotFoundError:
            return []
        entries = []
        for each in found:
            path = str(each["name"]).rstrip("/")
            # A folder may be listed in itself.
            if path.strip("/") != self.root.strip("/"):
                entries.append((path.rpartition("/")[2], each["type"] == "directory"))
        return sorted(entries)

    def delete(self, name: str) -> None:
        """Remove a file, whoever has written it; one that is not there counts as removed."""
        with suppress(FileNotFoundError):
            self._patiently(self.filesystem.rm_file, self._path(name))

    def download(self, name: str, target: Path) -> None:
        """Write a file of any size to `target`, and make its folder."""
        disk = str(target.parent)
        self._patiently(target.parent.mkdir, parents=True, exist_ok=True, disk=disk)
        self._patiently(self.filesystem.get_file, self._path(name), str(target), disk=disk)

    def find(self, prefix: str = "") -> list[StoredFile]:
        """Return all files below a folder, by name; none where there is no such folder."""
        found: dict[str, dict[str, Any]] = self._patiently(
            self.filesystem.find, self._path(prefix), detail=True
        )
        return [self._stored_file(path, info) for path, info in sorted(found.items())]

    def modified(self, name: str) -> datetime:
        """Return when a file was written or touched."""
        moment: datetime = self._patiently(self.filesystem.modified, self._path(name))
        return moment

    def touch(self, name: str) -> None:
        """Make a file new again. Never creates one that was removed meanwhile."""
        if self.is_local:
            self._patiently(os.utime, self._path(name))
        elif self._is_azure:
            self._patiently(touch_blob, self.filesystem, self._path(name))
        else:
            self.write(name, self.read(name))

    def remove(self, file: StoredFile) -> bool:
        """Remove a file unless it was written or touched since it was listed; return whether it
        is gone."""
        path = self._path(file.name)
        try:
            if self._is_azure:
                return self._patiently(remove_blob, self.filesystem, path, file.version)
            now = self._stored_file(path, self._patiently(self.filesystem.info, path))
            if now.version != file.version:
                return False
            self._patiently(self.filesystem.rm_file, path)
        except FileNotFoundError:
            pass
        return True

    def remove_folder(self, prefix: str, listed: Collection[StoredFile]) -> bool:
        """Remove a folder, of which `listed` are all files, unless one of them was written or
        touched since; return whether it is gone. On object storage the files are removed in the
        order of their names: artifact.json before files/."""
        if not self.is_local:
            return all(self.remove(file) for file in sorted(listed))
        folder = Path(self._path(prefix))
        aside = Path(self._path(f"{UNFINISHED}{uuid.uuid4().hex[:8]}"))
        try:
            self._patiently(os.rename, folder, aside)
        except FileNotFoundError:
            return True
        # From here on nobody can touch it: who tries finds it gone.
        before = {file.name.removeprefix(prefix): file.version for file in listed}
        now = {file.name.removeprefix(aside.name): file.version for file in self.find(aside.name)}
        if now != before and not folder.exists():
            os.rename(aside, folder)
            return False
        shutil.rmtree(aside, ignore_errors=True)
        return now == before

    def _path(self, name: str) -> str:
        if name and not is_relative_name(name):
            raise StoreError(f"{name!r}: leads out of the store {self.url}")
        return f"{self.root}/{name}" if name else self.root

    def _stored_file(self, path: str, info: dict[str, Any]) -> StoredFile:
        name = path.removeprefix(self.root).lstrip("/")
        modified = info.get("last_modified") or info.get("mtime") or self.filesystem.modified(path)
        version = str(info.get("etag") or modified)
        if not isinstance(modified, datetime):
            modified = datetime.fromtimestamp(modified, UTC)
        return StoredFile(name, int(info["size"]), modified, version)

    def _patiently(
        self, operation: Callable[..., T], *arguments: Any, disk: str | None = None, **options: Any
    ) -> T:
        """Return what the operation returns, and retry while the storage does not answer. `disk`:
        the folder that it writes to, where that is not the storage."""
        tries = Retrying(
            retry=retry_if_exception(is_outage),
            wait=wait_random_exponential(multiplier=0.5, max=10),
            stop=OutageLongerThan(self._wait_s),
            before_sleep=self._log_first_failure,
            reraise=True,
        )
        try:
            return tries(operation, *arguments, **options)
        except (FileNotFoundError, FileExistsError) as error:
            if error.strerror == "No such container":
                raise no_container(self._shown, self._setting) from None
            raise
        except OSError as error:
            if is_outage(error):
                raise self._unavailable(error) from error
            raise os_error(error, disk or self._shown, self._setting) from error
        except Exception as error:
            if not is_azure_error(error):
                raise
            # Not chained: the SDK's texts may hold a URL with its signature.
            if is_outage(error):
                raise self._unavailable(error) from None
            raise azure_error(error, self._shown, self._setting) from None

    def _log_first_failure(self, state: RetryCallState) -> None:
        if state.attempt_number == 1 and state.outcome:
            reason = reason_of(state.outcome.exception())
            _log.warning("%s: %s; trying again for up to %.0f s", self._shown, reason, self._wait_s)

    def _unavailable(self, error: Exception) -> StoreUnavailable:
        return StoreUnavailable(
            f"{self._shown}: the store has not answered for {self._wait_s:.0f} s "
            f"({reason_of(error)}); try again later"
        )


def write_local(path: Path, content: bytes) -> None:
    """Write a local file, whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    unfinished = path.with_name(f"{UNFINISHED}{uuid.uuid4().hex[:8]}")
    try:
        unfinished.write_bytes(content)
        os.replace(unfinished, path)
    finally:
        unfinished.unlink(missing_ok=True)


def upload_and_move(filesystem: Any, source: Path, beside: str, path: str) -> None:
    """Write a file to `beside`, and then rename it to `path`."""
    filesystem.put_file(str(source), beside)
    filesystem.mv(beside, path)
