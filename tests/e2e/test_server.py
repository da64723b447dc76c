"""A real Prefect server and its two workers, as `make up` starts them: where things run and what fails."""

import json
import os
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import psutil
import pytest
from tiny_recipe import recipe, row, write_rows

PROJECT = Path(__file__).resolve().parents[2]
LOCAL = PROJECT / "deployments" / "local.py"

pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]


class Server:
    """What `python deployments/local.py up` runs, with a home and a port of its own."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            self.port = free.getsockname()[1]
        self.api = httpx.Client(base_url=f"http://127.0.0.1:{self.port}/api", timeout=60, trust_env=False)
        kept = {name: value for name, value in os.environ.items() if not name.startswith(("PREFECT_", "TEACHER_"))}
        self.environment = kept | {
            "DISTILLERY_HOME": str(folder / "home"),
            "DISTILLERY_PREFECT_PORT": str(self.port),
            "PREFECT_HOME": str(folder / "prefect"),
            "PREFECT_SERVER_ANALYTICS_ENABLED": "false",
        }

    def local(self, command: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [sys.executable, str(LOCAL), command], env=self.environment, capture_output=True, text=True, timeout=300
        )

    def deployment_run(self, name: str, parameters: dict[str, Any]) -> subprocess.CompletedProcess[str]:
        """`prefect deployment run NAME --watch`, from anywhere."""
        command = [sys.executable, "-m", "prefect", "--no-prompt", "deployment", "run", name]
        command += ["--watch", "--watch-interval", "1", "--params", json.dumps(parameters)]
        environment = self.environment | {"PREFECT_API_URL": f"http://127.0.0.1:{self.port}/api"}
        return subprocess.run(command, env=environment, cwd=self.folder, capture_output=True, text=True, timeout=600)

    def post(self, path: str, body: dict[str, Any]) -> httpx.Response:
        """Asks again, as Prefect's own client does, while SQLite is locked by another writer (503)."""
        for _ in range(20):
            response = self.api.post(path, json=body)
            if response.status_code != 503:
                break
            time.sleep(0.5)
        return response

    def ask(self, path: str, **body: Any) -> Any:
        return self.post(path, body).raise_for_status().json()

    def newest_run(self, flow: str) -> dict[str, Any]:
        known = {"name": {"any_": [flow]}}
        runs: list[dict[str, Any]] = self.ask("/flow_runs/filter", flows=known, sort="START_TIME_DESC", limit=1)
        return runs[0]

    def is_running(self, flow: str) -> bool:
        state = {"state": {"type": {"any_": ["RUNNING"]}}}
        return bool(self.ask("/flow_runs/count", flows={"name": {"any_": [flow]}}, flow_runs=state))

    def family(self, run: dict[str, Any]) -> list[dict[str, Any]]:
        """The run and all that it started, by the names that distill gives them."""
        runs: list[dict[str, Any]] = self.ask("/flow_runs/filter", flow_runs={"name": {"like_": run["name"]}})
        return runs

    def tasks(self, run: dict[str, Any]) -> dict[str, str]:
        """The run's tasks and their states; its subflows are left out."""
        tasks = self.ask("/task_runs/filter", flow_runs={"id": {"any_": [run["id"]]}})
        return {
            task["name"]: task["state_name"]
            for task in tasks
            if not task["state"]["state_details"]["child_flow_run_id"]
        }

    def log(self, run: dict[str, Any]) -> str:
        entries = self.ask("/logs/filter", logs={"flow_run_id": {"any_": [run["id"]]}}, sort="TIMESTAMP_ASC")
        return "\n".join(entry["message"] for entry in entries)

    def worker_that_ran(self, run: dict[str, Any]) -> list[str]:
        """The pools whose worker's log holds what the run's process wrote."""
        logs = {pool: self.folder / "home" / "run" / f"{pool}.log" for pool in ("cpu-pool", "gpu-pool")}
        return [pool for pool, log in logs.items() if run["id"] in log.read_text()]

    def processes(self) -> list[psutil.Process]:
        """All processes that were started with this home in their environment."""
        found = []
        for process in psutil.process_iter():
            try:
                if process.environ().get("DISTILLERY_HOME") == self.environment["DISTILLERY_HOME"]:
                    found.append(process)
            except psutil.Error:
                continue
        return found


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    server = Server(tmp_path_factory.mktemp("server"))
    try:
        up = server.local("up")
        assert up.returncode == 0, up.stdout + up.stderr
        yield server
    finally:
        server.local("down")
        for process in server.processes():
            process.kill()
        server.api.close()


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[str]]:
    return write_rows(tmp_path_factory.mktemp("rows"))


@pytest.fixture(scope="module")
def base(tiny_model: Callable[[str], Path]) -> Path:
    return tiny_model("llama")


@pytest.fixture(scope="module")
def distilled(server: Server, files: dict[str, list[str]], base: Path) -> dict[str, Any]:
    """distill/demo with a tiny recipe, training sent to the GPU pool, as the deployment's own parameters say."""
    done = server.deployment_run("distill/demo", {"recipe": recipe(files, base)})
    run = server.newest_run("distill")
    assert done.returncode == 0, done.stdout + done.stderr + server.log(run)
    return run


def test_training_runs_in_the_gpu_worker_and_the_rest_in_the_cpu_worker(
    server: Server, distilled: dict[str, Any]
) -> None:
    name = distilled["name"]
    runs = {run["name"].removeprefix(name).strip(", "): run for run in server.family(distilled)}
    assert set(runs) == {"", "preparation", "preparation, teacher", "student"}
    assert distilled["state_name"] == "Completed"
    for child in ("preparation, teacher", "student"):
        assert runs[child]["work_pool_name"] == "gpu-pool"
        assert server.worker_that_ran(runs[child]) == ["gpu-pool"]
        assert server.tasks(runs[child]) == {"train": "Completed"}
    assert distilled["work_pool_name"] == "cpu-pool"
    assert server.worker_that_ran(distilled) == ["cpu-pool"]
    # A subflow without a deployment has no pool of its own: it runs in its parent's process.
    assert runs["preparation"]["work_pool_name"] is None
    assert server.worker_that_ran(runs["preparation"]) == ["cpu-pool"]
    here = {"prepare dataset", "label", "export", "evaluate", "register", "download"}
    assert server.tasks(distilled) == dict.fromkeys(here, "Completed")
    assert server.tasks(runs["preparation"]) == {"gold labels": "Completed", "export": "Completed"}


def test_the_cpu_pool_answers_a_file_with_the_registered_student(
    server: Server, distilled: dict[str, Any], tmp_path: Path
) -> None:
    rows = [row("new", number) for number in range(12)]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in [*rows, {"id": "bad"}]))
    parameters = {
        "model_name": "tiny-student",
        "input_uri": str(tmp_path / "rows.jsonl"),
        "output": str(tmp_path / "answers"),
    }
    done = server.deployment_run("batch-inference/cpu", parameters)
    run = server.newest_run("batch-inference")
    assert done.returncode == 0, done.stdout + done.stderr + server.log(run)
    assert run["work_pool_name"] == "cpu-pool"
    answers = [json.loads(line) for line in (tmp_path / "answers" / "predictions.jsonl").read_text().splitlines()]
    assert [answer["example_id"] for answer in answers] == [row["id"] for row in rows]
    assert {answer["answer"] for answer in answers} <= set("ABC")
    assert len((tmp_path / "answers" / "failed.jsonl").read_text().splitlines()) == 1


def _missing_layer(values: dict[str, Any], _folder: Path) -> None:
    values["student"]["layers"] = [7]


def _code_of_its_own(values: dict[str, Any], folder: Path) -> None:
    (folder / "config.json").write_text('{"model_type": "homemade"}')
    (folder / "model.safetensors").write_bytes(b"")
    values["student"] |= {"start": "base", "base": {"model": str(folder)}}


@pytest.mark.parametrize(
    ("spoil", "reason"),
    [
        (_missing_layer, "student.layers: 7 is no layer of this model, which has layers 0 to 1"),
        (_code_of_its_own, "needs Python code of its own to load; if you trust it, set trust_remote_code: true"),
    ],
)
def test_a_child_that_fails_fails_its_parent_with_its_reason(
    server: Server,
    files: dict[str, list[str]],
    base: Path,
    tmp_path: Path,
    spoil: Callable[[dict[str, Any], Path], None],
    reason: str,
) -> None:
    values = recipe(files, base)
    spoil(values, tmp_path)
    done = server.deployment_run("distill/demo", {"recipe": values})
    assert done.returncode == 1, done.stdout + done.stderr
    parent = server.newest_run("distill")
    child = next(run for run in server.family(parent) if run["name"] == f"{parent['name']}, student")
    assert (parent["state_type"], child["state_type"]) == ("FAILED", "FAILED")
    assert reason in child["state"]["message"]
    assert f"train-student/gpu: the run '{child['name']}' ended as Failed" in parent["state"]["message"]
    assert reason in parent["state"]["message"]
    assert reason in server.log(parent)
    assert "Traceback" not in server.log(parent) + server.log(child)


@pytest.mark.parametrize(
    ("deployment", "parameters", "named"),
    [
        ("distill/demo", {"recipe": {"preset": "demo", "nmae": "x"}}, "nmae"),
        ("distill/demo", {"recipe": {"preset": "demo", "teacher": {"concurrency": 0}}}, "0"),
        ("batch-inference/cpu", {"model_name": "m", "input_uri": "f", "registry": "elsewhere"}, "elsewhere"),
        ("batch-inference/cpu", {"model_name": "m"}, "input_uri"),
    ],
)
def test_bad_parameters_are_refused_before_a_run_exists(
    server: Server, deployment: str, parameters: dict[str, Any], named: str
) -> None:
    before = server.ask("/flow_runs/count")
    known = server.api.get(f"/deployments/name/{deployment}").json()
    response = server.post(f"/deployments/{known['id']}/create_flow_run", {"parameters": parameters})
    assert response.status_code in (409, 422), response.text
    assert named in response.text
    assert server.ask("/flow_runs/count") == before


def test_a_parameter_that_the_flow_does_not_have_is_refused(server: Server) -> None:
    before = server.ask("/flow_runs/count")
    done = server.deployment_run("distill/demo", {"recipe": {"preset": "demo"}, "where": "gpu"})
    assert done.returncode == 1
    assert "where" in done.stdout + done.stderr
    assert server.ask("/flow_runs/count") == before


def test_the_weekly_run_waits_until_it_is_switched_on(server: Server) -> None:
    lab = server.api.get("/deployments/name/distill/lab").json()
    assert [(schedule["schedule"]["cron"], schedule["active"]) for schedule in lab["schedules"]] == [
        ("0 5 * * 1", False)
    ]
    assert lab["work_pool_name"] == "cpu-pool"


def test_down_ends_everything_in_the_midst_of_a_run(server: Server, files: dict[str, list[str]], base: Path) -> None:
    values = recipe(files, base)
    values["teacher"]["preparation"]["training"]["epochs"] = 100_000
    deployment = server.api.get("/deployments/name/distill/demo").json()
    parameters = {"recipe": values, "training_deployment": "train-student/gpu"}
    server.post(f"/deployments/{deployment['id']}/create_flow_run", {"parameters": parameters}).raise_for_status()
    deadline = time.monotonic() + 120
    while not server.is_running("train-student"):
        assert time.monotonic() < deadline
        time.sleep(0.5)
    second = server.local("up")
    assert (second.returncode, second.stderr) == (1, "error: already up; `make down` first\n")
    started = {int(path.read_text()) for path in (server.folder / "home" / "run").glob("*.pid")}
    running = {process.pid for process in server.processes()}
    assert len(started) == 3
    # The server, the workers and, below these, the parent and the child.
    assert started < running
    assert len(running) >= 5

    down = server.local("down")
    assert down.returncode == 0, down.stderr
    deadline = time.monotonic() + 10
    while server.processes() and time.monotonic() < deadline:
        time.sleep(0.2)
    assert [" ".join(process.cmdline()) for process in server.processes()] == []
    assert not list((server.folder / "home" / "run").glob("*.pid"))
    with pytest.raises(httpx.TransportError):
        server.api.get("/health")
