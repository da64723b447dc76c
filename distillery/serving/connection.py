"""Connections: how many, headers that must come in time, and errors below the application."""

import asyncio
import json
from http import HTTPStatus
from typing import Any

import h11
from uvicorn.protocols.http.h11_impl import H11Protocol

from distillery.serving.limits import Limits
from distillery.serving.requests import ApiError


class TimedProtocol(H11Protocol):
    """uvicorn's own protocol, which by itself waits for headers for ever and takes connections
    until the process may open no more files. A connection that is idle between two requests is
    closed by uvicorn after a time, and at once where another one needs its place."""

    limits = Limits()
    opened: dict["TimedProtocol", None]
    """The server's connections, the oldest first."""
    _headers_due: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        self.opened[self] = None
        self._expect_headers()
        if len(self.opened) > self.limits.connections:
            self._make_room()

    def data_received(self, data: bytes) -> None:
        super().data_received(data)
        if self.conn.their_state is h11.IDLE and not self.transport.is_closing():
            self._expect_headers()
        else:
            self._stop_waiting()

    def connection_lost(self, exc: Exception | None) -> None:
        self._stop_waiting()
        self.opened.pop(self, None)
        super().connection_lost(exc)

    def _make_room(self) -> None:
        """Close the oldest connection that is idle or has not told its headers; if there is none,
        this one."""
        for other in self.opened:
            idle = other.cycle is None or other.cycle.response_complete
            if idle and other is not self:
                del self.opened[other]
                other.transport.abort()
                return
        message = "Too many connections are open; try again."
        retry = {"Retry-After": "1"}
        self.refuse(ApiError(503, message, code="too_many_connections", headers=retry))

    def _expect_headers(self) -> None:
        if self._headers_due is None:
            self._headers_due = self.loop.call_later(self.limits.header_s, self._headers_are_late)

    def _stop_waiting(self) -> None:
        if self._headers_due is not None:
            self._headers_due.cancel()
            self._headers_due = None

    def _headers_are_late(self) -> None:
        if not self.transport.is_closing() and self.conn.our_state is h11.IDLE:
            message = f"The headers did not come within {self.limits.header_s:g} s."
            self.refuse(ApiError(408, message))

    def send_400_response(self, msg: str) -> None:
        self.refuse(ApiError(400, msg))

    def refuse(self, error: ApiError) -> None:
        """Answer with an error in OpenAI's form, and close the connection."""
        body = json.dumps(error.body).encode()
        headers: list[tuple[bytes, bytes]] = [
            (b"content-type", b"application/json"),
            (b"content-length", str(len(body)).encode()),
            (b"connection", b"close"),
            *((name.lower().encode(), value.encode()) for name, value in error.headers.items()),
        ]
        reason = HTTPStatus(error.status).phrase.encode()
        answer: list[Any] = [
            h11.Response(status_code=error.status, headers=headers, reason=reason),
            h11.Data(data=body),
            h11.EndOfMessage(),
        ]
        for event in answer:
            self.transport.write(self.conn.send(event) or b"")
        self.transport.close()


def timed_protocol(limits: Limits) -> type[TimedProtocol]:
    """Return the protocol of one server, as uvicorn makes one for each connection."""
    return type("TimedProtocol", (TimedProtocol,), {"limits": limits, "opened": {}})
