"""Where the teacher is asked, through which SDK, and with which key or login."""

import asyncio
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Literal
from urllib.parse import unquote, urlsplit, urlunsplit

from pydantic import SecretStr

from distillery.errors import CredentialsError
from distillery.recipe import TeacherRecipe
from distillery.settings import (
    EXAMPLES,
    TeacherSettings,
    is_loopback,
    not_set,
    where_to_set,
)
from distillery.teacher.identity import endpoint_settings

if TYPE_CHECKING:
    from azure.core.credentials_async import AsyncTokenCredential

Sdk = Literal["azure-ai-inference", "openai"]

INFERENCE_HOSTS = (".inference.ai.azure.com", ".models.ai.azure.com")

FOUNDRY_HOST = ".services.ai.azure.com"

RESOURCE_HOSTS = (FOUNDRY_HOST, ".openai.azure.com", ".cognitiveservices.azure.com")
"""Each host is one resource, which answers at V1_PATH."""

AZURE_HOSTS = (*INFERENCE_HOSTS, *RESOURCE_HOSTS)

V1_PATH = "/openai/v1"
"""The path of Azure's v1 API, which the openai SDK asks as it asks any other endpoint (source:
learn.microsoft.com/azure/ai-foundry/how-to/model-inference-to-openai-migration)."""

OLDER_PATHS = ("/openai/", "/api/projects/")
"""What the paths begin with that portals show for the same resource: of a deployment, of an older
API and of a project."""

LOGIN_S = 30.0
"""Seconds within which azure-identity must give a token: it tries several sources of a login, of
which some run a program or ask an address that may not answer."""

SHORTEST_SECRET = 8
"""A key of fewer characters is a word such as "none", which may well appear in an answer."""


@dataclass(frozen=True)
class Endpoint:
    """Where the teacher answers. `identity` names it in the label store. `key` is None if
    azure-identity logs in, or if a server on this machine needs no key. `section` and `variables`
    are the recipe's, for messages."""

    url: str
    model: str
    key: SecretStr | None
    identity: str
    sdk: Sdk
    section: str = TeacherRecipe.section
    variables: str = TeacherRecipe.variables

    @property
    def is_local(self) -> bool:
        """Whether the endpoint is a server on this machine."""
        return is_loopback(host_of(self.url))

    @property
    def needs_login(self) -> bool:
        """Whether azure-identity logs in: an endpoint on Azure without a key."""
        return self.key is None and host_of(self.url).endswith(AZURE_HOSTS)

    @property
    def successor(self) -> "Endpoint | None":
        """The same resource's v1 endpoint, if this one belongs to the model inference API that
        Azure retired on 2026-08-26; None for any other."""
        parts = urlsplit(self.url)
        if self.sdk != "azure-ai-inference" or not host_of(self.url).endswith(FOUNDRY_HOST):
            return None
        url = urlunsplit((parts.scheme, parts.netloc, V1_PATH, "", ""))
        return replace(self, url=url, sdk="openai")

    def redact(self, text: str) -> str:
        """Return `text` without the key."""
        key = self.key.get_secret_value() if self.key else ""
        if len(key) < SHORTEST_SECRET:
            return text
        return text.replace(key, "***")


def resolve_endpoint(recipe: TeacherRecipe, settings: TeacherSettings | None = None) -> Endpoint:
    """Return the endpoint that TEACHER_MODEL_* name, CHEAP_MODEL_* for a cheap teacher, or
    JUDGE_MODEL_* for a judge. Raises CredentialsError with the names of those that are missing or
    wrong."""
    settings, variables = settings or endpoint_settings(recipe), recipe.variables
    model = settings.model.strip()
    address = settings.endpoint.strip()
    key = settings.key.get_secret_value().strip()
    missing = []
    if not model:
        missing.append(f"{variables}_NAME")
    if not address:
        missing.append(f"{variables}_ENDPOINT")
    if missing and not key:
        missing.append(f"{variables}_KEY")
    if missing:
        raise not_set(missing)
    url = base_url_of(address, variables)
    check_deployment_name(address, model, variables)
    check_key(key, url, variables)
    return Endpoint(
        url=url,
        model=model,
        key=SecretStr(key) if key else None,
        identity=recipe.stored_as(model),
        sdk=infer_sdk(url) if recipe.sdk == "auto" else recipe.sdk,
        section=recipe.section,
        variables=variables,
    )


def infer_sdk(url: str) -> Sdk:
    """Return azure-ai-inference for hosts of Azure's model inference API, and openai for Azure's
    v1 endpoint and all others."""
    host = host_of(url)
    is_foundry = host.endswith(FOUNDRY_HOST)
    if is_foundry and urlsplit(url).path.startswith("/models"):
        return "azure-ai-inference"
    if host.endswith(INFERENCE_HOSTS):
        return "azure-ai-inference"
    return "openai"


def base_url_of(address: str, variables: str) -> str:
    """Return the URL up to /chat/completions, as both SDKs need it. Of a resource on Azure it is
    that of the v1 endpoint, whichever of the portals' addresses is given, except /models. Raises
    CredentialsError if `address` is not a usable URL."""
    try:
        parts = urlsplit(address)
        valid = parts.scheme in ("http", "https") and bool(parts.hostname) and parts.port != 0
    except ValueError:
        valid = False
    if not valid:
        raise CredentialsError(
            f"{variables}_ENDPOINT: not a valid URL; it must start with https:// and name a host, "
            f"such as {EXAMPLES['_MODEL_ENDPOINT']}"
        )
    if "@" in parts.netloc:
        raise CredentialsError(
            f"{variables}_ENDPOINT: contains a user name; put the key in {variables}_KEY"
        )
    path = parts.path.rstrip("/").removesuffix("/chat/completions")
    is_older = not path or f"{path}/".startswith(OLDER_PATHS)
    if is_older and host_of(address).endswith(RESOURCE_HOSTS):
        path = V1_PATH
    return urlunsplit((parts.scheme, parts.netloc, path, "", ""))


def check_deployment_name(address: str, model: str, variables: str) -> None:
    """Raise CredentialsError if an address on Azure names another deployment than `model`: the v1
    endpoint is told the deployment's name in the request."""
    _, found, rest = urlsplit(address).path.partition("/openai/deployments/")
    named = unquote(rest.split("/")[0])
    if found and host_of(address).endswith(RESOURCE_HOSTS) and named != model:
        raise CredentialsError(
            f"{variables}_NAME {model}: {variables}_ENDPOINT names the deployment {named}; set "
            f"{variables}_NAME={named}, or take /openai/deployments/... off the address"
        )


def check_key(key: str, url: str, variables: str) -> None:
    """Raise CredentialsError if the key cannot be one, is missing where one is needed, or would
    travel unencrypted. A server without TLS on another machine is asked without a key."""
    host = host_of(url)
    is_plain = urlsplit(url).scheme == "http" and not is_loopback(host)
    if is_plain and host.endswith(AZURE_HOSTS):
        raise CredentialsError(f"{variables}_ENDPOINT: Azure needs https://; correct it")
    if is_plain and key:
        raise CredentialsError(
            f"{variables}_ENDPOINT: http:// would send the key to {host} unencrypted; use "
            f"https://, or leave {variables}_KEY empty if the server needs none"
        )
    if not key and not is_plain and not is_loopback(host) and not host.endswith(AZURE_HOSTS):
        raise CredentialsError(
            f"{variables}_KEY: not set or empty, and {host} is not an Azure host that "
            f"azure-identity can log in to; {where_to_set([f'{variables}_KEY'])}; a server "
            "that needs no key takes any word"
        )
    if key and not (key.isascii() and key.isprintable()):
        raise CredentialsError(
            f"{variables}_KEY: contains characters that no key has; copy it again"
        )


async def log_in(endpoint: Endpoint) -> "AsyncTokenCredential | None":
    """Return azure-identity's credential, which has given a token, for an Azure endpoint without a
    key; None for any other endpoint. Raises CredentialsError if there is no login within
    LOGIN_S."""
    if not endpoint.needs_login:
        return None
    from azure.core.exceptions import ClientAuthenticationError
    from azure.identity.aio import DefaultAzureCredential

    credential = DefaultAzureCredential()
    trouble = "finds no login"
    try:
        async with asyncio.timeout(LOGIN_S):
            await credential.get_token(token_scope(endpoint.url))
        return credential
    except ClientAuthenticationError:
        pass
    except TimeoutError:
        trouble = f"gives no token within {LOGIN_S:g} s"
    await credential.close()
    raise CredentialsError(
        f"{endpoint.variables}_KEY: not set or empty, and azure-identity {trouble}; run "
        f"'az login', or {where_to_set([f'{endpoint.variables}_KEY'])}"
    )


def token_scope(url: str) -> str:
    """Return the Entra ID scope: that of Azure AI services, or that of Azure ML for its serverless
    endpoints (the SDK's default). Sources: the README of azure-ai-inference;
    learn.microsoft.com/azure/developer/ai/how-to/switching-endpoints."""
    if host_of(url).endswith(INFERENCE_HOSTS):
        return "https://ml.azure.com/.default"
    return "https://cognitiveservices.azure.com/.default"


def host_of(url: str) -> str:
    """Return the name or address of a URL's host."""
    return urlsplit(url).hostname or ""
