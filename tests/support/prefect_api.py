"""Prefect's API as tests ask it, and a server for flows that need no more than one."""

import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, Self, TypeVar

import httpx
from azurite_server import free_port

T = TypeVar("T")


def wait_for(what: str, found: Callable[[], T | None], seconds: float = 120) -> T:
    """What `found` returns as soon as that is true; fails with `what` after `seconds`."""
    deadline = time.monotonic() + seconds
    while not (value := found()):
        assert time.monotonic() < deadline, f"not within {seconds:.0f} s: {what}"
        time.sleep(0.2)
    return value


class Patient(httpx.HTTPTransport):
    """Asks again, as Prefect's own client does, while SQLite is locked by another writer (503)."""

    def handle_request(self, request: httpx.Request) -> httpx.Response:
        for _ in range(20):
            response = super().handle_request(request)
            if response.status_code != 503:
                break
            response.close()
            time.sleep(0.5)
        return response


class PrefectApi:
    """A server at `url`, which ends in /api; `login` is 'user:password'."""

    def __init__(self, url: str, login: str | None = None) -> None:
        auth = httpx.BasicAuth(*login.split(":", 1)) if login else None
        # A server on SQLite may wait 60 s for its database's lock and answer nothing meanwhile.
        self.api = httpx.Client(base_url=url, timeout=120, auth=auth, transport=Patient())

    def is_healthy(self) -> bool:
        try:
            return self.api.get("/health").status_code == 200
        except httpx.TransportError:
            return False

    def ask(self, path: str, **body: Any) -> Any:
        return self.api.post(path, json=body).raise_for_status().json()


class OwnPrefect(PrefectApi):
    """A Prefect server in `folder`, on SQLite and without a password, as flows start it for
    themselves; but it stays, and is started once. `database` is its file."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.database = folder, folder / "prefect.db"
        self.port = free_port()
        self.url = f"http://127.0.0.1:{self.port}/api"
        super().__init__(self.url)

    def __enter__(self) -> Self:
        kept = {name: text for name, text in os.environ.items() if not name.startswith("PREFECT_")}
        own = {
            "PREFECT_HOME": str(self.folder),
            "PREFECT_SERVER_ANALYTICS_ENABLED": "false",
            "PREFECT_SERVER_UI_ENABLED": "false",
        }
        command = [sys.executable, "-m", "prefect", "server", "start", "--host", "127.0.0.1"]
        with (self.folder / "server.log").open("wb") as log:
            self._process = subprocess.Popen(
                [*command, "--port", str(self.port)], env=kept | own, stdout=log, stderr=log
            )
        try:
            # Seconds on an idle machine; minutes where others use all of its cores.
            wait_for("the server's start", self.has_started, 240)
        except BaseException:
            self._process.kill()
            self._process.wait()
            raise
        return self

    def has_started(self) -> bool:
        """Return whether the server answers. Fail with the end of its log where it has ended."""
        if self._process.poll() is not None:
            log = (self.folder / "server.log").read_text(errors="replace")
            raise AssertionError(f"Prefect's server has ended: {log[-2000:]}")
        return self.is_healthy()

    def __exit__(self, *_error: object) -> None:
        from prefect.events.worker import EventsWorker
        from prefect.logging.handlers import APILogHandler

        # What flows in this process have still to tell would wait for a server that is gone.
        APILogHandler().flush()
        EventsWorker.drain_all()
        self._process.terminate()
        self._process.wait(60)
        self.api.close()
