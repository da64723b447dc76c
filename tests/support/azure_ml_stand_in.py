"""Azure on this machine, as far as the registry needs it: ARM's and Azure ML's routes for models
and datastores, the login endpoint of a managed identity, and real Azurite for the blobs. All speak
TLS with a certificate made on the spot.

The real SDKs are led here by their own settings alone (ARM_CLOUD_METADATA_URL, IDENTITY_ENDPOINT,
REQUESTS_CA_BUNDLE). `*.localhost` names, which Azurite needs to tell accounts apart, must resolve
to 127.0.0.1: see `resolve_localhost`.
"""

import base64
import datetime
import itertools
import json
import socket
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from ipaddress import ip_address
from pathlib import Path
from typing import Any

import uvicorn
from azurite_server import ACCOUNT, ACCOUNT_KEY, Certificate
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import NameOID
from fastapi import Depends, FastAPI, Request
from fastapi.responses import JSONResponse

CONTAINER = "azureml-blobstore"
IDENTITY_HEADER = "stand-in-identity-header"
WORKSPACE = (
    "/subscriptions/{sub}/resourceGroups/{rg}"
    "/providers/Microsoft.MachineLearningServices/workspaces/{ws}"
)


def make_certificate(folder: Path, *names: str) -> Certificate:
    """A self-signed certificate for localhost, Azurite's account name, 127.0.0.1 and `names`, valid
    for a day."""
    key = ec.generate_private_key(ec.SECP256R1())
    name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "localhost")])
    hosts = [x509.DNSName(host) for host in ("localhost", f"{ACCOUNT}.blob.localhost", *names)]
    now = datetime.datetime.now(datetime.UTC)
    certificate = (
        x509.CertificateBuilder()
        .subject_name(name)
        .issuer_name(name)
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - datetime.timedelta(hours=1))
        .not_valid_after(now + datetime.timedelta(days=1))
        .add_extension(
            x509.SubjectAlternativeName([*hosts, x509.IPAddress(ip_address("127.0.0.1"))]),
            critical=False,
        )
        .add_extension(x509.BasicConstraints(ca=True, path_length=None), critical=True)
        .sign(key, hashes.SHA256())
    )
    made = Certificate(folder / "cert.pem", folder / "key.pem")
    made.cert.write_bytes(certificate.public_bytes(serialization.Encoding.PEM))
    made.key.write_bytes(
        key.private_bytes(
            serialization.Encoding.PEM,
            serialization.PrivateFormat.PKCS8,
            serialization.NoEncryption(),
        )
    )
    return made


def resolve_localhost(real: Callable[..., Any]) -> Callable[..., Any]:
    """`real` (socket.getaddrinfo) with every *.localhost at 127.0.0.1 (RFC 6761), which not every
    resolver knows."""

    def getaddrinfo(host: Any, *args: Any, **kwargs: Any) -> Any:
        name = host.decode() if isinstance(host, bytes) else host
        local = isinstance(name, str) and name.endswith(".localhost")
        return real("127.0.0.1" if local else host, *args, **kwargs)

    return getaddrinfo


class ArmError(Exception):
    def __init__(self, status: int, code: str, message: str) -> None:
        self.status, self.code, self.message = status, code, message


RETRY_AFTER_S = 1
"""What an answer 429 tells the client to wait."""


@dataclass
class AzureMLStandIn:
    """One workspace. `versions[name][version]` holds a version's REST body; `status` overrides
    every answer. `reader`: the login has Azure's role Reader, which neither writes nor sees
    secrets.

    `throttled`: how many requests to each address are answered 429 first, which `refused` counts.
    `asked` counts the others: those of the workspace as "workspace".

    Without `secrets` the datastore hands out none, and the storage takes the login itself.
    """

    blob_port: int
    secrets: dict[str, str] | None
    workspace: str = "ws"
    port: int = 0
    status: int | None = None
    reader: bool = False
    throttled: int = 0
    refused: Counter[str] = field(default_factory=Counter)
    asked: Counter[str] = field(default_factory=Counter)
    versions: dict[str, dict[str, Any]] = field(default_factory=dict)
    access_token: str = field(default_factory=lambda: storage_token())

    @property
    def url(self) -> str:
        return f"https://localhost:{self.port}"

    def environment(self, certificate: Certificate) -> dict[str, str]:
        """What leads the real SDKs here."""
        return {
            "AZUREML_SUBSCRIPTION_ID": "00000000-0000-0000-0000-000000000000",
            "AZUREML_RESOURCE_GROUP": "rg",
            "AZUREML_WS_NAME": self.workspace,
            "AZUREML_CURRENT_CLOUD": "Local",
            "ARM_CLOUD_METADATA_URL": f"{self.url}/metadata/endpoints",
            "IDENTITY_ENDPOINT": f"{self.url}/identity",
            "IDENTITY_HEADER": IDENTITY_HEADER,
            "REQUESTS_CA_BUNDLE": str(certificate.cert),
        }

    def app(self) -> FastAPI:
        app = FastAPI()
        app.add_exception_handler(ArmError, _arm_error)
        app.get("/metadata/endpoints")(self.clouds)
        app.get("/identity")(self.token)
        ready = [Depends(self.authorised)]
        models = WORKSPACE + "/models"
        datastores = WORKSPACE + "/datastores"
        app.get(models, dependencies=ready)(self.list_models)
        app.get(models + "/{name}", dependencies=ready)(self.get_model)
        app.get(models + "/{name}/versions", dependencies=ready)(self.list_versions)
        app.get(models + "/{name}/versions/{version}", dependencies=ready)(self.get_version)
        app.put(models + "/{name}/versions/{version}", dependencies=ready)(self.put_version)
        app.get(datastores, dependencies=ready)(self.list_datastores)
        app.get(datastores + "/{name}", dependencies=ready)(self.get_datastore)
        app.post(datastores + "/{name}/listSecrets", dependencies=ready)(self.list_secrets)
        return app

    def throttle(self, request: Request) -> None:
        address = f"{request.method} {request.url.path}"
        if self.refused[address] < self.throttled:
            self.refused[address] += 1
            raise ArmError(429, "TooManyRequests", "Slow down.")

    def authorised(self, request: Request) -> None:
        self.throttle(request)
        self.asked["workspace"] += 1
        if self.status is not None:
            raise ArmError(self.status, "StandIn", f"answered {self.status} as the test asked")
        if request.headers.get("authorization") != f"Bearer {self.access_token}":
            raise ArmError(401, "InvalidAuthenticationToken", "The access token is invalid.")
        if self.reader and request.method != "GET":
            raise ArmError(403, "AuthorizationFailed", "The client may not perform this action.")
        if request.path_params["ws"] != self.workspace:
            raise ArmError(
                404, "ResourceNotFound", f"The workspace {request.path_params['ws']} was not found."
            )

    def clouds(self) -> list[dict[str, Any]]:
        return [
            {
                "name": "Local",
                "portal": f"{self.url}/",
                "resourceManager": f"{self.url}/",
                "authentication": {"loginEndpoint": f"{self.url}/"},
                "suffixes": {"storage": f"localhost:{self.blob_port}"},
            }
        ]

    def token(self, request: Request, resource: str) -> dict[str, Any]:
        if request.headers.get("x-identity-header") != IDENTITY_HEADER:
            raise ArmError(401, "Unauthorized", "wrong identity header")
        expires = str(int(time.time()) + 3600)
        return {
            "access_token": self.access_token,
            "expires_on": expires,
            "resource": resource,
            "token_type": "Bearer",
        }

    def list_models(self, request: Request) -> dict[str, Any]:
        return {"value": [self._container(request.url.path, name) for name in self.versions]}

    def get_model(self, request: Request, name: str) -> dict[str, Any]:
        if name not in self.versions:
            raise ArmError(404, "UserError", f"Model container {name} was not found.")
        return self._container(request.url.path.rsplit("/", 1)[0], name)

    def _container(self, models: str, name: str) -> dict[str, Any]:
        newest = max(int(version) for version in self.versions[name])
        properties = {
            "latestVersion": str(newest),
            "nextVersion": str(newest + 1),
            "isArchived": False,
        }
        return {
            "id": f"{models}/{name}",
            "name": name,
            "properties": properties,
            "systemData": _system_data(),
        }

    def list_versions(self, name: str) -> dict[str, Any]:
        if name not in self.versions:
            raise ArmError(404, "UserError", f"Model container {name} was not found.")
        return {"value": list(self.versions[name].values())[::-1]}

    def get_version(self, name: str, version: str) -> Any:
        if version not in self.versions.get(name, {}):
            raise ArmError(404, "UserError", f"Model {name}:{version} was not found.")
        return self.versions[name][version]

    async def put_version(self, request: Request, name: str, version: str) -> Any:
        body = await request.json()
        old = self.versions.get(name, {}).get(version)
        if old and old["properties"]["modelUri"] != body["properties"]["modelUri"]:
            raise ArmError(409, "UserError", "A model with this name and version already exists.")
        body |= {
            "id": request.url.path,
            "name": version,
            "systemData": (old or {}).get("systemData", _system_data()),
        }
        body["properties"] = {
            "tags": {},
            "properties": {},
            "flavors": {},
            **body["properties"],
            "isArchived": False,
        }
        self.versions.setdefault(name, {})[version] = body
        return body

    def list_datastores(self, request: Request) -> dict[str, Any]:
        return {"value": [self.get_datastore(request, "workspaceblobstore")]}

    def get_datastore(self, request: Request, name: str) -> dict[str, Any]:
        if name != "workspaceblobstore":
            raise ArmError(404, "UserError", f"Datastore {name} was not found.")
        properties = {
            "datastoreType": "AzureBlob",
            "accountName": ACCOUNT,
            "containerName": CONTAINER,
            "endpoint": f"localhost:{self.blob_port}",
            "protocol": "https",
            "isDefault": True,
            "credentials": {"credentialsType": "AccountKey" if self.secrets else "None"},
        }
        return {"id": f"{request.url.path}/{name}", "name": name, "properties": properties}

    def list_secrets(self, name: str) -> dict[str, str]:
        if not self.secrets:
            raise ArmError(400, "UserError", f"Datastore {name} has no secrets.")
        return self.secrets

    @contextmanager
    def running(self, certificate: Certificate) -> Iterator[None]:
        """Serves from a thread on 127.0.0.1; the port is in `port` once it does."""
        with socket.create_server(("127.0.0.1", 0)) as listener:
            self.port = listener.getsockname()[1]
            # Clients keep their connections open; the server doesn't wait for them to hang up.
            config = uvicorn.Config(
                self.app(),
                log_level="critical",
                timeout_graceful_shutdown=1,
                ssl_certfile=str(certificate.cert),
                ssl_keyfile=str(certificate.key),
            )
            server = uvicorn.Server(config)
            thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]})
            thread.start()
            try:
                yield
            finally:
                server.should_exit = True
                thread.join(20)


def container_sas(writes: bool = True) -> dict[str, str]:
    """What listSecrets answers in Azure: a token for the container, good for an hour."""
    from azure.storage.blob import ContainerSasPermissions, generate_container_sas

    token: str = generate_container_sas(
        ACCOUNT,
        CONTAINER,
        account_key=ACCOUNT_KEY,
        permission=ContainerSasPermissions(read=True, write=writes, create=writes, list=True),
        expiry=datetime.datetime.now(datetime.UTC) + datetime.timedelta(hours=1),
    )
    return {"secretsType": "Sas", "sasToken": token}


def storage_token() -> str:
    """A token as Microsoft Entra ID gives it out, but unsigned: Azurite's basic OAuth reads its
    claims alone."""
    now = int(time.time())
    claims = {
        "iss": "https://sts.windows.net/00000000-0000-0000-0000-000000000000/",
        "aud": "https://storage.azure.com",
        "iat": now - 60,
        "nbf": now - 60,
        "exp": now + 3600,
        "ver": "1.0",
    }
    parts: tuple[Mapping[str, object], ...] = ({"alg": "RS256", "typ": "JWT"}, claims, {})
    return ".".join(
        base64.urlsafe_b64encode(json.dumps(part).encode()).decode().rstrip("=") for part in parts
    )


_seconds = itertools.count()


def _system_data() -> dict[str, str]:
    """Creation times one second apart, so that the order of two versions never hangs on the
    clock."""
    now = datetime.datetime.now(datetime.UTC) + datetime.timedelta(seconds=next(_seconds))
    return {"createdAt": now.isoformat(), "createdBy": "stand-in", "createdByType": "User"}


def _arm_error(request: Request, error: Exception) -> JSONResponse:
    assert isinstance(error, ArmError)
    return JSONResponse(
        {"error": {"code": error.code, "message": error.message}},
        status_code=error.status,
        headers={"Retry-After": str(RETRY_AFTER_S)} if error.status == 429 else None,
    )
