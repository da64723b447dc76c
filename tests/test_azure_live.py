"""One test for each of Azure's services, with the account that .env or the environment names. They
are skipped where it names none. CONTRIBUTING.md says what they cost."""

from dataclasses import replace
from fnmatch import fnmatch
from pathlib import Path
from urllib.parse import urlsplit

import pytest

from distillery.errors import TeacherError
from distillery.models.azure_registry import WEIGHTS, RemoteModel, parse_azureml
from distillery.recipe import TeacherRecipe, load_recipe
from distillery.registry.azureml import AzureRegistry
from distillery.settings import AzureMLSettings, TeacherSettings
from distillery.teacher.asking import probe
from distillery.teacher.endpoint import FOUNDRY_HOST, V1_PATH, Endpoint, resolve_endpoint

pytestmark = [pytest.mark.azure_live, pytest.mark.timeout(300)]

NAME = "distillery-live-test"


@pytest.fixture
def endpoint() -> Endpoint:
    """The resource on Azure AI Foundry that TEACHER_MODEL_ENDPOINT names."""
    settings = TeacherSettings()
    host = urlsplit(settings.endpoint).hostname or ""
    if not settings.model or not host.endswith(FOUNDRY_HOST):
        pytest.skip(f"TEACHER_MODEL_NAME and a TEACHER_MODEL_ENDPOINT on *{FOUNDRY_HOST} needed")
    return replace(resolve_endpoint(TeacherRecipe(), settings), url=f"https://{host}")


@pytest.fixture
def workspace() -> None:
    if not AzureMLSettings().is_complete:
        pytest.skip("AZUREML_SUBSCRIPTION_ID, AZUREML_RESOURCE_GROUP and AZUREML_WS_NAME needed")


async def test_the_v1_address_answers(endpoint: Endpoint) -> None:
    asked = replace(endpoint, url=f"{endpoint.url}{V1_PATH}", sdk="openai")
    found = await probe(TeacherRecipe(), asked)
    assert found.answers
    assert found.model_version


async def test_the_labs_address_answers_or_its_error_names_the_v1_address(
    endpoint: Endpoint,
) -> None:
    asked = replace(endpoint, url=f"{endpoint.url}/models", sdk="azure-ai-inference")
    try:
        found = await probe(TeacherRecipe(), asked)
        is_usable = found.answers
    except TeacherError as error:
        is_usable = V1_PATH in str(error)
    assert is_usable


@pytest.mark.usefixtures("workspace")
def test_a_workspace_registers_lists_and_gives_back(tmp_path: Path) -> None:
    """The same bytes each time, so that there is one version, however often this runs."""
    folder, registry = tmp_path / "tiny", AzureRegistry()
    folder.mkdir()
    (folder / "genai_config.json").write_text("{}")
    registry.check_access(NAME)
    registered = registry.register(folder, NAME, {}, {})
    again = registry.register(folder, NAME, {}, {})
    assert again.version == registered.version
    assert registered.version in [model.version for model in registry.list(NAME)]
    downloaded = registry.download(registered, tmp_path / "downloaded")
    assert (downloaded / "genai_config.json").read_text() == "{}"


@pytest.mark.usefixtures("workspace")
def test_the_azureml_registry_has_the_labs_base_model() -> None:
    """Its files are listed, and its MLmodel is read; no weights are downloaded."""
    remote = RemoteModel(parse_azureml(load_recipe("lab").student.base.model))
    paths = {file.path for file in remote.files}
    assert {"config.json", "tokenizer.json"} <= paths
    weights = [file.size for file in remote.files if fnmatch(file.path, WEIGHTS)]
    # 3.8 billion parameters in bfloat16.
    assert 7e9 < sum(weights) < 9e9
