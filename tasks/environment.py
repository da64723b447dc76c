"""What every start of a flow sets in the environment, before Prefect and the model libraries read
it.

It must import neither: flows/__init__.py calls it first of all, however a flow is started. What the
environment says already wins.
"""

import os
import warnings
from pathlib import Path

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


def _has_own_prefect() -> bool:
    """Return whether the user has told Prefect of a server or a profile; their choice holds
    then."""
    if os.environ.get("PREFECT_API_URL") or os.environ.get("PREFECT_PROFILE"):
        return True
    return (Path.home() / ".prefect" / "profiles.toml").exists()
