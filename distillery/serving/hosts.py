"""Refuse requests under names that are not the server's.

A page of another site may point its own name at 127.0.0.1 (DNS rebinding). The browser then counts
the server as that site's own, and its requests tell that name as their host.
"""

import re
import socket
from collections.abc import Collection
from ipaddress import ip_address

from starlette.datastructures import Headers
from starlette.types import ASGIApp, Receive, Scope, Send

from distillery.errors import ModelError
from distillery.serving.requests import ApiError


class HostCheck:
    """Passes on requests to an address, to localhost, to this machine's own name and to `hosts`."""

    def __init__(self, app: ASGIApp, hosts: Collection[str]) -> None:
        self.app = app
        own = ("localhost", socket.gethostname(), *hosts)
        self.names = {without_port(name) for name in own}

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http":
            # HTTP/1.0 needs no host, and no browser leaves it out.
            host = Headers(scope=scope).get("host")
            if host is not None and not self.is_own(host):
                name = without_port(host)[:100]
                refused = ApiError(
                    421,
                    f"This server does not answer as {name!r}; if that is its name, start "
                    "it with --allow-host.",
                )
                await refused.response(scope, receive, send)
                return
        await self.app(scope, receive, send)

    def is_own(self, host: str) -> bool:
        """Return whether a Host header names this server: no one can give an address another
        meaning."""
        name = without_port(host)
        # Names below localhost are this machine's too, by RFC 6761; browsers ask no one for them.
        if name in self.names or name.endswith(".localhost"):
            return True
        try:
            ip_address(name)
        except ValueError:
            return False
        return True


def without_port(host: str) -> str:
    """Return the name or the address in a Host header, in lower case."""
    name = host.lower()
    if name.startswith("["):
        return name[1:].partition("]")[0]
    if name.count(":") == 1:
        name = name.partition(":")[0]
    return name.rstrip(".")


def own_name(given: str) -> str:
    """Return the name in what a user gives as the server's own, which may be an address with
    scheme and port. Raises ModelError for what is no name."""
    name = without_port(given.strip().rpartition("://")[2].partition("/")[0])
    if not re.fullmatch(r"[a-z0-9_.:-]+", name):
        raise ModelError(f"--allow-host {given}: give the name of a host, such as my.example")
    return name
