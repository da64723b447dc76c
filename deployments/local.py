"""Start and stop a Prefect server and two workers on this machine.

`python deployments/local.py up | down` is `make up` and `make down`. The processes' ids and logs
are in DISTILLERY_HOME/run. Everything binds to the loopback interface. The server keeps its data
where PREFECT_API_DATABASE_CONNECTION_URL says; by default in SQLite in PREFECT_HOME.

The server asks for a password, which is in DISTILLERY_HOME/run/password: every page of a browser
on this machine reaches the loopback interface, and whoever has Prefect's API has the machine.
"""

import os
import secrets
import shlex
import socket
import subprocess
import sys
import time
from contextlib import suppress
from functools import cache
from pathlib import Path

import httpx
import psutil

from distillery.errors import DistilleryError
from distillery.processes import is_secret
from distillery.settings import read_dotenv
from tasks.environment import refuse_foreign_settings, set_defaults

PROJECT = Path(__file__).resolve().parent.parent
POOLS = ("cpu-pool", "gpu-pool")
PASSWORDS = ("PREFECT_SERVER_API_AUTH_STRING", "PREFECT_API_AUTH_STRING")
"""The server's own password and its clients', which must be the same."""
NOT_FOR_WORKERS = frozenset(
    {
        "DISTILLERY_SERVER_KEY",
        "LABELS_DATABASE_PASSWORD",
        "POSTGRES_PASSWORD",
        "PREFECT_DATABASE_PASSWORD",
        "PREFECT_SERVER_ENCRYPTION_KEY",
    }
)
"""Secrets of other processes than the workers."""


def settings() -> dict[str, str]:
    """Return what the environment says, and after it .env of the project's folder."""
    return dotenv(PROJECT) | os.environ


@cache
def dotenv(folder: Path) -> dict[str, str]:
    """Return what .env says. It is read once, since it may warn."""
    try:
        return {name: value for name, value in read_dotenv(folder).items() if value}
    except DistilleryError as error:
        sys.exit(f"error: {error}")


PORT = settings().get("DISTILLERY_PREFECT_PORT") or "4200"


def home() -> Path:
    return (
        Path(settings().get("DISTILLERY_HOME") or PROJECT / ".distillery").expanduser().absolute()
    )


def run_folder() -> Path:
    folder = home() / "run"
    folder.mkdir(parents=True, exist_ok=True)
    return folder


def password_file() -> Path:
    return run_folder() / "password"


def password() -> str:
    """Return the server's password, as user:password, and keep it in a file that only this user can
    read. It is what the settings say, else that of the last time, else a new one."""
    file = password_file()
    found = next(filter(None, map(settings().get, PASSWORDS)), "")
    if not found and file.exists():
        found = file.read_text().strip()
    if not found:
        found = f"admin:{secrets.token_urlsafe(24)}"
    user, colon, rest = found.partition(":")
    if not (user and colon and rest and found.isascii() and found.isprintable()):
        sys.exit(
            f"error: {' or '.join(PASSWORDS)} or {file}: not user:password in ASCII; correct it, "
            "or remove it and a new one is made"
        )
    file.touch(mode=0o600)
    # A file of the user's own making may be open to others.
    file.chmod(0o600)
    file.write_text(found + "\n")
    return found


def environment() -> dict[str, str]:
    """Return the environment of the set-up, which needs every secret to give it to the server."""
    api = f"http://127.0.0.1:{PORT}/api"
    ours = {"PREFECT_API_URL": api, "PREFECT_WORKER_QUERY_SECONDS": "1", "PYTHONUNBUFFERED": "1"}
    # A worker gives each run a working folder of its own, which no .env and no relative path leads
    # to.
    ours["DISTILLERY_HOME"] = str(home())
    # The rows of those who work here are in the project's folder.
    ours["DISTILLERY_DATA_FOLDERS"] = settings().get("DISTILLERY_DATA_FOLDERS") or str(PROJECT)
    store = settings().get("DISTILLERY_STORE")
    if store and "://" not in store:
        ours["DISTILLERY_STORE"] = str(Path(store).expanduser().absolute())
    ours["PREFECT_API_AUTH_STRING"] = password()
    found = settings() | ours
    found.pop("PREFECT_SERVER_API_AUTH_STRING", None)
    return found


def environment_of_server() -> dict[str, str]:
    """Return the environment of the server: its own secrets, and none of the runs'.

    CSRF tokens are left off, because the server's own calls by its automations have none. A browser
    sends the password with no request by itself, so that a foreign page has nothing to misuse."""
    from deployments.setup import SECRETS

    kept = {
        name: value
        for name, value in settings().items()
        if name.startswith("PREFECT_") or not (name in SECRETS or is_secret(name, value))
    }
    return kept | {
        "PREFECT_API_URL": f"http://127.0.0.1:{PORT}/api",
        "PREFECT_SERVER_API_AUTH_STRING": password(),
        # The UI's own pages, at either name of this machine.
        "PREFECT_SERVER_API_CORS_ALLOWED_ORIGINS": (
            f"http://127.0.0.1:{PORT},http://localhost:{PORT}"
        ),
        # A run whose heartbeat was due while the server was down is looked after when it is back
        # (see setup.py).
        "PREFECT_SERVER_EVENTS_EXPIRED_BUCKET_BUFFER": "P7D",
        "PYTHONUNBUFFERED": "1",
    }


def environment_of_worker(pool: str) -> dict[str, str]:
    """Return the environment of a worker: the settings that are each worker's own.

    What all workers share comes with each run from the server (see setup.py)."""
    from deployments.setup import NOT_FOR_TRAINING, SECRETS

    withheld = NOT_FOR_WORKERS.union(SECRETS)
    if pool == "gpu-pool":
        withheld |= NOT_FOR_TRAINING
    return {name: value for name, value in environment().items() if name not in withheld}


def set_up() -> None:
    command = [sys.executable, "-m", "deployments.setup"]
    if subprocess.run(command, env=environment(), cwd=PROJECT).returncode:  # noqa: S603 - our own interpreter
        sys.exit(
            "error: the server is not set up; `make down`, mend what is said above, then `make up`"
        )


def start(name: str, environment: dict[str, str], *arguments: str) -> None:
    with (run_folder() / f"{name}.log").open("a") as log:
        process = subprocess.Popen(  # noqa: S603 - our own interpreter
            [sys.executable, "-m", "prefect", *arguments],
            env=environment,
            cwd=PROJECT,
            stdout=log,
            stderr=log,
            start_new_session=True,
        )
    (run_folder() / f"{name}.pid").write_text(str(process.pid))


def wait_for_server(seconds: float = 120) -> None:
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        try:
            if httpx.get(f"http://127.0.0.1:{PORT}/api/health", timeout=2).status_code == 200:
                return
        except httpx.HTTPError:
            pass
        time.sleep(0.5)
    sys.exit(
        f"error: the Prefect server did not start in {seconds:.0f} s; see {run_folder()}/server.log"
    )


def up() -> None:
    if any(running_process(name) for name in ("server", *POOLS)):
        sys.exit("error: already up; `make down` first")
    # What answers there would be taken for ours, and set up.
    with socket.socket() as probe:
        if probe.connect_ex(("127.0.0.1", int(PORT))) == 0:
            sys.exit(
                f"error: port {PORT} is taken; end what listens there, or set "
                "DISTILLERY_PREFECT_PORT"
            )
    listen = ("--host", "127.0.0.1", "--port", PORT)
    start("server", environment_of_server(), "server", "start", *listen)
    wait_for_server()
    set_up()
    for pool in POOLS:
        worker = ("worker", "start", "--pool", pool, "--name", f"{pool}-worker")
        start(pool, environment_of_worker(pool), *worker)
    file = shlex.quote(str(password_file()))
    print(
        f"Prefect UI: http://127.0.0.1:{PORT}; it asks for the password, which is all of {file}\n"
        f"run: export PREFECT_API_URL=http://127.0.0.1:{PORT}/api "
        f'PREFECT_API_AUTH_STRING="$(cat {file})"\n'
        "     .venv/bin/prefect deployment run 'distill/demo' --watch"
    )


def down() -> None:
    for name in (*POOLS, "server"):
        process = running_process(name)
        if process is not None:
            family = [process, *process.children(recursive=True)]
            process.terminate()
            _, left = psutil.wait_procs(family, timeout=30)
            # A worker that is slow to end would leave its runs behind.
            for each in left:
                with suppress(psutil.NoSuchProcess):
                    each.kill()
            psutil.wait_procs(left, timeout=10)
        (run_folder() / f"{name}.pid").unlink(missing_ok=True)


def running_process(name: str) -> psutil.Process | None:
    """Return our process `name` if it still runs, and not another program that has its id now."""
    try:
        process = psutil.Process(int((run_folder() / f"{name}.pid").read_text()))
        if any("prefect" in argument for argument in process.cmdline()):
            return process
    except (OSError, ValueError, psutil.Error):
        pass
    return None


if __name__ == "__main__":
    refuse_foreign_settings(PROJECT)
    set_defaults()
    commands = {"up": up, "down": down}
    if len(sys.argv) != 2 or sys.argv[1] not in commands:
        sys.exit("usage: python deployments/local.py up | down")
    commands[sys.argv[1]]()
