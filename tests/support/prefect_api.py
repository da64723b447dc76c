"""Prefect's API as tests ask it."""

import time
from collections.abc import Callable
from typing import Any, TypeVar

import httpx

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
