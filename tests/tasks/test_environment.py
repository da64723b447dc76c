"""A flow that is started by hand has what make would set, and what the user says wins."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tasks.environment import refuse_foreign_settings

PROJECT = Path(__file__).resolve().parents[2]
SCRIPT = "import flows, json, os; print(json.dumps(dict(os.environ)))"


def started(folder: Path, **given: str) -> dict[str, str]:
    """The environment after a bare start with HOME and the working folder in `folder`."""
    folder.mkdir(exist_ok=True)
    bare = {"PATH": os.environ["PATH"], "HOME": str(folder), "PYTHONPATH": str(PROJECT)}
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT],
        cwd=folder,
        env=bare | given,
        capture_output=True,
        text=True,
        check=True,
    )
    found: dict[str, str] = json.loads(done.stdout)
    return found


def test_a_bare_start_is_quiet_and_keeps_its_database_in_the_working_folder(tmp_path: Path) -> None:
    found = started(tmp_path)
    assert found["PREFECT_SERVER_ANALYTICS_ENABLED"] == "false"
    assert found["PREFECT_LOGGING_EXTRA_LOGGERS"] == "distillery"
    assert found["OLIVE_DISABLE_TELEMETRY"] == "1"
    assert found["PREFECT_HOME"] == str(tmp_path / ".distillery" / "prefect")
    assert (tmp_path / ".distillery").is_dir(), "Prefect makes its own folder, and none above it"
    elsewhere = started(tmp_path, DISTILLERY_HOME=str(tmp_path / "deep" / "home"))
    assert elsewhere["PREFECT_HOME"] == str(tmp_path / "deep" / "home" / "prefect")
    assert (tmp_path / "deep" / "home").is_dir()


def test_what_the_environment_says_wins(tmp_path: Path) -> None:
    own = {"PREFECT_HOME": "/own", "PREFECT_SERVER_ANALYTICS_ENABLED": "true"}
    assert started(tmp_path, **own).items() >= own.items()


def test_a_server_or_a_profile_of_the_users_own_is_left_alone(tmp_path: Path) -> None:
    assert "PREFECT_HOME" not in started(
        tmp_path / "a", PREFECT_API_URL="http://127.0.0.1:4200/api"
    )
    (tmp_path / "b" / ".prefect").mkdir(parents=True)
    (tmp_path / "b" / ".prefect" / "profiles.toml").write_text("")
    assert "PREFECT_HOME" not in started(tmp_path / "b")


NAMES_A_SERVER = {
    "prefect.toml": '[api]\nurl = "http://server.test/api"\n',
    "pyproject.toml": '[tool.prefect.api]\nurl = "http://server.test/api"\n',
    ".env": "PREFECT_API_URL=http://server.test/api\n",
    ".prefect/profiles.toml": 'active = "a"\n[profiles.a]\n'
    'PREFECT_API_URL = "http://server.test/api"\n',
}

NAMES_NONE = {
    "prefect.toml": '# PREFECT_API_URL = "http://server.test/api"\n[api]\nmax_retries = 3\n',
    "pyproject.toml": '[tool.other]\nPREFECT_API_URL = "http://server.test/api"\n',
    ".env": "# PREFECT_API_URL=http://server.test/api\n",
    ".prefect/profiles.toml": 'active = "a"\n[profiles.a]\nPREFECT_SERVER_EPHEMERAL_ENABLED = '
    '"true"\n[profiles.b]\nPREFECT_API_URL = "http://server.test/api"\n',
}


@pytest.mark.security
def test_the_temporary_server_gets_a_password_and_no_page_reads_it(tmp_path: Path) -> None:
    for name, text in NAMES_NONE.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(text)
    found = started(tmp_path)
    user, _, password = found["PREFECT_SERVER_API_AUTH_STRING"].partition(":")
    assert (user, len(password) >= 32) == ("admin", True)
    assert found["PREFECT_API_AUTH_STRING"] == f"{user}:{password}"
    assert found["PREFECT_SERVER_API_CORS_ALLOWED_ORIGINS"] == ""
    own = started(tmp_path, PREFECT_API_AUTH_STRING="me:my-own")
    assert own["PREFECT_SERVER_API_AUTH_STRING"] == own["PREFECT_API_AUTH_STRING"] == "me:my-own"


@pytest.mark.parametrize("name", NAMES_A_SERVER)
def test_a_server_that_the_user_names_gets_the_users_own_password(
    tmp_path: Path, name: str
) -> None:
    (tmp_path / name).parent.mkdir(exist_ok=True)
    (tmp_path / name).write_text(NAMES_A_SERVER[name])
    found = started(tmp_path)
    assert "PREFECT_SERVER_API_AUTH_STRING" not in found
    assert "PREFECT_API_AUTH_STRING" not in found


@pytest.mark.security
@pytest.mark.parametrize("name", [".env", "prefect.toml", "pyproject.toml"])
def test_settings_that_others_may_write_end_a_run_in_one_line(tmp_path: Path, name: str) -> None:
    (tmp_path / name).write_text(NAMES_A_SERVER[name])
    (tmp_path / name).chmod(0o666)
    with pytest.raises(SystemExit) as ended:
        refuse_foreign_settings(tmp_path)
    assert str(ended.value) == (
        f"error: {tmp_path / name}: Prefect would take settings from it, but others may write "
        f"to it; run `chmod go-w {tmp_path / name}`"
    )


def test_a_pyproject_without_settings_of_prefect_does_not_matter(tmp_path: Path) -> None:
    (tmp_path / "pyproject.toml").write_text(NAMES_NONE["pyproject.toml"])
    (tmp_path / "pyproject.toml").chmod(0o666)
    refuse_foreign_settings(tmp_path)
