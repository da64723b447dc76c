"""Where the teacher is asked: the URL, the SDK, the key and the login."""

from dataclasses import replace
from urllib.parse import parse_qs, urlsplit

import pytest
from chat_endpoint import ChatEndpoint, Reply
from exception_text import exception_text
from pydantic import SecretStr

from distillery.errors import CredentialsError
from distillery.recipe import TeacherRecipe
from distillery.settings import TeacherSettings
from distillery.teacher.asking import Teacher
from distillery.teacher.endpoint import Endpoint, Sdk, infer_sdk, resolve_endpoint, token_scope

KEY = "key-7f3a-very-secret"


@pytest.mark.parametrize(
    ("url", "expected"),
    [
        ("https://lab.services.ai.azure.com/models", "azure-ai-inference"),
        ("https://phi.eastus2.inference.ai.azure.com", "azure-ai-inference"),
        ("https://phi.eastus2.models.ai.azure.com", "azure-ai-inference"),
        ("https://lab.openai.azure.com/openai/v1", "openai"),
        ("https://lab.services.ai.azure.com/openai/v1", "openai"),
        ("https://api.openai.com/v1", "openai"),
        ("http://127.0.0.1:8000/v1", "openai"),
        ("https://models.ai.azure.com.example.org/models", "openai"),
    ],
)
def test_the_sdk_comes_from_the_url(url: str, expected: str) -> None:
    assert infer_sdk(url) == expected
    settings = TeacherSettings(model="m", endpoint=url, key=SecretStr(KEY))
    assert resolve_endpoint(TeacherRecipe(), settings).sdk == expected
    assert resolve_endpoint(TeacherRecipe(sdk="openai"), settings).sdk == "openai"


@pytest.mark.parametrize(
    ("given", "url"),
    [
        (
            "https://lab.services.ai.azure.com/models/chat/completions?api-version=1",
            "https://lab.services.ai.azure.com/models",
        ),
        ("https://lab.openai.azure.com/", "https://lab.openai.azure.com/openai/v1"),
        ("https://api.openai.com/v1/", "https://api.openai.com/v1"),
    ],
)
def test_the_url_as_portals_show_it(given: str, url: str) -> None:
    settings = TeacherSettings(model="m", endpoint=given, key=SecretStr(KEY))
    assert resolve_endpoint(TeacherRecipe(), settings).url == url


def test_the_identity_is_the_models_name_or_the_recipes() -> None:
    settings = TeacherSettings(
        model="gpt-4o", endpoint="https://api.openai.com/v1", key=SecretStr(KEY)
    )
    assert resolve_endpoint(TeacherRecipe(), settings).identity == "gpt-4o"
    assert resolve_endpoint(TeacherRecipe(identity="sha256:1"), settings).identity == "sha256:1"


@pytest.mark.parametrize(
    ("model", "url", "key", "named"),
    [
        ("", "", "", "TEACHER_MODEL_NAME, TEACHER_MODEL_ENDPOINT, TEACHER_MODEL_KEY: not set"),
        ("m", "", KEY, "TEACHER_MODEL_ENDPOINT: not set"),
        (
            "m",
            "https://api.openai.com/v1",
            "",
            "TEACHER_MODEL_KEY: not set, and api.openai.com is not an Azure host",
        ),
        ("m", "api.openai.com", KEY, "TEACHER_MODEL_ENDPOINT: not a valid URL"),
        (
            "m",
            f"https://u:{KEY}@api.openai.com/v1",
            "",
            "TEACHER_MODEL_ENDPOINT: contains a user name",
        ),
        (
            "m",
            "https://api.openai.com/v1",
            f"{KEY}\u201d",
            "TEACHER_MODEL_KEY: contains characters that no key has",
        ),
    ],
)
def test_missing_or_wrong_credentials_are_named(model: str, url: str, key: str, named: str) -> None:
    settings = TeacherSettings(model=model, endpoint=url, key=SecretStr(key))
    with pytest.raises(CredentialsError) as caught:
        resolve_endpoint(TeacherRecipe(), settings)
    assert str(caught.value).startswith(named)
    assert KEY not in exception_text(caught.value)


@pytest.mark.parametrize(
    ("url", "scope"),
    [
        (
            "https://lab.services.ai.azure.com/models",
            "https://cognitiveservices.azure.com/.default",
        ),
        ("https://lab.openai.azure.com/openai/v1", "https://cognitiveservices.azure.com/.default"),
        ("https://phi.eastus2.models.ai.azure.com", "https://ml.azure.com/.default"),
    ],
)
def test_the_scope_of_a_token(url: str, scope: str) -> None:
    assert token_scope(url) == scope


def test_a_key_is_not_in_what_an_endpoint_prints() -> None:
    endpoint = Endpoint("https://api.openai.com/v1", "m", SecretStr(KEY), "m", "openai")
    assert KEY not in repr(endpoint) + str(endpoint)


def azure_endpoint(sdk: Sdk) -> Endpoint:
    """Return an Azure endpoint without a key."""
    settings = TeacherSettings(
        model="m", endpoint="https://lab.openai.azure.com", key=SecretStr("")
    )
    return replace(resolve_endpoint(TeacherRecipe(), settings), sdk=sdk)


async def test_azure_without_key_and_login(sdk: Sdk, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in (
        "AZURE_CLIENT_ID",
        "AZURE_TENANT_ID",
        "AZURE_CLIENT_SECRET",
        "IDENTITY_ENDPOINT",
        "MSI_ENDPOINT",
    ):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("AZURE_TOKEN_CREDENTIALS", "EnvironmentCredential")
    endpoint = azure_endpoint(sdk)
    with pytest.raises(
        CredentialsError, match=r"TEACHER_MODEL_KEY: not set, and azure-identity finds no login"
    ):
        async with Teacher(TeacherRecipe(), endpoint):
            pass


async def test_azure_without_key_uses_the_login_of_azure_identity(
    sdk: Sdk, monkeypatch: pytest.MonkeyPatch
) -> None:
    token = {
        "access_token": "token",
        "expires_on": "9999999999",
        "token_type": "Bearer",
        "resource": "r",
    }
    endpoint = azure_endpoint(sdk)
    with ChatEndpoint(lambda call: Reply(token)) as server:
        # App Service's managed identity, which azure-identity asks at this address.
        monkeypatch.setenv("AZURE_TOKEN_CREDENTIALS", "ManagedIdentityCredential")
        monkeypatch.setenv("IDENTITY_ENDPOINT", f"{server.url}/token")
        monkeypatch.setenv("IDENTITY_HEADER", "header")
        async with Teacher(TeacherRecipe(), endpoint):
            pass
        (call,) = server.calls
        assert parse_qs(urlsplit(call.path).query)["resource"] == [
            "https://cognitiveservices.azure.com"
        ]
