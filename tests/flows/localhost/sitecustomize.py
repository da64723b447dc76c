"""*.localhost at 127.0.0.1, which not every resolver knows: with this folder on PYTHONPATH, Python
imports it at its start."""

import socket
from typing import Any

real = socket.getaddrinfo


def getaddrinfo(host: Any, *args: Any, **kwargs: Any) -> Any:
    name = host.decode() if isinstance(host, bytes) else str(host)
    return real("127.0.0.1" if name.endswith(".localhost") else host, *args, **kwargs)


socket.getaddrinfo = getaddrinfo
