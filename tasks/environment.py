"""What every start of a flow sets in the environment, before Prefect and the model libraries read
it.

This module imports neither at its top: flows/__init__.py calls it first of all, however a flow is
started. What the environment says already wins.
"""

import os
import secrets
import sys
import tomllib
import warnings
from pathlib import Path

from distillery.settings import why_not_trusted

DEFAULTS = {
    # Prefect's own telemetry writes to its database while the first run starts: "database is
    # locked".
    "PREFECT_SERVER_ANALYTICS_ENABLED": "false",
    # Else Prefect prints a notice on telemetry in a terminal.
    "DO_NOT_TRACK": "1",
    # On a busy machine the temporary server of a first run takes longer than Prefect's 20 s.
    "PREFECT_SERVER_EPHEMERAL_STARTUP_TIMEOUT_SECONDS": "120",
    "PREFECT_LOGGING_EXTRA_LOGGERS": "distillery",
    "OLIVE_DISABLE_TELEMETRY": "1",
    "HF_HUB_DISABLE_TELEMETRY": "1",
    "HF_HUB_DISABLE_PROGRESS_BARS": "1",
    "TQDM_DISABLE": "1",
    # Threads that wait for each other spin for milliseconds by default. With another process on the
    # same cores, training is several times slower then; without one, this makes no difference.
    "GOMP_SPINCOUNT": "1000",
    "TOKENIZERS_PARALLELISM": "false",
    "TRANSFORMERS_VERBOSITY": "error",
    # Of one library to another: nobody who reads a run's log can do anything about them.
    "PYTHONWARNINGS": "ignore::FutureWarning,ignore::DeprecationWarning",
}


def set_defaults() -> None:
    """Set what is not set yet, for this process and for those that it starts."""
    for name, value in DEFAULTS.items():
        os.environ.setdefault(name, value)
    if "PREFECT_HOME" not in os.environ and not _has_own_prefect():
        home = Path(os.environ.get("DISTILLERY_HOME") or ".distillery").expanduser().absolute()
        os.environ["PREFECT_HOME"] = str(home / "prefect")
        # Prefect makes this folder, but not those above it.
        home.mkdir(parents=True, exist_ok=True)
    for category in (FutureWarning, DeprecationWarning):
        warnings.simplefilter("ignore", category)


def refuse_foreign_settings(folder: Path) -> None:
    """End this process with one line if Prefect, started in `folder`, would read settings from a
    file that another user may have written, in which they could name a server of their own."""
    for name in (".env", "prefect.toml", "pyproject.toml"):
        file = folder / name
        reason = why_not_trusted(file)
        if reason and (name != "pyproject.toml" or _is_for_prefect(file)):
            sys.exit(f"error: {file}: Prefect would take settings from it, but {reason}")


def _is_for_prefect(pyproject: Path) -> bool:
    """Return whether a pyproject.toml has settings of Prefect, or can't be read."""
    try:
        return "prefect" in tomllib.loads(pyproject.read_text()).get("tool", {})
    except (OSError, ValueError):
        return True


def close_temporary_server() -> None:
    """Give the server that Prefect starts for a run without one a password, and open it to no page
    of a browser.

    Nothing is changed if the user names another API: in the environment, in .env, prefect.toml or
    pyproject.toml, or in the active profile. Prefect itself says so."""
    if os.environ.get("PREFECT_API_URL"):
        return
    from prefect.context import refresh_global_settings_context
    from prefect.settings import get_current_settings

    settings = get_current_settings()
    if settings.api.url:
        return
    given = settings.server.api.auth_string or settings.api.auth_string
    password = given.get_secret_value() if given else f"admin:{secrets.token_urlsafe(32)}"
    # An empty list of origins allows none. It has no page of its own either.
    os.environ["PREFECT_SERVER_API_CORS_ALLOWED_ORIGINS"] = ""
    os.environ["PREFECT_SERVER_API_AUTH_STRING"] = password
    os.environ["PREFECT_API_AUTH_STRING"] = password
    # Importing Prefect has read the settings.
    refresh_global_settings_context()


def _has_own_prefect() -> bool:
    """Return whether the user has told Prefect of a server or a profile; their choice holds
    then."""
    if os.environ.get("PREFECT_API_URL") or os.environ.get("PREFECT_PROFILE"):
        return True
    return (Path.home() / ".prefect" / "profiles.toml").exists()
