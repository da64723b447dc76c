"""Trainings on another machine: what says something of their settings, and what does not; and a
search that ends on the latter."""

import asyncio
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from contextvars import copy_context
from types import SimpleNamespace
from typing import Any, cast

import httpx
import pytest
from prefect import flow, get_client
from prefect.client.orchestration import SyncPrefectClient
from prefect.client.schemas.actions import WorkPoolCreate
from prefect.client.schemas.filters import FlowRunFilter, FlowRunFilterDeploymentId
from prefect.client.schemas.objects import FlowRun, State
from prefect.deployments import run_deployment
from prefect.exceptions import ObjectNotFound, PrefectHTTPStatusError
from prefect.states import Cancelled, Completed, Crashed, Failed, exception_to_failed_state

import flows.search as module
import flows.train_student as training
from distillery.errors import StoreUnavailable, TrainingError, TrainingUnavailable
from distillery.recipe import Recipe, SearchRecipe
from flows.train_student import check_deployment, ended, failure_of


def failed_by(error: Exception) -> State:
    """The state as Prefect itself makes it of a flow that raises `error`."""
    return asyncio.run(
        exception_to_failed_state(error, message="Flow run encountered an exception:")
    )


def test_a_training_that_refuses_its_settings_is_told_from_a_machine_that_died() -> None:
    diverged = failure_of(failed_by(TrainingError("the loss is nan at step 3")), "gpu: the run 'x'")
    assert type(diverged) is TrainingError
    assert str(diverged) == (
        "gpu: the run 'x' ended as Failed: Flow run encountered an exception: "
        "TrainingError: the loss is nan at step 3"
    )


@pytest.mark.parametrize(
    "state",
    [
        Crashed(message="Flow run infrastructure exited with non-zero status code 137."),
        Cancelled(message="by a person"),
        Failed(message="Worker failed to submit flow run"),
        failed_by(StoreUnavailable("the store does not answer")),
        failed_by(TrainingUnavailable("base.model: can't get it")),
        failed_by(RuntimeError("CUDA error")),
    ],
)
def test_all_else_says_nothing_of_the_settings(state: State) -> None:
    assert isinstance(failure_of(state, "gpu: the run 'x'"), TrainingUnavailable)


@pytest.mark.slow
def test_a_deployment_that_is_not_there_is_one_line(prefect_api: None) -> None:
    with pytest.raises(TrainingUnavailable, match="no deployment train-student/gone here; `pref"):
        check_deployment("train-student/gone")


@flow
def waits(deployment: str) -> None:
    run = run_deployment(deployment, timeout=0)
    assert isinstance(run, FlowRun)
    ended(run, deployment)


def heartbeat(client: SyncPrefectClient, pool: str) -> None:
    client.request(
        "POST",
        "/work_pools/{work_pool_name}/workers/heartbeat",
        path_params={"work_pool_name": pool},
        json={"name": "w", "heartbeat_interval_seconds": 30},
    )


def waiting_run(pool: str) -> FlowRun:
    """Start a run on a new pool and wait for it, in a flow; return the run."""
    with get_client(sync_client=True) as client:
        client.create_work_pool(WorkPoolCreate(name=pool, type="process"))
        deployment = client.create_deployment(
            flow_id=client.create_flow(waits), name=pool, work_pool_name=pool
        )
        try:
            waits(f"waits/{pool}")
        finally:
            runs = client.read_flow_runs(
                flow_run_filter=FlowRunFilter(
                    deployment_id=FlowRunFilterDeploymentId(any_=[deployment])
                )
            )
    return runs[0]


@pytest.mark.slow
def test_a_pool_without_a_worker_is_told_and_then_ends_the_wait(
    prefect_api: None, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(training, "WARN_S", 1.0)
    monkeypatch.setattr(training, "LOOK_S", 0.1)
    monkeypatch.setenv("DISTILLERY_WORKER_WAIT", "3")
    with pytest.raises(TrainingUnavailable) as caught:
        waiting_run("empty")
    told = (
        "training_deployment waits/empty: the run '{name}' waits, and its work pool empty is gone, "
        "is paused, as a whole or in its queue default, or has no worker; start one with `prefect "
        "worker start --pool empty`"
    )
    with get_client(sync_client=True) as client:
        (run,) = [run for run in client.read_flow_runs() if run.work_pool_name == "empty"]
    line = told.format(name=run.name)
    assert str(caught.value) == f"{line}, or raise DISTILLERY_WORKER_WAIT (3 s)"
    warnings = [entry.getMessage() for entry in caplog.records if entry.levelname == "WARNING"]
    assert warnings.count(f"{line}; it ends after 3 s") == 1
    assert run.state
    assert run.state.is_cancelled()


@pytest.mark.slow
def test_a_run_waits_for_a_worker_that_is_busy(
    prefect_api: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(training, "LOOK_S", 0.1)
    monkeypatch.setenv("DISTILLERY_WORKER_WAIT", "4")
    waited = []

    def beat() -> None:
        """A worker that is alive and takes nothing until the run has waited for longer than for one
        that is gone; then the run is set to an end."""
        seen_at = None
        with get_client(sync_client=True) as client:
            while seen_at is None or time.monotonic() < seen_at + 6:
                with suppress(ObjectNotFound, PrefectHTTPStatusError):
                    heartbeat(client, "busy")
                runs = [run for run in client.read_flow_runs() if run.work_pool_name == "busy"]
                if runs and seen_at is None:
                    seen_at = time.monotonic()
                time.sleep(0.2)
            client.set_flow_run_state(runs[0].id, Completed())
            waited.append(time.monotonic() - seen_at)

    thread = threading.Thread(target=copy_context().run, args=(beat,), daemon=True)
    thread.start()
    run = waiting_run("busy")
    thread.join()
    assert run.state
    assert run.state.is_completed()
    assert waited[0] > 6


@pytest.mark.slow
@pytest.mark.parametrize("trouble", ["paused", "deleted"])
def test_a_queue_that_is_paused_and_a_pool_that_is_gone_end_the_wait(
    prefect_api: None, monkeypatch: pytest.MonkeyPatch, trouble: str
) -> None:
    monkeypatch.setattr(training, "LOOK_S", 0.1)
    monkeypatch.setenv("DISTILLERY_WORKER_WAIT", "2")
    stopped = threading.Event()

    def interfere() -> None:
        """A worker that is alive; then trouble, once the run is there."""
        with get_client(sync_client=True) as client:
            while not stopped.wait(0.2):
                runs = [run for run in client.read_flow_runs() if run.work_pool_name == trouble]
                if runs:
                    heartbeat(client, trouble)
                if runs and trouble == "paused":
                    assert runs[0].work_queue_id
                    client.update_work_queue(runs[0].work_queue_id, is_paused=True)
                elif runs:
                    time.sleep(1)
                    client.delete_work_pool(trouble)

    thread = threading.Thread(target=copy_context().run, args=(interfere,))
    thread.start()
    try:
        with pytest.raises(
            TrainingUnavailable, match=f"its work pool {trouble} is gone, is paused"
        ):
            waiting_run(trouble)
    finally:
        stopped.set()
        thread.join()


@pytest.fixture
def steps(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """What a search has called, of the calls that stand in for its stages here."""
    called: list[str] = []

    def stand_in(name: str, result: Any = None) -> Callable[..., Any]:
        def call(*_arguments: Any) -> Any:
            called.append(name)
            return result

        return call

    data = SimpleNamespace(rows=lambda role: role)
    monkeypatch.setattr(module, "check_deployment", stand_in("check deployment"))
    monkeypatch.setattr(module, "base_folder", stand_in("base folder"))
    monkeypatch.setattr(module, "prepared", stand_in("prepared", data))
    monkeypatch.setattr(module, "labelled_rows", stand_in("labels", SimpleNamespace(data=data)))
    return called


def run_search(deployment: str | None) -> None:
    recipe = Recipe.model_validate({"preset": "demo"})
    space = SearchRecipe(learning_rate=(1e-5, 1e-3), trials=3)
    # In a context of its own, because a flow changes the tags of all that follows.
    copy_context().run(module.search.fn, recipe, space, deployment)


def failing(error: Exception, trials: list[int]) -> Callable[..., Any]:
    def train(*_arguments: Any) -> Any:
        trials.append(1)
        raise error

    return train


def test_a_search_ends_on_a_machine_that_died(
    steps: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    trials: list[int] = []
    monkeypatch.setattr(
        module, "trained_student", failing(TrainingUnavailable("the worker is gone"), trials)
    )
    with pytest.raises(TrainingUnavailable, match="the worker is gone"):
        run_search("train-student/gpu")
    assert len(trials) == 1
    assert steps == ["check deployment", "base folder", "prepared", "labels"]


@pytest.mark.parametrize("missing", ["check_deployment", "base_folder"])
def test_what_is_not_there_ends_a_search_before_labels_are_paid_for(
    steps: list[str], monkeypatch: pytest.MonkeyPatch, missing: str
) -> None:
    monkeypatch.setattr(module, missing, failing(TrainingUnavailable("not there"), []))
    with pytest.raises(TrainingUnavailable, match="not there"):
        run_search("train-student/gone")
    assert "labels" not in steps


def test_a_pool_that_goes_while_its_workers_are_asked_for_has_none() -> None:
    class Client:
        def read_work_pool(self, _name: str) -> Any:
            return SimpleNamespace(is_paused=False, is_push_pool=False, is_managed_pool=False)

        def read_workers_for_work_pool(self, _name: str) -> Any:
            request = httpx.Request("POST", "http://127.0.0.1/api/work_pools/gone/workers/filter")
            response = httpx.Response(404, request=request)
            raise PrefectHTTPStatusError("Not Found", request=request, response=response)

    assert not training.has_worker(cast(Any, Client()), "gone", None)
