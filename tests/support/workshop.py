"""A Prefect server and two workers, each as on a machine of its own, and what they did as Prefect's
API reports it.

Each worker has a working folder, a DISTILLERY_HOME and a PREFECT_HOME of its own; all that they
share is what `shared` names: the store, the label database and the registry.
"""

import json
import os
import re
import signal
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar

import httpx
import psutil
from azurite_server import free_port
from prefect_api import PrefectApi, wait_for

PROJECT = Path(__file__).resolve().parents[2]
COUNTING = PROJECT / "tests" / "flows" / "counting"
POOLS = ("cpu-pool", "gpu-pool")
ENDED = ("COMPLETED", "FAILED", "CRASHED", "CANCELLED")

T = TypeVar("T")
Run = dict[str, Any]
"""A flow run as the API gives it."""


class Workshop(PrefectApi):
    """`shared` is what the set-up puts on the server, which gives it to the runs, `server` the
    server's own environment; `password` protects the API."""

    def __init__(
        self,
        folder: Path,
        shared: Mapping[str, str] | None = None,
        server: Mapping[str, str] | None = None,
        password: str | None = None,
    ) -> None:
        self.folder, self.port = folder, free_port()
        self.url = f"http://127.0.0.1:{self.port}"
        super().__init__(f"{self.url}/api", f"admin:{password}" if password else None)
        ours = ("PREFECT_", "TEACHER_", "DISTILLERY_", "AZURE")
        self.environment = {
            name: value for name, value in os.environ.items() if not name.startswith(ours)
        }
        self.environment |= {
            "DISTILLERY_HOME": str(folder),
            "DISTILLERY_PREFECT_PORT": str(self.port),
            "DISTILLERY_CHECKPOINT_SECONDS": "1",
            # Where tests keep their rows and models.
            "DISTILLERY_DATA_FOLDERS": tempfile.gettempdir(),
            "PREFECT_API_URL": f"{self.url}/api",
            "PREFECT_HOME": str(folder / "prefect"),
            "PREFECT_SERVER_ANALYTICS_ENABLED": "false",
            "PYTHONUNBUFFERED": "1",
            "WORKSHOP": str(folder),
            **(shared or {}),
        }
        self.shared = dict(shared or {})
        self.server_environment = dict(server or {})
        if password:
            self.environment["PREFECT_API_AUTH_STRING"] = f"admin:{password}"
            self.server_environment["PREFECT_SERVER_API_AUTH_STRING"] = f"admin:{password}"
        self.running: dict[str, subprocess.Popen[bytes]] = {}
        (folder / "run").mkdir(parents=True)
        (folder / "counted").touch()

    def start(self, pools: Sequence[str] = POOLS) -> None:
        self.start_server()
        set_up = [sys.executable, "-m", "deployments.setup"]
        done = subprocess.run(
            set_up, env=self.environment, cwd=PROJECT, capture_output=True, text=True, timeout=300
        )
        assert done.returncode == 0, done.stdout + done.stderr
        for pool in pools:
            self.start_worker(pool)

    def start_server(self) -> None:
        arguments = ("server", "start", "--host", "127.0.0.1", "--port", str(self.port))
        self._start(
            "server",
            *arguments,
            PREFECT_SERVER_EVENTS_EXPIRED_BUCKET_BUFFER="P7D",
            **self.server_environment,
        )
        wait_for("the server's start", self.is_healthy)

    def log_in(self) -> str:
        """Take the password of the server that `make up` has started."""
        login = (self.folder / "run" / "password").read_text().strip()
        self.api.auth = httpx.BasicAuth(*login.split(":", 1))
        self.environment["PREFECT_API_AUTH_STRING"] = login
        return login

    def start_worker(
        self, pool: str, name: str | None = None, limit: int | None = None, **environment: str
    ) -> None:
        """Start a worker of a pool, by default under the pool's name; `limit`: runs at once."""
        name = name or pool
        limits = () if limit is None else ("--limit", str(limit))
        self._start(
            name,
            *("worker", "start", "--pool", pool, "--name", f"{name}-worker", *limits),
            COUNT_FILE=str(self.folder / "counted"),
            DISTILLERY_HOME=str(self.folder / name / "home"),
            PREFECT_WORKER_QUERY_SECONDS="1",
            PYTHONPATH=f"{COUNTING}:{PROJECT}",
            **environment,
        )

    def stop(self, name: str, by: signal.Signals = signal.SIGTERM) -> None:
        process = self.running.pop(name)
        process.send_signal(by)
        process.wait(180)

    def close(self) -> None:
        for process in self.processes():
            process.kill()
        for started in self.running.values():
            started.wait(180)
        self.api.close()

    def _start(self, name: str, *arguments: str, **environment: str) -> None:
        """Starts `prefect ARGUMENTS` in a folder of its own, without what is shared: that comes
        from the server. Its log is run/NAME.log."""
        place = self.folder / name
        place.mkdir(exist_ok=True)
        own = {key: value for key, value in self.environment.items() if key not in self.shared}
        with self.log_of(name).open("ab") as log:
            self.running[name] = subprocess.Popen(
                [sys.executable, "-m", "prefect", *arguments],
                env=own | {"PREFECT_HOME": str(place / "prefect")} | environment,
                cwd=place,
                stdout=log,
                stderr=log,
                start_new_session=True,
            )

    def log_of(self, name: str) -> Path:
        return self.folder / "run" / f"{name}.log"

    def deployment_run(
        self, name: str, parameters: dict[str, Any]
    ) -> subprocess.CompletedProcess[str]:
        """`prefect deployment run NAME --watch`, from anywhere."""
        command = [sys.executable, "-m", "prefect", "--no-prompt", "deployment", "run", name]
        command += ["--watch", "--watch-interval", "1", "--params", json.dumps(parameters)]
        return subprocess.run(
            command,
            env=self.environment,
            cwd=self.folder,
            capture_output=True,
            text=True,
            timeout=600,
        )

    def deployment(self, name: str) -> dict[str, Any]:
        found: dict[str, Any] = self.api.get(f"/deployments/name/{name}").raise_for_status().json()
        return found

    def start_run(self, recipe: dict[str, Any], deployment: str = "distill/demo") -> Run:
        """A run of `recipe` on the two workers. A deployment has one run at a time: a second one
        takes another."""
        parameters = {"recipe": recipe, "training_deployment": "train-student/gpu"}
        path = f"/deployments/{self.deployment(deployment)['id']}/create_flow_run"
        run: Run = self.ask(path, parameters=parameters)
        return run

    def cancel(self, run: Run) -> None:
        """As the UI does it."""
        self.ask(
            f"/flow_runs/{run['id']}/set_state", state={"type": "CANCELLING", "name": "Cancelling"}
        )

    def distil(self, recipe: dict[str, Any]) -> Run:
        """A run from its start to its end, which must be Completed."""
        run = self.ended(self.start_run(recipe))
        assert run["state_name"] == "Completed", f"{run['state']}\n{self.log(run)}"
        return run

    def run(self, run: Run) -> Run:
        """The run as it is now."""
        found: Run = self.api.get(f"/flow_runs/{run['id']}").raise_for_status().json()
        return found

    def until(self, run: Run, what: str, found: Callable[[], T], seconds: float = 120) -> T:
        """What `found` returns as soon as that is true, in the midst of the run; fails where the
        run ends before."""

        def look() -> T:
            value, now = found(), self.run(run)
            assert value or now["state_type"] not in ENDED, (
                f"{what}: {now['state']}\n{self.log(run)}"
            )
            return value

        return wait_for(what, look, seconds)

    def ended(self, run: Run, seconds: float = 300) -> Run:
        wait_for(f"the end of {run['name']}", lambda: self.run(run)["state_type"] in ENDED, seconds)
        return self.run(run)

    def end(self, run: Run) -> None:
        """Without any grace, whatever it is at."""
        for one in self.family(run).values():
            for process in self.processes(one):
                process.kill()
            self.ask(f"/flow_runs/{one['id']}/set_state", state={"type": "CANCELLED"}, force=True)

    def newest_run(self, flow: str) -> Run:
        known = {"name": {"any_": [flow]}}
        runs: list[Run] = self.ask(
            "/flow_runs/filter", flows=known, sort="START_TIME_DESC", limit=1
        )
        return runs[0]

    def is_running(self, flow: str) -> bool:
        state = {"state": {"type": {"any_": ["RUNNING"]}}}
        return bool(self.ask("/flow_runs/count", flows={"name": {"any_": [flow]}}, flow_runs=state))

    def family(self, run: Run) -> dict[str, Run]:
        """The run ("") and all that it started ("student", "preparation, teacher"), by the names
        that distill gives."""
        top = self.run(run)
        family, parents = {"": top}, [top["id"]]
        while parents:
            found = self.ask(
                "/flow_runs/filter", flow_runs={"parent_flow_run_id": {"any_": parents}}
            )
            family |= {
                child["name"].removeprefix(top["name"]).strip(", "): child for child in found
            }
            parents = [child["id"] for child in found]
        return family

    def tasks(self, run: Run) -> dict[str, str]:
        """The run's stages and their states. Its subflows are left out, and the tasks that look
        into the registry, which are no stages."""
        tasks = self.ask("/task_runs/filter", flow_runs={"id": {"any_": [run["id"]]}})
        return {
            task["name"]: task["state_name"]
            for task in tasks
            if not task["state"]["state_details"]["child_flow_run_id"]
            and task["name"] not in ("judged before", "gate", "promote", "report")
        }

    def states(self, run: Run) -> dict[str, str]:
        """Each stage of the run and of all that it started, as 'FLOW: TASK', and its state."""
        family = self.family(run)
        return {
            f"{name}: {task}": state
            for name, one in family.items()
            for task, state in self.tasks(one).items()
        }

    def log(self, run: Run) -> str:
        entries = self.ask(
            "/logs/filter", logs={"flow_run_id": {"any_": [run["id"]]}}, sort="TIMESTAMP_ASC"
        )
        return "\n".join(entry["message"] for entry in entries)

    def wait_for_line(self, run: Run, text: str) -> None:
        """Wait until a run's log holds this: a run sends its log in parts, the last of them when it
        has ended."""
        wait_for(f"{text} in\n{self.log(run)}", lambda: text in self.log(run), 30)

    def artifacts(self, run: Run) -> dict[str, dict[str, Any]]:
        """The run's own, by their keys."""
        mine = {"flow_run_id": {"any_": [run["id"]]}}
        return {
            artifact["key"]: artifact for artifact in self.ask("/artifacts/filter", artifacts=mine)
        }

    def scoreboard(self, run: Run) -> list[str]:
        """The lines of the summary's scoreboard."""
        summary = self.artifacts(run)["distillation"]["data"]
        return [line for line in summary.splitlines() if re.match(r"\| .* \| \d\.\d{3} \[", line)]

    def counts(self) -> Counter[str]:
        """What all processes have done so far: "step", "request", "serve"."""
        return Counter((self.folder / "counted").read_text().split())

    @contextmanager
    def slower(self, **seconds: float) -> Iterator[None]:
        """Each step (`step=0.5`) or each `request` takes this much longer meanwhile, in runs under
        way too."""
        for what, delay in seconds.items():
            beside = self.folder / f"delay.{what}"
            beside.write_text(str(delay))
            beside.rename(self.folder / f"counted.{what}")
        try:
            yield
        finally:
            for what in seconds:
                (self.folder / f"counted.{what}").unlink(missing_ok=True)

    def worker_that_ran(self, run: Run) -> list[str]:
        """The pools whose worker's log holds what the run's process wrote."""
        return [pool for pool in POOLS if run["id"] in self.log_of(pool).read_text()]

    def processes(self, run: Run | None = None) -> list[psutil.Process]:
        """All that was started from this workshop and still runs, or what of it belongs to
        `run`."""
        wanted = ("PREFECT__FLOW_RUN_ID", run["id"]) if run else ("WORKSHOP", str(self.folder))
        found = []
        for process in psutil.process_iter():
            try:
                if (
                    process.environ().get(wanted[0]) == wanted[1]
                    and process.status() != psutil.STATUS_ZOMBIE
                ):
                    found.append(process)
            except psutil.Error:
                continue
        return found

    def engine(self, run: Run) -> psutil.Process:
        """The run's own process, which its worker has started; not what that one has started."""
        workers = {process.pid for process in self.running.values()}
        (engine,) = (process for process in self.processes(run) if process.ppid() in workers)
        return engine
