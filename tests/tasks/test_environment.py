"""A flow that is started by hand has what make would set, and what the user says wins."""

import json
import os
import subprocess
import sys
from pathlib import Path

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
