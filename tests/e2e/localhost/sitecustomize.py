"""*.localhost and the hosts of Azure AI Foundry at 127.0.0.1: with this folder on PYTHONPATH,
Python imports it at its start."""

import socket
from typing import Any

HERE = (".localhost", ".services.ai.azure.com")

real = socket.getaddrinfo


def getaddrinfo(host: Any, *args: Any, **kwargs: Any) -> Any:
    name = host.decode() if isinstance(host, bytes) else str(host)
    return real("127.0.0.1" if name.endswith(HERE) else host, *args, **kwargs)


socket.getaddrinfo = getaddrinfo
