"""What an error of the storage or of the hub means: an outage that may pass, a full disk, a
refused access.

Texts of Azure's SDK are never repeated: they may hold a URL with its signature.
"""

import errno
import os

from tenacity import RetryCallState
from tenacity.stop import stop_base

from distillery.errors import CredentialsError, DistilleryError, StoreError

NO_ROOM = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)

FORBIDDEN = (errno.EACCES, errno.EPERM, errno.EROFS)

OUTAGES = (
    errno.EIO,
    errno.ESTALE,
    errno.ETIMEDOUT,
    errno.EHOSTDOWN,
    errno.EHOSTUNREACH,
    errno.ENETDOWN,
    errno.ENETUNREACH,
)
"""What a network folder reports while its server does not answer."""


class OutageLongerThan(stop_base):
    """Stops before a retry that would come `seconds` after the first failure. The time until that
    failure, such as an hour of upload, does not count."""

    def __init__(self, seconds: float) -> None:
        self._seconds = seconds
        self._failed_at: float | None = None

    def __call__(self, state: RetryCallState) -> bool:
        now = state.outcome_timestamp or 0.0
        if self._failed_at is None:
            self._failed_at = now
        return now + state.upcoming_sleep - self._failed_at > self._seconds


def is_azure_error(error: BaseException) -> bool:
    return type(error).__module__.startswith(("azure.", "aiohttp"))


def is_outage(error: BaseException) -> bool:
    """Return whether `error` may pass by itself.

    So does what two writers of the same content do to each other: 412 for the reader of a file
    that is being rewritten, InvalidBlockList for the writer of a large file that another writer
    has just finished."""
    if isinstance(error, OSError):
        return isinstance(error, ConnectionError | TimeoutError) or error.errno in OUTAGES
    if not is_azure_error(error):
        return False
    from azure.core.exceptions import ClientAuthenticationError

    status: int | None = getattr(error, "status_code", None)
    if status is None:
        return not isinstance(error, ClientAuthenticationError)
    if getattr(error, "error_code", None) == "InvalidBlockList":
        return True
    return status in (408, 412, 429) or status >= 500


def is_hub_outage(error: BaseException) -> bool:
    """Return whether an error of huggingface_hub or datasets may pass by itself: a connection that
    failed, 408, 429 or 5xx. Without HF_HUB_OFFLINE, that is: with it, nothing is asked."""
    from huggingface_hub import constants

    cause: BaseException | None = None if constants.HF_HUB_OFFLINE else error
    while cause is not None:
        status = getattr(getattr(cause, "response", None), "status_code", None)
        if status is not None:
            return status in (408, 429) or status >= 500
        # By its name, since these libraries bring different versions of httpx.
        classes = [each.__name__ for each in type(cause).__mro__]
        if isinstance(cause, ConnectionError | TimeoutError) or "TransportError" in classes:
            return True
        cause = cause.__cause__ or cause.__context__
    return False


def reason_of(error: BaseException | None) -> str:
    """Return what can be said of an error without its text."""
    error = getattr(error, "inner_exception", None) or error
    if isinstance(error, OSError) and error.errno:
        return os.strerror(error.errno)
    code = getattr(error, "error_code", None)
    parts = (getattr(error, "status_code", None), getattr(code, "value", code))
    return " ".join(str(part) for part in parts if part) or type(error).__name__


def os_error(error: OSError, location: str, setting: str = "DISTILLERY_STORE") -> StoreError:
    """Return the one line for an error of the system that waiting does not mend. `setting`: which
    one names the location."""
    if error.errno in NO_ROOM:
        return StoreError(
            f"{location}: the disk is full; free some space, or set {setting} or "
            "DISTILLERY_HOME to another disk"
        )
    if error.errno in FORBIDDEN:
        return StoreError(
            f"{location}: not writable ({error.strerror}); set {setting} to a folder that is"
        )
    # Some libraries' errors are of this kind too, and their texts may hold a URL with its secret.
    reason = error.strerror or type(error).__name__
    return StoreError(f"{location}: {reason}; set {setting} to a folder that can be written")


def azure_error(error: Exception, url: str, setting: str) -> DistilleryError:
    """Return the one line for an error of Azure's SDK that waiting does not mend. `setting`: which
    one names the URL."""
    from azure.core.exceptions import ClientAuthenticationError

    status = getattr(error, "status_code", None)
    if isinstance(error, ClientAuthenticationError) and status is None:
        return CredentialsError(
            f"{url}: no key and no Azure login; run `az login`, or set "
            "AZURE_STORAGE_CONNECTION_STRING or AZURE_STORAGE_ACCOUNT_KEY"
        )
    if status in (401, 403):
        return CredentialsError(
            f"{url}: access is refused ({reason_of(error)}); correct the AZURE_STORAGE_* settings, "
            "or give the login the role Storage Blob Data Contributor"
        )
    if getattr(error, "error_code", None) == "ContainerNotFound":
        return no_container(url, setting)
    return StoreError(f"{url}: the store refuses ({reason_of(error)}); correct {setting}")


def no_container(url: str, setting: str) -> StoreError:
    return StoreError(f"{url}: there is no such container; create it, or correct {setting}")
