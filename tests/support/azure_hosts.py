"""Azure's host names, which lead to this machine, and their certificate, which both SDKs trust."""

import socket
import ssl
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import aiohttp.connector
import pytest
from azure_ml_stand_in import make_certificate
from azurite_server import Certificate

FOUNDRY = "lab.services.ai.azure.com"
HOSTS = (FOUNDRY, "lab.openai.azure.com", "lab.cognitiveservices.azure.com")


@contextmanager
def azure_hosts(folder: Path) -> Iterator[Certificate]:
    """Leads HOSTS to 127.0.0.1 and gives their certificate, which is in `folder`."""
    certificate = make_certificate(folder, *HOSTS)
    real = socket.getaddrinfo

    def getaddrinfo(host: Any, *args: Any, **kwargs: Any) -> Any:
        name = host.decode() if isinstance(host, bytes) else host
        return real("127.0.0.1" if name in HOSTS else host, *args, **kwargs)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(socket, "getaddrinfo", getaddrinfo)
        patch.setenv("SSL_CERT_FILE", str(certificate.cert))
        # aiohttp makes its own when it is imported, before the variable was set.
        trusting = ssl.create_default_context(cafile=str(certificate.cert))
        patch.setattr(aiohttp.connector, "_SSL_CONTEXT_VERIFIED", trusting)
        yield certificate
