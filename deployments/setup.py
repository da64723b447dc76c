"""Give a Prefect server all that Distillery needs.

`python -m deployments.setup [process | docker | kubernetes]` makes the variables, the Secret
blocks, the two work pools with their concurrency limits, the automations that find dead runs, and
the deployments of prefect.yaml. It prints one line per object and is idempotent. PREFECT_API_URL
names the server; what the workers need is taken from the environment or .env.
"""

import argparse
import os
import subprocess
import sys
from base64 import b64encode
from datetime import timedelta
from pathlib import Path
from typing import Any
from uuid import UUID

import httpx
import yaml
from prefect.blocks.core import Block
from prefect.blocks.notifications import CustomWebhookNotificationBlock
from prefect.blocks.system import Secret
from prefect.client.orchestration import SyncPrefectClient, get_client
from prefect.client.schemas.actions import WorkPoolCreate, WorkPoolUpdate
from prefect.client.schemas.objects import StateType
from prefect.events.actions import ChangeFlowRunState, SendNotification
from prefect.events.schemas.automations import AutomationCore, EventTrigger, Posture
from prefect.exceptions import ObjectNotFound, PrefectHTTPStatusError
from prefect.settings import get_current_settings
from prefect.types import SecretDict
from prefect.variables import Variable

from distillery.errors import DistilleryError
from distillery.processes import environment_without_secrets
from distillery.settings import load_environment
from tasks.environment import refuse_foreign_settings
from tasks.results import BLOCK, save_block

PROJECT = Path(__file__).resolve().parent.parent

VARIABLES = (
    "AZUREML_RESOURCE_GROUP",
    "AZUREML_SUBSCRIPTION_ID",
    "AZUREML_WS_NAME",
    "AZURE_CLIENT_ID",
    "AZURE_STORAGE_ACCOUNT_NAME",
    "AZURE_TENANT_ID",
    "CHEAP_MODEL_NAME",
    "DISTILLERY_STORE",
    "JUDGE_MODEL_NAME",
    "TEACHER_MODEL_NAME",
)
"""Settings that all workers share and that are not secret."""
SECRETS = (
    "AZURE_CLIENT_SECRET",
    "AZURE_STORAGE_ACCOUNT_KEY",
    "AZURE_STORAGE_CONNECTION_STRING",
    "AZURE_STORAGE_SAS_TOKEN",
    "CHEAP_MODEL_ENDPOINT",
    "CHEAP_MODEL_KEY",
    "DISTILLERY_LABELS",
    "DISTILLERY_REGISTRY",
    "DISTILLERY_TRACKING",
    "HF_TOKEN",
    "JUDGE_MODEL_ENDPOINT",
    "JUDGE_MODEL_KEY",
    "TEACHER_MODEL_ENDPOINT",
    "TEACHER_MODEL_KEY",
)
"""Secrets that all workers share; the URL of a database or of MLflow may hold a password."""
TEACHER_BLOCK, CHEAP_BLOCK, JUDGE_BLOCK = "teacher-model", "cheap-model", "judge-model"
ENDPOINTS = {
    TEACHER_BLOCK: {"TEACHER_MODEL_ENDPOINT": "endpoint", "TEACHER_MODEL_KEY": "key"},
    CHEAP_BLOCK: {"CHEAP_MODEL_ENDPOINT": "endpoint", "CHEAP_MODEL_KEY": "key"},
    JUDGE_BLOCK: {"JUDGE_MODEL_ENDPOINT": "endpoint", "JUDGE_MODEL_KEY": "key"},
}
"""The secrets that one block each holds together, under these names: whoever could change the
endpoint alone would be sent the key."""
NOT_FOR_TRAINING = frozenset(
    {
        "CHEAP_MODEL_ENDPOINT",
        "CHEAP_MODEL_KEY",
        "CHEAP_MODEL_NAME",
        "DISTILLERY_REGISTRY",
        "DISTILLERY_SIGNING_KEY",
        "JUDGE_MODEL_ENDPOINT",
        "JUDGE_MODEL_KEY",
        "JUDGE_MODEL_NAME",
        "TEACHER_MODEL_ENDPOINT",
        "TEACHER_MODEL_KEY",
        "TEACHER_MODEL_NAME",
    }
)
"""What runs of the GPU pool don't get: they train, on labels that are there. They do need the label
database, where the leases are."""
OF_SEVERAL_GPUS = frozenset({"DISTILLERY_FSDP"})
"""What pods of the CPU pool don't get, which have the same Secret as those of the GPU pool: on one
device, a training would refuse it."""
EACH_WORKERS_OWN = (
    "DISTILLERY_CACHE_GB",
    "DISTILLERY_CHECKPOINT_SECONDS",
    "DISTILLERY_DATA_FOLDERS",
    "DISTILLERY_DATA_PROTOCOLS",
    "DISTILLERY_DEVICES",
    "DISTILLERY_FSDP",
    "DISTILLERY_NEEDS_GPU",
    "DISTILLERY_REMOTE_CODE",
    "DISTILLERY_ROW_MB",
    "DISTILLERY_SIGNING_KEY",
    "DISTILLERY_STORE_WAIT",
    "DISTILLERY_TABLE_MB",
    "DISTILLERY_WORKER_WAIT",
    "DISTILLERY_VERIFY_KEY",
)
"""Settings that a run takes from its worker, such as which models may run their own code, and which
signatures count."""
OWN_LOGIN = ("PREFECT_API_AUTH_STRING", "PREFECT_API_KEY")
"""How a run logs in to Prefect's API."""
PROXIES = ("ALL_PROXY", "HTTPS_PROXY", "HTTP_PROXY", "NO_PROXY")
OF_LIBRARIES = (
    *PROXIES,
    "AZUREML_WORKSPACE_NAME",
    "AZURE_AUTHORITY_HOST",
    "AZURE_CLIENT_CERTIFICATE_PATH",
    "HF_ENDPOINT",
    "MLFLOW_TRACKING_PASSWORD",
    "MLFLOW_TRACKING_TOKEN",
    "MLFLOW_TRACKING_USERNAME",
    "REQUESTS_CA_BUNDLE",
    "SSL_CERT_FILE",
)
"""What the libraries that reach the network read."""

HEARTBEAT = 30
"""Seconds between two heartbeats of a run, the least that Prefect allows."""
SILENT_AFTER = 60
"""Seconds without a heartbeat after which a run is suspected to be dead."""
DEAD_AFTER = 60
"""Seconds that a suspected run has left to send one: twice what it needs to reach a server that is
back."""
SILENT = "distillery.flow-run.silent"
EVENTS_BLOCK = "distillery-events"


def set_up(workers: str, gpus: int, devices: int) -> None:
    """Bring the server to the state that the module describes.

    `workers` is the pools' type; `gpus` is how many trainings may run at once, and `devices` on how
    many GPUs each of them. Raises httpx's and Prefect's errors."""
    with get_client(sync_client=True) as client:
        environment = save_settings(workers)
        for pool, limit in (("cpu-pool", None), ("gpu-pool", gpus)):
            template = base_job_template(workers, pool, environment, devices)
            save_pool(client, pool, workers, template, limit)
        save_block()
        for automation in automations(save_events_block()):
            save_automation(client, automation)
        delete_block(client, "webhook", EVENTS_BLOCK)
        # Endpoint and key were apart, the endpoint in a variable.
        delete_block(client, "secret", "teacher-model-key")
        if Variable.get("teacher_model_endpoint") is not None:
            Variable.unset("teacher_model_endpoint")
            print("variable teacher_model_endpoint: deleted")
    deploy()


def save_settings(workers: str) -> dict[str, str | None]:
    """Save what is set of VARIABLES and SECRETS on the server.

    Return the environment of each run, which refers to them."""
    environment: dict[str, str | None] = {
        "PREFECT_FLOWS_HEARTBEAT_FREQUENCY": str(HEARTBEAT),
        # What the domain says of an outage or a checkpoint belongs in the run's log.
        "PREFECT_LOGGING_EXTRA_LOGGERS": "distillery",
        "PREFECT_RESULTS_DEFAULT_STORAGE_BLOCK": BLOCK,
    }
    environment |= {name: f"{{{{ ${name} }}}}" for name in EACH_WORKERS_OWN}
    for name in filter(os.environ.get, VARIABLES):
        known = Variable.get(name.lower())
        if known != os.environ[name]:
            Variable.set(name.lower(), os.environ[name], overwrite=True)
        tell("variable", name.lower(), known, known == os.environ[name])
        environment[name] = f"{{{{ prefect.variables.{name.lower()} }}}}"
    if workers == "kubernetes":
        # Many can read a job's manifest in a cluster: all secrets come from a Secret of Kubernetes,
        # and a worker's own settings too. An empty one here would hide that of the Secret.
        for name in EACH_WORKERS_OWN:
            del environment[name]
        return environment | dict.fromkeys(OWN_LOGIN)
    together: set[str] = set()
    for block, names in ENDPOINTS.items():
        held = {name: key for name, key in names.items() if os.environ.get(name)}
        if held:
            save(Secret(value={key: os.environ[name] for name, key in held.items()}), block)
        for name, key in held.items():
            environment[name] = f"{{{{ prefect.blocks.secret.{block}.{key} }}}}"
        together |= held.keys()
    for name in filter(os.environ.get, SECRETS):
        if name in together:
            continue
        slug = name.lower().replace("_", "-")
        save(Secret(value=os.environ[name]), slug)
        environment[name] = f"{{{{ prefect.blocks.secret.{slug} }}}}"
    return environment


def base_job_template(
    workers: str, pool: str, environment: dict[str, str | None], devices: int = 1
) -> dict[str, Any]:
    """Return the pool's job configuration from pools.yaml with the runs' environment, in the GPU
    pool with `devices` GPUs for each run.

    It has no variable that a run may change."""
    pools = yaml.safe_load((PROJECT / "deployments" / "pools.yaml").read_text())
    configuration = pools[workers][pool]
    if workers == "kubernetes":
        (container,) = configuration["job_manifest"]["spec"]["template"]["spec"]["containers"]
        container["env"] = secrets_of_pod(pool)
    if pool == "gpu-pool":
        environment = {
            name: value for name, value in environment.items() if name not in NOT_FOR_TRAINING
        }
    if pool == "gpu-pool" and workers != "process":
        # These templates ask for GPUs. A worker of processes says for itself whether it has some.
        environment |= {"DISTILLERY_NEEDS_GPU": "true", "DISTILLERY_DEVICES": str(devices)}
        ask_for_gpus(configuration, devices)
    # Prefect takes references to variables and blocks only in a variable's default.
    env = {"type": "object", "default": environment, "const": environment}
    return {
        "job_configuration": configuration | {"env": "{{ env }}"},
        "variables": {"type": "object", "properties": {"env": env}, "additionalProperties": False},
    }


def ask_for_gpus(configuration: dict[str, Any], devices: int) -> None:
    """Have the job of the Docker or Kubernetes template get so many GPUs, and the memory of as many
    processes that load the model."""
    if "job_manifest" in configuration:
        (container,) = configuration["job_manifest"]["spec"]["template"]["spec"]["containers"]
        resources = container["resources"]
        gibibytes = int(resources["requests"]["memory"].removesuffix("Gi"))
        resources["requests"]["memory"] = f"{gibibytes * devices}Gi"
        resources["limits"]["nvidia.com/gpu"] = str(devices)
    else:
        (request,) = configuration["container_create_kwargs"]["device_requests"]
        request["count"] = devices


def secrets_of_pod(pool: str) -> list[dict[str, Any]]:
    """Return the variables that a pod of the pool takes from the Secret `distillery`, where it
    has them."""
    names = [*OWN_LOGIN, *OF_LIBRARIES, *VARIABLES, *SECRETS, *EACH_WORKERS_OWN]
    withheld = NOT_FOR_TRAINING if pool == "gpu-pool" else OF_SEVERAL_GPUS
    return [
        {
            "name": name,
            "valueFrom": {"secretKeyRef": {"name": "distillery", "key": name, "optional": True}},
        }
        for name in names
        if name not in withheld
    ]


def save_pool(
    client: SyncPrefectClient, name: str, workers: str, template: dict[str, Any], limit: int | None
) -> None:
    try:
        known = client.read_work_pool(name)
    except ObjectNotFound:
        wanted = WorkPoolCreate(
            name=name, type=workers, base_job_template=template, concurrency_limit=limit
        )
        client.create_work_pool(wanted)
        tell("work pool", name, None, False)
        return
    if known.type != workers:
        sys.exit(
            f"error: {name} is a pool of {known.type} workers; "
            f"run `prefect work-pool delete {name}` first"
        )
    same = (known.base_job_template, known.concurrency_limit) == (template, limit)
    if not same:
        client.update_work_pool(
            name, WorkPoolUpdate(base_job_template=template, concurrency_limit=limit)
        )
    tell("work pool", name, known, same)


def save_events_block() -> UUID:
    """Save a block by which the server sends an event to itself.

    Blocks of the type Webhook share one pool of connections, and each call closes it at its end: if
    two runs fall silent at the same moment, one call breaks the other, and an event is lost. This
    type opens a connection of its own for each call, and the server repeats a call that breaks."""
    api = get_current_settings().api
    headers = {"Content-Type": "application/json"}
    secrets = {}
    if api.auth_string:
        login = b64encode(api.auth_string.get_secret_value().encode()).decode()
        secrets["login"] = login
        headers["Authorization"] = "Basic {{login}}"
    block = CustomWebhookNotificationBlock(
        name=EVENTS_BLOCK,
        url=f"{api.url}/events",
        headers=headers,
        # A string is sent as it is, and `body` is the text that the automation makes.
        form_data="{{body}}",
        timeout=60,
        secrets=SecretDict(secrets),
    )
    return save(block, EVENTS_BLOCK)


def automations(events_block: UUID) -> list[AutomationCore]:
    """Return the two automations that take a run from its last heartbeat to Crashed.

    A server that comes back after an outage sees at once that no heartbeat came meanwhile, and only
    after that the runs' next ones. So silence alone crashes nothing: it makes an event. The time
    that decides begins with that event, when the server is up and hears the run.

    The event does not change the run's state: the server accepts a change to Running from a run
    that has just failed or been cancelled, and so revives it. It refuses to crash such a run."""
    event = (
        '[{"id": "{{ firing.id }}", "occurred": "{{ firing.triggered }}", "event": "%s",'
        ' "resource": {"prefect.resource.id": "{{ labels.prefect.resource.id }}"}}]'
    )
    return [
        AutomationCore(
            name="distillery: silent run",
            description=f"Suspects a run that sends no heartbeat for {SILENT_AFTER} s to be dead.",
            # Only runs of our deployments, which have the tag, have a heartbeat as often as this.
            trigger=silence(
                {"prefect.flow-run.Running", "prefect.flow-run.heartbeat"},
                SILENT_AFTER,
                match_related={"prefect.resource.id": "prefect.tag.distillery"},
            ),
            actions=[SendNotification(block_document_id=events_block, body=event % SILENT)],
        ),
        AutomationCore(
            name="distillery: dead run",
            description=f"Crashes a suspect that sends no heartbeat for another {DEAD_AFTER} s.",
            trigger=silence({SILENT}, DEAD_AFTER),
            actions=[
                ChangeFlowRunState(
                    state=StateType.CRASHED,
                    message=f"No sign of life for {SILENT_AFTER + DEAD_AFTER} s: the worker or its "
                    "machine is gone, or cut off. Check the worker, then start the run again: what "
                    "was finished comes from the cache, and training goes on from its last "
                    "checkpoint.",
                )
            ],
        ),
    ]


def silence(after: set[str], seconds: int, **more: Any) -> EventTrigger:
    """Return a trigger that fires for each flow run that is silent for `seconds`.

    Silent is neither a heartbeat nor a change of state since the newest of the events `after`."""
    return EventTrigger(
        match={"prefect.resource.id": "prefect.flow-run.*"},
        after=after,
        # An event that is in both sets restarts the time.
        expect={"prefect.flow-run.*", *after},
        for_each={"prefect.resource.id"},
        posture=Posture.Proactive,
        threshold=1,
        within=timedelta(seconds=seconds),
        **more,
    )


def save_automation(client: SyncPrefectClient, wanted: AutomationCore) -> None:
    known = client.read_automations_by_name(wanted.name)
    same = bool(known) and AutomationCore.model_validate(known[0].model_dump()) == wanted
    if not known:
        client.create_automation(wanted)
    elif not same:
        client.update_automation(known[0].id, wanted)
    tell("automation", wanted.name, known, same)


def save(block: Block, name: str) -> UUID:
    known: Any
    try:
        known = type(block).load(name)
    except ValueError:
        known = None
    same = known is not None and dict(known) == dict(block)
    tell(f"{block.get_block_type_slug()} block", name, known, same)
    identity: Any = known._block_document_id if same else block.save(name, overwrite=True)
    return UUID(str(identity))


def delete_block(client: SyncPrefectClient, block_type: str, name: str) -> None:
    """Delete a block that an earlier version saved, if it is there."""
    try:
        known = client.read_block_document_by_name(name, block_type)
    except ObjectNotFound:
        return
    client.delete_block_document(known.id)
    print(f"{block_type} block {name}: deleted")


def deploy() -> None:
    command = [sys.executable, "-m", "prefect", "--no-prompt", "deploy", "--all"]
    proxies = [*PROXIES, *map(str.lower, PROXIES)]
    environment = environment_without_secrets("PREFECT_API_URL", *OWN_LOGIN, *proxies)
    done = subprocess.run(  # noqa: S603 - our own interpreter
        command, cwd=PROJECT, env=environment, capture_output=True, text=True
    )
    if done.returncode:
        sys.exit(f"error: prefect deploy --all failed\n{done.stdout}{done.stderr}")
    print("deployments of prefect.yaml: deployed")


def tell(kind: str, name: str, known: object, same: bool) -> None:
    """Print what was done to an object: it was `known` before or not, and the `same` or not."""
    done = "created"
    if same:
        done = "unchanged"
    elif known:
        done = "updated"
    print(f"{kind} {name}: {done}")


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m deployments.setup", description="Sets up a Prefect server."
    )
    parser.add_argument(
        "workers", nargs="?", default="process", choices=("process", "docker", "kubernetes")
    )
    parser.add_argument(
        "--gpus", type=int, default=1, help="how many trainings may run at once on gpu-pool"
    )
    parser.add_argument(
        "--devices",
        type=int,
        default=1,
        help="how many GPUs each training gets from the template of docker or kubernetes; with "
        "process, set DISTILLERY_DEVICES where the worker starts",
    )
    options = parser.parse_args()
    if options.devices < 1:
        parser.error("--devices: at least 1")
    if options.devices > 1 and options.workers == "process":
        parser.error("--devices: with process, set DISTILLERY_DEVICES where the worker starts")
    refuse_foreign_settings(Path.cwd())
    try:
        load_environment()
    except DistilleryError as error:
        sys.exit(f"error: {error}")
    url = get_current_settings().api.url
    if not url:
        sys.exit(
            "error: PREFECT_API_URL: not set; set it to the Prefect server, such as "
            "http://127.0.0.1:4200/api"
        )
    try:
        set_up(options.workers, options.gpus, options.devices)
    except PrefectHTTPStatusError as error:
        hint = ""
        if error.response.status_code == 401:
            hint = (
                "; is PREFECT_API_AUTH_STRING the server's? That of `make up` is in "
                "DISTILLERY_HOME/run/password"
            )
        sys.exit(
            f"error: {url} refuses: {error.response.status_code} {error.response.text[:300]}{hint}"
        )
    except httpx.TransportError as error:
        sys.exit(f"error: PREFECT_API_URL: no Prefect server answers at {url}: {error}")


if __name__ == "__main__":
    main()
