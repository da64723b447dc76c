"""Serve a student behind OpenAI's chat-completions API, for openai and azure-ai-inference clients.

    python -m distillery.serving FOLDER --name support-mood

The messages go through the model's own chat template unchanged. One worker thread answers all
requests: each takes only the passes that it needs, one for max_tokens 1, and texts that are
generated share theirs. Sampling is
greedy if no temperature is given, and log-probabilities are those of temperature 1. With vLLM's
`structured_outputs: {"choice": [TEXT, ...]}` the answer is the likeliest of these texts, as a
student with prompt.answer: text chooses it.
"""

import argparse
import json
import os
import socket
import sys
from collections.abc import Sequence
from pathlib import Path

from pydantic import SecretStr

from distillery.errors import CredentialsError, DistilleryError, ModelError
from distillery.processes import exit_with_parent
from distillery.registry.manifest import verify_before_loading
from distillery.serving.hosts import own_name
from distillery.serving.limits import ACCEPTED_AT_ONCE, Limits, for_queue, within_open_files
from distillery.serving.process import KEY_VARIABLE
from distillery.settings import is_loopback, load_environment


def serve(
    folder: Path,
    model_name: str,
    host: str = "127.0.0.1",
    port: int = 8080,
    api_key: SecretStr | None = None,
    *,
    threads: int | None = None,
    parent: int | None = None,
    hosts: Sequence[str] = (),
    limits: Limits | None = None,
    shared_prefix: bool | None = None,
    for_labels: bool = False,
    processes: int = 1,
) -> None:
    """Serve until a signal ends it, then answer what is there. Prints the URL as one line of JSON
    first.

    Port 0 takes a free one. With `parent`, a process id, the server ends when that process does.
    `hosts`: names, beside its own, that clients reach the server by. `shared_prefix`: whether a
    prompt goes on from what it shares with the one before; None is yes where only this machine
    reaches the server. `for_labels`: a run's own teacher is served, whose log-probabilities of
    written answers a student learns from; see `completion.complete`. `processes`: how many load the
    model and answer, each on its own.
    Raises CredentialsError for an address that other machines reach without a key, ModelError for a
    bad folder, port or name, and RegistryError for a registered model that was altered or is not
    signed as DISTILLERY_VERIFY_KEY asks for.
    """
    from distillery.serving.running import Serving, run, run_processes
    from distillery.serving.student import file_states

    if not is_loopback(host) and not (api_key and api_key.get_secret_value()):
        raise CredentialsError(
            f"--host {host}: other machines can reach it; set {KEY_VARIABLE}, or use 127.0.0.1"
        )
    if parent is not None:
        exit_with_parent(parent)
    names = [own_name(name) for name in hosts]
    verify_before_loading(folder)
    limits = within_open_files(limits or Limits())
    serving = Serving(
        folder,
        model_name,
        api_key,
        hosts=(host, *names),
        threads=threads,
        limits=limits,
        shared_prefix=is_loopback(host) if shared_prefix is None else shared_prefix,
        for_labels=for_labels,
        files=file_states(folder),
    )
    app = serving.load() if processes == 1 else None
    with listen(host, port) as listener:
        address, free_port = listener.getsockname()[:2]
        if ":" in address:
            address = f"[{address}]"
        url = f"http://{address}:{free_port}/v1"

        def tell() -> None:
            print(json.dumps({"url": url, "model": model_name}), flush=True)

        if app:
            tell()
            run(app, limits, listener)
        else:
            run_processes(processes, serving, listener, tell)


def listen(host: str, port: int) -> socket.socket:
    """Return a listening socket. Raises ModelError if the address can't be used."""
    try:
        family = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0][0]
        listener = socket.create_server((host, port), family=family, backlog=ACCEPTED_AT_ONCE)
    except (OSError, OverflowError) as error:
        raise ModelError(
            f"--host {host} --port {port}: can't be used ({error}); give others"
        ) from error
    # Connections inherit it. Without it, the second packet of an answer waits 40 ms for the
    # delayed acknowledgement of the first.
    listener.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    return listener


def key_from_environment() -> SecretStr | None:
    """Return the key that clients must send, from DISTILLERY_SERVER_KEY; None if it is not set."""
    load_environment()
    key = os.environ.get(KEY_VARIABLE, "")
    return SecretStr(key) if key else None


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m distillery.serving",
        description="Serve the model in a folder. Clients must send the key in "
        f"{KEY_VARIABLE}, if it is set.",
    )
    parser.add_argument("folder", type=Path, help="an exported or downloaded model")
    parser.add_argument("--name", required=True, help="the model's name in requests")
    parser.add_argument("--host", default="127.0.0.1", help="the address to listen on")
    parser.add_argument("--port", type=int, default=8080, help="0 takes a free one")
    parser.add_argument("--threads", type=int, help="threads of one operation")
    parser.add_argument("--queue", type=int, default=Limits.queue, help="waiting requests")
    parser.add_argument("--drain-seconds", type=float, default=Limits.drain_s, help="when stopped")
    parser.add_argument("--parent", type=int, help="end with the process of this id")
    parser.add_argument(
        "--for-labels",
        action="store_true",
        help="log-probabilities among the tokens that a schema leaves, with the end of the turn",
    )
    options = parser.parse_args()
    try:
        serve(
            options.folder,
            options.name,
            options.host,
            options.port,
            key_from_environment(),
            threads=options.threads,
            parent=options.parent,
            limits=for_queue(options.queue, drain_s=options.drain_seconds),
            for_labels=options.for_labels,
        )
    except DistilleryError as error:
        sys.exit(str(error))
