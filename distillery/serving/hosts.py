"""Refuse requests under names that are not the server's.

A page of another site may point its own name at 127.0.0.1 (DNS rebinding). The browser then counts
the server as that site's own, and its requests tell that name as their host.
"""

import socket
from collections.abc import Collection
from ipaddress import ip_address

from starlette.datastructures import Headers
from starlette.types import ASGIApp, Receive, Scope, Send

from distillery.serving.requests import ApiError


class HostCheck:
    """Passes on requests to an address, to localhost, to this machine's own name and to `hosts`."""

    def __init__(self, app: ASGIApp, hosts: Collection[str]) -> None:
        self.app = app
        own = ("localhost", socket.gethostname(), *hosts)
        self.names = {name.lower().rstrip(".") for name in own}

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http":
            host = Headers(scope=scope).get("host", "")
            if not self.is_own(host):
                refused = ApiError(
                    421,
                    f"This server does not answer as {host[:100]!r}; if that is its name, start "
                    "it with --allow-host.",
                )
                await refused.response(scope, receive, send)
                return
        await self.app(scope, receive, send)

    def is_own(self, host: str) -> bool:
        """Return whether a Host header names this server: no one can give an address another
        meaning."""
        name = host.lower()
        if name.startswith("["):
            name = name[1:].partition("]")[0]
        elif name.count(":") == 1:
            name = name.partition(":")[0]
        if name.rstrip(".") in self.names:
            return True
        try:
            ip_address(name)
        except ValueError:
            return False
        return True
