"""Azure's blob storage on this machine: real Azurite on 127.0.0.1, which can be stopped and started
again."""

import shutil
import socket
import subprocess
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Self

AZURITE = Path(__file__).parent / "azurite"
ACCOUNT = "devstoreaccount1"
# Azurite's published key of its one built-in account.
ACCOUNT_KEY = (
    "Eby8vdM02xNOcqFlqUwJPLlmEtlCDXJ1OUzFT50uSRZ6IFsuFq2UVErCz4I6tq/K1SZFPTOtr/KBHBeksoGMGw=="
)


@dataclass(frozen=True)
class Certificate:
    cert: Path
    key: Path


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


class Azurite:
    """The blob service with its data in `folder`, started by `with` or start().

    It speaks HTTP and takes the key; with a certificate it speaks TLS and takes logins as well.
    Raises RuntimeError where Node or Azurite is missing."""

    def __init__(
        self, folder: Path, certificate: Certificate | None = None, port: int | None = None
    ) -> None:
        self.folder, self.certificate, self.port = folder, certificate, port or free_port()
        self._process: subprocess.Popen[bytes] | None = None

    @property
    def connection_string(self) -> str:
        scheme = "https" if self.certificate else "http"
        endpoint = f"{scheme}://127.0.0.1:{self.port}/{ACCOUNT}"
        return f"AccountName={ACCOUNT};AccountKey={ACCOUNT_KEY};BlobEndpoint={endpoint};"

    @property
    def environment(self) -> Mapping[str, str]:
        """What leads a store with an abfs:// URL here."""
        return {"AZURE_STORAGE_CONNECTION_STRING": self.connection_string}

    def requests(self, *parts: str) -> int:
        """Return how many requests were answered so far whose line in the log has all `parts`, such
        as "GET /CONTAINER/BLOB"."""
        lines = self._log.read_text().splitlines()
        return sum('HTTP/1.1" ' in line and all(part in line for part in parts) for line in lines)

    def start(self) -> None:
        """Starts it on the same port and the same data; returns once it answers."""
        node = shutil.which("node")
        main = AZURITE / "node_modules" / "azurite" / "dist" / "src" / "blob" / "main.js"
        if node is None or not main.exists():
            raise RuntimeError(
                "Azurite is missing: install Node 20 or newer, then run "
                "npm ci --prefix tests/support/azurite"
            )
        options = [
            "--blobHost",
            "127.0.0.1",
            "--blobPort",
            str(self.port),
            "--location",
            str(self.folder),
        ]
        options += ["--skipApiVersionCheck", "--disableTelemetry"]
        if self.certificate:
            options += [
                "--cert",
                str(self.certificate.cert),
                "--key",
                str(self.certificate.key),
                "--oauth",
                "basic",
            ]
        with self._log.open("ab") as log:
            self._process = subprocess.Popen([node, str(main), *options], stdout=log, stderr=log)
        self._wait(self._process)

    def stop(self) -> None:
        """Ends it; connections are refused from now on. It keeps its data."""
        if self._process:
            self._process.terminate()
            self._process.wait(20)
            self._process = None

    def __enter__(self) -> Self:
        self.start()
        return self

    def __exit__(self, *_error: object) -> None:
        self.stop()

    @property
    def _log(self) -> Path:
        return self.folder / "azurite.log"

    def _wait(self, process: "subprocess.Popen[bytes]") -> None:
        end = time.monotonic() + 60
        while time.monotonic() < end and process.poll() is None:
            with socket.socket() as probe:
                if probe.connect_ex(("127.0.0.1", self.port)) == 0:
                    return
            time.sleep(0.1)
        raise RuntimeError(f"Azurite did not start: {self._log.read_text()[-500:]}")
