"""Train one model: the flow that a GPU pool runs.

Without a server it is an ordinary subflow of distill.py and prepare_teacher.py. On a server these
two send it to the deployment train-student/gpu, and read its record from the artifact store.
"""

import re
import time
from contextlib import AbstractContextManager, nullcontext
from typing import Any
from uuid import uuid4

from prefect import flow, get_client, get_run_logger
from prefect.client.orchestration import SyncPrefectClient
from prefect.client.schemas.objects import FlowRun, State, WorkerStatus
from prefect.deployments import run_deployment
from prefect.exceptions import ObjectNotFound, PrefectHTTPStatusError
from prefect.settings import PREFECT_FLOWS_HEARTBEAT_FREQUENCY, temporary_settings
from prefect.states import Cancelled
from pydantic_core import to_jsonable_python

from distillery.errors import TrainingError, TrainingUnavailable
from distillery.recipe import BaseModelRecipe, HealingRecipe, Layers, PromptRecipe, TrainingRecipe
from distillery.records import Rows, StudentCheckpoint, TeacherLabels
from distillery.settings import LocalSettings
from distillery.storage.artifacts import ArtifactStore
from tasks.parent import ParentEnded, parent_watched
from tasks.stage import RESULT, begin, is_cached, own_tags, produced_by
from tasks.student import train

POLL_S = 0.5

LOOK_S = 5.0
"""Seconds between two looks for the pool's workers."""

WARN_S = 60.0

HAND_OFF = re.compile("train-[0-9a-f]{32}")
"""The names of records that a training hands to the run that waits for it."""


@flow(name="train-student", description="Fine-tunes a model on labelled rows.", **RESULT)
def train_student(
    base: BaseModelRecipe,
    training: TrainingRecipe,
    prompt: PromptRecipe,
    rows: Rows,
    labels: TeacherLabels,
    validation: Rows | None = None,
    start: StudentCheckpoint | None = None,
    layers: Layers | None = None,
    healing: tuple[HealingRecipe, ...] = (),
    gold: Rows | None = None,
    refresh: bool = False,
    hand_off: str | None = None,
) -> StudentCheckpoint | State:
    """Train `base`, or `start`, on the labelled rows.

    Args:
        base: The base model.
        training: How it is trained.
        prompt: The chat prompt.
        rows: The rows to train on.
        labels: Their labels.
        validation: Rows with gold answers, for the validation accuracy.
        start: A checkpoint to start from instead of the base model.
        layers: The decoder layers to keep, or how to choose them; by default all.
        healing: Steps of cutting and training before.
        gold: Rows to train on as well, with their own answers.
        refresh: Train again although nothing has changed.
        hand_off: The name under which the caller finds the record in the artifact store.
    """
    begin()
    if hand_off and not HAND_OFF.fullmatch(hand_off):
        raise TrainingError(f"hand_off: {hand_off!r}: leave it out; the run that waits sets it")
    again = train.with_options(refresh_cache=True) if refresh else train
    try:
        with parent_watched():
            checkpoint = again(
                base, training, prompt, rows, labels, validation, start, layers, healing, gold
            )
    except ParentEnded as ended:
        return Cancelled(message=str(ended))
    if hand_off:
        ArtifactStore().write_record(hand_off, checkpoint.model_dump_json())
    return checkpoint


def trained(
    deployment: str | None, what: str, refresh: bool, **parameters: Any
) -> StudentCheckpoint:
    """Run train_student in this process, or on the work pool of `deployment`.

    A child that fails fails its parent, and one whose parent is gone ends (tasks/parent.py)."""
    name = f"{produced_by()}, {what}"
    cached = not refresh and is_cached(train, **parameters)
    if deployment is None or cached:
        # Only work needs a worker of its own: a cached record is read here. Without a heartbeat,
        # since ending one takes Prefect up to a second.
        beat: AbstractContextManager[Any] = nullcontext()
        if cached:
            beat = temporary_settings({PREFECT_FLOWS_HEARTBEAT_FREQUENCY: None})
        with own_tags(), beat:
            result: StudentCheckpoint = train_student.with_options(
                # A text would be a template, in which braces mean something.
                flow_run_name=lambda: name
            )(refresh=refresh, **parameters)
        return result
    sent: dict[str, Any] = to_jsonable_python(parameters)
    sent["refresh"] = refresh
    sent["hand_off"] = f"train-{uuid4().hex}"
    try:
        started: Any = run_deployment(deployment, parameters=sent, flow_run_name=name, timeout=0)
    except ObjectNotFound as error:
        raise no_deployment(deployment) from error
    state = ended(started, deployment)
    if not state.is_completed():
        raise failure_of(state, f"{deployment}: the run '{name}'")
    return StudentCheckpoint.model_validate_json(ArtifactStore().read_record(sent["hand_off"]))


def ended(run: FlowRun, deployment: str) -> State:
    """Return the state in which a run of `deployment` ends.

    While nobody takes it from its work pool, the log says so after WARN_S. After
    DISTILLERY_WORKER_WAIT it is cancelled, and TrainingUnavailable is raised. A run that waits for
    a worker that is busy waits on."""
    limit_s = LocalSettings().worker_wait
    looked_at, warned = -LOOK_S, False
    alone_since: float | None = None
    # A run forgets a pool that is deleted.
    pool, queue = run.work_pool_name, run.work_queue_name
    with get_client(sync_client=True) as client:
        while True:
            run = client.read_flow_run(run.id)
            if run.state and run.state.is_final():
                return run.state
            now = time.monotonic()
            if run.state and not run.state.is_scheduled():
                alone_since = None
            elif now - looked_at >= LOOK_S:
                looked_at = now
                if has_worker(client, pool, queue):
                    alone_since, warned = None, False
                elif alone_since is None:
                    alone_since = now
            if alone_since is not None:
                trouble = (
                    f"training_deployment {deployment}: the run '{run.name}' waits, and its work "
                    f"pool {pool} is gone, is paused, as a whole or in its queue {queue}, or has "
                    f"no worker; start one with `prefect worker start --pool {pool}`"
                )
                if now - alone_since >= limit_s:
                    client.set_flow_run_state(run.id, Cancelled(message="no worker took it"))
                    raise TrainingUnavailable(
                        f"{trouble}, or raise DISTILLERY_WORKER_WAIT ({limit_s:g} s)"
                    )
                if now - alone_since >= WARN_S and not warned:
                    warned = True
                    get_run_logger().warning("%s; it ends after %g s", trouble, limit_s)
            time.sleep(POLL_S)


def has_worker(client: SyncPrefectClient, pool: str | None, queue: str | None) -> bool:
    """Return whether someone takes the runs of a work pool's queue: a worker whose heartbeat is
    recent, or for a run without a pool the process that serves its deployment. Nobody does where
    pool or queue are paused or not there any more."""
    if pool is None:
        return True
    try:
        found = client.read_work_pool(pool)
        if found.is_paused or (queue and client.read_work_queue_by_name(queue, pool).is_paused):
            return False
        if found.is_push_pool or found.is_managed_pool:
            return True
        workers = client.read_workers_for_work_pool(pool)
    except ObjectNotFound:
        return False
    except PrefectHTTPStatusError as error:
        # Of workers, Prefect's client does not raise ObjectNotFound: the pool has gone since.
        if error.response.status_code == 404:
            return False
        raise
    return any(worker.status == WorkerStatus.ONLINE for worker in workers)


def failure_of(state: State, run: str) -> TrainingError:
    """Return the error of a training that `run` names and that ended in `state`.

    It is a TrainingError if the training itself refused its settings or diverged, which Prefect
    tells in the state's message, and TrainingUnavailable for anything else."""
    message = f"{run} ended as {state.name}: {state.message}"
    if state.is_failed() and f" {TrainingError.__name__}: " in message:
        return TrainingError(message)
    return TrainingUnavailable(message)


def check_deployment(deployment: str | None) -> None:
    """Raise TrainingUnavailable if there is no such deployment, before anything is paid for."""
    if deployment is None:
        return
    with get_client(sync_client=True) as client:
        try:
            client.read_deployment_by_name(deployment)
        except ObjectNotFound as error:
            raise no_deployment(deployment) from error


def no_deployment(deployment: str) -> TrainingUnavailable:
    """Return the error of a deployment that is not there."""
    return TrainingUnavailable(
        f"training_deployment: no deployment {deployment} here; `prefect deploy --all`"
    )
