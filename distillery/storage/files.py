"""Files by name under an fsspec URL: a local folder, or object storage such as Azure's (abfs://).

Each operation waits out an outage in place, so that a finished training is not lost to one of a minute. What waiting
does not mend is one line at once.
"""

import errno
import logging
import os
import shutil
import uuid
from collections.abc import Callable, Collection
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, NamedTuple, TypeVar
from urllib.parse import urlsplit

import fsspec
from fsspec.asyn import sync
from fsspec.implementations.local import LocalFileSystem
from fsspec.utils import get_protocol
from tenacity import RetryCallState, Retrying, retry_if_exception, wait_random_exponential
from tenacity.stop import stop_base

from distillery.errors import CredentialsError, DistilleryError, StoreError, StoreUnavailable

ASIDE = ".writing-"
"""What has this in its name is not finished, and is nothing's final name."""

NO_ROOM = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)

_FORBIDDEN = (errno.EACCES, errno.EPERM, errno.EROFS)

_OUTAGES = (
    errno.EIO,
    errno.ESTALE,
    errno.ETIMEDOUT,
    errno.EHOSTDOWN,
    errno.EHOSTUNREACH,
    errno.ENETDOWN,
    errno.ENETUNREACH,
)
"""What a network folder says while its server is away."""

_AZURE = ("abfs", "abfss", "az")

_log = logging.getLogger(__name__)

T = TypeVar("T")


class StoredFile(NamedTuple):
    """`name` is below the storage's URL; `version` is another after each write and each touch."""

    name: str
    bytes: int
    modified: datetime
    version: str


class Storage:
    """Every method raises StoreUnavailable where the storage has not answered for `wait_s` seconds, StoreError or
    CredentialsError where waiting does not help, and FileNotFoundError for a name that is not there."""

    def __init__(self, url: str, wait_s: float) -> None:
        self.url = url.rstrip("/")
        self._wait_s = wait_s
        protocol = get_protocol(self.url)
        self._is_azure = protocol in _AZURE
        options = _azure_options(self.url) if self._is_azure else {}
        try:
            self._fs, self.root = fsspec.url_to_fs(self.url, **options)
        except (ValueError, ImportError) as error:
            reason = f"DISTILLERY_STORE {protocol}://…: {error.__cause__ or error}"
            if self._is_azure and isinstance(error, ValueError):
                reason += (
                    "; name the account in the URL, or correct AZURE_STORAGE_CONNECTION_STRING"
                )
            raise StoreError(reason) from None
        self.is_local = isinstance(self._fs, LocalFileSystem)
        if self._is_azure:
            _tune(self._fs.service_client)

    def read(self, name: str) -> bytes:
        content: bytes = self._ask(self._fs.cat_file, self._path(name))
        return content

    def write(self, name: str, content: bytes) -> None:
        """Whole or not at all, in place of what may be there."""
        if self.is_local:
            self._ask(_write_local, Path(self._path(name)), content)
        else:
            self._ask(self._fs.pipe_file, self._path(name), content)

    def create(self, name: str, content: bytes) -> bool:
        """Writes a file that is not there yet; of two writers at once, one does. Returns whether this one did."""
        try:
            self._ask(self._fs.pipe_file, self._path(name), content, mode="create")
        except FileExistsError:
            return False
        return True

    def upload(self, source: Path, name: str) -> None:
        """Stores a file of any size."""
        if self.is_local:
            self._ask(Path(self._path(name)).parent.mkdir, parents=True, exist_ok=True)
        self._ask(self._fs.put_file, str(source), self._path(name))

    def download(self, name: str, target: Path) -> None:
        """Writes a file of any size to `target`, making its folder."""
        self._ask(target.parent.mkdir, parents=True, exist_ok=True, disk=str(target.parent))
        self._ask(self._fs.get_file, self._path(name), str(target), disk=str(target.parent))

    def find(self, prefix: str = "") -> list[StoredFile]:
        """All files below a folder, by name; none where there is no such folder."""
        found: dict[str, dict[str, Any]] = self._ask(self._fs.find, self._path(prefix), detail=True)
        return [self._stored(path, info) for path, info in sorted(found.items())]

    def modified(self, name: str) -> datetime:
        """When a file was written or touched."""
        moment: datetime = self._ask(self._fs.modified, self._path(name))
        return moment

    def touch(self, name: str) -> None:
        """Makes a file new again, and no file where it has been removed meanwhile."""
        if self.is_local:
            self._ask(os.utime, self._path(name))
        elif self._is_azure:
            self._ask(self._on_blob, name, "set_blob_metadata", metadata={"is_directory": "false"})
        else:
            self.write(name, self.read(name))

    def remove(self, file: StoredFile) -> bool:
        """Removes a file unless it was written or touched since it was listed; returns whether it is gone."""
        try:
            if self._is_azure:
                return self._ask(self._remove_blob, file)
            path = self._path(file.name)
            if self._stored(path, self._ask(self._fs.info, path)).version != file.version:
                return False
            self._ask(self._fs.rm_file, path)
        except FileNotFoundError:
            pass
        return True

    def remove_folder(self, prefix: str, listed: Collection[StoredFile]) -> bool:
        """Removes a folder, of which `listed` are all files, unless one was written or touched since; returns whether
        it is gone. On object storage the files go by name: artifact.json before files/."""
        if not self.is_local:
            return all(self.remove(file) for file in sorted(listed))
        folder, aside = Path(self._path(prefix)), Path(self._path(f"{ASIDE}{uuid.uuid4().hex[:8]}"))
        try:
            self._ask(os.rename, folder, aside)
        except FileNotFoundError:
            return True
        # From here on nobody can touch it: whoever tries finds it gone.
        now = {file.name.removeprefix(aside.name): file.version for file in self.find(aside.name)}
        unchanged = now == {file.name.removeprefix(prefix): file.version for file in listed}
        if not unchanged and not folder.exists():
            os.rename(aside, folder)
            return False
        shutil.rmtree(aside, ignore_errors=True)
        return unchanged

    def _path(self, name: str) -> str:
        if ".." in Path(name).parts or name.startswith("/"):
            raise StoreError(f"{name}: leads out of the store {self.url}")
        return f"{self.root}/{name}" if name else self.root

    def _stored(self, path: str, info: dict[str, Any]) -> StoredFile:
        stamp = info.get("last_modified") or info.get("mtime") or self._fs.modified(path)
        modified = stamp if isinstance(stamp, datetime) else datetime.fromtimestamp(stamp, UTC)
        name = path.removeprefix(self.root).lstrip("/")
        return StoredFile(name, int(info["size"]), modified, str(info.get("etag") or stamp))

    def _on_blob(self, name: str, method: str, **options: Any) -> None:
        """Calls Azure's own client for what fsspec has no word for."""
        container, blob, _ = self._fs.split_path(self._path(name))

        async def call() -> None:
            async with self._fs.service_client.get_blob_client(container, blob) as client:
                await getattr(client, method)(**options)

        from azure.core.exceptions import ResourceNotFoundError

        try:
            sync(self._fs.loop, call)
        except ResourceNotFoundError:
            raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), name) from None

    def _remove_blob(self, file: StoredFile) -> bool:
        from azure.core import MatchConditions
        from azure.core.exceptions import ResourceModifiedError

        try:
            self._on_blob(
                file.name,
                "delete_blob",
                etag=file.version,
                match_condition=MatchConditions.IfNotModified,
            )
        except ResourceModifiedError:
            return False
        return True

    def _ask(
        self, operation: Callable[..., T], *arguments: Any, disk: str | None = None, **options: Any
    ) -> T:
        """What the operation returns. `disk` is the place that it writes to, where that is not the storage."""
        tries = Retrying(
            retry=retry_if_exception(_is_outage),
            wait=wait_random_exponential(multiplier=0.5, max=10),
            stop=_OutageLongerThan(self._wait_s),
            before_sleep=self._say_once,
            reraise=True,
        )
        try:
            return tries(operation, *arguments, **options)
        except (FileNotFoundError, FileExistsError) as error:
            if error.strerror == "No such container":
                raise self._no_container() from None
            raise
        except OSError as error:
            raise self._os_error(error, disk or self.url) from error
        except Exception as error:
            if not type(error).__module__.startswith(("azure.", "aiohttp")):
                raise
            # The SDK's texts may hold a URL with its signature, so that they are not chained.
            raise self._azure_error(error) from None

    def _say_once(self, state: RetryCallState) -> None:
        if state.attempt_number == 1 and state.outcome:
            reason = _reason(state.outcome.exception())
            _log.warning("%s: %s; trying again for up to %.0f s", self.url, reason, self._wait_s)

    def _os_error(self, error: OSError, place: str) -> StoreError:
        if _is_outage(error):
            return self._unavailable(error)
        if error.errno in NO_ROOM:
            return StoreError(
                f"{place}: the disk is full; free some space, or set DISTILLERY_STORE or DISTILLERY_HOME elsewhere"
            )
        if error.errno in _FORBIDDEN:
            return StoreError(
                f"{place}: not writable ({error.strerror}); set DISTILLERY_STORE to a place that is"
            )
        return StoreError(
            f"{place}: {error.strerror or error}; set DISTILLERY_STORE to a folder that can be written"
        )

    def _azure_error(self, error: Exception) -> DistilleryError:
        from azure.core.exceptions import ClientAuthenticationError

        if _is_outage(error):
            return self._unavailable(error)
        status, code = getattr(error, "status_code", None), getattr(error, "error_code", None)
        if isinstance(error, ClientAuthenticationError) and status is None:
            return CredentialsError(
                f"{self.url}: no key and no Azure login; run `az login`, or set AZURE_STORAGE_CONNECTION_STRING or "
                "AZURE_STORAGE_ACCOUNT_KEY"
            )
        if status in (401, 403):
            return CredentialsError(
                f"{self.url}: access is refused ({_reason(error)}); correct the AZURE_STORAGE_* settings, or give the "
                "login the role Storage Blob Data Contributor"
            )
        if code == "ContainerNotFound":
            return self._no_container()
        return StoreError(
            f"{self.url}: the store refuses ({_reason(error)}); correct DISTILLERY_STORE"
        )

    def _no_container(self) -> StoreError:
        return StoreError(
            f"{self.url}: there is no such container; create it, or correct DISTILLERY_STORE"
        )

    def _unavailable(self, error: Exception) -> StoreUnavailable:
        return StoreUnavailable(
            f"{self.url}: the store has not answered for {self._wait_s:.0f} s ({_reason(error)}); try again later"
        )


class _OutageLongerThan(stop_base):
    """Stops before a try that would come `seconds` after the first failure: what went well until then, such as an hour
    of upload, does not count."""

    def __init__(self, seconds: float) -> None:
        self._seconds = seconds
        self._failed_at: float | None = None

    def __call__(self, state: RetryCallState) -> bool:
        now = state.outcome_timestamp or 0.0
        self._failed_at = now if self._failed_at is None else self._failed_at
        return now + state.upcoming_sleep - self._failed_at > self._seconds


def _azure_options(url: str) -> dict[str, Any]:
    """For adlfs. It reads AZURE_STORAGE_* itself; without a key there it takes the login of azure-identity."""
    # azure-identity logs each failure over several lines, beside raising it.
    logging.getLogger("azure.identity").setLevel(logging.CRITICAL)
    # Each transfer at once holds a block of 4 MiB in memory; by default there are 128.
    options: dict[str, Any] = {"anon": False, "use_listings_cache": False, "max_concurrency": 4}
    _, at, host = urlsplit(url).netloc.rpartition("@")
    if at and not host.endswith(".core.windows.net"):
        # adlfs knows the public cloud's hosts alone.
        options |= {
            "account_name": host.split(".")[0],
            "account_host": host.replace(".dfs.", ".blob.", 1),
        }
    return options


def _tune(client: Any) -> None:
    """Sets what adlfs has no options for. The SDK tries once more, for a connection that drops in the midst of a large
    file; by default it goes on for a minute, within each try of ours. A server is silent for seconds, not minutes. From
    8 MiB on a file goes in blocks; by default those below 64 MiB are three times in memory."""
    client._config.max_single_put_size = client._config.max_single_get_size = 8 << 20
    retries, timeouts = client._config.retry_policy, client._pipeline._transport.connection_config
    (
        retries.total_retries,
        retries.initial_backoff,
        retries.increment_base,
        retries.random_jitter_range,
    ) = 1, 0, 0, 1
    timeouts.timeout, timeouts.read_timeout = 10, 20


def _write_local(path: Path, content: bytes) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    beside = path.with_name(f"{ASIDE}{uuid.uuid4().hex[:8]}")
    try:
        beside.write_bytes(content)
        os.replace(beside, path)
    finally:
        beside.unlink(missing_ok=True)


def _is_outage(error: BaseException) -> bool:
    """Whether it may be over by itself. What two writers of the same content do to each other is: 412 for who reads a
    file while it is written anew, InvalidBlockList for who writes a large one that another has just finished."""
    if isinstance(error, OSError):
        return isinstance(error, ConnectionError | TimeoutError) or error.errno in _OUTAGES
    if not type(error).__module__.startswith(("azure.", "aiohttp")):
        return False
    from azure.core.exceptions import ClientAuthenticationError

    status: int | None = getattr(error, "status_code", None)
    if status is None:
        return not isinstance(error, ClientAuthenticationError)
    return (
        status in (408, 412, 429)
        or status >= 500
        or getattr(error, "error_code", None) == "InvalidBlockList"
    )


def _reason(error: BaseException | None) -> str:
    """What can be said of an error without its text, which may hold a signature."""
    error = getattr(error, "inner_exception", None) or error
    if isinstance(error, OSError) and error.errno:
        return os.strerror(error.errno)
    status, code = getattr(error, "status_code", None), getattr(error, "error_code", None)
    return (
        " ".join(str(part) for part in (status, getattr(code, "value", code)) if part)
        or type(error).__name__
    )
