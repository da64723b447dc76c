"""Settings come from their own names in the environment, and from no others."""

from pathlib import Path

import pytest

from distillery.errors import CredentialsError
from distillery.settings import AzureMLSettings, LocalSettings, TeacherSettings


def test_a_field_is_not_read_from_a_variable_of_its_bare_name(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    for name in ("DISTILLERY_HOME", "TEACHER_MODEL_NAME", "TEACHER_MODEL_KEY"):
        monkeypatch.delenv(name, raising=False)
    for name in ("HOME", "STORE", "LABELS", "REGISTRY", "MODEL", "KEY", "WORKSPACE"):
        monkeypatch.setenv(name, "/somewhere/else")
    assert LocalSettings().home == Path(".distillery")
    assert LocalSettings().store_url == str(Path(".distillery").absolute() / "store")
    assert (TeacherSettings().model, TeacherSettings().key.get_secret_value()) == ("", "")
    assert AzureMLSettings().workspace == ""


def test_the_labs_names(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TEACHER_MODEL_NAME", "gpt")
    monkeypatch.setenv("TEACHER_MODEL_ENDPOINT", "https://example.test/models")
    monkeypatch.setenv("TEACHER_MODEL_KEY", "a-long-secret")
    settings = TeacherSettings()
    assert (settings.model, settings.endpoint) == ("gpt", "https://example.test/models")
    assert settings.key.get_secret_value() == "a-long-secret"
    assert "a-long-secret" not in repr(settings)


def test_azures_missing_names_are_listed(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in (
        "AZUREML_SUBSCRIPTION_ID",
        "AZUREML_RESOURCE_GROUP",
        "AZUREML_WS_NAME",
        "AZUREML_WORKSPACE_NAME",
    ):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("AZUREML_RESOURCE_GROUP", "group")
    with pytest.raises(
        CredentialsError, match=r"^AZUREML_SUBSCRIPTION_ID, AZUREML_WS_NAME: not set"
    ):
        AzureMLSettings().require()
    monkeypatch.setenv("AZUREML_SUBSCRIPTION_ID", "id")
    monkeypatch.setenv("AZUREML_WORKSPACE_NAME", "space")
    AzureMLSettings().require()
    assert AzureMLSettings().workspace == "space"
