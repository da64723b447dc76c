"""Run the server's application: in this process, or in several that share its socket."""

import asyncio
import logging
import math
import multiprocessing
import os
import signal
import socket
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from multiprocessing.connection import wait
from multiprocessing.context import SpawnProcess
from multiprocessing.synchronize import Event
from pathlib import Path
from typing import Any

import uvicorn
from fastapi import FastAPI
from prometheus_client.multiprocess import mark_process_dead
from pydantic import SecretStr

from distillery.errors import ModelError
from distillery.processes import exit_with_parent
from distillery.serving.app import create_app
from distillery.serving.connection import timed_protocol
from distillery.serving.limits import Limits
from distillery.serving.metrics import SHARED_FOLDER
from distillery.serving.student import ServedStudent, check_unchanged

RESTART_S = 1.0
"""Seconds before a process that has ended is started again."""

LAST_WORDS_S = 2.0
"""Seconds in which answers that are ready, or refusals, go out when a server stops."""

_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Serving:
    """What a server process is started with; see `server.serve`."""

    folder: Path
    model_name: str
    api_key: SecretStr | None
    hosts: Sequence[str]
    threads: int | None
    limits: Limits
    shared_prefix: bool
    for_labels: bool
    files: dict[Path, tuple[int, int]]

    def load(self) -> FastAPI:
        """Load the model; return the application that answers with it. Raises ModelError where the
        folder is not as it was when the server started."""
        check_unchanged(self.folder, self.files)
        return create_app(
            ServedStudent(self.folder, self.threads, self.for_labels, self.limits),
            self.model_name,
            self.api_key,
            hosts=self.hosts,
            limits=self.limits,
            shared_prefix=self.shared_prefix,
        )


class Server(uvicorn.Server):
    """uvicorn's server, which lets requests that are there be answered when it stops."""

    def __init__(self, app: FastAPI, limits: Limits) -> None:
        super().__init__(
            uvicorn.Config(
                app,
                http=timed_protocol(limits),
                ws="none",
                log_level="warning",
                access_log=False,
                server_header=False,
                timeout_graceful_shutdown=math.ceil(limits.drain_s + LAST_WORDS_S),
            )
        )
        self.app = app

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        """Take no more connections, and end with the last answer; see `ModelServer.drain`."""
        draining = asyncio.create_task(self.app.state.server.drain())
        await super().shutdown(sockets)
        draining.cancel()
        # Where a second signal cuts the answers short, nobody else tells the student's thread.
        self.app.state.server.rounds.close()


def run(app: FastAPI, limits: Limits, listener: socket.socket) -> None:
    """Answer what comes to a listening socket, until a signal ends it."""
    Server(app, limits).run(sockets=[listener])


class Processes:
    """Server processes: each loads the model, and takes connections from the same socket."""

    def __init__(self, count: int, serving: Serving, listener: socket.socket) -> None:
        self.serving, self.listener = serving, listener
        self.context = multiprocessing.get_context("spawn")
        # Each with what it sets when it has loaded the model, which must live as long as it does:
        # what is collected here can't be opened there.
        self.running: dict[SpawnProcess, Event] = {}
        self.count = count

    def start(self) -> None:
        """Start all of them. Raises ModelError where one ends before it is ready."""
        for _ in range(self.count):
            self.start_one()
        for process, is_loaded in self.running.items():
            while not is_loaded.wait(0.1):
                if not process.is_alive():
                    raise ModelError(
                        f"{self.serving.folder}: a server process ended with status "
                        f"{process.exitcode} before it was ready; its own lines say why"
                    )

    def start_one(self) -> None:
        """Start a process."""
        is_loaded = self.context.Event()
        arguments = (self.serving, self.listener, os.getpid(), is_loaded)
        process = self.context.Process(target=run_one, args=arguments)
        process.start()
        self.running[process] = is_loaded

    def keep(self, folder: str) -> None:
        """Start those that end again, for ever. `folder`: that of their metrics."""
        while True:
            wait([process.sentinel for process in self.running])
            for process in [each for each in self.running if not each.is_alive()]:
                _log.warning("a server process ended with status %s", process.exitcode)
                del self.running[process]
                mark_process_dead(process.pid, folder)  # type: ignore[no-untyped-call]
                time.sleep(RESTART_S)
                self.start_one()

    def stop(self) -> None:
        """Let all of them answer what is there, and end."""
        # As long as it is open here, connections would wait for someone to accept them.
        self.listener.close()
        deadline = time.monotonic() + self.serving.limits.drain_s + 2 * LAST_WORDS_S
        for process in self.running:
            process.terminate()
        for process in self.running:
            process.join(max(0.0, deadline - time.monotonic()))
            if process.is_alive():
                process.kill()
                process.join()


def run_one(serving: Serving, listener: socket.socket, parent: int, is_loaded: Event) -> None:
    """Serve in a process that `Processes` started."""
    exit_with_parent(parent)
    app = serving.load()
    is_loaded.set()
    run(app, serving.limits, listener)


def run_processes(
    count: int, serving: Serving, listener: socket.socket, tell: Callable[[], None]
) -> None:
    """Serve in `count` processes until a signal ends this one; call `tell` when all have loaded the
    model. Raises ModelError where one of them can't."""
    processes = Processes(count, serving, listener)
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, end)
    with tempfile.TemporaryDirectory() as folder:
        os.environ[SHARED_FOLDER] = folder
        try:
            processes.start()
            tell()
            processes.keep(folder)
        finally:
            processes.stop()


def end(number: int, _: Any) -> None:
    """Leave `run_processes`; the same signal once more ends this process at once."""
    signal.signal(number, signal.SIG_DFL)
    raise SystemExit(0)
