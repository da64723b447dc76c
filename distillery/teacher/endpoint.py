"""Where the teacher is asked, through which SDK, and with which key or login."""

from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal
from urllib.parse import urlsplit, urlunsplit

from pydantic import SecretStr

from distillery.errors import CredentialsError
from distillery.recipe import TeacherRecipe
from distillery.settings import TeacherSettings, is_loopback

if TYPE_CHECKING:
    from azure.core.credentials_async import AsyncTokenCredential

Sdk = Literal["azure-ai-inference", "openai"]

INFERENCE_HOSTS = (".inference.ai.azure.com", ".models.ai.azure.com")

AZURE_HOSTS = (
    *INFERENCE_HOSTS,
    ".services.ai.azure.com",
    ".openai.azure.com",
    ".cognitiveservices.azure.com",
)

SHORTEST_SECRET = 8
"""A key of fewer characters is a word such as "none", which may well appear in an answer."""


@dataclass(frozen=True)
class Endpoint:
    """Where the teacher answers. `identity` names it in the label store. `key` is None if
    azure-identity logs in, or if a server on this machine needs no key."""

    url: str
    model: str
    key: SecretStr | None
    identity: str
    sdk: Sdk

    @property
    def is_local(self) -> bool:
        """Whether the endpoint is a server on this machine."""
        return is_loopback(host_of(self.url))

    def redact(self, text: str) -> str:
        """Return `text` without the key."""
        key = self.key.get_secret_value() if self.key else ""
        if len(key) < SHORTEST_SECRET:
            return text
        return text.replace(key, "***")


def resolve_endpoint(recipe: TeacherRecipe, settings: TeacherSettings | None = None) -> Endpoint:
    """Return the endpoint that TEACHER_MODEL_* name. Raises CredentialsError with the names of
    those that are missing or wrong."""
    settings = settings or TeacherSettings()
    model = settings.model.strip()
    address = settings.endpoint.strip()
    key = settings.key.get_secret_value().strip()
    missing = []
    if not model:
        missing.append("TEACHER_MODEL_NAME")
    if not address:
        missing.append("TEACHER_MODEL_ENDPOINT")
    if missing and not key:
        missing.append("TEACHER_MODEL_KEY")
    if missing:
        raise CredentialsError(
            f"{', '.join(missing)}: not set; set them in the environment or in .env "
            "(see sample.env)"
        )
    url = base_url_of(address)
    check_key(key, url)
    return Endpoint(
        url=url,
        model=model,
        key=SecretStr(key) if key else None,
        identity=recipe.identity or model,
        sdk=infer_sdk(url) if recipe.sdk == "auto" else recipe.sdk,
    )


def infer_sdk(url: str) -> Sdk:
    """Return azure-ai-inference for hosts of Azure's model inference API, and openai for Azure's
    v1 endpoint and all others."""
    host = host_of(url)
    is_foundry = host.endswith(".services.ai.azure.com")
    if is_foundry and urlsplit(url).path.startswith("/models"):
        return "azure-ai-inference"
    if host.endswith(INFERENCE_HOSTS):
        return "azure-ai-inference"
    return "openai"


def base_url_of(address: str) -> str:
    """Return the URL up to /chat/completions, as both SDKs need it. A bare Azure OpenAI host gets
    the path of its v1 endpoint. Raises CredentialsError if `address` is not a usable URL."""
    try:
        parts = urlsplit(address)
        valid = parts.scheme in ("http", "https") and bool(parts.hostname) and parts.port != 0
    except ValueError:
        valid = False
    if not valid:
        raise CredentialsError(
            "TEACHER_MODEL_ENDPOINT: not a valid URL; it must start with https:// and name a host"
        )
    if "@" in parts.netloc:
        raise CredentialsError(
            "TEACHER_MODEL_ENDPOINT: contains a user name; put the key in TEACHER_MODEL_KEY"
        )
    path = parts.path.rstrip("/").removesuffix("/chat/completions")
    if not path and host_of(address).endswith((".openai.azure.com", ".services.ai.azure.com")):
        path = "/openai/v1"
    return urlunsplit((parts.scheme, parts.netloc, path, "", ""))


def check_key(key: str, url: str) -> None:
    """Raise CredentialsError if the key cannot be one, or is missing where one is needed."""
    host = host_of(url)
    if not key and not is_loopback(host) and not host.endswith(AZURE_HOSTS):
        raise CredentialsError(
            f"TEACHER_MODEL_KEY: not set, and {host} is not an Azure host that azure-identity can "
            "log in to; set the key (any word if the server needs none)"
        )
    if key and not (key.isascii() and key.isprintable()):
        raise CredentialsError(
            "TEACHER_MODEL_KEY: contains characters that no key has; copy it again"
        )


async def log_in(endpoint: Endpoint) -> "AsyncTokenCredential | None":
    """Return azure-identity's credential, which has given a token, for an Azure endpoint without a
    key; None for any other endpoint. Raises CredentialsError if there is no login."""
    if endpoint.key or endpoint.is_local:
        return None
    from azure.core.exceptions import ClientAuthenticationError
    from azure.identity.aio import DefaultAzureCredential

    credential = DefaultAzureCredential()
    try:
        await credential.get_token(token_scope(endpoint.url))
    except ClientAuthenticationError:
        await credential.close()
        raise CredentialsError(
            "TEACHER_MODEL_KEY: not set, and azure-identity finds no login; set the key, or run "
            "'az login'"
        ) from None
    return credential


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
