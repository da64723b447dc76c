"""teacher/endpoint"""

from dataclasses import dataclass
from typing import Literal
from urllib.parse import urlsplit, urlunsplit

from pydantic import SecretStr

from distillery.errors import CredentialsError
from distillery.recipe import TeacherRecipe
from distillery.settings import TeacherSettings, is_loopback

Sdk = Literal["azure-ai-inference", "openai"]

_INFERENCE_HOSTS = (".inference.ai.azure.com", ".models.ai.azure.com")

_AZURE_HOSTS = (
    *_INFERENCE_HOSTS,
    ".services.ai.azure.com",
    ".openai.azure.com",
    ".cognitiveservices.azure.com",
)


@dataclass(frozen=True)
class Endpoint:
    """Where the teacher answers. `identity` names it in the label store; `key` is None where azure-identity logs in,
    or where a server on this machine asks for none."""

    url: str
    model: str
    key: SecretStr | None
    identity: str
    sdk: Sdk


def resolve_endpoint(recipe: TeacherRecipe, settings: TeacherSettings | None = None) -> Endpoint:
    """The endpoint that TEACHER_MODEL_* name. Raises CredentialsError with the names that are missing or wrong."""
    settings = settings or TeacherSettings()
    names = {
        "TEACHER_MODEL_NAME": settings.model.strip(),
        "TEACHER_MODEL_ENDPOINT": settings.endpoint.strip(),
    }
    key = settings.key.get_secret_value().strip()
    missing = [name for name, value in names.items() if not value]
    if missing:
        missing += [] if key else ["TEACHER_MODEL_KEY"]
        raise CredentialsError(
            f"{', '.join(missing)}: not set; set them in the environment or in .env (see sample.env)"
        )
    url = _base_url(names["TEACHER_MODEL_ENDPOINT"])
    _check_key(key, url)
    model = names["TEACHER_MODEL_NAME"]
    sdk = infer_sdk(url) if recipe.sdk == "auto" else recipe.sdk
    return Endpoint(url, model, SecretStr(key) if key else None, recipe.identity or model, sdk)


def infer_sdk(url: str) -> Sdk:
    """azure-ai-inference for hosts of Azure's model inference API; openai for Azure's v1 endpoint and all others."""
    parts = urlsplit(url)
    host = parts.hostname or ""
    foundry = host.endswith(".services.ai.azure.com") and parts.path.startswith("/models")
    return "azure-ai-inference" if foundry or host.endswith(_INFERENCE_HOSTS) else "openai"


def _base_url(text: str) -> str:
    """The URL before /chat/completions, as both SDKs want it; a bare Azure OpenAI host gets its v1 path."""
    try:
        parts = urlsplit(text)
        valid = parts.scheme in ("http", "https") and bool(parts.hostname) and parts.port != 0
    except ValueError:
        valid = False
    if not valid:
        raise CredentialsError(
            "TEACHER_MODEL_ENDPOINT: no URL; it starts with https:// and names a host"
        )
    if "@" in parts.netloc:
        raise CredentialsError(
            "TEACHER_MODEL_ENDPOINT: holds a user name; put the key in TEACHER_MODEL_KEY"
        )
    path = parts.path.rstrip("/").removesuffix("/chat/completions")
    if not path and (parts.hostname or "").endswith(
        (".openai.azure.com", ".services.ai.azure.com")
    ):
        path = "/openai/v1"
    return urlunsplit((parts.scheme, parts.netloc, path, "", ""))


def _check_key(key: str, url: str) -> None:
    host = urlsplit(url).hostname or ""
    if not key and not is_loopback(host) and not host.endswith(_AZURE_HOSTS):
        raise CredentialsError(
            f"TEACHER_MODEL_KEY: not set, and {host} is no Azure host that azure-identity could log in to; "
            "set the key (any word where the server asks for none)"
        )
    if key and not (key.isascii() and key.isprintable()):
        raise CredentialsError("TEACHER_MODEL_KEY: has characters that no key has; copy it again")


def token_scope(url: str) -> str:
    """The Entra ID scope: that of Azure AI services, or Azure ML's for its serverless endpoints (the SDK's default).
    Sources: learn.microsoft.com/azure/developer/ai/how-to/switching-endpoints; the README of azure-ai-inference."""
    serverless = (urlsplit(url).hostname or "").endswith(_INFERENCE_HOSTS)
    return (
        "https://ml.azure.com/.default"
        if serverless
        else "https://cognitiveservices.azure.com/.default"
    )
