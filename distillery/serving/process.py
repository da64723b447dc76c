"""A server in a process of its own, which ends with this one."""

import json
import os
import secrets
import subprocess
import sys
import tempfile
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import IO

from pydantic import SecretStr

from distillery.errors import ModelError
from distillery.processes import environment_without_secrets

KEY_VARIABLE = "DISTILLERY_SERVER_KEY"

NO_VERIFICATION = {"DISTILLERY_VERIFY_KEY": ""}
"""A run serves the teacher that it has just made, which no registry holds."""

START_SECONDS = 300.0

STOP_SECONDS = 5.0

DRAIN_SECONDS = 0.0
"""Nobody waits for the answers of a run that has ended."""

OWN_QUEUE = 2048
"""Requests at once: more than the calls that a run makes at once (teacher.concurrency)."""


@dataclass(frozen=True)
class Served:
    """A running server: `url` ends in /v1, `key` is what it asks clients for."""

    url: str
    key: SecretStr
    process: subprocess.Popen[bytes]


@contextmanager
def served(
    folder: Path, model_name: str, threads: int | None = None, for_labels: bool = False
) -> Iterator[Served]:
    """Serve `folder` on 127.0.0.1 within the `with` block; `for_labels` as in `serve`.

    The server is stopped at the end of the block, and stops by itself if this process dies. Raises
    ModelError if it does not start.
    """
    key = secrets.token_urlsafe(32)
    command = [sys.executable, "-m", "distillery.serving", str(folder), "--name", model_name]
    command += ["--port", "0", "--parent", str(os.getpid()), "--queue", str(OWN_QUEUE)]
    command += ["--drain-seconds", str(DRAIN_SECONDS)]
    if threads is not None:
        command += ["--threads", str(threads)]
    if for_labels:
        command.append("--for-labels")
    with tempfile.TemporaryFile() as log:
        process = subprocess.Popen(  # noqa: S603 - our own interpreter and module
            command,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=log,
            env={**environment_without_secrets(), KEY_VARIABLE: key, **NO_VERIFICATION},
        )
        try:
            yield Served(wait_until_ready(process, folder, log), SecretStr(key), process)
        finally:
            stop(process)


def wait_until_ready(process: subprocess.Popen[bytes], folder: Path, log: IO[bytes]) -> str:
    """Return the server's URL once it answers. Raises ModelError with the last line of its log."""
    import httpx

    line = first_line_of(process, START_SECONDS)
    if not line:
        log.seek(0)
        last = log.read().decode(errors="replace").strip().rpartition("\n")[2]
        raise ModelError(
            last or f"{folder}: its server does not start within {START_SECONDS:.0f} s"
        )
    url = str(json.loads(line)["url"])
    try:
        # A proxy that the environment names has no way to this machine's own loopback address.
        with httpx.Client(trust_env=False, timeout=START_SECONDS) as client:
            client.get(url.removesuffix("/v1") + "/healthz").raise_for_status()
    except httpx.HTTPError as error:
        raise ModelError(
            f"{folder}: its server at {url} does not answer ({type(error).__name__})"
        ) from error
    return url


def first_line_of(process: subprocess.Popen[bytes], limit_s: float) -> bytes:
    """Return the first line that the process prints; b"" if it prints none within `limit_s`.

    A thread reads it, because Windows can't wait for a pipe by `select`.
    """
    lines: list[bytes] = []

    def read() -> None:
        assert process.stdout is not None  # noqa: S101 - it is a pipe
        lines.append(process.stdout.readline())

    reader = threading.Thread(target=read, daemon=True)
    reader.start()
    reader.join(limit_s)
    return b"".join(lines)


def stop(process: subprocess.Popen[bytes]) -> None:
    process.terminate()
    try:
        process.wait(STOP_SECONDS)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()
    if process.stdout:
        process.stdout.close()
