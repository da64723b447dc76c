"""A student behind OpenAI's chat-completions API, for any OpenAI or azure-ai-inference client.

    python -m distillery.serving FOLDER --name support-mood          # the key, if any, in DISTILLERY_SERVER_KEY

POST /v1/chat/completions, GET /v1/models, GET /healthz; the same without /v1, for azure-ai-inference. The messages go
through the model's own chat template just as they are. Requests are answered one at a time by one worker thread, and
each takes only the passes it needs: one for max_tokens 1. Sampling is greedy where no temperature is given, and
log-probabilities are those of temperature 1. With vLLM's `structured_outputs: {"choice": [TEXT, ...]}` the answer is
the likeliest of these texts, as a student with prompt.answer: text chooses it.
"""

import argparse
import json
import logging
import os
import secrets
import select
import socket
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import IO

from pydantic import SecretStr

from distillery.errors import CredentialsError, DistilleryError, ModelError
from distillery.inference.onnx_student import OnnxStudent
from distillery.processes import exit_with_parent
from distillery.serving.app import create_app
from distillery.settings import is_loopback, load_environment

KEY_VARIABLE = "DISTILLERY_SERVER_KEY"

_START_SECONDS = 300.0

_STOP_SECONDS = 5.0

_log = logging.getLogger(__name__)


def serve(
    folder: Path,
    model_name: str,
    host: str = "127.0.0.1",
    port: int = 8080,
    api_key: SecretStr | None = None,
    *,
    threads: int | None = None,
    parent: int | None = None,
) -> None:
    """Serves until a signal ends it; prints its URL as one JSON line first. Port 0 takes a free one. With `parent`, a
    process id, it also ends when that process does.

    Raises CredentialsError for an address that others can reach without a key; ModelError for a bad folder or port."""
    import uvicorn

    if not is_loopback(host) and not (api_key and api_key.get_secret_value()):
        raise CredentialsError(
            f"--host {host}: other machines reach it, so set {KEY_VARIABLE}, or use 127.0.0.1"
        )
    if parent is not None:
        exit_with_parent(parent)
    app = create_app(OnnxStudent(folder, threads), model_name, api_key)
    with _bound(host, port) as bound:
        address, taken = bound.getsockname()[:2]
        place = f"[{address}]" if ":" in address else address
        print(json.dumps({"url": f"http://{place}:{taken}/v1", "model": model_name}), flush=True)
        config = uvicorn.Config(
            app, log_level="warning", access_log=False, timeout_graceful_shutdown=2
        )
        uvicorn.Server(config).run(sockets=[bound])


def _bound(host: str, port: int) -> socket.socket:
    try:
        family = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0][0]
        bound = socket.create_server((host, port), family=family, backlog=2048)
    except (OSError, OverflowError) as error:
        raise ModelError(
            f"--host {host} --port {port}: can't be had ({error}); take others"
        ) from error
    # Inherited by each connection; without it an answer's second packet waits 40 ms for the client's delayed ACK.
    bound.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    return bound


@dataclass(frozen=True)
class Served:
    """A running server: `url` ends in /v1, `key` opens it."""

    url: str
    key: SecretStr
    process: subprocess.Popen[bytes]


@contextmanager
def served(folder: Path, model_name: str, threads: int | None = None) -> Iterator[Served]:
    """A server of `folder` in a process of its own on 127.0.0.1, gone afterwards whatever happens, even to us.

    Raises ModelError where it doesn't start."""
    key = secrets.token_urlsafe(32)
    command = [sys.executable, "-m", "distillery.serving", str(folder), "--name", model_name]
    command += ["--port", "0", "--parent", str(os.getpid())]
    command += [] if threads is None else ["--threads", str(threads)]
    with tempfile.TemporaryFile() as log:
        process = subprocess.Popen(  # noqa: S603 - our own interpreter and module
            command,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=log,
            env=os.environ | {KEY_VARIABLE: key},
        )
        try:
            yield Served(_wait_until_ready(process, folder, log), SecretStr(key), process)
        finally:
            _stop(process)


def _wait_until_ready(process: subprocess.Popen[bytes], folder: Path, log: IO[bytes]) -> str:
    import httpx

    assert process.stdout is not None  # noqa: S101 - it is a pipe
    ready, _, _ = select.select([process.stdout], [], [], _START_SECONDS)
    line = process.stdout.readline() if ready else b""
    if not line:
        log.seek(0)
        last = log.read().decode(errors="replace").strip().rpartition("\n")[2]
        raise ModelError(
            last or f"{folder}: its server does not start within {_START_SECONDS:.0f} s"
        )
    url = str(json.loads(line)["url"])
    try:
        # No proxy from the environment: this is our own machine.
        with httpx.Client(trust_env=False, timeout=_START_SECONDS) as client:
            client.get(url.removesuffix("/v1") + "/healthz").raise_for_status()
    except httpx.HTTPError as error:
        raise ModelError(
            f"{folder}: its server at {url} does not answer ({type(error).__name__})"
        ) from error
    return url


def _stop(process: subprocess.Popen[bytes]) -> None:
    process.terminate()
    try:
        process.wait(_STOP_SECONDS)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()
    if process.stdout:
        process.stdout.close()


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m distillery.serving", description="Serve a model folder."
    )
    parser.add_argument("folder", type=Path)
    parser.add_argument("--name", required=True, help="the model's name in requests")
    parser.add_argument("--host", default="127.0.0.1")
    parser.add_argument("--port", type=int, default=8080)
    parser.add_argument("--threads", type=int, help="cores for one operation")
    parser.add_argument("--parent", type=int, help="end with this process")
    options = parser.parse_args()
    load_environment()
    key = os.environ.get(KEY_VARIABLE, "")
    try:
        serve(
            options.folder,
            options.name,
            options.host,
            options.port,
            SecretStr(key) if key else None,
            threads=options.threads,
            parent=options.parent,
        )
    except DistilleryError as error:
        sys.exit(str(error))
