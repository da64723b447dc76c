"""What dies in the night: two workers that share Azurite, PostgreSQL and the Prefect API alone, and
real kill -9, SIGTERM and stopped services. Nothing is lost, nothing is repeated that was finished.

The tests that take `long` follow each other: each ends its run in another way, and the next run
trains on from there.
"""

import base64
import time
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import datetime
from io import BytesIO
from pathlib import Path
from signal import SIGKILL, SIGTERM, Signals
from typing import Any

import pytest
import torch
from azure.storage.blob import ContainerClient
from azurite_server import ACCOUNT_KEY, Azurite
from chat_endpoint import Call, ChatEndpoint, Reply, good, refused
from postgres_server import Postgres
from prefect_api import wait_for
from tiny_recipe import ROWS, endpoint_recipe, recipe
from workshop import ENDED, POOLS, Run, Workshop

from distillery.storage.manifest import FILES, MANIFEST
from distillery.training.checkpoint import STATE_FILE

pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]

PLANTED = {
    "TEACHER_MODEL_KEY": "planted-teacher-key-4Jx9Qm2Lw7",
    "HF_TOKEN": "planted-hub-token-8Vb3Nc6Zt1",
    "DISTILLERY_LABELS": "planted-labels-password-5Ks0Dh4Yp9",
    "PREFECT_API_DATABASE_CONNECTION_URL": "planted-database-password-2Gf7Wr1Um6",
    "PREFECT_API_AUTH_STRING": "planted-api-password-6Te8Xo3Ia5",
    "AZURE_STORAGE_CONNECTION_STRING": ACCOUNT_KEY,
}
"""The secret in each setting of the server and the workers."""
CONTAINER = "distillery"
AWAY = 20
"""Seconds that the server, the store or the database is away: they are tried again several times
meanwhile."""
EPOCH = -(-ROWS["train"] // 8)
"""Steps, in batches of 8."""
EPOCHS = 16
ASKED = ROWS["train"] + ROWS["test"]
"""Rows that an endpoint answers: a run scores it on the test rows too."""


def recovered(fault: str, since: float) -> None:
    print(f"\n{fault}: recovered in {time.monotonic() - since:.1f} s")


@dataclass(frozen=True)
class Cloud:
    """Two workers and what they reach over the network."""

    workshop: Workshop
    azurite: Azurite
    prefect: Postgres
    labels: Postgres
    endpoint: ChatEndpoint
    files: dict[str, list[str]]
    tiny: Path

    def recipe(self, name: str, **training: Any) -> dict[str, Any]:
        return endpoint_recipe(self.files, self.tiny, name, **training)

    def answers(self, teacher: str) -> int:
        """Rows in the label store."""
        return int(
            self.labels.ask(f"SELECT count(*) FROM teacher_answers WHERE teacher LIKE '{teacher}'")
        )

    def steps(self) -> int:
        return self.workshop.counts()["step"]

    def checkpoints(self) -> set[str]:
        """The folders of the whole checkpoints in the store; a checkpoint's list of files is
        written last."""
        with self.container() as container:
            names = [blob.name for blob in container.list_blobs("store/work/")]
        return {
            name.removesuffix(f"/{MANIFEST}") for name in names if name.endswith(f"/{MANIFEST}")
        }

    def kept_steps(self) -> int:
        """The steps in the newest whole checkpoint."""
        with self.container() as container:
            name = f"{max(self.checkpoints())}/{FILES}/{STATE_FILE}"
            state = torch.load(BytesIO(container.download_blob(name).readall()), weights_only=True)
        return int(state["step"])

    def container(self) -> ContainerClient:
        return ContainerClient.from_connection_string(self.azurite.connection_string, CONTAINER)

    def until_checkpoint(self, run: Run) -> Run:
        """The run's child, as soon as it has left another checkpoint of the student's training."""
        before = self.checkpoints()
        self.workshop.until(run, "a checkpoint", lambda: self.checkpoints() - before)
        return self.workshop.family(run)["student"]


class LongTraining:
    """The training of one student, through one run after the other."""

    def __init__(self, cloud: Cloud) -> None:
        self.cloud, self.values = cloud, cloud.recipe("long", epochs=EPOCHS)
        self.runs, self.before, self.lost = 0, cloud.steps(), 0
        self.fault, self.at = "", 0.0

    def goes_on(self) -> tuple[Run, Run]:
        """A run and its child, which has gone on training and has just left a checkpoint."""
        before, kept = self.cloud.steps(), self.cloud.kept_steps() if self.runs else 0
        self.lost = self.steps - kept
        run = self.cloud.workshop.start_run(self.values)
        self.cloud.workshop.until(run, "training", lambda: self.cloud.steps() > before)
        if self.runs:
            recovered(self.fault, self.at)
        self.runs += 1
        child = self.cloud.until_checkpoint(run)
        if kept:
            said = f"training goes on from its checkpoint at step {kept}"
            self.cloud.workshop.until(
                run, said, lambda: said in self.cloud.workshop.log(child).splitlines()
            )
        return run, child

    def is_ended_by(self, fault: str) -> None:
        self.fault, self.at = fault, time.monotonic()

    @property
    def steps(self) -> int:
        return self.cloud.steps() - self.before


@pytest.fixture(scope="module")
def cloud(
    tmp_path_factory: pytest.TempPathFactory, files: dict[str, list[str]], tiny: Path
) -> Iterator[Cloud]:
    azurite = Azurite(tmp_path_factory.mktemp("azurite"))
    with azurite, Postgres() as prefect, Postgres() as labels, ChatEndpoint() as endpoint:
        with ContainerClient.from_connection_string(
            azurite.connection_string, CONTAINER
        ) as container:
            container.create_container()
        shared = {
            **azurite.environment,
            "DISTILLERY_STORE": f"abfs://{CONTAINER}/store",
            "DISTILLERY_LABELS": labels.url("postgresql", PLANTED["DISTILLERY_LABELS"]),
            "HF_TOKEN": PLANTED["HF_TOKEN"],
            "TEACHER_MODEL_ENDPOINT": endpoint.url,
            "TEACHER_MODEL_KEY": PLANTED["TEACHER_MODEL_KEY"],
            "TEACHER_MODEL_NAME": "teacher",
        }
        name = "PREFECT_API_DATABASE_CONNECTION_URL"
        server = {name: prefect.url("postgresql+asyncpg", PLANTED[name])}
        workshop = Workshop(
            tmp_path_factory.mktemp("cloud"), shared, server, PLANTED["PREFECT_API_AUTH_STRING"]
        )
        try:
            workshop.start()
            yield Cloud(workshop, azurite, prefect, labels, endpoint, files, tiny)
        finally:
            workshop.close()


@pytest.fixture(autouse=True)
def no_run_left(cloud: Cloud) -> Iterator[None]:
    """The run of a test that has failed takes the next one's place in the pool and the
    deployment."""
    yield
    running = {"state": {"type": {"not_any_": list(ENDED)}}, "deployment_id": {"is_null_": False}}
    demo = {"name": {"any_": ["demo"]}}
    for run in cloud.workshop.ask("/flow_runs/filter", flow_runs=running, deployments=demo):
        cloud.workshop.end(run)


@pytest.fixture(scope="module")
def first(cloud: Cloud) -> Run:
    """The demo-shaped run."""
    return cloud.workshop.distil(recipe(cloud.files, cloud.tiny))


@pytest.fixture(scope="module")
def lost(cloud: Cloud, first: Run) -> dict[str, tuple[Run, float]]:
    """Two runs that a worker took with it, in the midst of labelling, and when (time.time()).
    Nobody reports these."""
    workshop = cloud.workshop
    demo = workshop.deployment("distill/demo")
    kept = (
        "flow_id",
        "entrypoint",
        "parameter_openapi_schema",
        "pull_steps",
        "tags",
        "work_pool_name",
    )
    workshop.ask("/deployments/", name="spare", **{name: demo[name] for name in kept})

    def lose(name: str, deployment: str, by: Signals) -> tuple[Run, float]:
        enough = len(cloud.endpoint.calls) + ROWS["train"] // 2
        with workshop.slower(request=1):
            run = workshop.start_run(cloud.recipe(name), deployment)
            workshop.until(run, "labelling", lambda: len(cloud.endpoint.calls) > enough)
            engine = workshop.engine(run)
            workshop.stop("cpu-pool", by)
            if by == SIGKILL:
                engine.kill()
            wait_for("its end", lambda: not workshop.processes(run), 180)
            ended = time.time()
        workshop.start_worker("cpu-pool")
        return run, ended

    return {
        "twins": lose("twins", "distill/lab", SIGTERM),
        "zombie": lose("zombie", "distill/spare", SIGKILL),
    }


@pytest.fixture(scope="module")
def training(cloud: Cloud, lost: dict[str, tuple[Run, float]]) -> LongTraining:
    return LongTraining(cloud)


@pytest.fixture
def long(training: LongTraining) -> Iterator[LongTraining]:
    with training.cloud.workshop.slower(step=0.5):
        yield training


def test_the_whole_way_on_azure_and_postgresql_and_again_from_the_cache(
    cloud: Cloud, first: Run
) -> None:
    workshop = cloud.workshop
    assert set(workshop.states(first).values()) == {"Completed"}
    assert cloud.answers("local:%") == ROWS["train"]
    for pool in POOLS:
        assert not {"store", "labels.db"} & {
            path.name for path in (workshop.folder / pool / "home").iterdir()
        }
    before = workshop.counts()
    again = workshop.distil(recipe(cloud.files, cloud.tiny))
    assert workshop.states(again) == dict.fromkeys(workshop.states(first), "Cached")
    assert workshop.scoreboard(again) == workshop.scoreboard(first)
    # Only what was under way has progress to show.
    assert workshop.artifacts(again).keys() == {
        key for key, artifact in workshop.artifacts(first).items() if artifact["type"] != "progress"
    }
    assert workshop.counts() == before
    assert cloud.answers("local:%") == ROWS["train"]


def test_a_child_that_is_killed_fails_its_parent(cloud: Cloud, long: LongTraining) -> None:
    parent, child = long.goes_on()
    cloud.workshop.engine(child).kill()
    long.is_ended_by("kill -9 of the child")
    ended = cloud.workshop.ended(parent, 30)
    assert cloud.workshop.run(child)["state_name"] == "Crashed"
    assert ended["state_name"] == "Failed"
    assert (
        f"train-student/gpu: the run '{child['name']}' ended as Crashed"
        in ended["state"]["message"]
    )
    assert "\n" not in ended["state"]["message"]


def test_a_parent_that_is_killed_leaves_no_training_behind(
    cloud: Cloud, long: LongTraining
) -> None:
    parent, child = long.goes_on()
    cloud.workshop.engine(parent).kill()
    long.is_ended_by("kill -9 of the parent")
    wait_for("the end of its training", lambda: not cloud.workshop.processes(child), 30)
    print(
        f"\nkill -9 of the parent: its training has ended {time.monotonic() - long.at:.1f} s later"
    )
    assert cloud.workshop.ended(parent, 30)["state_name"] == "Crashed"
    assert cloud.workshop.ended(child, 10)["state_name"] == "Cancelled"


def test_cancelling_the_parent_stops_its_training(cloud: Cloud, long: LongTraining) -> None:
    parent, child = long.goes_on()
    cloud.workshop.cancel(parent)
    long.is_ended_by("cancelling")
    wait_for(
        "the end of both",
        lambda: not cloud.workshop.processes(parent) + cloud.workshop.processes(child),
        60,
    )
    print(f"\ncancelling: both runs' processes have ended {time.monotonic() - long.at:.1f} s later")
    assert cloud.workshop.ended(parent, 10)["state_name"] == "Cancelled"
    assert cloud.workshop.ended(child, 10)["state_name"] == "Cancelled"


def test_a_training_outlives_its_server_and_then_its_store(
    cloud: Cloud, long: LongTraining
) -> None:
    workshop, azurite = cloud.workshop, cloud.azurite
    parent, child = long.goes_on()
    asked = len(cloud.endpoint.calls)
    with workshop.slower(step=1):
        workshop.stop("server")
        time.sleep(AWAY)
        assert workshop.processes(parent)
        assert workshop.processes(child)
        workshop.start_server()
        started = time.monotonic()
        # The server may have gone before it was told of any progress.
        workshop.until(child, "first progress", lambda: "train" in workshop.artifacts(child))
        shown = workshop.artifacts(child)["train"]
        workshop.until(
            child,
            "progress",
            lambda: workshop.artifacts(child)["train"]["data"] != shown["data"],
        )
        recovered(f"a server away for {AWAY} s", started)
        cloud.until_checkpoint(parent)
        azurite.stop()
        time.sleep(AWAY)
        azurite.start()
        started = time.monotonic()
    assert workshop.ended(child)["state_name"] == "Completed"
    recovered(f"a store away for {AWAY} s", started)
    assert workshop.ended(parent)["state_name"] == "Completed", workshop.log(parent)
    print(f"\n{long.steps} steps in {long.runs} runs for a training of {EPOCHS * EPOCH} steps")
    # What the runs did after their last whole checkpoint was done again, and nothing else.
    assert long.steps == EPOCHS * EPOCH + long.lost
    # All rows were answered before the first fault.
    assert len(cloud.endpoint.calls) == asked
    states = workshop.states(parent)
    assert states.pop("student: train") == "Completed"
    assert {name for name, state in states.items() if state == "Cached"} >= {": prepare dataset"}


@pytest.mark.parametrize(("name", "fault"), [("twins", "SIGTERM"), ("zombie", "kill -9")])
def test_a_run_that_its_worker_took_with_it_is_found_crashed(
    cloud: Cloud, lost: dict[str, tuple[Run, float]], name: str, fault: str
) -> None:
    run, since = lost[name]
    ended = cloud.workshop.ended(run, 180)
    assert ended["state_name"] == "Crashed"
    assert "No sign of life" in ended["state"]["message"]
    found = datetime.fromisoformat(ended["state"]["timestamp"]).timestamp() - since
    print(f"\n{fault} of a worker and its run: found Crashed {found:.0f} s later")
    assert found <= 150


def test_two_runs_of_one_recipe_at_once_do_each_piece_of_work_once(
    cloud: Cloud, lost: dict[str, tuple[Run, float]]
) -> None:
    workshop, values = cloud.workshop, cloud.recipe("twins")
    before, calls, known = cloud.steps(), len(cloud.endpoint.calls), cloud.answers("twins")
    # What the run before them got before its worker was ended is kept.
    assert known > 0
    twins = [
        workshop.start_run(values, deployment) for deployment in ("distill/demo", "distill/lab")
    ]
    ended = [workshop.ended(run) for run in twins]
    assert [run["state_name"] for run in ended] == ["Completed", "Completed"]
    assert cloud.steps() - before == 2 * EPOCH
    assert len(cloud.endpoint.calls) - calls == ASKED - known
    assert cloud.answers("twins") == ASKED
    one, other = (workshop.states(run) for run in twins)
    assert one.keys() == other.keys()
    # These two come to the same for the runs before.
    for stage in one.keys() - {": prepare dataset", ": ask base model"}:
        assert sorted((one[stage], other[stage])) == ["Cached", "Completed"], stage
    assert workshop.scoreboard(twins[0]) == workshop.scoreboard(twins[1])


def test_a_second_run_of_a_deployment_is_cancelled(cloud: Cloud, first: Run) -> None:
    workshop, calls = cloud.workshop, len(cloud.endpoint.calls)
    with workshop.slower(request=1):
        run = workshop.start_run(cloud.recipe("alone"))
        workshop.until(run, "labelling", lambda: len(cloud.endpoint.calls) > calls)
        second = workshop.ended(workshop.start_run(cloud.recipe("second")), 60)
        assert second["state_name"] == "Cancelled"
        assert cloud.answers("second") == 0
        assert workshop.run(run)["state_name"] == "Running"
        workshop.end(run)


def test_labelling_waits_for_its_database(cloud: Cloud, first: Run) -> None:
    workshop, calls = cloud.workshop, len(cloud.endpoint.calls)
    with workshop.slower(request=1):
        run = workshop.start_run(cloud.recipe("patient"))
        half = calls + ROWS["train"] // 2
        workshop.until(run, "half the labels", lambda: len(cloud.endpoint.calls) >= half)
        cloud.labels.stop()
        time.sleep(AWAY)
        cloud.labels.start()
    started = time.monotonic()
    workshop.until(run, "the labels", lambda: cloud.answers("patient") >= ROWS["train"])
    recovered(f"a label database away for {AWAY} s", started)
    workshop.end(run)
    asked = [call.question for call in cloud.endpoint.calls[calls:]]
    assert len(asked) == len(set(asked))


def test_a_store_that_stays_away_fails_the_run_in_one_line(cloud: Cloud, first: Run) -> None:
    workshop, calls = cloud.workshop, len(cloud.endpoint.calls)
    workshop.stop("cpu-pool")
    workshop.start_worker("cpu-pool", DISTILLERY_STORE_WAIT="2", RETRY_SECONDS="1")
    with workshop.slower(request=0.5):
        run = workshop.start_run(cloud.recipe("unlucky"))
        workshop.until(run, "labelling", lambda: len(cloud.endpoint.calls) > calls)
        cloud.azurite.stop()
    stopped = time.monotonic()
    try:
        ended = workshop.ended(run)
    finally:
        cloud.azurite.start()
        workshop.stop("cpu-pool")
        workshop.start_worker("cpu-pool")
    print(f"\na store that stays away: failed {time.monotonic() - stopped:.1f} s later")
    assert ended["state_name"] == "Failed"
    assert (
        "abfs://distillery/store: the store has not answered for 2 s" in ended["state"]["message"]
    )
    assert "\n" not in ended["state"]["message"]
    assert "Traceback" not in workshop.log(run)
    # What was paid for is kept.
    assert cloud.answers("unlucky") == ROWS["train"]


def test_cancelling_while_the_local_teacher_answers_ends_it_too(cloud: Cloud, first: Run) -> None:
    workshop, values = cloud.workshop, recipe(cloud.files, cloud.tiny)
    values["teacher"]["temperature"] = 0.5
    before = workshop.counts()["request"]
    with workshop.slower(request=5):
        run = workshop.start_run(values)
        workshop.until(run, "labelling", lambda: workshop.counts()["request"] > before)
        assert any("distillery.serving" in process.cmdline() for process in workshop.processes(run))
        workshop.cancel(run)
        wait_for("the end of run and teacher", lambda: not workshop.processes(run), 60)
    assert workshop.ended(run, 60)["state_name"] == "Cancelled"


def test_a_run_that_is_killed_leaves_no_training_of_its_teacher_behind(cloud: Cloud) -> None:
    """Its parent, the preparation, died in the same process, and no worker speaks for that."""
    workshop, values, before = cloud.workshop, recipe(cloud.files, cloud.tiny), cloud.steps()
    values["teacher"]["preparation"]["training"]["epochs"] = 100
    with workshop.slower(step=0.5):
        run = workshop.start_run(values)
        wait_for("training", lambda: cloud.steps() > before)
        child = workshop.family(run)["preparation, teacher"]
        workshop.engine(run).kill()
        wait_for("the end of its training", lambda: not workshop.processes(child), 30)
    assert workshop.ended(child, 10)["state_name"] == "Cancelled"


def echo_the_key(call: Call) -> Reply:
    encoded = base64.b64encode(call.key.encode()).decode()
    return refused(401, f"Incorrect API key provided: {call.key}, in base64 {encoded}.")


def test_planted_secrets_are_found_nowhere(cloud: Cloud, first: Run) -> None:
    workshop = cloud.workshop
    cloud.endpoint.script = echo_the_key
    try:
        refused_run = workshop.ended(workshop.start_run(cloud.recipe("refused")))
    finally:
        cloud.endpoint.script = good
    assert cloud.endpoint.calls[-1].key == PLANTED["TEACHER_MODEL_KEY"]
    assert refused_run["state_name"] == "Failed"
    assert "401" in refused_run["state"]["message"]

    texts = {"Prefect's database": cloud.prefect.dump(), "the label database": cloud.labels.dump()}
    texts["artifacts"] = str(workshop.ask("/artifacts/filter", limit=200))
    texts["logs"] = str(workshop.ask("/logs/filter", limit=200))
    places = {name: text.encode() for name, text in texts.items()}
    for folder in (workshop.folder, cloud.azurite.folder):
        places |= {str(path): path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    assert refused_run["id"] in texts["Prefect's database"]
    assert refused_run["id"] in workshop.log_of("cpu-pool").read_text()
    assert len(places) > 100
    found = [
        f"{setting} in {place}"
        for setting, secret in PLANTED.items()
        for encoded in encodings(secret)
        for place, content in places.items()
        if encoded in content
    ]
    assert not found, "\n".join(found)


def encodings(secret: str) -> Iterator[bytes]:
    """The secret itself and what of it stands in base64, whatever stands before and after it."""
    plain = secret.encode()
    yield plain
    for before, mixed in ((0, 0), (1, 2), (2, 3)):
        encoded = base64.b64encode(bytes(before) + plain)
        yield encoded[mixed : (before + len(plain)) * 8 // 6]


def test_a_secret_in_base64_would_be_found() -> None:
    secret = PLANTED["TEACHER_MODEL_KEY"]
    for around in ("", "x", "xy", "xyz"):
        text = base64.b64encode(f"{around}{secret}{around}".encode())
        assert any(encoded in text for encoded in list(encodings(secret))[1:])
