"""Start and stop a Prefect server and two workers on this machine.

`python deployments/local.py up | down` is `make up` and `make down`. The processes' ids and logs
are in DISTILLERY_HOME/run. Everything binds to the loopback interface. The server keeps its data
where PREFECT_API_DATABASE_CONNECTION_URL says; by default in SQLite in PREFECT_HOME.
"""

import os
import socket
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path

import httpx
import psutil
from dotenv import dotenv_values

from tasks.environment import set_defaults

PROJECT = Path(__file__).resolve().parent.parent
POOLS = ("cpu-pool", "gpu-pool")


def settings() -> dict[str, str]:
    """Return what the environment says, and after it .env."""
    return {
        name: value for name, value in dotenv_values(PROJECT / ".env").items() if value
    } | os.environ


PORT = settings().get("DISTILLERY_PREFECT_PORT") or "4200"


def home() -> Path:
    return (
        Path(settings().get("DISTILLERY_HOME") or PROJECT / ".distillery").expanduser().absolute()
    )


def run_folder() -> Path:
    folder = home() / "run"
    folder.mkdir(parents=True, exist_ok=True)
    return folder


def environment() -> dict[str, str]:
    api = f"http://127.0.0.1:{PORT}/api"
    ours = {"PREFECT_API_URL": api, "PREFECT_WORKER_QUERY_SECONDS": "1", "PYTHONUNBUFFERED": "1"}
    # A worker gives each run a working folder of its own, which no .env and no relative path leads
    # to.
    ours["DISTILLERY_HOME"] = str(home())
    store = settings().get("DISTILLERY_STORE")
    if store and "://" not in store:
        ours["DISTILLERY_STORE"] = str(Path(store).expanduser().absolute())
    return settings() | ours


def set_up() -> None:
    command = [sys.executable, "-m", "deployments.setup"]
    if subprocess.run(command, env=environment(), cwd=PROJECT).returncode:  # noqa: S603 - our own interpreter
        sys.exit(
            "error: the server is not set up; `make down`, mend what is said above, then `make up`"
        )


def start(name: str, *arguments: str, **extra: str) -> None:
    with (run_folder() / f"{name}.log").open("a") as log:
        process = subprocess.Popen(  # noqa: S603 - our own interpreter
            [sys.executable, "-m", "prefect", *arguments],
            env=environment() | extra,
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
    # A run whose heartbeat was due while the server was down is looked after when it is back (see
    # setup.py).
    buffer = {"PREFECT_SERVER_EVENTS_EXPIRED_BUCKET_BUFFER": "P7D"}
    start("server", "server", "start", "--host", "127.0.0.1", "--port", PORT, **buffer)
    wait_for_server()
    set_up()
    for pool in POOLS:
        start(pool, "worker", "start", "--pool", pool, "--name", f"{pool}-worker")
    print(f"Prefect UI: http://127.0.0.1:{PORT}; run: PREFECT_API_URL=http://127.0.0.1:{PORT}/api "
          ".venv/bin/prefect deployment run 'distill/demo' --watch")  # fmt: skip


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
    set_defaults()
    commands = {"up": up, "down": down}
    if len(sys.argv) != 2 or sys.argv[1] not in commands:
        sys.exit("usage: python deployments/local.py up | down")
    commands[sys.argv[1]]()
