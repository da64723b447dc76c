"""An Azure ML registry on this machine, beside the workspace of azure_ml_stand_in.py: the routes
that azure-ai-ml asks for a registry's model, and the key to its storage, which is real Azurite.

Between the client and Azurite stands a proxy that can cut connections and refuse new ones, as a
network does.
"""

import datetime
import select
import socket
import threading
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from azure_ml_stand_in import ArmError, AzureMLStandIn
from azurite_server import ACCOUNT, ACCOUNT_KEY, Certificate
from fastapi import Depends, FastAPI, Request

if TYPE_CHECKING:
    from azure.storage.blob import ContainerClient

REGISTRY = "azureml"
CONTAINER = "registry-models"
TRANSFORMERS = "flavors:\n  transformers: {task: text-generation}\n"
HFTRANSFORMERS = (
    "flavors:\n  hftransformersv2: {task_type: text-generation}\n  python_function: {}\n"
)
TOKENIZER = ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja")
LAYOUTS = ("components", "data", "plain")
ROUTES = ("discovery", "datarefs", "models")
MODEL_VERSION = (
    "/mferp/managementfrontend/subscriptions/{sub}/resourceGroups/{rg}/providers"
    "/Microsoft.MachineLearningServices/registries/{registry}/{what}/{name}/versions/{version}"
)


@dataclass
class RegistryStandIn(AzureMLStandIn):
    """A registry. `models[name, version]` is the folder of a model's files in its storage, which
    the client reaches through `proxy_port`.

    `key_seconds`: how long a key to the storage is good. `asked` counts by route."""

    proxy_port: int = 0
    key_seconds: float = 3600
    models: dict[tuple[str, str], str] = field(default_factory=dict)

    def environment(self, certificate: Certificate) -> dict[str, str]:
        return super().environment(certificate) | {"REGISTRY_DISCOVERY_ENDPOINT_URL": self.url}

    def app(self) -> FastAPI:
        app = super().app()
        ready = [Depends(self.admitted)]
        app.get("/registrymanagement/v1.0/registries/{registry}/discovery", dependencies=ready)(
            self.discovery
        )
        app.get(MODEL_VERSION.replace("{what}", "models"), dependencies=ready)(self.registry_model)
        app.post(MODEL_VERSION.replace("{what}", "datarefs"), dependencies=ready)(self.storage_key)
        return app

    def admitted(self, request: Request) -> None:
        self.throttle(request)
        self.asked.update(route for route in ROUTES if f"/{route}" in request.url.path)
        if self.status is not None:
            raise ArmError(self.status, "StandIn", f"answered {self.status} as the test asked")
        if request.headers.get("authorization") != f"Bearer {self.access_token}":
            raise ArmError(401, "InvalidAuthenticationToken", "The access token is invalid.")
        if request.path_params["registry"] != REGISTRY:
            raise ArmError(404, "UserError", "The registry was not found.")

    def discovery(self) -> dict[str, Any]:
        return {
            "registryName": REGISTRY,
            "subscriptionId": "00000000-0000-0000-0000-000000000000",
            "resourceGroup": "rg",
            "primaryRegionResourceProviderUri": f"{self.url}/",
        }

    def registry_model(self, name: str, version: str) -> dict[str, Any]:
        if (name, version) not in self.models:
            raise ArmError(404, "UserError", f"Model {name}:{version} was not found.")
        properties = {
            "modelUri": self.address(name, version),
            "modelType": "mlflow_model",
            "flavors": {},
        }
        address = f"azureml://registries/{REGISTRY}/models/{name}/versions/{version}"
        return {"id": address, "name": version, "properties": properties}

    def storage_key(self, name: str, version: str) -> dict[str, Any]:
        key = {
            "credentialType": "SAS",
            "sasUri": f"{self.container_url}?{read_key(self.key_seconds)}",
        }
        address = self.address(name, version)
        return {"blobReferenceForConsumption": {"blobUri": address, "credential": key}}

    @property
    def container_url(self) -> str:
        return f"https://{ACCOUNT}.blob.localhost:{self.proxy_port}/{CONTAINER}"

    def address(self, name: str, version: str) -> str:
        return f"{self.container_url}/{self.models[name, version]}"


def read_key(seconds: float) -> str:
    """Return a token that reads and lists the container for some seconds."""
    from azure.storage.blob import ContainerSasPermissions, generate_container_sas

    now = datetime.datetime.now(datetime.UTC)
    token: str = generate_container_sas(
        ACCOUNT,
        CONTAINER,
        account_key=ACCOUNT_KEY,
        permission=ContainerSasPermissions(read=True, list=True),
        expiry=now + datetime.timedelta(seconds=seconds),
    )
    return token


def create_container(blob_port: int, name: str) -> "ContainerClient":
    """Return a container of the storage, created if it is not there."""
    from azure.storage.blob import ContainerClient

    url = f"https://{ACCOUNT}.blob.localhost:{blob_port}"
    key = {"account_name": ACCOUNT, "account_key": ACCOUNT_KEY}
    container = ContainerClient(url, name, credential=key)
    if not container.exists():
        container.create_container()
    return container


def upload(blob_port: int, folder: str, files: Mapping[str, bytes | Path]) -> None:
    """Write a model's files into the registry's storage."""
    with create_container(blob_port, CONTAINER) as container:
        for name, content in files.items():
            data = content.read_bytes() if isinstance(content, Path) else content
            container.upload_blob(f"{folder}/{name}", data, overwrite=True)


def in_layout(layout: str, files: Mapping[str, Any]) -> dict[str, Any]:
    """Return a model's files as a registry holds them: by their names there."""
    top = "mlflow_model_folder"
    if layout == "plain":
        return {f"files/{name}": content for name, content in files.items()}
    folders = ("model", "components/tokenizer")
    described = TRANSFORMERS
    if layout == "data":
        folders, described = ("data/model", "data/tokenizer"), HFTRANSFORMERS
    held: dict[str, Any] = {f"{top}/MLmodel": described.encode(), f"{top}/conda.yaml": b"name: x"}
    for name, content in files.items():
        folder = folders[1] if name in TOKENIZER else folders[0]
        held[f"{top}/{folder}/{name}"] = content
    held[f"{top}/{folders[0]}/pytorch_model.bin"] = b"may run code"
    if layout == "data":
        # As in the registry: a config of its own, beside that of the weights.
        held[f"{top}/data/config/config.json"] = files["config.json"]
    return held


class Proxy:
    """Passes connections on to `port`, and counts in `sent` the bytes that clients were sent.

    `cut_after(count)` cuts all connections when as many more bytes have been sent, and refuses new
    ones for `away_s`. `bytes_per_s` holds all connections together to that speed."""

    def __init__(self, port: int) -> None:
        self._target, self.port, self.sent, self.connections = port, 0, 0, 0
        self.bytes_per_s: float | None = None
        self._cut_at: int | None = None
        self._away_s, self._away_until = 0.0, 0.0
        self._lock = threading.Lock()
        self._stopped = threading.Event()

    def cut_after(self, count: int, away_s: float) -> None:
        self._cut_at, self._away_s = self.sent + count, away_s

    @contextmanager
    def running(self) -> Iterator[None]:
        with socket.create_server(("127.0.0.1", 0)) as listener:
            self.port = listener.getsockname()[1]
            listener.settimeout(0.1)
            thread = threading.Thread(target=self._accept, args=(listener,))
            thread.start()
            try:
                yield
            finally:
                self._stopped.set()
                thread.join(20)

    def _accept(self, listener: socket.socket) -> None:
        while not self._stopped.is_set():
            try:
                client, _ = listener.accept()
            except TimeoutError:
                continue
            if time.monotonic() < self._away_until:
                client.close()
                continue
            self.connections += 1
            threading.Thread(target=self._pass_on, args=(client,), daemon=True).start()

    def _pass_on(self, client: socket.socket) -> None:
        began = time.monotonic()
        with client, socket.create_connection(("127.0.0.1", self._target)) as server:
            while not self._stopped.is_set() and began >= self._away_until - self._away_s:
                ready, _, _ = select.select([client, server], [], [], 0.1)
                for source in ready:
                    data = source.recv(1 << 16)
                    if not data:
                        return
                    if source is client:
                        server.sendall(data)
                    elif not self._send(client, data):
                        return

    def _send(self, client: socket.socket, data: bytes) -> bool:
        """Send data to the client; return False where the connection is to be cut."""
        with self._lock:
            if self._cut_at is not None and self.sent + len(data) > self._cut_at:
                self._cut_at = None
                self._away_until = time.monotonic() + self._away_s
                return False
            self.sent += len(data)
            if self.bytes_per_s:
                time.sleep(len(data) / self.bytes_per_s)
        try:
            client.sendall(data)
        except OSError:
            return False
        return True
