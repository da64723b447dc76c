"""Connections that must tell their request's headers in time, and errors below the application."""

import asyncio
import json
from http import HTTPStatus
from typing import Any

import h11
from uvicorn.protocols.http.h11_impl import H11Protocol

from distillery.serving.requests import ApiError


class TimedProtocol(H11Protocol):
    """uvicorn's own protocol, which by itself waits for headers for ever. A connection that is idle
    between two requests is closed by uvicorn."""

    header_s = 15.0
    _headers_due: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        self._expect_headers()

    def data_received(self, data: bytes) -> None:
        super().data_received(data)
        if self.conn.their_state is h11.IDLE and not self.transport.is_closing():
            self._expect_headers()
        else:
            self._stop_waiting()

    def connection_lost(self, exc: Exception | None) -> None:
        self._stop_waiting()
        super().connection_lost(exc)

    def _expect_headers(self) -> None:
        if self._headers_due is None:
            self._headers_due = self.loop.call_later(self.header_s, self._headers_are_late)

    def _stop_waiting(self) -> None:
        if self._headers_due is not None:
            self._headers_due.cancel()
            self._headers_due = None

    def _headers_are_late(self) -> None:
        if not self.transport.is_closing() and self.conn.our_state is h11.IDLE:
            self.refuse(ApiError(408, f"The headers did not come within {self.header_s:g} s."))

    def send_400_response(self, msg: str) -> None:
        self.refuse(ApiError(400, msg))

    def refuse(self, error: ApiError) -> None:
        """Answer with an error in OpenAI's form, and close the connection."""
        body = json.dumps(error.body).encode()
        headers: list[tuple[bytes, bytes]] = [
            (b"content-type", b"application/json"),
            (b"content-length", str(len(body)).encode()),
            (b"connection", b"close"),
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


def timed_protocol(header_s: float) -> type[TimedProtocol]:
    """Return the protocol with its limit in seconds, as uvicorn makes one for each connection."""
    return type("TimedProtocol", (TimedProtocol,), {"header_s": header_s})
