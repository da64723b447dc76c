"""Azure's blob storage, as far as fsspec and adlfs have no words for it."""

import errno
import logging
import os
from typing import Any
from urllib.parse import urlsplit

from fsspec.asyn import sync

AZURE_PROTOCOLS = ("abfs", "abfss", "az")


def azure_options(url: str) -> dict[str, Any]:
    """Return adlfs' options for `url`. adlfs reads AZURE_STORAGE_* itself; where these hold no
    key, it takes the login of azure-identity."""
    # azure-identity logs each failure over several lines, and raises it too.
    logging.getLogger("azure.identity").setLevel(logging.CRITICAL)
    # Each of the transfers at once holds a block of 4 MiB in memory; by default there are 128.
    options: dict[str, Any] = {"anon": False, "use_listings_cache": False, "max_concurrency": 4}
    _, at, host = urlsplit(url).netloc.rpartition("@")
    if at and not host.endswith(".core.windows.net"):
        # adlfs knows the hosts of the public cloud only.
        options["account_name"] = host.split(".")[0]
        options["account_host"] = host.replace(".dfs.", ".blob.", 1)
    return options


def azure_ml_login() -> Any:
    """Return azure-identity's credential for Azure ML and the storage behind it."""
    from azure.identity import DefaultAzureCredential

    # They log every failure, partly over several lines, and raise it too.
    for name in ("azure.identity", "azure.ai.ml", "azure.core.pipeline.transport"):
        noisy = logging.getLogger(name)
        noisy.propagate = False
        noisy.addHandler(logging.NullHandler())
    return DefaultAzureCredential()


def limit_retries(client: Any) -> None:
    """Set what adlfs has no options for.

    The SDK retries once, for a connection that drops in the middle of a large file; by default it
    goes on for a minute within each of our own tries. It waits seconds for a silent server, not
    minutes. Files from 8 MiB on are transferred in blocks; by default those below 64 MiB are held
    in memory three times."""
    config = client._config
    config.max_single_put_size = config.max_single_get_size = 8 << 20
    config.retry_policy.total_retries = 1
    config.retry_policy.initial_backoff = 0
    config.retry_policy.increment_base = 0
    config.retry_policy.random_jitter_range = 1
    connection = client._pipeline._transport.connection_config
    connection.timeout = 10
    connection.read_timeout = 20


def touch_blob(filesystem: Any, path: str) -> None:
    """Make a blob new. Raises FileNotFoundError."""
    call_blob(filesystem, path, "set_blob_metadata", metadata={"is_directory": "false"})


def remove_blob(filesystem: Any, path: str, etag: str) -> bool:
    """Remove a blob if it still has this etag; return whether it had. Raises FileNotFoundError."""
    from azure.core import MatchConditions
    from azure.core.exceptions import ResourceModifiedError

    unmodified = MatchConditions.IfNotModified
    try:
        call_blob(filesystem, path, "delete_blob", etag=etag, match_condition=unmodified)
    except ResourceModifiedError:
        return False
    return True


def call_blob(filesystem: Any, path: str, method: str, **options: Any) -> None:
    """Call a method of Azure's own client for the blob at `path`. Raises FileNotFoundError."""
    from azure.core.exceptions import ResourceNotFoundError

    container, blob, _ = filesystem.split_path(path)

    async def call() -> None:
        async with filesystem.service_client.get_blob_client(container, blob) as client:
            await getattr(client, method)(**options)

    try:
        sync(filesystem.loop, call)
    except ResourceNotFoundError:
        raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), path) from None
