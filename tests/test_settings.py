"""Settings come from their own names in the environment or in a .env of one's own, and from no
others."""

import logging
import os
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from distillery.errors import CredentialsError, DistilleryError
from distillery.settings import (
    AzureMLSettings,
    LocalSettings,
    TeacherSettings,
    known_names,
    load_environment,
    not_set,
    read_dotenv,
)

PROJECT = Path(__file__).resolve().parents[1]
SOMEBODY, NOBODY = 4_000_001, 4_000_002


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


@pytest.fixture
def give_to(monkeypatch: pytest.MonkeyPatch) -> Callable[[Path, int], None]:
    """`give_to(file, user)`: the file, or link, looks as if it belonged to the user with this id.

    Only root can really give a file away."""
    owners: dict[tuple[Path, bool], int] = {}
    real = Path.stat

    def stat(self: Path, *, follow_symlinks: bool = True) -> os.stat_result:
        found = real(self, follow_symlinks=follow_symlinks)
        values: list[Any] = list(found)
        values[4] = owners.get((self, follow_symlinks), values[4])
        return os.stat_result(values)

    def give_to(file: Path, user: int, target: bool = True) -> None:
        owners[file, False] = user
        if target:
            owners[file, True] = user

    monkeypatch.setattr(Path, "stat", stat)
    return give_to


@pytest.fixture
def working_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The working folder, whose .env nobody has read yet; what is read of it is forgotten."""
    folder = tmp_path / "mine" / "work"
    folder.mkdir(parents=True)
    monkeypatch.chdir(folder)
    for name in (*known_names(), "PREFECT__FLOW_RUN_ID", "DISTILLERY_CHILD"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(os, "environ", os.environ.copy())
    monkeypatch.setattr("distillery.settings.load_environment", load_environment.__wrapped__)
    return folder


@pytest.mark.security
def test_dotenv_is_read_from_the_working_folder_and_not_from_above(working_folder: Path) -> None:
    (working_folder.parent / ".env").write_text("TEACHER_MODEL_NAME=above\n")
    assert TeacherSettings().model == ""
    (working_folder / ".env").write_text("TEACHER_MODEL_NAME=here\nAZUREML_WS_NAME=space\n")
    os.environ["AZUREML_WS_NAME"] = "set already"
    assert TeacherSettings().model == "here"
    assert AzureMLSettings().workspace == "set already"


@pytest.mark.security
@pytest.mark.parametrize("marker", ["PREFECT__FLOW_RUN_ID", "DISTILLERY_CHILD"])
def test_a_run_of_a_worker_and_a_child_read_no_dotenv(working_folder: Path, marker: str) -> None:
    (working_folder / ".env").write_text("TEACHER_MODEL_NAME=here\n")
    os.environ[marker] = "x"
    assert TeacherSettings().model == ""


@pytest.mark.security
def test_a_dotenv_of_another_user_is_not_read(
    working_folder: Path,
    give_to: Callable[..., None],
    caplog: pytest.LogCaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    file = working_folder / ".env"
    file.write_text("TEACHER_MODEL_ENDPOINT=https://elsewhere.test\n")
    give_to(file, SOMEBODY)
    assert TeacherSettings().endpoint == ""
    (told,) = caplog.messages
    assert told == (f"{file} is not read: it belongs to another user; work in a folder of your own")
    # Root works in the folders of others, as in a container; nobody else takes their settings.
    give_to(working_folder, SOMEBODY)
    monkeypatch.setattr(os, "geteuid", lambda: 0)
    assert read_dotenv(working_folder) != {}
    monkeypatch.setattr(os, "geteuid", lambda: NOBODY)
    assert read_dotenv(working_folder) == {}
    give_to(file, 0)
    assert read_dotenv(working_folder) != {}


@pytest.mark.security
def test_a_dotenv_that_another_group_may_write_is_not_read(
    working_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = working_folder / ".env"
    file.write_text("HF_TOKEN=t\n")
    file.chmod(0o664)
    monkeypatch.setattr(os, "geteuid", lambda: file.stat().st_uid or SOMEBODY)
    monkeypatch.setattr(os, "getegid", lambda: file.stat().st_gid)
    assert read_dotenv(working_folder) == ({"HF_TOKEN": "t"})
    monkeypatch.setattr(os, "getegid", lambda: file.stat().st_gid + 1)
    assert read_dotenv(working_folder) == {}
    file.chmod(0o644)
    assert read_dotenv(working_folder) == {"HF_TOKEN": "t"}


def test_prefect_s_own_settings_in_dotenv_are_left_to_prefect(
    working_folder: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (working_folder / ".env").write_text("PREFECT_API_KEY=k\nHF_HOME=/large\n")
    assert read_dotenv(working_folder) == {"HF_HOME": "/large"}
    assert caplog.messages == []


def test_a_run_of_a_worker_is_told_where_its_settings_come_from(
    working_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert str(not_set(["A_NAME"])) == (
        f"A_NAME: not set or empty; set it in {working_folder}/.env (copy sample.env) or in the "
        "environment"
    )
    names = ["TEACHER_MODEL_NAME", "TEACHER_MODEL_ENDPOINT"]
    assert str(not_set(names)).endswith(
        "(copy sample.env) or in the environment, such as TEACHER_MODEL_NAME=gpt-4.1-mini "
        "TEACHER_MODEL_ENDPOINT=https://api.openai.com/v1"
    )
    (working_folder / ".env").touch()
    assert str(not_set(["A_NAME"])) == (
        f"A_NAME: not set or empty; set it in {working_folder}/.env or in the environment"
    )
    monkeypatch.setenv("PREFECT__FLOW_RUN_ID", "r")
    assert str(not_set(["A_NAME"])) == (
        "A_NAME: not set or empty; set it in .env of the server's machine and run `python -m "
        "deployments.setup`"
    )


@pytest.mark.security
def test_a_link_of_another_user_is_not_followed(
    working_folder: Path, give_to: Callable[..., None]
) -> None:
    (working_folder / "real").write_text("HF_TOKEN=t\n")
    (working_folder / ".env").symlink_to("real")
    assert read_dotenv(working_folder) == {"HF_TOKEN": "t"}
    give_to(working_folder / ".env", SOMEBODY, target=False)
    assert read_dotenv(working_folder) == {}


@pytest.mark.security
def test_a_dotenv_that_everybody_may_write_or_that_is_no_file_is_not_read(
    working_folder: Path, caplog: pytest.LogCaptureFixture
) -> None:
    file = working_folder / ".env"
    file.write_text("HF_TOKEN=t\n")
    file.chmod(0o666)
    assert read_dotenv(working_folder) == {}
    assert "chmod go-w" in caplog.messages[-1]
    file.unlink()
    # Opening it would wait for ever.
    os.mkfifo(file)
    assert read_dotenv(working_folder) == {}
    assert "no regular file" in caplog.messages[-1]
    file.unlink()
    # The folder of a virtual environment.
    file.mkdir()
    caplog.clear()
    assert read_dotenv(working_folder) == {}
    assert caplog.messages == []


def test_a_dotenv_that_only_its_owner_may_read_is_told(
    working_folder: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    (working_folder / ".env").write_text("HF_TOKEN=t\n")
    # Root may read everything.
    monkeypatch.setattr(os, "access", lambda *_: False)
    assert read_dotenv(working_folder) == {}
    assert caplog.messages[-1].endswith(
        "you may not read it; ask its owner, or work in a folder of your own"
    )


@pytest.mark.security
def test_only_known_names_are_taken_from_dotenv(
    working_folder: Path, caplog: pytest.LogCaptureFixture
) -> None:
    known = {
        "AZURE_AUTHORITY_HOST": "https://login.example.test",
        "HF_TOKEN": "t",
        "HTTPS_PROXY": "http://proxy.test:3128",
        "https_proxy": "http://proxy.test:3128",
        "NO_PROXY": "localhost",
        "REQUESTS_CA_BUNDLE": "/ca.pem",
        "SSL_CERT_FILE": "/ca.pem",
    }
    lines = [f"{name}={value}" for name, value in known.items()]
    lines += ["LD_PRELOAD=/tmp/evil.so", "PYTHONPATH=/tmp", "DISTILLERY_STROE=/typing/error"]
    (working_folder / ".env").write_text("\n".join(lines))
    with caplog.at_level(logging.WARNING):
        assert read_dotenv(working_folder) == known
    assert [re.findall(r": (\w+) is no setting", told) for told in caplog.messages] == [
        ["LD_PRELOAD"],
        ["PYTHONPATH"],
        ["DISTILLERY_STROE"],
    ]


def test_every_name_of_sample_env_is_known() -> None:
    text = (PROJECT / "sample.env").read_text()
    names = set(re.findall(r"^(?:# )?([A-Z][A-Z0-9_]+)=", text, re.MULTILINE))
    assert {name for name in names if not name.startswith("AZURE_")} - known_names() == set()


def test_a_dotenv_that_is_no_text_is_one_line(working_folder: Path) -> None:
    (working_folder / ".env").write_bytes(b"HF_TOKEN=\xff\n")
    with pytest.raises(DistilleryError, match=r"\.env: not UTF-8; save it as UTF-8$"):
        TeacherSettings()
