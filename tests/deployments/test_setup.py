"""What deployments/ puts on a Prefect server, checked by Prefect's own code and a real server, and
its container files.

No container is started here: the images are checked by their structure, compose.yaml and what goes
to a cluster by their published schemas too. `make image-check` builds the image and runs it.
"""

import asyncio
import json
import os
import re
import shlex
import signal
import subprocess
import sys
import time
import tomllib
from collections.abc import Iterator
from fnmatch import fnmatch
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from uuid import uuid4

import kubernetes_validate  # type: ignore[import-untyped]
import pytest
import yaml
from azurite_server import free_port
from postgres_server import Postgres
from prefect.blocks.system import Secret
from prefect.blocks.webhook import Webhook
from prefect.client.orchestration import get_client
from prefect.client.schemas.objects import FlowRun
from prefect.settings import PREFECT_API_AUTH_STRING, PREFECT_API_URL, temporary_settings
from prefect.variables import Variable
from prefect.workers.base import BaseJobConfiguration
from prefect.workers.process import ProcessJobConfiguration
from prefect_api import PrefectApi, wait_for
from typer.main import get_command

from deployments import local, setup
from distillery.cli import app
from distillery.processes import is_secret
from distillery.readiness import training_bytes
from distillery.recipe import load_recipe

# A server may take minutes to start on a busy machine; each wait has a limit and a message of its
# own.
pytestmark = pytest.mark.timeout(1200)

PROJECT = Path(__file__).resolve().parents[2]
FOLDER = PROJECT / "deployments"
POOLS = ("cpu-pool", "gpu-pool")
WORKERS = ("process", "docker", "kubernetes")
SECRET = {name: f"planted-{name.lower()}-7Qm3Xv9" for name in setup.SECRETS}
PLAIN = {name: f"value-of-{name.lower()}" for name in setup.VARIABLES}
BLOCKS = len(SECRET) - len(setup.ENDPOINTS) + 2
"""An endpoint's two secrets are one block; two more are of no secret of these."""


def configuration_class(workers: str) -> type[BaseJobConfiguration]:
    from prefect_docker import worker as docker_worker  # type: ignore[import-untyped]
    from prefect_kubernetes import worker as kubernetes_worker  # type: ignore[import-untyped]

    classes: dict[str, type[BaseJobConfiguration]] = {
        "process": ProcessJobConfiguration,
        "docker": docker_worker.DockerWorkerJobConfiguration,
        "kubernetes": kubernetes_worker.KubernetesWorkerJobConfiguration,
    }
    return classes[workers]


def configured(workers: str, pool: str, environment: dict[str, str | None] | None = None) -> Any:
    """The pool's job as a worker makes it for a flow run."""
    template = setup.base_job_template(workers, pool, environment or {})
    # No server is asked: without references there is nothing to resolve.
    with temporary_settings(
        {PREFECT_API_URL: "http://server/api", PREFECT_API_AUTH_STRING: "admin:planted-api"}
    ):
        configuration: BaseJobConfiguration = asyncio.run(
            configuration_class(workers).from_template_and_values(template, {})
        )
        configuration.prepare_for_flow_run(FlowRun(flow_id=uuid4(), name="a-run"))
    return configuration


def container(pool: str) -> dict[str, Any]:
    """What the Docker worker asks of the engine, in the form of the engine's own API."""
    from docker.models.containers import _create_container_args  # type: ignore[import-untyped]

    job = configured("docker", pool)
    arguments = {
        "version": "1.41",
        "image": job.image,
        "command": job.command,
        "volumes": job.volumes,
    }
    return dict(_create_container_args(arguments | (job.container_create_kwargs or {})))


def pod(pool: str) -> dict[str, Any]:
    return dict(configured("kubernetes", pool).job_manifest["spec"]["template"]["spec"])


def test_a_docker_run_gets_its_image_and_the_gpu_pool_alone_a_gpu() -> None:
    cpu, gpu = container("cpu-pool"), container("gpu-pool")
    assert (cpu["image"], gpu["image"]) == ("distillery:cpu", "distillery:cuda")
    assert cpu["command"] == gpu["command"] == "prefect flow-run execute"
    assert "DeviceRequests" not in cpu["host_config"]
    (device,) = gpu["host_config"]["DeviceRequests"]
    assert (device["Driver"], device["Count"], device["Capabilities"]) == ("nvidia", 1, [["gpu"]])
    assert gpu["host_config"]["Binds"] == ["distillery:/var/lib/distillery"]


def test_a_kubernetes_run_gets_its_image_and_the_gpu_pool_alone_a_gpu_node() -> None:
    cpu, gpu = pod("cpu-pool"), pod("gpu-pool")
    assert [one["containers"][0]["image"] for one in (cpu, gpu)] == [
        "distillery:cpu",
        "distillery:cuda",
    ]
    assert all(
        one["containers"][0]["args"] == ["prefect", "flow-run", "execute"] for one in (cpu, gpu)
    )
    assert gpu["containers"][0]["resources"]["limits"] == {"nvidia.com/gpu": "1"}
    assert gpu["nodeSelector"]["nvidia.com/gpu.present"] == "true"
    assert gpu["tolerations"] == [
        {"key": "nvidia.com/gpu", "operator": "Exists", "effect": "NoSchedule"}
    ]
    assert "gpu" not in json.dumps(cpu)


@pytest.mark.parametrize("pool", POOLS)
def test_the_kubernetes_job_is_one_by_the_clients_own_models(pool: str) -> None:
    from kubernetes_asyncio.client import ApiClient

    manifest = configured("kubernetes", pool).job_manifest
    # These two are Prefect's, and in no schema of a pod.
    del (
        manifest["spec"]["template"]["spec"]["parallelism"],
        manifest["spec"]["template"]["spec"]["completions"],
    )

    async def round_trip() -> Any:
        async with ApiClient() as client:
            # What a model does not know is lost on the way.
            response = SimpleNamespace(data=json.dumps(manifest))
            return client.sanitize_for_serialization(client.deserialize(response, "V1Job"))

    assert asyncio.run(round_trip()) == manifest


KUBERNETES: list[dict[str, Any]] = yaml.safe_load((FOLDER / "kubernetes.yaml").read_text())["items"]
DEPLOYMENTS = {
    item["metadata"]["name"]: item["spec"] for item in KUBERNETES if item["kind"] == "Deployment"
}
PODS = {name: spec["template"]["spec"] for name, spec in DEPLOYMENTS.items()}


def test_what_goes_to_a_cluster_follows_kubernetes_published_schemas() -> None:
    jobs = [configured("kubernetes", pool).job_manifest for pool in POOLS]
    for job in jobs:
        for of_prefect in ("parallelism", "completions"):
            del job["spec"]["template"]["spec"][of_prefect]
    for manifest in (*KUBERNETES, *jobs):
        kubernetes_validate.validate(manifest, "1.34", strict=True)
        assert manifest["metadata"]["namespace"] == "distillery"
    jobs[0]["spec"]["template"]["spec"]["containers"][0]["image_pull_policy"] = "Never"
    with pytest.raises(kubernetes_validate.ValidationError, match="image_pull_policy"):
        kubernetes_validate.validate(jobs[0], "1.34", strict=True)


def test_a_cluster_has_a_worker_for_each_pool_and_a_student_behind_a_service() -> None:
    assert set(PODS) == {"cpu-worker", "gpu-worker", "student"}
    for name, spec in DEPLOYMENTS.items():
        assert spec["selector"]["matchLabels"] == spec["template"]["metadata"]["labels"]
        assert spec["selector"]["matchLabels"] == {"app": name}
    for pool in POOLS:
        (worker,) = PODS[pool.replace("pool", "worker")]["containers"]
        command = ["prefect", "worker", "start", "--pool", pool, "--with-healthcheck"]
        assert worker["command"] == command
    (service,) = (item for item in KUBERNETES if item["kind"] == "Service")
    (server,) = PODS["student"]["containers"]
    assert service["spec"]["selector"] == {"app": "student"}
    (port,) = service["spec"]["ports"]
    assert port["targetPort"] == server["ports"][0]["name"]
    command = server["command"]
    assert command[:3] == ["distillery", "serve", "/model/student"]
    assert command[command.index("--port") + 1] == str(server["ports"][0]["containerPort"])
    serve: Any = get_command(app)
    known = {option for each in serve.commands["serve"].params for option in each.opts}
    assert {word for word in command if word.startswith("--")} <= known
    name, namespace = service["metadata"]["name"], service["metadata"]["namespace"]
    allowed = {command[at + 1] for at, word in enumerate(command) if word == "--allow-host"}
    assert allowed == {name, f"{name}.{namespace}", f"{name}.{namespace}.svc.cluster.local"}


@pytest.mark.security
@pytest.mark.parametrize("name", PODS)
def test_a_pod_that_stays_up_is_confined_and_its_secrets_are_documented(name: str) -> None:
    assert breaches(PODS[name]) == []
    # A worker alone asks the cluster for something.
    assert ("serviceAccountName" in PODS[name]) == (name != "student")
    assert PODS[name].get("automountServiceAccountToken", True) == (name != "student")
    documented = re.findall(
        r"^#? ?([A-Z][A-Z0-9_]+)=", (PROJECT / "sample.env").read_text(), re.MULTILINE
    )
    containers = [*PODS[name]["containers"], *PODS[name].get("initContainers", [])]
    for one in containers:
        named = {each["name"]: each.get("value") for each in one["env"]}
        keys = {
            each["valueFrom"]["secretKeyRef"]["key"] for each in one["env"] if "valueFrom" in each
        }
        assert keys
        assert keys <= set(documented)
        assert not any(is_secret(key, value) for key, value in named.items() if value)
        assert one["resources"]["limits"]["memory"]


@pytest.mark.security
@pytest.mark.parametrize("pool", POOLS)
def test_a_kubernetes_job_holds_no_secret_and_reads_those_that_it_needs_from_one(
    pool: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("DISTILLERY_SIGNING_KEY", "planted-signing-key")
    for name, value in SECRET.items():
        monkeypatch.setenv(name, value)
    for name in PLAIN:
        monkeypatch.delenv(name, raising=False)
    manifest = configured("kubernetes", pool, setup.save_settings("kubernetes")).job_manifest
    (only,) = manifest["spec"]["template"]["spec"]["containers"]
    assert "planted" not in json.dumps(manifest)
    assert "envFrom" not in only
    read = {
        one["name"]: one["valueFrom"]["secretKeyRef"] for one in only["env"] if "valueFrom" in one
    }
    assert all(
        reference == {"name": "distillery", "key": name, "optional": True}
        for name, reference in read.items()
    )
    withheld = setup.NOT_FOR_TRAINING if pool == "gpu-pool" else {"DISTILLERY_FSDP"}
    of_template = {"DISTILLERY_NEEDS_GPU", "DISTILLERY_DEVICES"} if pool == "gpu-pool" else set()
    wanted = {*SECRET, *PLAIN, *setup.EACH_WORKERS_OWN}
    assert wanted - withheld - of_template <= set(read)
    assert set(read).isdisjoint(withheld)
    assert "PREFECT_API_AUTH_STRING" in read
    environment = {one["name"]: one["value"] for one in only["env"] if "value" in one}
    assert set(environment).isdisjoint(read)
    assert environment["PREFECT_API_URL"] == "http://server/api"
    assert environment["PREFECT_FLOWS_HEARTBEAT_FREQUENCY"] == "30"
    # An evicted run is scheduled again.
    assert environment["PREFECT_FLOW_RUN_EXECUTE_SIGTERM_BEHAVIOR"] == "reschedule"


def breaches(pod: dict[str, Any]) -> list[str]:
    """What of a pod breaks the "restricted" level of Kubernetes' Pod Security Standards, version
    1.34, with that of "baseline", which it includes. Only Linux."""
    of_pod = pod.get("securityContext", {})
    found = [f"{name}: true" for name in ("hostNetwork", "hostPID", "hostIPC") if pod.get(name)]
    if of_pod.get("sysctls"):
        found.append("sysctls")
    allowed = {"configMap", "csi", "downwardAPI", "emptyDir", "ephemeral", "projected", "secret"}
    allowed.add("persistentVolumeClaim")
    for volume in pod.get("volumes", []):
        found += [f"volume {kind}" for kind in set(volume) - {"name"} - allowed]
    containers = [
        container
        for kind in ("containers", "initContainers", "ephemeralContainers")
        for container in pod.get(kind, [])
    ]
    for container in containers:
        own = container.get("securityContext", {})
        both = of_pod | own
        capabilities = own.get("capabilities", {})
        options = both.get("seLinuxOptions", {})
        wrong = {
            "privileged": own.get("privileged", False),
            "allowPrivilegeEscalation": own.get("allowPrivilegeEscalation") is not False,
            "capabilities.drop": "ALL" not in capabilities.get("drop", []),
            "capabilities.add": not set(capabilities.get("add", [])) <= {"NET_BIND_SERVICE"},
            "runAsNonRoot": both.get("runAsNonRoot") is not True,
            "runAsUser": both.get("runAsUser") == 0,
            "seccompProfile": both.get("seccompProfile", {}).get("type")
            not in ("RuntimeDefault", "Localhost"),
            "procMount": own.get("procMount", "Default") != "Default",
            "appArmorProfile": both.get("appArmorProfile", {}).get("type", "RuntimeDefault")
            == "Unconfined",
            "seLinuxOptions": bool({"user", "role"} & set(options)),
            "hostPort": any(port.get("hostPort") for port in container.get("ports", [])),
            "host of a probe": any(
                "host" in container.get(probe, {}).get(kind, {})
                for probe in ("livenessProbe", "readinessProbe", "startupProbe")
                for kind in ("httpGet", "tcpSocket")
            ),
        }
        found += [name for name, is_wrong in wrong.items() if is_wrong]
    return found


@pytest.mark.security
@pytest.mark.parametrize("pool", POOLS)
def test_a_pod_keeps_to_the_restricted_standard(pool: str) -> None:
    found = pod(pool)
    assert breaches(found) == []
    assert found["automountServiceAccountToken"] is False
    found["containers"][0].pop("securityContext")
    found["securityContext"].pop("seccompProfile")
    found["volumes"].append({"name": "host", "hostPath": {"path": "/"}})
    assert breaches(found) == [
        "volume hostPath",
        "allowPrivilegeEscalation",
        "capabilities.drop",
        "seccompProfile",
    ]


def make_databases(server: Postgres) -> None:
    """As compose.yaml has it done."""
    environment = os.environ | {
        "PGHOST": server.host,
        "POSTGRES_USER": "owner",
        "PREFECT_DATABASE_PASSWORD": "it's",
        "LABELS_DATABASE_PASSWORD": "another",
    }
    command = ["sh", str(FOLDER / "databases.sh")]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")


class Server(PrefectApi):
    """A real Prefect server on a port and a PostgreSQL database of its own, as in compose.yaml. On
    SQLite a busy server waits a minute for locks of its own and loses events."""

    def __init__(self, folder: Path, database: Postgres) -> None:
        self.folder, self.password = folder, "admin:planted-api-password"
        self.database = database
        port = free_port()
        self.url = f"http://127.0.0.1:{port}/api"
        self.command = [
            sys.executable,
            "-m",
            "prefect",
            "server",
            "start",
            "--host",
            "127.0.0.1",
            "--port",
            str(port),
        ]
        kept = {
            name: value
            for name, value in os.environ.items()
            if not name.startswith(("PREFECT_", *SECRET, *PLAIN))
        }
        self.environment = kept | {
            "PREFECT_API_AUTH_STRING": self.password,
            "PREFECT_API_DATABASE_CONNECTION_URL": database.url(
                "postgresql+asyncpg", user="prefect", database="prefect"
            ),
            "PREFECT_API_URL": self.url,
            "PREFECT_HOME": str(folder),
            "PREFECT_SERVER_ANALYTICS_ENABLED": "false",
            "PREFECT_SERVER_API_AUTH_STRING": self.password,
            "PREFECT_SERVER_EVENTS_EXPIRED_BUCKET_BUFFER": "P7D",
        }
        super().__init__(self.url, self.password)

    def start(self) -> None:
        with (self.folder / "server.log").open("ab") as log:
            self.process = subprocess.Popen(
                self.command, env=self.environment, stdout=log, stderr=log
            )
        # Seconds on an idle machine; minutes where others use all of its cores.
        wait_for("the server's start", self.is_healthy, 300)

    def is_healthy(self) -> bool:
        assert self.process.poll() is None, (self.folder / "server.log").read_text()
        return super().is_healthy()

    def kill(self) -> None:
        self.process.kill()
        self.process.wait(30)

    def set_up(self, *arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, "-m", "deployments.setup", *arguments]
        environment = self.environment | environment
        return subprocess.run(
            command, env=environment, cwd=PROJECT, capture_output=True, text=True, timeout=300
        )

    def state(self) -> dict[str, Any]:
        """All that the set-up command is there for, as the API reports it, with ids and times of
        the last change."""
        deployments = self.ask("/deployments/filter", sort="NAME_ASC")
        for deployment in deployments:
            # Prefect writes a deployment anew each time; what it says must be the same.
            for entry in (
                deployment,
                *deployment["schedules"],
                deployment["global_concurrency_limit"] or {},
            ):
                entry.pop("updated", None)
            for schedule in deployment["schedules"]:
                del schedule["id"], schedule["created"]
        blocks = self.ask("/block_documents/filter", include_secrets=True, sort="NAME_ASC")
        return {
            "automations": self.ask("/automations/filter", sort="NAME_ASC"),
            "blocks": [
                {"name": one["name"], "data": one["data"], "updated": one["updated"]}
                for one in blocks
            ],
            "deployments": deployments,
            "pools": [self.api.get(f"/work_pools/{name}").json() for name in POOLS],
            "variables": self.ask("/variables/filter", sort="NAME_ASC"),
        }


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    with Postgres() as database:
        make_databases(database)
        server = Server(tmp_path_factory.mktemp("server"), database)
        try:
            server.start()
            done = server.set_up(**SECRET, **PLAIN)
            assert done.returncode == 0, done.stdout + done.stderr
            assert not re.search("planted|unchanged|updated", done.stdout + done.stderr)
            yield server
        finally:
            server.api.close()
            server.process.send_signal(signal.SIGINT)
            server.process.wait(30)


@pytest.mark.slow
def test_set_up_again_changes_nothing(server: Server) -> None:
    before = server.state()
    assert {kind: len(things) for kind, things in before.items()} == {
        "automations": 2,
        "blocks": BLOCKS,
        "deployments": len(yaml.safe_load((PROJECT / "prefect.yaml").read_text())["deployments"]),
        "pools": 2,
        "variables": len(PLAIN),
    }
    again = server.set_up(**SECRET, **PLAIN)
    assert again.returncode == 0, again.stderr
    assert not re.search("created|updated", again.stdout)
    assert server.state() == before


@pytest.mark.slow
def test_set_up_takes_over_what_has_changed(server: Server) -> None:
    changed = PLAIN | {"DISTILLERY_STORE": "abfs://elsewhere/store"}
    try:
        done = server.set_up("process", "--gpus", "3", **SECRET, **changed)
        lines = [line for line in done.stdout.splitlines() if "unchanged" not in line]
        assert lines == [
            "variable distillery_store: updated",
            "work pool gpu-pool: updated",
            "deployments of prefect.yaml: deployed",
        ]
        assert server.api.get("/work_pools/gpu-pool").json()["concurrency_limit"] == 3
        assert (
            server.api.get("/variables/name/distillery_store").json()["value"]
            == "abfs://elsewhere/store"
        )
    finally:
        server.set_up(**SECRET, **PLAIN)


@pytest.mark.slow
def test_set_up_deletes_what_an_earlier_version_saved(server: Server) -> None:
    with temporary_settings(
        {PREFECT_API_URL: server.url, PREFECT_API_AUTH_STRING: server.password}
    ):
        Webhook(url=f"{server.url}/events").save(setup.EVENTS_BLOCK)
        Secret(value="planted").save("teacher-model-key")
        Variable.set("teacher_model_endpoint", "https://teacher.test")
    before = server.state()["blocks"]
    done = server.set_up(**SECRET, **PLAIN)
    lines = [line for line in done.stdout.splitlines() if "unchanged" not in line]
    assert lines == [
        "webhook block distillery-events: deleted",
        "secret block teacher-model-key: deleted",
        "variable teacher_model_endpoint: deleted",
        "deployments of prefect.yaml: deployed",
    ]
    state = server.state()
    assert len(state["variables"]) == len(PLAIN)
    blocks = state["blocks"]
    assert len(blocks) == len(before) - 2 == BLOCKS
    # Whoever could change the endpoint alone would be sent the key.
    (teacher,) = (block for block in blocks if block["name"] == setup.TEACHER_BLOCK)
    assert teacher["data"]["value"] == {
        "endpoint": SECRET["TEACHER_MODEL_ENDPOINT"],
        "key": SECRET["TEACHER_MODEL_KEY"],
    }
    (judge,) = (block for block in blocks if block["name"] == setup.JUDGE_BLOCK)
    assert judge["data"]["value"]["key"] == SECRET["JUDGE_MODEL_KEY"]
    (events,) = [block for block in blocks if block["name"] == setup.EVENTS_BLOCK]
    assert "form_data" in events["data"]


@pytest.mark.slow
@pytest.mark.parametrize("pool", POOLS)
def test_a_worker_resolves_every_setting_and_secret(
    server: Server, pool: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    own = dict.fromkeys(setup.EACH_WORKERS_OWN, "") | {"DISTILLERY_REMOTE_CODE": "trusted/model"}
    for name, value in own.items():
        monkeypatch.setenv(name, value)
    known = server.api.get(f"/work_pools/{pool}").json()
    assert known["concurrency_limit"] == {"cpu-pool": None, "gpu-pool": 1}[pool]
    assert "planted" not in json.dumps(known)
    with temporary_settings(
        {PREFECT_API_URL: server.url, PREFECT_API_AUTH_STRING: server.password}
    ):
        job: ProcessJobConfiguration = asyncio.run(
            ProcessJobConfiguration.from_template_and_values(known["base_job_template"], {})
        )
    fixed = {
        "PREFECT_FLOWS_HEARTBEAT_FREQUENCY": "30",
        "PREFECT_LOGGING_EXTRA_LOGGERS": "distillery",
        "PREFECT_RESULTS_DEFAULT_STORAGE_BLOCK": "distillery-store/results",
    }
    wanted = SECRET | PLAIN | own | fixed
    if pool == "gpu-pool":
        wanted = {name: wanted[name] for name in set(wanted) - setup.NOT_FOR_TRAINING}
    assert job.env == wanted


@pytest.mark.slow
@pytest.mark.parametrize("workers", WORKERS)
@pytest.mark.parametrize("pool", POOLS)
def test_a_server_takes_the_template(server: Server, workers: str, pool: str) -> None:
    key = "{{ prefect.blocks.secret.teacher-model-key }}"
    template = setup.base_job_template(workers, pool, {"TEACHER_MODEL_KEY": key})
    name = f"{workers}-{pool}"
    made = server.ask("/work_pools/", name=name, type=workers, base_job_template=template)
    assert made["base_job_template"] == template


@pytest.mark.slow
@pytest.mark.parametrize(
    "variables",
    [
        {"command": "id"},
        {"env": {"PYTHONPATH": "/tmp"}},
        {"env.DISTILLERY_REMOTE_CODE": "any/model"},
    ],
    ids=str,
)
def test_whoever_starts_a_run_sets_neither_its_command_nor_its_environment(
    server: Server, variables: dict[str, Any]
) -> None:
    deployment = server.api.get("/deployments/name/distill/demo").json()
    response = server.api.post(
        f"/deployments/{deployment['id']}/create_flow_run", json={"job_variables": variables}
    )
    assert response.status_code == 422, response.text
    assert server.ask("/flow_runs/count") == 0


@pytest.mark.slow
def test_a_server_that_refuses_or_does_not_answer_is_one_line(server: Server) -> None:
    for environment, expected in (
        ({"PREFECT_API_AUTH_STRING": "admin:wrong"}, "is PREFECT_API_AUTH_STRING the server's?"),
        (
            {"PREFECT_API_URL": f"http://127.0.0.1:{free_port()}/api"},
            "PREFECT_API_URL: no Prefect server answers at",
        ),
        ({"PREFECT_API_URL": ""}, "PREFECT_API_URL: not set"),
    ):
        done = server.set_up(**environment)
        assert done.returncode == 1
        assert expected in done.stderr
        assert len(done.stderr.strip().splitlines()) == 1
    other_type = server.set_up("docker")
    assert other_type.stderr.strip() == (
        "error: cpu-pool is a pool of process workers; "
        "run `prefect work-pool delete cpu-pool` first"
    )


ACTION_FAILED = "prefect.automation.action.failed"


class Heart:
    """Runs of a deployment as the server sees them: Running, and with a heartbeat whenever `beat`
    is called.

    Real runs beat every 30 s, the least that Prefect allows: a test of them would take minutes."""

    def __init__(self, server: Server, *names: str) -> None:
        self.server = server
        flow = server.ask("/flows/", name="watched")["id"]
        self.runs = [self._run(flow, name) for name in names]

    def _run(self, flow: str, name: str) -> str:
        run = self.server.ask("/flow_runs/", flow_id=flow, name=name, tags=["distillery"])["id"]
        self.enter(run, "RUNNING")
        return str(run)

    def enter(self, run: str, state: str) -> None:
        self.server.ask(f"/flow_runs/{run}/set_state", state={"type": state})

    def beat(self, run: str) -> None:
        self.send(run, "prefect.flow-run.heartbeat")

    def send(self, run: str, name: str) -> None:
        event = {
            "id": str(uuid4()),
            "occurred": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
            "event": name,
            "resource": {"prefect.resource.id": f"prefect.flow-run.{run}"},
            "related": [
                {"prefect.resource.id": "prefect.tag.distillery", "prefect.resource.role": "tag"}
            ],
        }
        self.server.api.post("/events", json=[event]).raise_for_status()

    def states(self) -> dict[str, str]:
        """The name of each run's state."""
        wanted = {"id": {"any_": self.runs}}
        return {
            run["id"]: run["state_name"]
            for run in self.server.ask("/flow_runs/filter", flow_runs=wanted)
        }

    def events(self, name: str) -> list[dict[str, Any]]:
        asked = {"filter": {"event": {"name": [name]}}, "limit": 50}
        found: list[dict[str, Any]] = self.server.ask("/events/filter", **asked)["events"]
        return found

    def runs_with(self, event: str) -> set[str]:
        """The runs of which the server has kept an event of this name, or one that names them."""
        ids = {
            resource["prefect.resource.id"]
            for each in self.events(event)
            for resource in (each["resource"], *each["related"])
        }
        return {run for run in self.runs if f"prefect.flow-run.{run}" in ids}

    def wait_for_watch(self, runs: set[str]) -> None:
        """Wait until the server watches each of `runs` for silence, which it notes in a transaction
        of its own, perhaps after it has kept the heartbeat.

        A run beats many times before an outage; these have beaten once, so nothing may be lost."""
        asked = "SELECT bucketing_key FROM automation_bucket WHERE last_event IS NOT NULL"

        def watches_all() -> bool:
            watched = self.server.database.ask(asked, "prefect", "prefect")
            return all(run in watched for run in runs)

        wait_for("the watch over each run", watches_all)

    def wait_for(self, event: str, runs: set[str], alive: str | None = None) -> None:
        """Wait until the server has kept an event of this name for each of `runs`; the run `alive`
        beats meanwhile."""
        deadline = time.monotonic() + 120
        while not runs <= self.runs_with(event):
            assert time.monotonic() < deadline, f"{event}: only of {self.runs_with(event)}"
            if alive:
                self.beat(alive)
            time.sleep(0.5)


@pytest.mark.slow
def test_an_outage_of_the_server_crashes_no_healthy_run_and_hides_no_dead_one(
    server: Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Seven runs are silent while the server is down, for longer than the automations wait; one of
    them is alive. The server finds all seven silent at one moment."""
    # Ten seconds are the least that Prefect allows.
    silent_after, dead_after = 10, 40
    monkeypatch.setattr(setup, "SILENT_AFTER", silent_after)
    monkeypatch.setattr(setup, "DEAD_AFTER", dead_after)
    with temporary_settings(
        {PREFECT_API_URL: server.url, PREFECT_API_AUTH_STRING: server.password}
    ):
        events_block = setup.save_events_block()
        with get_client(sync_client=True) as client:
            for automation in setup.automations(events_block):
                setup.save_automation(client, automation)
    # A server takes up the automations at its start. Changed while it ran, it once watched no run
    # within two minutes.
    server.kill()
    server.start()
    heart = Heart(server, "healthy", "failed", *(f"dead {number}" for number in range(1, 7)))
    healthy, failed, *dead = heart.runs
    heart.wait_for("prefect.flow-run.Running", set(heart.runs))
    for run in heart.runs:
        heart.beat(run)
    heart.enter(failed, "FAILED")
    # A heartbeat that was under way when the run ended.
    heart.beat(failed)
    heart.wait_for("prefect.flow-run.heartbeat", set(heart.runs))
    # A run that has ended need not be watched.
    heart.wait_for_watch({healthy, *dead})
    server.kill()
    # The outage is longer than the silence that makes a run a suspect.
    time.sleep(silent_after + 1)
    server.start()
    heart.wait_for(setup.SILENT, {healthy, *dead})
    heart.beat(healthy)
    # A run that ended in the moment in which it was found silent.
    heart.send(failed, setup.SILENT)
    expected = dict.fromkeys(heart.runs, "Running") | {failed: "Failed"}
    assert heart.states() == expected, "silence alone crashes nothing"
    deadline = time.monotonic() + 180
    while "Running" in {heart.states()[run] for run in dead} and time.monotonic() < deadline:
        heart.beat(healthy)
        time.sleep(1)
    expected |= dict.fromkeys(dead, "Crashed")
    assert heart.states() == expected
    for run in dead:
        message = server.api.get(f"/flow_runs/{run}").json()["state"]["message"]
        assert "start the run again" in message
    # The server refuses to crash what has ended, and that is the only action that fails.
    heart.wait_for(ACTION_FAILED, {failed}, alive=healthy)
    names = {each["resource"]["prefect.resource.name"] for each in heart.events(ACTION_FAILED)}
    assert names == {"distillery: dead run"}
    assert heart.states() == expected


@pytest.mark.parametrize(
    ("schema", "file"),
    [("compose-spec", "compose.yaml"), ("github-workflows", "github-actions.yml")],
    ids=str,
)
def test_the_file_follows_its_published_schema(schema: str, file: str) -> None:
    command = [
        sys.executable,
        "-m",
        "check_jsonschema",
        "--builtin-schema",
        f"vendor.{schema}",
        str(FOLDER / file),
    ]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout


def test_a_local_run_finds_home_and_store_from_its_own_working_folder(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("DISTILLERY_HOME", "data")
    for store, expected in (
        ("data/store", str(tmp_path / "data" / "store")),
        ("~/store", str(Path.home() / "store")),
        ("/srv/store", "/srv/store"),
        ("abfs://container/store", "abfs://container/store"),
    ):
        monkeypatch.setenv("DISTILLERY_STORE", store)
        found = local.environment()
        assert (found["DISTILLERY_HOME"], found["DISTILLERY_STORE"]) == (
            str(tmp_path / "data"),
            expected,
        )
    monkeypatch.delenv("DISTILLERY_STORE")
    monkeypatch.setattr(local, "PROJECT", tmp_path)
    assert "DISTILLERY_STORE" not in local.environment()


@pytest.fixture
def project(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A project's folder of this test's own; nothing is set but what it says in .env."""
    folder = tmp_path / "project"
    folder.mkdir()
    monkeypatch.setattr(local, "PROJECT", folder)
    for name in (*local.PASSWORDS, *SECRET, *PLAIN):
        monkeypatch.delenv(name, raising=False)
    return folder


@pytest.mark.security
def test_make_up_keeps_a_password_that_only_its_user_reads(project: Path, home: Path) -> None:
    first = local.password()
    assert re.fullmatch(r"admin:[\w-]{32,}", first)
    file = home / "run" / "password"
    assert file.stat().st_mode & 0o777 == 0o600
    assert local.password() == first, "a second `make up` takes the same"
    file.write_text("mine:own\n")
    file.chmod(0o644)
    assert local.password() == "mine:own"
    assert file.stat().st_mode & 0o777 == 0o600


@pytest.mark.security
def test_make_up_takes_the_password_of_the_settings(
    project: Path, home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (project / ".env").write_text("PREFECT_API_AUTH_STRING=a:of-the-file\n")
    assert local.password() == "a:of-the-file"
    monkeypatch.setenv("PREFECT_API_AUTH_STRING", "a:of-the-environment")
    assert local.password() == "a:of-the-environment"
    monkeypatch.setenv("PREFECT_SERVER_API_AUTH_STRING", "a:the-servers")
    assert local.password() == "a:the-servers"
    assert (home / "run" / "password").read_text() == "a:the-servers\n"
    for wrong in ("no-user", ":x", "user:", "üser:x"):
        monkeypatch.setenv("PREFECT_SERVER_API_AUTH_STRING", wrong)
        with pytest.raises(SystemExit, match="not user:password in ASCII; correct it"):
            local.password()


@pytest.mark.security
def test_server_and_workers_of_make_up_get_what_they_need(
    project: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    given = SECRET | {"DISTILLERY_SIGNING_KEY": "k", "POSTGRES_PASSWORD": "p"}
    (project / ".env").write_text("".join(f"{name}={value}\n" for name, value in given.items()))
    database = "postgresql+asyncpg://prefect:planted@host/prefect"
    monkeypatch.setenv("PREFECT_API_DATABASE_CONNECTION_URL", database)
    server = local.environment_of_server()
    assert server["PREFECT_API_DATABASE_CONNECTION_URL"] == database
    assert server["PREFECT_SERVER_API_AUTH_STRING"] == local.password()
    origins = server["PREFECT_SERVER_API_CORS_ALLOWED_ORIGINS"].split(",")
    assert origins == [f"http://{host}:{local.PORT}" for host in ("127.0.0.1", "localhost")]
    assert set(server).isdisjoint(given)
    # The set-up gives them to the server, which gives them to the runs.
    assert local.environment().items() >= SECRET.items()
    cpu, gpu = map(local.environment_of_worker, POOLS)
    for worker in (cpu, gpu):
        assert worker["PREFECT_API_AUTH_STRING"] == local.password()
        assert "PREFECT_SERVER_API_AUTH_STRING" not in worker
    assert set(cpu) & set(given) == {"DISTILLERY_SIGNING_KEY"}
    assert set(gpu) & set(given) == set()


COMPOSE: dict[str, Any] = yaml.safe_load((FOLDER / "compose.yaml").read_text())


@pytest.mark.security
def test_each_database_has_a_role_of_its_own_that_reaches_no_other(tmp_path: Path) -> None:
    with Postgres() as server:
        # As in a volume of the version before: all belongs to the superuser.
        for name in ("prefect", "labels"):
            server.ask(f"CREATE DATABASE {name}")
            server.ask("CREATE TYPE colour AS ENUM ('red')", database=name)
            server.ask("CREATE TABLE kept (id serial PRIMARY KEY, c colour)", database=name)
            server.ask("INSERT INTO kept (c) VALUES ('red')", database=name)
            server.ask("CREATE VIEW seen AS SELECT * FROM kept", database=name)
        make_databases(server)
        make_databases(server)
        roles = "SELECT rolname, rolsuper, rolcreatedb, rolcreaterole FROM pg_roles WHERE"
        assert server.ask(f"{roles} rolname IN ('labels', 'prefect') ORDER BY 1") == (
            "labels|f|f|f\nprefect|f|f|f"
        )
        for name, other in (("prefect", "labels"), ("labels", "prefect")):
            server.ask("INSERT INTO kept (c) VALUES ('red')", name, name)
            server.ask(
                "ALTER TABLE kept ADD note text; ALTER TYPE colour RENAME TO hue", name, name
            )
            server.ask("DROP VIEW seen; CREATE TABLE made (id int)", name, name)
            assert server.ask("SELECT count(*) FROM kept", name, name) == "2"
            for database in (other, "postgres", "template1"):
                with pytest.raises(AssertionError, match="permission denied for database"):
                    server.ask("SELECT 1", name, database)
            with pytest.raises(AssertionError, match=r"permission denied|must be superuser"):
                server.ask("COPY (SELECT 1) TO PROGRAM 'id'", name, name)


def test_compose_names_only_what_it_has() -> None:
    services = COMPOSE["services"]
    assert set(services) == {"postgres", "server", "setup", "cpu-worker", "gpu-worker"}
    for service in services.values():
        assert set(service.get("depends_on", {})) <= set(services)
        assert {volume.partition(":")[0] for volume in service.get("volumes", [])} <= set(
            COMPOSE["volumes"]
        )
        assert {config["source"] for config in service.get("configs", [])} <= set(
            COMPOSE["configs"]
        )
        # A service that others wait for has a way to say that it is well.
        for name, condition in service.get("depends_on", {}).items():
            assert condition["condition"] != "service_healthy" or "healthcheck" in services[name]
        build = service.get("build")
        assert build is None or (PROJECT / build["context"] / build["dockerfile"]).is_file()
    used = {service["image"] for service in services.values()}
    built = {service["image"] for service in services.values() if "build" in service}
    assert built == {"distillery:cpu", "distillery:cuda"}
    assert used - built == {"postgres:17-alpine"}


def test_compose_starts_the_two_workers_with_a_gpu_for_one() -> None:
    services = COMPOSE["services"]
    devices = {
        name: service.get("deploy", {}).get("resources", {}).get("reservations", {}).get("devices")
        for name, service in services.items()
    }
    assert {name for name, device in devices.items() if device} == {"gpu-worker"}
    (device,) = devices["gpu-worker"]
    assert device == {
        "driver": "nvidia",
        "count": "${DISTILLERY_DEVICES:-1}",
        "capabilities": ["gpu"],
    }
    for pool in POOLS:
        command = services[pool.replace("pool", "worker")]["command"]
        assert command == ["prefect", "worker", "start", "--pool", pool, "--with-healthcheck"]


def test_compose_opens_no_port_to_others_and_the_server_asks_for_a_password() -> None:
    ports = [port for service in COMPOSE["services"].values() for port in service.get("ports", [])]
    assert ports == ["127.0.0.1:4200:4200"]
    environment = COMPOSE["services"]["server"]["environment"]
    assert environment["PREFECT_SERVER_API_AUTH_STRING"].startswith("${PREFECT_API_AUTH_STRING:?")
    origins = environment["PREFECT_SERVER_API_CORS_ALLOWED_ORIGINS"]
    assert origins == "http://127.0.0.1:4200,http://localhost:4200"


@pytest.mark.security
def test_every_container_of_compose_is_confined() -> None:
    for name, service in COMPOSE["services"].items():
        assert service["security_opt"] == ["no-new-privileges:true"], name
        assert service["cap_drop"] == ["ALL"], name
        assert not {"cap_add", "privileged", "pid", "ipc", "network_mode"} & set(service), name
        assert service["mem_limit"], name
        assert service["pids_limit"] > 0, name
        assert service.get("user", "1000") != "root", name
        assert "seccomp" not in str(service), "Docker's own profile holds"
    services = COMPOSE["services"]
    read_only = {name for name, service in services.items() if service.get("read_only")}
    assert read_only == {"server", "setup"}
    assert all(services[name]["tmpfs"] == ["/tmp"] for name in read_only)
    # Elsewhere Prefect would copy the UI into its own package.
    assert services["server"]["environment"]["PREFECT_UI_STATIC_DIRECTORY"].startswith("/tmp/")
    assert services["postgres"]["user"] == "postgres"
    for pool in POOLS:
        host = container(pool)["host_config"]
        assert (host["CapDrop"], host["SecurityOpt"]) == (["ALL"], ["no-new-privileges:true"])
        assert host["PidsLimit"] > 0


@pytest.mark.security
def test_each_container_of_compose_gets_the_secrets_that_it_needs() -> None:
    given = {
        name: {
            variable
            for variable in re.findall(r"\$\{(\w+)", json.dumps(service["environment"]))
            if is_secret(variable, "")
        }
        for name, service in COMPOSE["services"].items()
    }
    databases = {"LABELS_DATABASE_PASSWORD", "PREFECT_DATABASE_PASSWORD"}
    login = "PREFECT_API_AUTH_STRING"
    assert given["postgres"] == {"POSTGRES_PASSWORD", *databases}
    of_server = {"PREFECT_DATABASE_PASSWORD", "PREFECT_SERVER_ENCRYPTION_KEY", login}
    assert given["server"] == of_server
    assert given["setup"].isdisjoint({"PREFECT_DATABASE_PASSWORD", "PREFECT_SERVER_ENCRYPTION_KEY"})
    keys = {"DISTILLERY_SIGNING_KEY", "DISTILLERY_VERIFY_KEY"}
    assert given["cpu-worker"] == {login, *keys}
    assert given["gpu-worker"] == {login, "DISTILLERY_VERIFY_KEY"}


def test_compose_takes_every_setting_from_a_documented_variable() -> None:
    text = (FOLDER / "compose.yaml").read_text()
    found = re.findall(r"\$\{?(\w+)(:[-?])?", text)
    assert {name for name, kind in found if not kind} == set(), "neither a default nor required"
    documented = re.findall(
        r"^#? ?([A-Z][A-Z0-9_]+)=", (PROJECT / "sample.env").read_text(), re.MULTILINE
    )
    assert {name for name, _ in found} <= set(documented)
    # What the set-up command passes on to the runs, under a name that it knows.
    environment = set(COMPOSE["services"]["setup"]["environment"])
    assert environment - {"PREFECT_API_URL", "PREFECT_API_AUTH_STRING"} == {
        *setup.VARIABLES,
        *setup.SECRETS,
    }
    assert set(setup.EACH_WORKERS_OWN) <= set(COMPOSE["services"]["cpu-worker"]["environment"])


@pytest.mark.parametrize("workers", WORKERS)
def test_a_pool_for_gpus_ends_trainings_without_one(workers: str) -> None:
    """Where the template asks for a GPU itself. A worker of processes says whether it has one."""
    environment: dict[str, str | None] = {"DISTILLERY_NEEDS_GPU": "the worker's"}
    found = {pool: configured(workers, pool, environment).env for pool in POOLS}
    of_gpus = "the worker's" if workers == "process" else "true"
    assert found["cpu-pool"]["DISTILLERY_NEEDS_GPU"] == "the worker's"
    assert found["gpu-pool"]["DISTILLERY_NEEDS_GPU"] == of_gpus
    services = COMPOSE["services"]
    assert services["gpu-worker"]["environment"] == services["cpu-worker"]["environment"] | {
        "DISTILLERY_DEVICES": "${DISTILLERY_DEVICES:-1}",
        "DISTILLERY_FSDP": "${DISTILLERY_FSDP:-false}",
        "DISTILLERY_NEEDS_GPU": "true",
        "DISTILLERY_SIGNING_KEY": "",
    }


def test_a_training_gets_as_many_gpus_as_the_set_up_was_told() -> None:
    environment: dict[str, str | None] = {"DISTILLERY_DEVICES": "the worker's"}
    for workers, value in (("process", "the worker's"), ("docker", "4"), ("kubernetes", "4")):
        template = {
            pool: setup.base_job_template(workers, pool, environment, devices=4) for pool in POOLS
        }
        found = {
            pool: each["variables"]["properties"]["env"]["default"]["DISTILLERY_DEVICES"]
            for pool, each in template.items()
        }
        assert found == {"cpu-pool": "the worker's", "gpu-pool": value}
        job = template["gpu-pool"]["job_configuration"]
        if workers == "docker":
            assert job["container_create_kwargs"]["device_requests"][0]["count"] == 4
        if workers == "kubernetes":
            (only,) = job["job_manifest"]["spec"]["template"]["spec"]["containers"]
            assert only["resources"]["limits"] == {"nvidia.com/gpu": "4"}
            assert only["resources"]["requests"]["memory"] == "128Gi"
    assert pod("gpu-pool")["containers"][0]["resources"]["limits"] == {"nvidia.com/gpu": "1"}


def test_a_pod_gets_the_memory_that_the_preset_lab_takes() -> None:
    phi_4_mini = 3_836_021_760
    need = training_bytes(load_recipe("lab"), 4 * phi_4_mini)
    for pool in POOLS:
        requests = pod(pool)["containers"][0]["resources"]["requests"]
        assert int(requests["memory"].removesuffix("Gi")) * 2**30 >= need, pool


def test_links_of_a_run_in_compose_lead_to_the_port_that_is_open() -> None:
    (port,) = COMPOSE["services"]["server"]["ports"]
    for name in ("cpu-worker", "gpu-worker"):
        environment = COMPOSE["services"][name]["environment"]
        assert environment["PREFECT_UI_URL"] == f"http://{port.rpartition(':')[0]}"


def instructions() -> list[list[str]]:
    """The Dockerfile's instructions, each split as a shell does."""
    lines = (FOLDER / "images" / "Dockerfile").read_text().splitlines()
    text = "\n".join(line for line in lines if not line.startswith("#"))
    return [shlex.split(line) for line in text.replace("\\\n", " ").splitlines() if line.strip()]


def test_the_image_copies_only_what_there_is_and_what_is_not_ignored() -> None:
    ignored = (FOLDER / "images" / "Dockerfile.dockerignore").read_text().splitlines()
    kept = {line.removeprefix("!") for line in ignored if line.startswith("!")}
    copied = {source for copy in instructions() if copy[0] == "COPY" for source in copy[1:-1]}
    assert "*" in ignored
    assert {source for source in copied if "/" not in source} == kept
    assert all((PROJECT / source).exists() for source in copied)
    assert not any(fnmatch(".env", name) for name in kept)


def test_the_image_installs_the_projects_own_versions() -> None:
    project = tomllib.loads((PROJECT / "pyproject.toml").read_text())["project"]
    words = [word for run in instructions() if run[0] == "RUN" for word in run]
    (torch,) = (one for one in project["dependencies"] if one.startswith("torch"))
    assert torch in words
    extras = words[words.index("deployments/requirements.py") + 1 : words.index(">")]
    assert extras
    assert set(extras) <= set(project["optional-dependencies"])
    # All but torch and the project itself are compared with their hashes.
    assert words.count("pip") - words.count("--require-hashes") == 2
    assert words.count("--no-deps") == 3


def test_the_image_runs_a_worker_as_no_root_and_knows_that_it_is_a_container() -> None:
    last = {one[0]: one[1:] for one in instructions()}
    assert last["USER"] == ["1000"]
    assert "ENTRYPOINT" not in last
    # The shell's words of a JSON list.
    assert [word.strip("[],") for word in last["CMD"]][:3] == ["prefect", "worker", "start"]
    settings = dict(
        word.split("=", 1) for one in instructions() if one[0] == "ENV" for word in one[1:]
    )
    assert settings["DISTILLERY_CONTAINER"] == "1"
    # What is mounted elsewhere lies where the image keeps its data.
    home = settings["DISTILLERY_HOME"]
    assert last["VOLUME"] == [home]
    mounted = {volume.partition(":")[2] for volume in COMPOSE["services"]["cpu-worker"]["volumes"]}
    mounted |= {
        one["mountPath"] for pool in POOLS for one in pod(pool)["containers"][0]["volumeMounts"]
    }
    mounted |= {
        volume.partition(":")[2] for pool in POOLS for volume in configured("docker", pool).volumes
    }
    assert mounted - {"/dev/shm"} == {home}


def test_make_image_check_names_what_the_files_of_the_image_have() -> None:
    """It needs root, a network and minutes, and so is no test: see CONTRIBUTING.md."""
    script = FOLDER / "images" / "check.sh"
    subprocess.run(["bash", "-n", script], check=True)
    text = script.read_text()
    # Each service starts when those that it depends on are ready.
    order = re.findall(r"^(?:start|compose up .*?) ([a-z-]+)(?: >/dev/null)?$", text, re.MULTILINE)
    assert order[-1] == "cpu-worker"
    for place, service in enumerate(order):
        assert set(COMPOSE["services"][service].get("depends_on", {})) <= set(order[:place])
    assert all(
        COMPOSE["services"][service]["healthcheck"]["test"][0] == "CMD"
        for service in re.findall(r"^start ([a-z-]+)$", text, re.MULTILINE)
    )
    # What the two lines of sed in it look for.
    (base,) = [line for line in instructions() if line[0] == "FROM"]
    assert re.fullmatch(r"python:3\.\d+-slim-[a-z]+", base[1])
    database = COMPOSE["services"]["postgres"]["image"]
    assert (FOLDER / "compose.yaml").read_text().count(f" image: {database}\n") == 1
    given = set(re.findall(r"([A-Z_]+)=\S*\$\(openssl", text))
    assert set(re.findall(r"\$\{(\w+):\?", json.dumps(COMPOSE["services"]))) <= given


def test_the_github_example_deploys_and_then_watches_the_run() -> None:
    text = (FOLDER / "github-actions.yml").read_text()
    # YAML 1.1 reads the key `on` as true.
    workflow = yaml.safe_load(text)
    assert {"workflow_dispatch", "push"} == set(workflow[True])
    job = workflow["jobs"]["distil"]
    assert all(value.startswith("${{ secrets.") for value in job["env"].values())
    commands = [
        shlex.split(line) for step in job["steps"] for line in step.get("run", "").splitlines()
    ]
    assert [command[:3] for command in commands] == [
        ["pip", "install", "--require-hashes"],
        ["pip", "install", "--no-deps"],
        ["python", "deployments/requirements.py", ">"],
        ["pip", "install", "--require-hashes"],
        ["pip", "install", "--no-deps"],
        ["prefect", "--no-prompt", "deploy"],
        ["prefect", "--no-prompt", "deployment"],
    ]
    assert {"distill/demo", "--watch"} < set(commands[-1])
    for step in job["steps"]:
        assert re.fullmatch(r"actions/[a-z-]+@[0-9a-f]{40}", step.get("uses", f"actions/a@{0:040}"))
    # Where packages come from is for pip's own configuration to say.
    assert not re.search(r"https?://|--(extra-)?index-url|-i ", text)
    # Prefect itself takes these words.
    environment = os.environ | {"PREFECT_API_URL": f"http://127.0.0.1:{free_port()}/api"}
    refused = subprocess.run(
        [sys.executable, "-m", *commands[-1]], env=environment, capture_output=True, text=True
    )
    assert refused.returncode == 1
    assert "All connection attempts failed" in refused.stdout + refused.stderr
