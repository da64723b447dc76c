"""Where the teacher is asked: the URL, the SDK, the key and the login."""

from dataclasses import replace
from pathlib import Path
from urllib.parse import parse_qs, urlsplit

import pytest
from azure_hosts import FOUNDRY, azure_hosts
from chat_endpoint import ChatEndpoint, Reply, good, refused
from exception_text import exception_text
from pydantic import SecretStr

from distillery.errors import CredentialsError, TeacherError
from distillery.recipe import TeacherRecipe
from distillery.settings import TeacherSettings
from distillery.teacher.asking import Teacher, probe
from distillery.teacher.endpoint import (
    Endpoint,
    Sdk,
    infer_sdk,
    log_in,
    resolve_endpoint,
    token_scope,
)

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
        ("https://lab.openai.azure.com/openai/", "https://lab.openai.azure.com/openai/v1"),
        (
            "https://lab.openai.azure.com/openai/v1/chat/completions",
            "https://lab.openai.azure.com/openai/v1",
        ),
        (
            "https://lab.cognitiveservices.azure.com/",
            "https://lab.cognitiveservices.azure.com/openai/v1",
        ),
        (
            "https://lab.cognitiveservices.azure.com/openai/deployments/m/chat/completions"
            "?api-version=2025-01-01-preview",
            "https://lab.cognitiveservices.azure.com/openai/v1",
        ),
        (
            "https://lab.cognitiveservices.azure.com/openai/responses?api-version=2025-04-01",
            "https://lab.cognitiveservices.azure.com/openai/v1",
        ),
        (
            "https://lab.services.ai.azure.com/api/projects/distillation",
            "https://lab.services.ai.azure.com/openai/v1",
        ),
        (
            "https://lab.services.ai.azure.com/api/projects/distillation/openai/v1/",
            "https://lab.services.ai.azure.com/openai/v1",
        ),
        (
            "https://lab.services.ai.azure.com/other/v1",
            "https://lab.services.ai.azure.com/other/v1",
        ),
        (
            "https://gateway.example.com/openai/deployments/other",
            "https://gateway.example.com/openai/deployments/other",
        ),
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
        (
            "",
            "",
            "",
            "TEACHER_MODEL_NAME, TEACHER_MODEL_ENDPOINT, TEACHER_MODEL_KEY: not set or empty",
        ),
        ("m", "", KEY, "TEACHER_MODEL_ENDPOINT: not set or empty"),
        (
            "m",
            "https://api.openai.com/v1",
            "",
            "TEACHER_MODEL_KEY: not set or empty, and api.openai.com is not an Azure host",
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
        (
            "m",
            "http://gpu.example.com:8000/v1",
            KEY,
            "TEACHER_MODEL_ENDPOINT: http:// would send the key to gpu.example.com unencrypted",
        ),
        (
            "m",
            "http://localhost.example.com/v1",
            KEY,
            "TEACHER_MODEL_ENDPOINT: http:// would send the key to localhost.example.com",
        ),
        ("m", "http://lab.openai.azure.com", KEY, "TEACHER_MODEL_ENDPOINT: Azure needs https://"),
        ("m", "http://lab.openai.azure.com", "", "TEACHER_MODEL_ENDPOINT: Azure needs https://"),
        (
            "m",
            "https://lab.openai.azure.com/openai/deployments/gpt%20x/chat/completions",
            KEY,
            "TEACHER_MODEL_NAME m: TEACHER_MODEL_ENDPOINT names the deployment gpt x; set",
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
    ("url", "key"),
    [
        ("http://127.0.0.1:8000/v1", KEY),
        ("http://localhost:8000/v1", KEY),
        ("http://[::1]:8000/v1", KEY),
        ("http://gpu.example.com:8000/v1", ""),
    ],
)
async def test_what_may_be_asked_without_tls(url: str, key: str) -> None:
    settings = TeacherSettings(model="m", endpoint=url, key=SecretStr(key))
    endpoint = resolve_endpoint(TeacherRecipe(), settings)
    assert endpoint.url == url
    assert await log_in(endpoint) is None, "no token goes there either"


@pytest.mark.parametrize("status", [302, 307])
async def test_a_key_is_not_sent_on_by_a_redirect(sdk: Sdk, status: int) -> None:
    with ChatEndpoint() as elsewhere:
        moved = Reply({}, status, {"Location": f"{elsewhere.url}/chat/completions?secret=x"})
        with ChatEndpoint(lambda call: moved) as server:
            endpoint = Endpoint(server.url, "m", SecretStr(KEY), "m", sdk)
            async with Teacher(TeacherRecipe(), endpoint) as teacher:
                with pytest.raises(TeacherError) as caught:
                    await teacher.ask([{"role": "user", "content": "A or B?"}], ("A", "B"))
        assert elsewhere.calls == []
        assert str(caught.value) == (
            f"TEACHER_MODEL_ENDPOINT {server.url}: redirects ({status}) to "
            f"127.0.0.1:{elsewhere.port}/v1/chat/completions, where the key is not sent; set the "
            "address that answers itself"
        )


def foundry(port: int, key: str = KEY) -> Endpoint:
    """Return the endpoint of an address in the lab's form."""
    url = f"https://{FOUNDRY}:{port}/models"
    settings = TeacherSettings(model="m", endpoint=url, key=SecretStr(key))
    return resolve_endpoint(TeacherRecipe(), settings)


@pytest.mark.parametrize("status", [404, 410])
async def test_a_retired_address_names_the_one_to_set(status: int, tmp_path: Path) -> None:
    with (
        azure_hosts(tmp_path) as certificate,
        ChatEndpoint(lambda call: refused(status, "gone"), certificate) as server,
    ):
        endpoint = foundry(server.port)
        async with Teacher(TeacherRecipe(), endpoint) as teacher:
            with pytest.raises(TeacherError) as caught:
                await teacher.ask([{"role": "user", "content": "A or B?"}], ("A", "B"))
    (call,) = server.calls
    assert call.path.startswith("/models/chat/completions?api-version=")
    assert call.headers["user-agent"].startswith("azsdk-python-ai-inference")
    assert str(caught.value) == (
        f"TEACHER_MODEL_ENDPOINT {endpoint.url}: not found ({status}); Azure retired its model "
        "inference API on 2026-08-26: set TEACHER_MODEL_ENDPOINT="
        f"https://{FOUNDRY}:{server.port}/openai/v1"
    )


async def test_the_address_that_is_named_answers(tmp_path: Path) -> None:
    with azure_hosts(tmp_path) as certificate, ChatEndpoint(good, certificate) as server:
        successor = foundry(server.port).successor
        assert successor
        found = await probe(TeacherRecipe(), successor)
    assert found.answers
    assert [call.path for call in server.calls] == ["/openai/v1/chat/completions"]
    assert server.calls[0].key == KEY
    assert successor.successor is None


async def test_a_model_that_a_living_address_lacks_is_named(tmp_path: Path) -> None:
    unknown = refused(404, "Unknown model: m", code="unknown_model")
    with (
        azure_hosts(tmp_path) as certificate,
        ChatEndpoint(lambda call: unknown, certificate) as server,
        pytest.raises(TeacherError, match=r"^TEACHER_MODEL_NAME m: not found at .*/models "),
    ):
        await probe(TeacherRecipe(), foundry(server.port))


@pytest.mark.parametrize(
    ("url", "scope"),
    [
        (
            "https://lab.services.ai.azure.com/models",
            "https://cognitiveservices.azure.com/.default",
        ),
        ("https://lab.openai.azure.com/openai/v1", "https://cognitiveservices.azure.com/.default"),
        ("https://lab.cognitiveservices.azure.com", "https://cognitiveservices.azure.com/.default"),
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
        CredentialsError,
        match=r"TEACHER_MODEL_KEY: not set or empty, and azure-identity finds no login",
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


async def test_a_login_that_does_not_answer_ends(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("distillery.teacher.endpoint.LOGIN_S", 0.2)
    with ChatEndpoint(lambda call: Reply({}, delay=60)) as server:
        monkeypatch.setenv("AZURE_TOKEN_CREDENTIALS", "ManagedIdentityCredential")
        monkeypatch.setenv("IDENTITY_ENDPOINT", f"{server.url}/token")
        monkeypatch.setenv("IDENTITY_HEADER", "header")
        with pytest.raises(CredentialsError) as caught:
            await log_in(azure_endpoint("openai"))
        assert len(server.calls) == 1
    assert str(caught.value).startswith(
        "TEACHER_MODEL_KEY: not set or empty, and azure-identity gives no token within 0.2 s; run "
        "'az login', or set it in "
    )
